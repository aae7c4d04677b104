"""What claims rest on beyond an interval: bounds, tests, equivalence within a margin, rates behind a detector's errors.

References: Clopper and Pearson 1934; McNemar 1947; Holm 1979; Rogan and Gladen 1978 (rates behind errors); Schuirmann
1987 (two one-sided tests); Tango 1998 (paired score test); Zou and Donner 2008, Statistics in Medicine 27,
1693-1702 (limits of a function from the limits of its arguments).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Sequence

import numpy as np
from scipy import stats as scipy_stats
from scipy.optimize import brentq
from scipy.special import ndtr

from erasure.eval.stats import (
    LEVEL,
    Estimate,
    difference,
    effective_n,
    holm,
    mean,
    paired_changes,
    resampled_means,
    score_variance,
)


def zero_hits(n: float, *, level: float = LEVEL) -> float:
    """The largest rate that ``n`` independent pictures without a hit leave possible: 1 - (1 - level)^(1/n), one-sided.

    Exact (Clopper and Pearson 1934). Pictures that share prompts are worth fewer: pass :func:`effective_n`.

    >>> round(zero_hits(50), 3)
    0.058
    """
    if n <= 0:
        raise ValueError(f"a bound needs pictures; got n={n}; without any there is nothing to say")
    return 1 - (1 - level) ** (1 / n)


def mcnemar(gained: int, lost: int) -> float:
    """Two-sided exact p-value of a paired change: pairs that changed went either way with probability 1/2.

    For pairs that share nothing with one another; pictures of one prompt do, and :func:`sign_flip` is their test.
    """
    if gained < 0 or lost < 0:
        raise ValueError(f"counts of changed pairs are not negative; got {gained} and {lost}; check what was counted")
    return float(scipy_stats.binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def worst_upper(rates: Sequence[Estimate], *, level: float = LEVEL) -> float:
    """An upper bound for the largest of several rates, adjusted for looking at all of them.

    The smallest u for which Holm's procedure rejects "this rate is at least u" for every one of them, by Wilson's score
    test on the effective number, one-sided at (1 - level) / 2 as the upper end of an interval is; and never less than
    the largest upper end of their own intervals.
    """
    complete = (r for r in rates if r.value is not None and r.high is not None)
    known = [(float(r.value or 0), effective_n(r.n, r.clusters), float(r.high or 0)) for r in complete]
    if not known or len(known) < len(rates):
        raise ValueError(f"every rate needs a value and an interval; got {list(map(str, rates))}; leave the others out")

    def accepted(u: float) -> float:
        z = [(value - u) / math.sqrt(u * (1 - u) / size) for value, size, _ in known]
        return max(p for p in holm([float(ndtr(one)) for one in z]) if p is not None) - (1 - level) / 2

    least = max(1e-9, *(value for value, _, _ in known))
    u = 1.0 if least >= 1 - 1e-9 or accepted(1 - 1e-9) > 0 else float(brentq(accepted, least, 1 - 1e-9))
    return max(u, *(high for _, _, high in known))


def above(rates: Sequence[Estimate], limit: float, *, level: float = LEVEL) -> list[bool]:
    """Which of several rates are above a limit, adjusted for looking at all of them.

    By Wilson's score test of "this rate is at most ``limit``" on the effective number, one-sided at (1 - level) / 2,
    with Holm's adjustment; and only where the lower end of the rate's own interval is above the limit too. Rates
    without a value or an interval are not.
    """
    known = [i for i, r in enumerate(rates) if r.value is not None and r.low is not None]
    z = [
        (float(rates[i].value or 0) - limit)
        / math.sqrt(limit * (1 - limit) / effective_n(rates[i].n, rates[i].clusters))
        for i in known
    ]
    adjusted = dict(zip(known, holm([float(ndtr(-one)) for one in z]), strict=True))
    return [
        (p := adjusted.get(i)) is not None and p <= (1 - level) / 2 and float(rate.low or 0) > limit
        for i, rate in enumerate(rates)
    ]


@dataclasses.dataclass(frozen=True)
class Equivalence:
    """Two one-sided tests of a paired difference. "Not significant" is never read as "equal".

    Attributes:
        estimate: the difference with its 1 - 2 alpha interval (90 % at alpha 0.05).
        margin: differences up to this are declared to be none.
        p_lower, p_upper: of "the difference is -margin or less" and "is margin or more"; None without an interval.
    """

    estimate: Estimate
    margin: float
    p_lower: float | None
    p_upper: float | None

    @property
    def equivalent(self) -> bool | None:
        """Whether the whole interval lies inside the margin; None when there is no interval."""
        low, high = self.estimate.low, self.estimate.high
        return None if low is None or high is None else -self.margin < low and high < self.margin


def equivalence(
    before: Sequence[float | None],
    after: Sequence[float | None],
    clusters: Sequence[Hashable],
    margin: float,
    *,
    alpha: float = 0.05,
    shares: bool = True,
    seed: int = 0,
) -> Equivalence:
    """Whether two models are equal within a margin, over pairs of pictures that share prompt and noise.

    Args:
        margin: in the unit of the values; declare it before looking. 0.05 for rates unless there is a reason.
        alpha: of each of the two tests.
        shares: values are 0 or 1. False for other numbers, which have the bootstrap alone.

    Each p-value is the larger of the bootstrap's and Tango's score test's, as the interval is the wider of theirs.
    """
    if margin <= 0 or (shares and margin >= 1):
        raise ValueError(f"a margin is above 0, and below 1 for rates; got {margin}; declare how much is no difference")
    level, changes = 1 - 2 * alpha, paired_changes(before, after)
    if shares:
        estimate = difference(before, after, clusters, level=level, seed=seed)
    else:
        estimate = mean(changes, clusters, level=level, seed=seed)
    if estimate.value is None or estimate.low is None:
        return Equivalence(estimate, margin, None, None)
    kept = [(change, cluster) for change, cluster in zip(changes, clusters, strict=True) if change is not None]
    values = np.array([change for change, _ in kept])
    draws = resampled_means(values, [cluster for _, cluster in kept], seed)
    size = effective_n(estimate.n, estimate.clusters)

    def p_value(sign: int) -> float:
        """Of "sign times the difference is margin or more"."""
        resampled = (1 + int((sign * draws >= margin).sum())) / (1 + len(draws))
        if not shares:
            return resampled
        up, down = (float((sign * values * way > 0).mean()) * size for way in (1, -1))
        z = (up - down - size * margin) / math.sqrt(size * score_variance(up, down, size, margin))
        return max(resampled, float(ndtr(z)))

    return Equivalence(estimate, margin, p_value(-1), p_value(1))


def rogan_gladen(apparent: Estimate, sensitivity: Estimate, specificity: Estimate) -> Estimate:
    """The rate behind a detector's errors: (apparent + specificity - 1) / (sensitivity + specificity - 1), within 0..1.

    Args:
        apparent: how often the detector sees the target.
        sensitivity, specificity: of the detector, on pictures like these ones; those of other pictures mislead.

    Each of the three moves the result by some distance when it goes to its limit; the distances add up in squares
    (Zou and Donner 2008). With symmetric limits this is the delta method; unlike it, none seen still has a width.
    No value where the detector may be no better than chance.
    """
    parts = (apparent, sensitivity, specificity)
    if any(part.value is None or part.low is None or part.high is None for part in parts):
        return Estimate.missing("a rate, a sensitivity and a specificity with intervals are needed")
    (p, p_low, p_high), (se, se_low, se_high), (sp, sp_low, sp_high) = (
        (float(part.value or 0), float(part.low or 0), float(part.high or 0)) for part in parts
    )
    if se_low + sp_low <= 1:
        return Estimate.missing("the detector may be no better than chance: sensitivity + specificity can be 1 or less")

    def corrected(p: float, se: float, sp: float) -> float:
        return (p + sp - 1) / (se + sp - 1)

    value = corrected(p, se, sp)
    down = math.hypot(*(value - corrected(*x) for x in ((p_low, se, sp), (p, se_high, sp), (p, se, sp_low))))
    up = math.hypot(*(value - corrected(*x) for x in ((p_high, se, sp), (p, se_low, sp), (p, se, sp_high))))
    if value + up < 0 or value - down > 1:
        return Estimate.missing("the detector's sensitivity and specificity cannot give this rate; measure them here")
    low, value, high = (min(1.0, max(0.0, x)) for x in (value - down, value, value + up))
    return Estimate(
        value, low, high, "Rogan-Gladen, limits recovered", apparent.n, apparent.clusters, apparent.excluded
    )
