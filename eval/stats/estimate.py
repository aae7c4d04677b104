"""Estimates with intervals.

The unit is one picture; its cluster is the prompt, or its template and phrase (:mod:`erasure.eval.stats.resample`).

An interval of a rate, or of a change of one, is the wider at each end of two: the percentile bootstrap over clusters,
which measures how similar their pictures are but collapses when few of them differ, and a score interval on an
effective number of pictures, which never collapses but assumes how similar they are.

References: Wilson 1927 (score interval); Miller 2024, arXiv 2411.00640 (clustered errors for evaluations).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Sequence

import numpy as np
from scipy.special import betaincinv, ndtri

from erasure.eval.stats.resample import LEVEL, bootstrap, effective_size, resampled_by, wider


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A number with its interval.

    Attributes:
        value: the point estimate; None for "unknown" (then ``reason`` says why), never 0.
        low, high: limits of the 95 % interval, or None.
        method: of the interval.
        n: number of observations.
        clusters: number of prompts.
        excluded: observations without a value.
        reason: why there is no value, or no interval.
        size: effective number of independent observations of a score interval; None without one.
    """

    value: float | None
    low: float | None
    high: float | None
    method: str
    n: int
    clusters: int
    excluded: int = 0
    reason: str | None = None
    size: float | None = None

    def __post_init__(self) -> None:
        if any(part is not None and math.isnan(part) for part in (self.value, self.low, self.high)):
            raise ValueError(
                f"an estimate must be a number or None; got NaN ({self.value}, {self.low} to {self.high}), which every "
                "limit would let pass; look at the observations it was made of"
            )

    @classmethod
    def missing(cls, reason: str, *, excluded: int = 0) -> Estimate:
        """No value, and why."""
        return cls(None, None, None, "none", 0, 0, excluded, reason)

    def __str__(self) -> str:
        return format(self, "%")

    def __format__(self, kind: str) -> str:
        """``f"{estimate:%}"`` -> ``12.5 % (4.3 to 21.4)``; ``f"{estimate:.3f}"`` -> plain; ``not available``."""
        if self.value is None:
            return "not available"
        scale, digits, unit = (100.0, ".1f", " %") if kind in ("", "%") else (1.0, kind, "")
        text = f"{self.value * scale:{digits}}{unit}"
        if self.low is None or self.high is None:
            return text
        return f"{text} ({self.low * scale:{digits}} to {self.high * scale:{digits}})"


def wilson(hits: float, n: float, *, level: float = LEVEL) -> tuple[float, float]:
    """The Wilson score interval of a rate. ``n`` may be an effective (fractional) sample size.

    >>> tuple(round(x, 3) for x in wilson(0, 50))
    (0.0, 0.071)
    """
    if n <= 0 or not 0 <= hits <= n:
        raise ValueError(f"a rate needs 0 <= hits <= n and n > 0; got {hits} of {n}; check what was counted")
    z = float(ndtri(0.5 + level / 2))
    rate, shrink = hits / n, 1 + z * z / n
    centre = (rate + z * z / (2 * n)) / shrink
    half = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n)) / shrink
    return 0.0 if hits == 0 else max(0.0, centre - half), 1.0 if hits == n else min(1.0, centre + half)


def exact(hits: float, n: float, *, level: float = LEVEL) -> tuple[float, float]:
    """The exact interval of a rate (Clopper and Pearson 1934), for few pictures at a high level; ``n`` as in `wilson`.

    >>> tuple(round(x, 3) for x in exact(3, 3))
    (0.292, 1.0)
    """
    if n <= 0 or not 0 <= hits <= n:
        raise ValueError(f"a rate needs 0 <= hits <= n and n > 0; got {hits} of {n}; check what was counted")
    tail, misses = (1 - level) / 2, n - hits
    low = 0.0 if hits == 0 else float(betaincinv(hits, misses + 1, tail))
    return low, 1.0 if misses == 0 else float(betaincinv(hits + 1, misses, 1 - tail))


def rate(
    hits: Sequence[float | None], clusters: Sequence[Hashable], *, level: float = LEVEL, seed: int = 0
) -> Estimate:
    """The share of hits, with a 95 % interval over prompts.

    Args:
        hits: one entry per picture; None = no verdict, excluded and counted.
        clusters: the prompt of each picture; :class:`~erasure.eval.stats.Asked` where template and phrase are known.
        level: of the interval.
        seed: of the bootstrap's generator.

    The wider at each end of the bootstrap (2000 resamples) and Wilson's interval on the effective number.
    """
    values, names, excluded = present(hits, clusters)
    if not len(values):
        return Estimate.missing("no picture had a verdict" if excluded else "no pictures", excluded=excluded)
    n, value, size = len(values), float(values.mean()), effective_size(names)
    low, high = wider(bootstrap(values, names, seed, level), wilson(value * size, size, level=level))
    method = f"wider of {resampled_by(names)} and Wilson, effective n {size:.0f}"
    return Estimate(value, max(0.0, low), min(1.0, high), method, n, len(set(names)), excluded, size=size)


def mean(
    values: Sequence[float | None], clusters: Sequence[Hashable], *, level: float = LEVEL, seed: int = 0
) -> Estimate:
    """The mean of scores, with a percentile bootstrap of prompts; no interval from fewer than two prompts."""
    known, names, excluded = present(values, clusters)
    if not len(known):
        return Estimate.missing("no values", excluded=excluded)
    n, count, value = len(known), len(set(names)), float(known.mean())
    if count < 2:
        return Estimate(value, None, None, "mean", n, count, excluded, "one prompt gives no interval")
    low, high = bootstrap(known, names, seed, level)
    return Estimate(value, low, high, resampled_by(names), n, count, excluded)


def present(
    values: Sequence[float | bool | None], clusters: Sequence[Hashable]
) -> tuple[np.ndarray, list[Hashable], int]:
    """The values that are there, their clusters, and how many are not."""
    if len(values) != len(clusters):
        raise ValueError(f"one cluster per value; got {len(values)} values and {len(clusters)} clusters")
    kept = [(float(v), c) for v, c in zip(values, clusters, strict=True) if v is not None]
    return np.array([v for v, _ in kept]), [c for _, c in kept], len(values) - len(kept)
