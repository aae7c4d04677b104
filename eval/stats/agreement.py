"""How far two detectors agree, and how well a score separates two kinds.

References: Cohen 1960 (kappa); Newcombe 2006, Statistics in Medicine 25, 559-573; DeLong et al. 1988; Zou 2007.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np
from scipy.optimize import brentq
from scipy.special import ndtri

from erasure.eval.stats.estimate import Estimate
from erasure.eval.stats.resample import LEVEL, resampled_by, tails, weights


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
    draws = weights(list(index), seed)
    limits = np.nanquantile([statistic(np.tensordot(draw, cells, 1)) for draw in draws[:400]], tails())
    return Estimate(value, float(limits[0]), float(limits[1]), resampled_by(list(index)), len(first), len(index))


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
        controls: the same of each control. The interval takes them as given.

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
    z, size = float(ndtri(0.5 + LEVEL / 2)), (m + n) / 2

    def excess(a: float) -> float:
        variance = a * (1 - a) / (m * n) * (1 + (size - 1) * ((1 - a) / (2 - a) + a / (1 + a)))
        return (a - value) ** 2 - z * z * variance

    low = 0.0 if value <= 0 else float(brentq(excess, 0.0, min(value, 1 - 1e-9)))
    high = 1.0 if value >= 1 else float(brentq(excess, max(value, 1e-9), 1.0))
    return low, high
