"""Several rates: a bound for the largest, and which of them are above a limit."""

from __future__ import annotations

import math
from collections.abc import Sequence

from scipy.special import ndtr

from erasure.eval.stats.estimate import Estimate
from erasure.eval.stats.resample import LEVEL, effective_n
from erasure.eval.stats.tests import holm


def worst_upper(rates: Sequence[Estimate]) -> float:
    """An upper bound for the largest of several rates: the largest upper end of their intervals.

    It needs no adjustment, however many there are. It is too low only where the interval of the largest rate is, and
    which rate that is does not depend on the data: a statement about all is tested by testing each (intersection-union,
    Berger 1982, Technometrics 24). One about *some*, as in :func:`above`, does need it.
    """
    highs = [rate.high for rate in rates if rate.value is not None and rate.high is not None]
    if not highs or len(highs) < len(rates):
        raise ValueError(f"every rate needs a value and an interval; got {list(map(str, rates))}; leave the others out")
    return max(highs)


def above(rates: Sequence[Estimate], limit: float, *, level: float = LEVEL) -> list[bool]:
    """Which of several rates are above a limit, adjusted for multiplicity.

    By Wilson's score test of "this rate is at most ``limit``" on the effective number, one-sided at (1 - level) / 2,
    with Holm's adjustment (1979); and only where the lower end of the rate's own interval is above the limit too. Rates
    without a value or an interval are not.
    """
    known = [i for i, r in enumerate(rates) if r.value is not None and r.low is not None]
    sizes = {i: rates[i].size or effective_n(rates[i].n, rates[i].clusters) for i in known}
    z = [(float(rates[i].value or 0) - limit) / math.sqrt(limit * (1 - limit) / sizes[i]) for i in known]
    adjusted = dict(zip(known, holm([float(ndtr(-one)) for one in z]), strict=True))
    return [
        (p := adjusted.get(i)) is not None and p <= (1 - level) / 2 and float(rate.low or 0) > limit
        for i, rate in enumerate(rates)
    ]
