"""Estimates with intervals: what a number from an evaluation is worth.

The unit is one picture, the cluster is its prompt: pictures of one prompt resemble each other, so intervals come from
resampling prompts, not pictures. Comparisons are paired (the same prompt and the same noise before and after).

An interval of a rate, or of a change of one, is the wider at each end of two: the percentile bootstrap over prompts,
which knows how alike the pictures of a prompt are but collapses when few prompts differ, and a score interval on an
effective number of pictures, which never collapses but has to assume how alike they are. The limits of both rise with
every hit, so those of the wider do too, and a sample never looks better than one with more hits.

References: Wilson 1927 (score interval); Tango 1998, "Equivalence test and confidence interval for the difference in
proportions for the paired-sample design", Statistics in Medicine 17, 891-908; Holm 1979; Kish 1965 (design effect);
Cohen 1960 (kappa); Miller 2024, arXiv 2411.00640 (clustered errors for evaluations).

Tests of equivalence and bounds that claims rest on are in :mod:`erasure.eval.inference`, sample sizes in
:mod:`erasure.eval.power`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Hashable, Sequence

import numpy as np
from scipy import stats as scipy_stats
from scipy.optimize import brentq

RESAMPLES = 2000
LEVEL = 0.95
ASSUMED_CORRELATION = 0.3  # of pictures of one prompt, in the score intervals
EXACT = 13  # up to so many prompts with a net change, all sign patterns are counted; above, FLIPS random ones
FLIPS = 9999
RESAMPLED = "cluster bootstrap by prompt"


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


def paired_score(gained: float, lost: float, n: float, *, level: float = LEVEL) -> tuple[float, float]:
    """Tango's score interval of a difference of paired rates, (gained - lost) / n. Counts may be fractional.

    It depends on the pairs that changed and on ``n`` alone, and has a width even when none changed.

    >>> tuple(round(x, 3) for x in paired_score(0, 0, 60))
    (-0.06, 0.06)
    """
    if n <= 0 or gained < 0 or lost < 0 or gained + lost > n * (1 + 1e-9):
        raise ValueError(f"changes need gained + lost <= n; got {gained} + {lost} of {n}; check what was counted")
    z = float(scipy_stats.norm.ppf(0.5 + level / 2))
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


def effective_n(n: int, clusters: int, *, correlation: float = ASSUMED_CORRELATION) -> float:
    """How many independent samples ``n`` pictures of ``clusters`` prompts are worth (Kish's design effect)."""
    return n / (1 + (n / clusters - 1) * correlation)


def rate(hits: Sequence[float | None], clusters: Sequence[Hashable], *, seed: int = 0) -> Estimate:
    """The share of hits, with a 95 % interval over prompts.

    Args:
        hits: one entry per picture; None = no verdict, excluded and counted.
        clusters: the prompt of each picture.
        seed: of the bootstrap's generator.

    The wider at each end of the bootstrap over prompts (2000 resamples) and Wilson's interval on the effective number.
    """
    values, names, excluded = _present(hits, clusters)
    if not len(values):
        return Estimate.missing("no picture had a verdict" if excluded else "no pictures", excluded=excluded)
    n, count, value = len(values), len(set(names)), float(values.mean())
    size = effective_n(n, count)
    low, high = _wider(_bootstrap(values, names, seed), wilson(value * size, size))
    return Estimate(value, low, high, f"wider of {RESAMPLED} and Wilson, effective n {size:.0f}", n, count, excluded)


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
        copies: how many times each picture stands on one side, to be paired with those of several models. Copies are
            no further pictures, and narrow nothing.

    The wider at each end of the bootstrap of prompts over the paired differences and Tango's paired score interval on
    the effective number of pairs.
    """
    if not len(before) == len(after) == len(clusters):
        raise ValueError(
            f"paired samples differ in length; got {len(before)}, {len(after)}, {len(clusters)}; one entry per pair"
        )
    changes, names, excluded = _present(paired_changes(before, after), clusters)
    if not len(changes):
        return Estimate.missing("no pair had two verdicts" if excluded else "no pairs", excluded=excluded)
    n, count, value = len(changes), len(set(names)), float(changes.mean())
    size = effective_n(math.ceil(n / copies), count)
    score = paired_score(float((changes > 0).mean()) * size, float((changes < 0).mean()) * size, size, level=level)
    low, high = _wider(_bootstrap(changes, names, seed, level), score)
    return Estimate(value, low, high, f"wider of {RESAMPLED} and Tango, effective n {size:.0f}", n, count, excluded)


def residual(
    erased: Sequence[float | None],
    base: Sequence[float | None],
    controls: Sequence[Sequence[float | None]],
    clusters: Sequence[Hashable],
    *,
    seed: int = 0,
) -> Estimate:
    """How much of what the base shows beyond a model that never saw the target is left: (e - g) / (b - g).

    0 is as a model that never saw it, 1 as the base; below 0 is suppressed beyond that, above 1 found more easily than
    in the base. Never clipped.

    Args:
        erased, base: one value per picture, in one order.
        controls: the same for each of K models that never saw the target; g is their mean.
        clusters: the prompt of each picture.

    The interval is the wider at each end of the bootstrap, which draws prompts and controls together, and of the paired
    interval of e - g at the estimated b - g. No value unless b - g is positive.
    """
    rows = [
        None if any(value is None for value in row) else (row[0], row[1], sum(row[2:]) / len(controls))
        for row in zip(erased, base, *controls, strict=True)
    ]
    kept = [i for i, row in enumerate(rows) if row is not None]
    if not kept:
        return Estimate.missing("no picture had a verdict in every model", excluded=len(rows))
    names = [clusters[i] for i in kept]
    index = {name: i for i, name in enumerate(dict.fromkeys(names))}
    at = [index[name] for name in names]

    def sums(values: Sequence[float | None]) -> np.ndarray:
        return np.bincount(at, [float(values[i] or 0.0) for i in kept], len(index))

    e, b, g = sums(erased), sums(base), np.stack([sums(control) for control in controls])
    span = float((b - g.mean(0)).sum())
    excluded = len(rows) - len(kept)
    if span <= 0:
        reason = "the base shows no more of the target than a model that never saw it"
        return Estimate.missing(reason, excluded=excluded)
    value = float((e - g.mean(0)).sum()) / span
    prompts = _resample(len(index), seed)
    drawn = np.random.default_rng(seed + 1).multinomial(len(g), np.full(len(g), 1 / len(g)), len(prompts)) / len(g)
    mixed = np.einsum("rc,rk,kc->r", prompts, drawn, g)
    above, below = (np.round(prompts @ x - mixed, 9) for x in (e, b))  # a difference of 1e-16 is none
    with np.errstate(divide="ignore", invalid="ignore"):
        low, high = np.nanquantile(above / below, _tails())
    method = f"{RESAMPLED} and control, wider of that and the paired interval"
    if not np.isfinite([low, high]).all():  # in too many draws the base shows no more than the controls
        reason = "the base shows too little more of the target than a model that never saw it for an interval"
        return Estimate(value, None, None, method, len(kept), len(index), excluded, reason)
    count, never = len(controls), [control[i] for control in controls for i in kept]
    gap = difference(never, [erased[i] for i in kept] * count, names * count, copies=count, seed=seed)
    scale = span / len(kept)
    if gap.low is not None and gap.high is not None:
        low, high = min(low, gap.low / scale), max(high, gap.high / scale)
    return Estimate(value, float(low), float(high), method, len(kept), len(index), excluded)


def sign_flip(
    before: Sequence[bool | None], after: Sequence[bool | None], clusters: Sequence[Hashable], *, seed: int = 0
) -> float | None:
    """Two-sided p-value of a paired change: how often random signs of the prompts' changes give one as large.

    Without an effect each prompt's net change could as well have had the other sign, whatever the pictures of a prompt
    have in common. With one picture per prompt this is McNemar's exact test. None when there are no pairs.
    """
    changes, names, _ = _present(paired_changes(before, after), clusters)
    if not len(changes):
        return None
    index = {name: i for i, name in enumerate(dict.fromkeys(names))}
    sums = np.bincount([index[name] for name in names], changes)
    sums = sums[sums != 0]  # a prompt without a net change adds nothing under either sign
    if len(sums) <= EXACT:
        signs = np.array(list(itertools.product((-1, 1), repeat=len(sums))))
        return float((np.abs(signs @ sums) >= abs(sums.sum())).mean())
    signs = np.random.default_rng(seed).choice((-1, 1), size=(FLIPS, len(sums)))
    return float((1 + (np.abs(signs @ sums) >= abs(sums.sum())).sum()) / (1 + FLIPS))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's adjustment for looking at several p-values at once; missing ones stay missing and are not counted."""
    order = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, i) in enumerate(order):
        largest = max(largest, min(1.0, p * (len(order) - rank)))
        adjusted[i] = largest
    return adjusted


def mean(
    values: Sequence[float | None], clusters: Sequence[Hashable], *, level: float = LEVEL, seed: int = 0
) -> Estimate:
    """The mean of scores, with a percentile bootstrap of prompts; no interval from fewer than two prompts."""
    present, names, excluded = _present(values, clusters)
    if not len(present):
        return Estimate.missing("no values", excluded=excluded)
    n, count, value = len(present), len(set(names)), float(present.mean())
    if count < 2:
        return Estimate(value, None, None, "mean", n, count, excluded, "one prompt gives no interval")
    low, high = _bootstrap(present, names, seed, level)
    return Estimate(value, low, high, RESAMPLED, n, count, excluded)


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
    return Estimate(value, float(limits[0]), float(limits[1]), RESAMPLED, len(first), len(index))


def ratio(
    top: Sequence[float | None], bottom: Sequence[float | None], clusters: Sequence[Hashable], *, seed: int = 0
) -> Estimate:
    """The ratio of two means over the same clusters, drawn together; no value where the lower one is not positive."""
    kept = [i for i, (t, b) in enumerate(zip(top, bottom, strict=True)) if t is not None and b is not None]
    excluded = len(top) - len(kept)
    above, below = (np.array([values[i] for i in kept], dtype=float) for values in (top, bottom))
    if not len(kept) or below.sum() <= 0:
        reason = "what it is divided by is not positive" if len(kept) else "no values"
        return Estimate.missing(reason, excluded=excluded)
    index = {name: i for i, name in enumerate(dict.fromkeys(clusters[i] for i in kept))}
    at, value = [index[clusters[i]] for i in kept], float(above.sum() / below.sum())
    draws = _resample(len(index), seed)
    tops, bottoms = (draws @ np.bincount(at, x, len(index)) for x in (above, below))
    if len(index) < 2 or (bottoms <= 0).mean() > 1 - LEVEL:
        reason = "one cluster gives no interval" if len(index) < 2 else "what it is divided by may be zero"
        return Estimate(value, None, None, "ratio of means", len(kept), len(index), excluded, reason)
    low, high = np.quantile((tops / bottoms)[bottoms > 0], _tails())
    return Estimate(value, float(low), float(high), RESAMPLED, len(kept), len(index), excluded)


def auc(positive: Sequence[float], negative: Sequence[float]) -> Estimate:
    """The area under the ROC curve: the chance that a positive scores above a negative, ties counted half.

    Newcombe's score interval on the variance of Hanley and McNeil (Newcombe 2006, Statistics in Medicine 25, 559-573),
    which has a width even where the scores separate perfectly: +-0.11 at 0.5 from 50 and 50 samples.

    >>> print(f"{auc([3.0, 4.0, 5.0], [0.0, 1.0, 2.0]):.2f}")
    1.00 (0.50 to 1.00)
    """
    m, n = len(positive), len(negative)
    if not m or not n:
        return Estimate.missing("an area under the curve needs scores of both kinds")
    value = float(_placements(positive, negative)[0].mean())
    return Estimate(value, *_auc_limits(value, m, n), "Newcombe's score interval", m + n, m + n)


def auc_gap(
    mine: tuple[Sequence[float], Sequence[float]], controls: Sequence[tuple[Sequence[float], Sequence[float]]]
) -> Estimate:
    """The area under one model's curve minus the mean area under the controls', on the same samples in one order.

    Args:
        mine: scores of the positives and of the negatives.
        controls: the same of each control. They are taken as they are: their number narrows nothing.

    The limits of both areas are combined as squares (Zou 2007, Psychological Methods 12, 399-413) with the areas'
    correlation after DeLong et al. 1988, so that a gap between two perfect scores has a width too.
    """
    if not controls or not all(len(scores) for pair in (mine, *controls) for scores in pair):
        return Estimate.missing("a gap needs scores of both kinds in the model and in a control")
    first, each = _placements(*mine), [_placements(*control) for control in controls]
    second = tuple(np.mean([pair[kind] for pair in each], axis=0) for kind in (0, 1))
    m, n, a, b = len(first[0]), len(first[1]), float(first[0].mean()), float(second[0].mean())

    def covariance(x: Sequence[np.ndarray], y: Sequence[np.ndarray]) -> float:
        return sum(float(((p - p.mean()) * (q - q.mean())).mean()) / len(p) for p, q in zip(x, y, strict=True))

    spread = math.sqrt(covariance(first, first) * covariance(second, second))
    r = covariance(first, second) / spread if spread > 0 else 0.0

    def half(x: float, y: float) -> float:
        return math.sqrt(max(0.0, x * x + y * y - 2 * r * x * y))

    (a_low, a_high), (b_low, b_high) = _auc_limits(a, m, n), _auc_limits(b, m, n)
    low, high = a - b - half(a - a_low, b_high - b), a - b + half(a_high - a, b - b_low)
    return Estimate(a - b, low, high, "Newcombe's score intervals, combined", m + n, m + n)


def _placements(positive: Sequence[float], negative: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Of each positive the share of negatives below it, of each negative the share of positives above it."""

    def below(values: Sequence[float], others: Sequence[float]) -> np.ndarray:
        ordered = np.sort(others)
        sides = np.searchsorted(ordered, values, "left") + np.searchsorted(ordered, values, "right")
        return sides / (2 * len(ordered))

    return below(positive, negative), 1 - below(negative, positive)


def _auc_limits(value: float, m: int, n: int) -> tuple[float, float]:
    """Both areas whose Hanley-McNeil variance puts ``value`` at the critical distance (Newcombe's method 5)."""
    z, size = float(scipy_stats.norm.ppf(0.5 + LEVEL / 2)), (m + n) / 2

    def excess(a: float) -> float:
        variance = a * (1 - a) / (m * n) * (1 + (size - 1) * ((1 - a) / (2 - a) + a / (1 + a)))
        return (a - value) ** 2 - z * z * variance

    low = 0.0 if value <= 0 else float(brentq(excess, 0.0, min(value, 1 - 1e-9)))
    high = 1.0 if value >= 1 else float(brentq(excess, max(value, 1e-9), 1.0))
    return low, high


def _present(
    values: Sequence[float | bool | None], clusters: Sequence[Hashable]
) -> tuple[np.ndarray, list[Hashable], int]:
    if len(values) != len(clusters):
        raise ValueError(f"one cluster per value; got {len(values)} values and {len(clusters)} clusters")
    kept = [(float(v), c) for v, c in zip(values, clusters, strict=True) if v is not None]
    return np.array([v for v, _ in kept]), [c for _, c in kept], len(values) - len(kept)


def paired_changes(before: Sequence[float | None], after: Sequence[float | None]) -> list[float | None]:
    """After minus before, pair by pair; None where either is missing."""
    return [None if x is None or y is None else float(y) - float(x) for x, y in zip(before, after, strict=True)]


def _bootstrap(values: np.ndarray, names: list[Hashable], seed: int, level: float = LEVEL) -> tuple[float, float]:
    """Percentile limits of the mean when whole clusters are drawn with replacement."""
    low, high = np.quantile(resampled_means(values, names, seed), _tails(level))
    return float(low), float(high)


def resampled_means(values: np.ndarray, names: list[Hashable], seed: int) -> np.ndarray:
    """The mean in every bootstrap resample, in which whole clusters are drawn with replacement."""
    index = {name: i for i, name in enumerate(dict.fromkeys(names))}
    at = [index[name] for name in names]
    sums, sizes = np.bincount(at, values, len(index)), np.bincount(at, minlength=len(index))
    draws = _resample(len(index), seed)
    return draws @ sums / (draws @ sizes)


def _wider(first: tuple[float, float], second: tuple[float, float]) -> tuple[float, float]:
    """The outermost limits of two intervals."""
    return min(first[0], second[0]), max(first[1], second[1])


def _resample(clusters: int, seed: int) -> np.ndarray:
    """How often each cluster is drawn: (resamples, clusters) counts."""
    return np.random.default_rng(seed).multinomial(clusters, np.full(clusters, 1 / clusters), size=RESAMPLES)


def _tails(level: float = LEVEL) -> tuple[float, float]:
    return (1 - level) / 2, (1 + level) / 2
