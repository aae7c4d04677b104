"""When a curve reaches a level, and how much sooner: eval/stats/times.py, against values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from erasure.eval.stats import Reached, reached, sooner, stacked
from erasure.eval.stats.resample import jackknife_half_width, spread_half_width, t_half_width

STEPS = (0, 2, 4, 8, 16)
HALF = 0.5


def when(*curve: float) -> tuple[float, float, float]:
    found = reached(np.array([curve]), np.array([HALF]), STEPS)
    return float(found.at[0]), float(found.low[0]), float(found.high[0])


def times(*at: float) -> Reached:
    """Of curves whose times are known exactly."""
    return Reached(*(np.array(at, float) for _ in range(3)))


def compared(mine: Reached, *others: Reached, runs: int = 0) -> tuple:
    return sooner(mine, stacked(others), runs=runs, by="runs", n=8, clusters=8, last=16)


@pytest.mark.parametrize(
    ("curve", "at", "low", "high"),
    [
        ((0, 0, 0.4, 0.6, 1), 2.5, 2.4, 2.6),  # half way from 4 to 8, and wrong by a fifth of that at most
        ((0, 0, 0, 1, 1), 2.5, 2, 3),  # a jump may be anywhere between the two
        ((0, 0.1, 0.3, 0.5, 1), 3, 2.8, 3),  # at a look itself
        ((0, 0.2, 0.6, 0.1, 0.9), 1.75, 1.45, 1.85),  # the first time counts
        ((0, 0.8, 1, 1, 1), 0.625, 0, 1),  # before the first look
        ((0.6, 0.8, 1, 1, 1), -np.inf, -np.inf, 1),
        ((0, 0, 0, 0.2, 0.4), np.inf, 4, np.inf),
    ],
)
def test_a_time_is_read_between_two_looks(curve, at, low, high):
    assert when(*curve) == pytest.approx((at, low, high))


def test_a_level_of_nothing_is_never_reached():
    assert reached(np.ones((1, 5)), np.zeros(1), STEPS).at == [np.inf]


def test_sooner_is_the_others_mean_minus_mine():
    mine, others = times(*[1.0] * 41), (times(*[2.0] * 41), times(*[4.0] * 41))
    estimate, note = compared(mine, *others)
    assert estimate.value == 2 and not note
    assert estimate.high == pytest.approx(2 + t_half_width([2.0, 4.0]))  # two others differ by so much


def test_the_interval_is_no_narrower_than_the_jackknife_over_runs():
    without = [0.5, 1.0, 1.5]
    mine, other = times(1.0, *without, *[1.0] * 40), times(*[2.0] * 44)
    estimate, _ = compared(mine, other, runs=3)
    assert estimate.low == pytest.approx(1 - jackknife_half_width(without))


def test_of_a_mean_the_jackknife_is_the_t_interval():
    runs = np.array([0.2, 0.9, 0.4, 0.7])
    without = (runs.sum() - runs) / 3
    assert jackknife_half_width(without) == pytest.approx(t_half_width(runs))
    assert spread_half_width(runs) == pytest.approx(t_half_width(runs) * 5**0.5)


def test_what_is_not_seen_leaves_a_bound_or_nothing():
    never, soon = reached(np.zeros((41, 5)), np.full(41, HALF), STEPS), times(*[1.0] * 41)
    estimate, note = compared(soon, never)
    assert (estimate.value, estimate.high, note) == (3, None, "a lower bound")
    estimate, note = compared(never, soon)
    assert (estimate.value, estimate.low, note) == (-3, None, "an upper bound")
    assert compared(never, never)[0].value is None
