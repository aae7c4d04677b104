"""Intervals cover what they should, and those that were made before did not: studies/coverage.py with few repeats.

Seeds are fixed. Each test holds the new number to a bound that the old one fails.
"""

from __future__ import annotations

import pytest

from erasure.eval.probes.suppression.p4d import P4D
from erasure.eval.probes.suppression.ring_a_bell import RingABell
from erasure.eval.probes.suppression.unlearn_diff_atk import UnlearnDiffAtk
from erasure.eval.stats import Kept
from studies.coverage import (
    Design,
    Effects,
    above_controls,
    advantages,
    attacks,
    changes,
    largest,
    losses,
    rates,
    ratios,
    residuals,
    slower,
    strata,
    trainings,
)
from tests.slow import first

REPEATS = 100


@pytest.mark.parametrize("share", first([0.15, 0.4], 0.15))
def test_a_rate_covers_the_truth_where_templates_differ(share):
    design, effects = Design(24, 3, 1), Effects(3, 1)
    assert rates(share, design, effects, REPEATS)[0] >= 0.92
    assert rates(share, design, effects, REPEATS, old=True)[0] < 0.87  # prompts as clusters


def test_the_upper_limit_is_rarely_too_low():
    _, below, high = rates(0.15, Design(6, 3, 2), Effects(3, 0), REPEATS)
    assert below <= 0.05 and high < 0.5
    assert rates(0.15, Design(6, 3, 2), Effects(3, 0), REPEATS, old=True)[1] > 0.06


def test_a_change_covers_the_truth_where_templates_differ():
    design, effects = Design(24, 3, 1), Effects(3, 1)
    assert changes(0.9, 0.4, design, effects, REPEATS)[0] >= 0.92
    assert changes(0.9, 0.4, design, effects, REPEATS, old=True)[0] < 0.9


def test_a_loss_of_the_margin_is_rarely_called_less():
    """Type I error of non-inferiority, where losses differ wildly between templates (docs/statistics.md)."""
    design, effects = Design(24, 5, 1), Effects(2, 0)
    assert changes(0.95, 0.9, design, effects, REPEATS, kind=Kept)[1] <= 0.08
    assert changes(0.9, 0.4, design, effects, REPEATS, kind=Kept, old=True)[1] > 0.08


def test_a_rate_after_training_covers_the_mean_over_trainings():
    assert trainings(0.5, 1.0, REPEATS) >= 0.92
    assert trainings(0.5, 1.0, REPEATS, old=True) < 0.6  # one training


def test_a_residual_covers_the_truth_over_trainings():
    covered, recovered = residuals(1.0, 60)
    assert covered >= 0.92 and recovered <= 0.05
    assert residuals(1.0, 60, old=True)[0] < 0.85


def test_a_ratio_has_no_interval_where_its_lower_part_may_be_zero():
    """Nothing is known of (e - g) / (b - g) where b equals g: a finite interval is wrong then (Fieller 1954)."""
    assert ratios(0.0, 0.0, 300)[1] <= 0.1  # 0.05 of the samples that have a value: those with b above g
    assert ratios(0.0, 0.0, 300, old=True)[1] > 0.15
    assert ratios(0.1, 2.0, 300)[0] >= 0.95
    assert ratios(0.3, 1.0, 300)[1] >= 0.8  # and it has one where b is clearly above g


def test_an_advantage_covers_the_truth_over_trainings():
    found = advantages(1.0, REPEATS)
    assert found.covered >= 0.95 and found.faster <= 0.05
    assert advantages(1.0, REPEATS, old=True).covered < 0.92  # one training


def test_a_model_that_never_saw_the_target_is_rarely_said_to_relearn_it_faster_than_others_like_it():
    found = advantages(0.5, 2 * REPEATS, between=1.0)  # as retrained models may differ: by a doubling
    assert found.faster <= 0.06 and found.above <= 0.05


def test_a_model_that_never_saw_the_target_is_rarely_said_to_show_more_than_others_like_it():
    above, less = above_controls(0.0, 1.0, REPEATS)[0], above_controls(0.2, 1.0, REPEATS)[1]
    assert above <= 0.08 and less <= 0.04
    assert above_controls(0.0, 1.0, REPEATS, old=True)[0] > 0.1  # controls taken as they are
    assert above_controls(0.2, 1.0, 3 * REPEATS, old=True)[1] > 0.05
    assert above_controls(0.5, 0.0, REPEATS)[0] >= 0.9  # and what is far above controls that agree is found


def test_a_model_that_learns_as_fast_as_the_base_is_shown_to_and_one_of_half_its_speed_is_not():
    """Eight prompts that only the base finds of unequal difficulty (on Emoji World it does)."""
    same, half = (slower(octave, 0.3, REPEATS) for octave in (0.0, 1.0))
    assert same.covered >= 0.92 and same.within >= 0.6
    assert half.covered >= 0.92 and half.within <= 0.05


def test_the_worst_stratum_allows_for_having_been_chosen():
    design, effects = Design(24, 3, 1), Effects(0, 0)
    assert strata(0.15, design, effects, REPEATS) >= 0.95
    assert strata(0.15, design, effects, REPEATS, old=True) < 0.95


def test_what_lost_most_is_nothing_where_nothing_was_lost():
    found = losses([0.95] * 9, REPEATS)
    assert found["plain"] < -0.07  # what the lowest three of nine labels "lose" by chance
    assert abs(found["value"]) < 0.01
    assert found["significant"] <= 0.05 and found["coverage"] >= 0.95 and found["degraded"] == 0


def test_a_true_loss_is_found_and_a_loss_of_the_margin_is_rarely_called_less():
    gone = losses([0.95] * 8 + [0.0], REPEATS)
    assert gone["significant"] >= 0.95 and gone["non-inferior"] == 0 and gone["coverage"] >= 0.95
    assert losses([0.95] * 8 + [0.5], REPEATS)["non-inferior"] <= 0.06


@pytest.mark.slow
def test_the_largest_of_many_rates_is_below_its_bound():
    """Without an adjustment for their number: a statement about all of them needs none."""
    for shares in ([0.2] + [0.0] * 19, [0.4] + [0.05] * 19, [0.15] * 20):
        assert largest(shares, REPEATS)[0] >= 0.97


def test_a_strong_attack_has_power_and_a_useless_one_has_none():
    """As many sentences as the preset standard attacks; six, as it did before, are too few."""
    sentences, tries = UnlearnDiffAtk.presets["standard"]["prompts"], UnlearnDiffAtk.presets["standard"]["tries"]
    assert attacks(sentences, tries, 0.7, 0.1, REPEATS).powerful >= 0.95
    assert attacks(sentences, tries, 0.05, 0.05, REPEATS).powerful <= 0.05
    assert attacks(6, 10, 0.7, 0.1, REPEATS).powerful < 0.7


@pytest.mark.parametrize("attack", [UnlearnDiffAtk, P4D, RingABell])
def test_an_attack_that_finds_nothing_can_show_that(attack):
    """Else C3 is out of reach at the preset, however well a model resists."""
    standard = attack.presets["standard"]
    assert attacks(standard["prompts"], standard["tries"], 0.0, 1e-9, 1).within == 1
    assert attacks(12, 5, 0.0, 1e-9, 1).within == 0
