"""Comparisons on the same prompts and the same noise: changes, residuals, ratios.

References: Tango 1998, "Equivalence test and confidence interval for the difference in proportions for the
paired-sample design", Statistics in Medicine 17, 891-908.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np
from scipy.optimize import brentq
from scipy.special import ndtri

from erasure.eval.stats.estimate import Estimate, present
from erasure.eval.stats.resample import LEVEL, bootstrap, effective_size, ratio_limits, resampled_by, weights, wider


def paired_score(gained: float, lost: float, n: float, *, level: float = LEVEL) -> tuple[float, float]:
    """Tango's score interval of a difference of paired rates, (gained - lost) / n. Counts may be fractional.

    It depends on the pairs that changed and on ``n`` alone, and has a width even when none changed.

    >>> tuple(round(x, 3) for x in paired_score(0, 0, 60))
    (-0.06, 0.06)
    """
    if n <= 0 or gained < 0 or lost < 0 or gained + lost > n * (1 + 1e-9):
        raise ValueError(f"changes need gained + lost <= n; got {gained} + {lost} of {n}; check what was counted")
    z = float(ndtri(0.5 + level / 2))
    return -_score_limit(lost, gained, n, z), _score_limit(gained, lost, n, z)


def _score_limit(up: float, down: float, n: float, z: float) -> float:
    """The largest difference d that a score test with critical value ``z`` does not reject."""
    value = (up - down) / n
    if value > 1 - 1e-9:
        return 1.0

    def excess(d: float) -> float:
        return (n * (d - value)) ** 2 - z * z * n * score_variance(up, down, n, d)

    return float(brentq(excess, value + 1e-9, 1.0))


def score_variance(up: float, down: float, n: float, d: float) -> float:
    """Variance of one pair's change if the difference P(up) - P(down) were d (0 to 1)."""
    # q: maximum-likelihood estimate of P(down) when P(up) = P(down) + d (Tango's equation 25)
    linear = (2 * n - up + down) * d - (up + down)
    q = (math.sqrt(max(0.0, linear * linear + 8 * n * down * d * (1 - d))) - linear) / (4 * n)
    return 2 * q + d * (1 - d)


def difference(
    before: Sequence[float | None],
    after: Sequence[float | None],
    clusters: Sequence[Hashable],
    *,
    copies: int = 1,
    level: float = LEVEL,
    seed: int = 0,
) -> Estimate:
    """The change in a rate, after minus before, over pairs of pictures that share prompt and noise.

    Args:
        copies: how often each picture is repeated on one side, to be paired with those of several models. Copies do
            not narrow the interval.

    The wider at each end of the bootstrap of prompts over the paired differences and Tango's paired score interval on
    the effective number of pairs.
    """
    if not len(before) == len(after) == len(clusters):
        raise ValueError(
            f"paired samples differ in length; got {len(before)}, {len(after)}, {len(clusters)}; one entry per pair"
        )
    changes, names, excluded = present(paired_changes(before, after), clusters)
    if not len(changes):
        return Estimate.missing("no pair had two verdicts" if excluded else "no pairs", excluded=excluded)
    n, count, value = len(changes), len(set(names)), float(changes.mean())
    size = effective_size(names, copies=copies)
    score = paired_score(float((changes > 0).mean()) * size, float((changes < 0).mean()) * size, size, level=level)
    low, high = wider(bootstrap(changes, names, seed, level), score)
    method = f"wider of {resampled_by(names)} and Tango, effective n {size:.0f}"
    return Estimate(value, max(-1.0, low), min(1.0, high), method, n, count, excluded, size=size)


def residual(
    erased: Sequence[float | None],
    saw: Sequence[Sequence[float | None]],
    controls: Sequence[Sequence[float | None]],
    clusters: Sequence[Hashable],
    *,
    seed: int = 0,
) -> Estimate:
    """How much of the target is left, between models that never saw it and models that did: (e - g) / (b - g).

    0 is as a model that never saw it, 1 as one that did. Below 0 it is suppressed further, above 1 found more easily.
    Never clipped.

    Args:
        erased: one value per picture.
        saw: the same for each of the models that saw the target: the base, or twins of the controls; b is their mean.
        controls: the same for each of K models that never saw the target; g is their mean.
        clusters: the prompt of each picture.

    The interval is the wider at each end of the bootstrap (:func:`ratio_limits`), which draws prompts, controls and
    those that saw together, and of the paired interval of e - g at the estimated b - g. No value unless b - g is
    positive, and no interval unless it is clearly so.
    """
    rows = list(zip(erased, *saw, *controls, strict=True))
    kept = [i for i, row in enumerate(rows) if None not in row]
    if not kept:
        return Estimate.missing("no picture had a verdict in every model", excluded=len(rows))
    names = [clusters[i] for i in kept]
    index = {name: i for i, name in enumerate(dict.fromkeys(names))}
    at = [index[name] for name in names]

    def sums(values: Sequence[float | None]) -> np.ndarray:
        return np.bincount(at, [float(values[i] or 0.0) for i in kept], len(index))

    e, b, g = sums(erased), np.stack([sums(one) for one in saw]), np.stack([sums(one) for one in controls])
    span = float((b.mean(0) - g.mean(0)).sum())
    excluded = len(rows) - len(kept)
    if span <= 0:
        reason = "models that saw the target show no more of it than those that never did"
        return Estimate.missing(reason, excluded=excluded)
    value = float((e - g.mean(0)).sum()) / span
    prompts = weights(list(index), seed)

    def mixed(models: np.ndarray, seed: int) -> np.ndarray:
        n = len(models)
        drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), len(prompts)) / n
        return np.einsum("rc,rk,kc->r", prompts, drawn, models)

    never, those = mixed(g, seed + 1), mixed(b, seed + 2)
    above, below = (np.round(x - never, 9) for x in (prompts @ e, those))  # a difference of 1e-16 is none
    drawn = prompts.any(axis=1)  # draws of crossed factors may have no picture
    limits = ratio_limits(above[drawn], below[drawn])
    method = f"{resampled_by(names)} and control, wider of that and the paired interval"
    if limits is None:
        reason = "no interval: models that saw the target do not clearly show more of it than those that never did"
        return Estimate(value, None, None, method, len(kept), len(index), excluded, reason)
    count, flat = len(controls), [control[i] for control in controls for i in kept]
    gap = difference(flat, [erased[i] for i in kept] * count, names * count, copies=count, seed=seed)
    scale = span / len(kept)
    if gap.low is not None and gap.high is not None:
        limits = wider(limits, (gap.low / scale, gap.high / scale))
    return Estimate(value, *limits, method, len(kept), len(index), excluded)


def ratio(
    top: Sequence[float | None], bottom: Sequence[float | None], clusters: Sequence[Hashable], *, seed: int = 0
) -> Estimate:
    """The ratio of two means over the same clusters, drawn together (:func:`ratio_limits`).

    No value unless the lower mean is positive, and no interval unless it is clearly so.
    """
    kept = [i for i, (t, b) in enumerate(zip(top, bottom, strict=True)) if t is not None and b is not None]
    excluded = len(top) - len(kept)
    above, below = (np.array([values[i] for i in kept], dtype=float) for values in (top, bottom))
    if not len(kept) or below.sum() <= 0:
        reason = "what it is divided by is not positive" if len(kept) else "no values"
        return Estimate.missing(reason, excluded=excluded)
    index = {name: i for i, name in enumerate(dict.fromkeys(clusters[i] for i in kept))}
    at, value = [index[clusters[i]] for i in kept], float(above.sum() / below.sum())
    draws = weights(list(index), seed)
    limits = ratio_limits(*(draws @ np.bincount(at, x, len(index)) for x in (above, below)))
    if len(index) < 2 or limits is None:
        reason = "one cluster gives no interval" if len(index) < 2 else "what it is divided by may be zero"
        return Estimate(value, None, None, "ratio of means", len(kept), len(index), excluded, reason)
    return Estimate(value, *limits, resampled_by(list(index)), len(kept), len(index), excluded)


def paired_changes(before: Sequence[float | None], after: Sequence[float | None]) -> list[float | None]:
    """After minus before, pair by pair; None where either is missing."""
    return [None if x is None or y is None else float(y) - float(x) for x, y in zip(before, after, strict=True)]
