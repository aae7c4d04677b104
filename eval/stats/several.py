"""Several rates: a bound for the largest, and which of them are above a limit. Holm 1979."""

from __future__ import annotations

import math
from collections.abc import Sequence

from scipy.optimize import brentq
from scipy.special import ndtr

from erasure.eval.stats.estimate import Estimate
from erasure.eval.stats.resample import LEVEL, effective_n
from erasure.eval.stats.tests import holm


def worst_upper(rates: Sequence[Estimate], *, level: float = LEVEL) -> float:
    """An upper bound for the largest of several rates, adjusted for multiplicity.

    The smallest u for which Holm's procedure rejects "this rate is at least u" for every one of them, by Wilson's score
    test on the effective number, one-sided at (1 - level) / 2 as the upper end of an interval is; and never less than
    the largest upper end of their own intervals.
    """
    complete = (r for r in rates if r.value is not None and r.high is not None)
    known = [(float(r.value or 0), r.size or effective_n(r.n, r.clusters), float(r.high or 0)) for r in complete]
    if not known or len(known) < len(rates):
        raise ValueError(f"every rate needs a value and an interval; got {list(map(str, rates))}; leave the others out")

    def accepted(u: float) -> float:
        z = [(value - u) / math.sqrt(u * (1 - u) / size) for value, size, _ in known]
        return max(p for p in holm([float(ndtr(one)) for one in z]) if p is not None) - (1 - level) / 2

    least = max(1e-9, *(value for value, _, _ in known))
    u = 1.0 if least >= 1 - 1e-9 or accepted(1 - 1e-9) > 0 else float(brentq(accepted, least, 1 - 1e-9))
    return max(u, *(high for _, _, high in known))


def above(rates: Sequence[Estimate], limit: float, *, level: float = LEVEL) -> list[bool]:
    """Which of several rates are above a limit, adjusted for multiplicity.

    By Wilson's score test of "this rate is at most ``limit``" on the effective number, one-sided at (1 - level) / 2,
    with Holm's adjustment; and only where the lower end of the rate's own interval is above the limit too. Rates
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
