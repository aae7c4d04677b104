"""When a learning curve reaches a level, and how much sooner one model's does than others'."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from erasure.eval.stats.estimate import Estimate
from erasure.eval.stats.resample import jackknife_half_width, t_half_width, tails, wider


class Reached(NamedTuple):
    """log2 of the training step at which curves are at a level: ``(curves,)``, or ``(models, curves)`` of several.

    Attributes:
        at: read between two looks as if the curve rose straight on the scale of log2. Minus infinite where it is there
            before any training, infinite where it is not there at the last look.
        low, high: it lies between them. Before the first look after 0 that is all that is known. Between two other
            looks the straight line may be wrong by the share of their distance by which the curve rises there.
    """

    at: np.ndarray
    low: np.ndarray
    high: np.ndarray


def stacked(models: Sequence[Reached]) -> Reached:
    """The times of several models, ``(models, curves)``."""
    return Reached(*map(np.stack, zip(*models, strict=True)))


def reached(rates: np.ndarray, level: np.ndarray, steps: Sequence[int]) -> Reached:
    """When each curve is at its level for the first time.

    Args:
        rates: ``(curves, looks)``.
        level: ``(curves,)``; one of 0 or less is never reached.
        steps: of training at each look, from 0; two or more.
    """
    there = (rates >= level[:, None]) & (level[:, None] > 0)
    k, row = there.argmax(1), np.arange(len(rates))
    never, at_once, early = ~there.any(1), k == 0, k == 1
    x, before = np.log2(np.maximum(steps, 1)), np.maximum(k - 1, 0)
    start, rise, gap = rates[row, before], rates[row, k] - rates[row, before], x[k] - x[before]
    share = np.divide(level - start, rise, out=np.zeros(len(rates)), where=rise > 0)
    at = x[before] + share * gap
    return Reached(
        np.select([never, at_once], [np.inf, -np.inf], at),
        np.select([never, at_once, early], [x[-1], -np.inf, 0.0], at - share * rise * gap),
        np.select([never, at_once | early], [np.inf, x[1]], at + (1 - share) * rise * gap),
    )


def sooner(
    mine: Reached, others: Reached, *, runs: int, by: str, n: int, clusters: int, last: int
) -> tuple[Estimate, str]:
    """log2(T_c / T), T_c the geometric mean of the others' times, and what is to be said of it ("" if nothing).

    Args:
        mine, others: ``(curves,)`` and ``(models, curves)``. The first curve is the estimate, the next ``runs`` are
            those without one of the runs, the others resamples.
        runs: 0 where there is one run, and none can be left out.
        by: what the resamples draw, in words.
        last: the last step that was looked at.

    At each end the widest of 95 % of the resamples, the jackknife over the runs and the t interval over the others. A
    time that is not seen is known to lie beyond a look; then the value is a bound, too.
    """
    least, most = others.low.mean(0) - mine.high, others.high.mean(0) - mine.low
    with np.errstate(invalid="ignore"):
        value = others.at[:, 0].mean() - mine.at[0]
    note = ""
    if not np.isfinite(value):
        value, note = (least[0], "a lower bound") if np.isfinite(least[0]) else (most[0], "an upper bound")
    if not np.isfinite(value):
        return Estimate.missing(f"neither it nor the control reached the threshold within {last} steps"), ""
    tail, top = tails()
    without, drawn = slice(1, 1 + runs), slice(1 + runs, None)
    limits = np.quantile(least[drawn], tail, method="lower"), np.quantile(most[drawn], top, method="higher")
    if runs:
        below, beyond = (half(jackknife_half_width, bound[without]) for bound in (least, most))
        limits = wider(limits, (least[0] - below, most[0] + beyond))
    if len(others.at) > 1:
        below, beyond = (half(t_half_width, bound[:, 0]) for bound in (others.low, others.high))
        limits = wider(limits, (least[0] - below, most[0] + beyond))
    start, end = (float(limit) if np.isfinite(limit) else None for limit in limits)
    reason = "on one side the interval is open: too many resamples were censored" if None in (start, end) else None
    method = f"bootstrap of {by}, censored at {last} steps"
    return Estimate(float(value), start, end, method, n, clusters, 0, reason), note


def half(width: Callable[[np.ndarray], float], values: np.ndarray) -> float:
    """The half width of an interval over some values; infinite where one of them is not known."""
    return width(values) if np.isfinite(values).all() else np.inf
