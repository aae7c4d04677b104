"""Estimates with intervals: what a number from an evaluation is worth.

The unit is one picture, the cluster is its prompt: pictures of one prompt resemble each other, so intervals come from
resampling prompts, not pictures. Comparisons are paired (the same prompt and the same noise before and after).

References: Wilson 1927 (score interval); McNemar 1947; Newcombe 1998, "Improved confidence intervals for the difference
between binomial proportions based on paired data", method 10; Kish 1965 (design effect); Cohen 1960 (kappa);
Miller 2024, arXiv 2411.00640 (clustered errors for evaluations).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Sequence

import numpy as np
from scipy import stats as scipy_stats

RESAMPLES = 2000
LEVEL = 0.95
FEW_CLUSTERS = 8  # below this a percentile bootstrap over prompts is far too narrow, so a score interval is used
ASSUMED_CORRELATION = 0.3  # of pictures of one prompt, where the data cannot show it (all or none hit)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A number with its interval and its story; never a bare float.

    Attributes:
        value: the point estimate, or None when there is none (then ``reason`` says why). Never 0 for "unknown".
        low, high: limits of the 95 % interval, or None.
        method: how the interval was made.
        n: observations that entered.
        clusters: prompts they belong to.
        excluded: observations left out because they had no value.
        reason: why there is no value, or no interval.
    """

    value: float | None
    low: float | None
    high: float | None
    method: str
    n: int
    clusters: int
    excluded: int = 0
    reason: str | None = None

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
    if float(hits).is_integer() and float(n).is_integer():
        interval = scipy_stats.binomtest(int(hits), int(n)).proportion_ci(level, method="wilson")
        return float(interval.low), float(interval.high)
    z = float(scipy_stats.norm.ppf(0.5 + level / 2))
    rate, shrink = hits / n, 1 + z * z / n
    centre = (rate + z * z / (2 * n)) / shrink
    half = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n)) / shrink
    return max(0.0, centre - half), min(1.0, centre + half)


def zero_hit_bound(n: int, *, level: float = LEVEL) -> float:
    """The largest rate that is compatible with no hit in ``n`` independent samples: 1 - (1 - level)^(1/n).

    >>> round(zero_hit_bound(100), 4)
    0.0295
    """
    if n < 1:
        raise ValueError(f"a bound needs at least one sample; got n = {n}; generate some images first")
    return float(1 - (1 - level) ** (1 / n))


def effective_n(n: int, clusters: int, *, correlation: float = ASSUMED_CORRELATION) -> float:
    """How many independent samples ``n`` pictures of ``clusters`` prompts are worth (Kish's design effect)."""
    return n / (1 + (n / clusters - 1) * correlation)


def rate(hits: Sequence[bool | None], clusters: Sequence[Hashable], *, seed: int = 0) -> Estimate:
    """The share of hits, with a 95 % interval over prompts.

    Args:
        hits: one entry per picture; None = no verdict, excluded and counted.
        clusters: the prompt of each picture.
        seed: of the bootstrap's generator.

    Percentile bootstrap of prompts, 2000 resamples. When all or none hit it would have no width, and with fewer than
    8 prompts it is too narrow: then a Wilson interval on the effective sample size.
    """
    values, names, excluded = _present(hits, clusters)
    if not len(values):
        return Estimate.missing("no picture had a verdict" if excluded else "no pictures", excluded=excluded)
    n, count, value = len(values), len(set(names)), float(values.mean())
    if value in (0.0, 1.0) or count < FEW_CLUSTERS:
        size = effective_n(n, count)
        low, high = wilson(value * size, size)
        return Estimate(value, low, high, f"Wilson, effective n {size:.0f}", n, count, excluded)
    low, high = _bootstrap(values, names, seed)
    return Estimate(value, low, high, "cluster bootstrap by prompt", n, count, excluded)


def difference(
    before: Sequence[bool | None], after: Sequence[bool | None], clusters: Sequence[Hashable], *, seed: int = 0
) -> Estimate:
    """The change in a rate, after minus before, over pairs of pictures that share prompt and noise.

    Bootstrap of prompts over the paired differences; where that has no width (nothing, or everything, changed) or
    there are fewer than 8 prompts, Newcombe's paired score interval on the effective sample size.
    """
    if not len(before) == len(after) == len(clusters):
        raise ValueError(
            f"paired samples differ in length; got {len(before)}, {len(after)}, {len(clusters)}; one entry per pair"
        )
    pairs = [None if x is None or y is None else float(y) - float(x) for x, y in zip(before, after, strict=True)]
    changes, names, excluded = _present(pairs, clusters)
    if not len(changes):
        return Estimate.missing("no pair had two verdicts" if excluded else "no pairs", excluded=excluded)
    n, count, value = len(changes), len(set(names)), float(changes.mean())
    if np.ptp(changes) == 0 or count < FEW_CLUSTERS:
        kept = [(bool(x), bool(y)) for x, y in zip(before, after, strict=True) if x is not None and y is not None]
        size = effective_n(n, count)
        low, high = _newcombe(np.array(kept), size)
        return Estimate(value, low, high, f"Newcombe paired, effective n {size:.0f}", n, count, excluded)
    low, high = _bootstrap(changes, names, seed)
    return Estimate(value, low, high, "paired cluster bootstrap by prompt", n, count, excluded)


def _newcombe(pairs: np.ndarray, size: float) -> tuple[float, float]:
    """Newcombe 1998, method 10, for pairs (n, 2) of booleans counted as ``size`` independent pairs."""
    before, after = pairs.mean(0)
    (low_b, high_b), (low_a, high_a) = wilson(before * size, size), wilson(after * size, size)
    spread = math.sqrt(before * (1 - before) * after * (1 - after))
    phi = ((pairs[:, 0] & pairs[:, 1]).mean() - before * after) / spread if spread > 0 else 0.0

    def distance(a: float, b: float) -> float:
        return math.sqrt(max(0.0, a * a - 2 * phi * a * b + b * b))

    value = after - before
    low = value - distance(after - low_a, high_b - before)
    high = value + distance(high_a - after, before - low_b)
    return float(max(-1.0, low)), float(min(1.0, high))


def mcnemar(before: Sequence[bool | None], after: Sequence[bool | None]) -> float | None:
    """The exact two-sided McNemar p-value; 1 when no pair changed, None when there are no pairs.

    It takes pairs as independent. With several seeds per prompt it is optimistic: read it beside the interval.
    """
    pairs = [(x, y) for x, y in zip(before, after, strict=True) if x is not None and y is not None]
    if not pairs:
        return None
    lost, won = sum(bool(x) and not y for x, y in pairs), sum(bool(y) and not x for x, y in pairs)
    return 1.0 if lost + won == 0 else float(scipy_stats.binomtest(lost, lost + won, 0.5).pvalue)


def mean(values: Sequence[float | None], clusters: Sequence[Hashable], *, seed: int = 0) -> Estimate:
    """The mean of scores, with a percentile bootstrap of prompts; no interval from fewer than two prompts."""
    present, names, excluded = _present(values, clusters)
    if not len(present):
        return Estimate.missing("no values", excluded=excluded)
    n, count, value = len(present), len(set(names)), float(present.mean())
    if count < 2:
        return Estimate(value, None, None, "mean", n, count, excluded, "one prompt gives no interval")
    low, high = _bootstrap(present, names, seed)
    return Estimate(value, low, high, "cluster bootstrap by prompt", n, count, excluded)


def kappa(first: Sequence[str], second: Sequence[str], clusters: Sequence[Hashable], *, seed: int = 0) -> Estimate:
    """Cohen's kappa: agreement of two detectors beyond chance; 1 = always, 0 = as chance would have it."""
    if not len(first):
        return Estimate.missing("no pictures")
    names = {label: i for i, label in enumerate(sorted({*first, *second}))}
    cells = np.zeros((len(set(clusters)), len(names), len(names)))
    index = {cluster: i for i, cluster in enumerate(dict.fromkeys(clusters))}
    for a, b, cluster in zip(first, second, clusters, strict=True):
        cells[index[cluster], names[a], names[b]] += 1

    def statistic(table: np.ndarray) -> float:
        share = table / table.sum()
        chance = float(share.sum(0) @ share.sum(1))
        return float("nan") if chance == 1 else (float(np.trace(share)) - chance) / (1 - chance)

    value = statistic(cells.sum(0))
    if math.isnan(value):
        return Estimate(
            None, None, None, "Cohen's kappa", len(first), len(index), 0, "both detectors gave one label only"
        )
    draws = _resample(len(index), seed)
    limits = np.nanquantile([statistic(np.tensordot(draw, cells, 1)) for draw in draws[:400]], _tails())
    return Estimate(value, float(limits[0]), float(limits[1]), "cluster bootstrap by prompt", len(first), len(index))


def _present(
    values: Sequence[float | bool | None], clusters: Sequence[Hashable]
) -> tuple[np.ndarray, list[Hashable], int]:
    if len(values) != len(clusters):
        raise ValueError(f"one cluster per value; got {len(values)} values and {len(clusters)} clusters")
    kept = [(float(v), c) for v, c in zip(values, clusters, strict=True) if v is not None]
    return np.array([v for v, _ in kept]), [c for _, c in kept], len(values) - len(kept)


def _bootstrap(values: np.ndarray, names: list[Hashable], seed: int) -> tuple[float, float]:
    """Percentile limits of the mean when whole clusters are drawn with replacement."""
    index = {name: i for i, name in enumerate(dict.fromkeys(names))}
    at = [index[name] for name in names]
    sums, sizes = np.bincount(at, values, len(index)), np.bincount(at, minlength=len(index))
    draws = _resample(len(index), seed)
    low, high = np.quantile(draws @ sums / (draws @ sizes), _tails())
    return float(low), float(high)


def _resample(clusters: int, seed: int) -> np.ndarray:
    """How often each cluster is drawn: (resamples, clusters) counts."""
    return np.random.default_rng(seed).multinomial(clusters, np.full(clusters, 1 / clusters), size=RESAMPLES)


def _tails() -> tuple[float, float]:
    return (1 - LEVEL) / 2, (1 + LEVEL) / 2
