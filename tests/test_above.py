"""Which of several rates are above a limit: adjusted for looking at all of them."""

from __future__ import annotations

import numpy as np
import pytest

from erasure.eval.stats import Estimate, above, effective_n, wilson

LIMIT = 0.2


def given(hits: int, n: int) -> Estimate:
    return Estimate(hits / n, *wilson(hits, effective_n(n, n)), "Wilson", n, n)


def test_one_rate_is_above_where_its_interval_is():
    for hits in range(31):
        assert above([given(hits, 30)], LIMIT) == [given(hits, 30).low > LIMIT]


def test_others_make_it_harder():
    quiet = given(1, 30)
    alone = next(hits for hits in range(31) if above([given(hits, 30)], LIMIT)[0])
    assert above([given(alone, 30), *[quiet] * 11], LIMIT) == [False] * 12
    assert above([given(alone + 4, 30), *[quiet] * 11], LIMIT) == [True, *[False] * 11]


def test_a_rate_without_an_interval_is_not():
    found = above([Estimate.missing("none"), Estimate(0.9, None, None, "counted", 5, 5), given(29, 30)], LIMIT)
    assert found == [False, False, True]


@pytest.mark.slow
def test_one_of_twelve_at_the_limit_is_rarely_called_above():
    """Each looked at by itself, one of twelve rates at the limit is above it in a fifth of all assessments."""
    rng, adjusted, apart = np.random.default_rng(0), 0, 0
    for _ in range(300):
        rates = [given(int(hits), 24) for hits in rng.binomial(24, LIMIT, 12)]
        adjusted += any(above(rates, LIMIT))
        apart += any(r.low > LIMIT for r in rates)
    assert adjusted / 300 < 0.06 < 0.12 < apart / 300
