"""Bounds, strata and losses that were looked for, and what is drawn together."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats as scipy_stats

from erasure.eval.stats import (
    ONE_RUN,
    Asked,
    Estimate,
    Kept,
    Trained,
    difference,
    effective_n,
    effective_size,
    lost_most,
    mean,
    rate,
    residual,
    wilson,
    worst_stratum,
    worst_upper,
)


def given(hits: float, n: int) -> Estimate:
    """A rate of independent pictures."""
    low, high = wilson(hits, n)
    return Estimate(hits / n, low, high, "Wilson", n, n)


def asked(templates: int, phrases: int, images: int = 1, kind: type = Asked) -> list[Asked]:
    return [kind(f"t{t}", f"p{p}") for t in range(templates) for p in range(phrases) for _ in range(images)]


def test_the_bound_for_the_largest_of_several_rates_is_the_largest_of_their_bounds():
    one, other = given(0, 100), given(20, 100)
    assert worst_upper([one]) == worst_upper([one] * 4) == pytest.approx(wilson(0, 100)[1])
    assert worst_upper([one, other, one]) == pytest.approx(wilson(20, 100)[1])
    assert worst_upper([given(100, 100), one]) == 1
    clustered = rate([i < 20 for i in range(100)], [i // 20 for i in range(100)])  # a wider interval of its own
    assert worst_upper([clustered, other]) == clustered.high > worst_upper([other])
    with pytest.raises(ValueError, match="value and an interval"):
        worst_upper([one, Estimate.missing("x")])


# --- crossed clusters -------------------------------------------------------------------------------------------------


def test_pictures_that_share_nothing_else_are_worth_what_prompts_are():
    alone = [Asked(f"t{i}", f"p{i}") for i in range(40) for _ in range(5)]
    assert effective_size(alone) == pytest.approx(effective_n(200, 40))
    assert effective_size([str(unit) for unit in alone]) == pytest.approx(effective_n(200, 40))


def test_the_effective_number_counts_who_shares_what():
    # of 24 x 3 pictures each shares its template with 2 others and its phrase with 23
    assert effective_size(asked(24, 3)) == pytest.approx(72 / (1 + 0.1 * 2 + 0.05 * 23))
    assert effective_size(asked(24, 3, kind=Kept)) == pytest.approx(72 / (1 + 0.1 * 2))  # labels are no sample
    assert effective_size(asked(24, 1)) == pytest.approx(24)  # one phrase is no sample of phrases
    assert effective_size(asked(24, 3) * 3, copies=3) == pytest.approx(effective_size(asked(24, 3)))
    runs = [Trained(r, f"p{p}") for r in range(3) for p in range(12)]
    assert effective_size(runs) == pytest.approx(36 / (1 + 0.3 * 2))


def test_hits_in_one_template_are_not_so_many_independent_facts():
    """RECE: 5 of 12 pictures in one style, none of 24 elsewhere."""
    units = asked(6, 3, 2)
    hits = [float(unit.first in ("t0", "t1") and i % 2 == 0 and i < 10) for i, unit in enumerate(units)]
    assert sum(hits) == 5
    by_prompt, crossed = rate(hits, [str(unit) for unit in units]), rate(hits, units)
    assert crossed.value == by_prompt.value and crossed.clusters == by_prompt.clusters == 18
    assert crossed.high > by_prompt.high + 0.03
    assert "template and phrase" in crossed.method


def test_none_of_n_keeps_an_upper_limit_in_every_design():
    for units in (asked(24, 3), asked(6, 3, 2), asked(1, 3), asked(3, 1), asked(24, 3, kind=Kept)):
        none = rate([0.0] * len(units), units)
        assert none.low == 0 and none.high == pytest.approx(wilson(0, effective_size(units))[1])
        same = difference([0.0] * len(units), [0.0] * len(units), units)
        assert same.low < 0 < same.high


def test_an_incomplete_design_is_weighed_too():
    units = [Asked(f"t{t}", f"p{p}") for p in range(5) for t in range(24) if (t + p) % 3 == 0]
    hits = [float(unit.first in ("t0", "t3")) for unit in units]
    found = rate(hits, units)
    assert 0 <= found.low < found.value < found.high < 1


def test_kept_labels_are_meant_as_they_stand():
    """One label of nine is lost in all templates: about these nine that is certain, about others it would not be."""
    units = asked(12, 9, kind=Kept)
    after = [float(unit.second != "p0") for unit in units]
    listed = difference([1.0] * len(units), after, units)
    sample = difference([1.0] * len(units), after, asked(12, 9))
    assert listed.high < -0.04 and listed.low > -0.3
    assert sample.low < listed.low - 0.1


def test_runs_are_drawn_as_a_whole():
    units = [Trained(r, f"p{p}") for r in range(3) for p in range(24)]
    hits = [float(unit.first == 0) for unit in units]  # one training of three teaches it, in every picture
    whole, blind = rate(hits, units), rate(hits, [unit.second for unit in units])
    assert whole.low == 0 and whole.high == 1
    assert blind.high - blind.low < 0.5


def test_one_run_says_what_is_not_in_its_interval():
    hits = [float(i % 3 == 0) for i in range(24)]
    one = [Trained(0, f"p{i}") for i in range(24)]
    found = rate(hits, one)
    assert ONE_RUN in found.method
    plain = rate(hits, [unit.second for unit in one])
    assert (found.low, found.high) == (plain.low, plain.high)
    several = rate(hits, [Trained(i % 3, f"p{i}") for i in range(24)])
    assert ONE_RUN not in several.method


def test_few_levels_have_the_t_interval():
    values = [1.0] * 4 + [2.0] * 4 + [6.0] * 4
    found = mean(values, [Trained(i // 4, i % 4) for i in range(12)])
    half = scipy_stats.t.ppf(0.975, 2) * np.std([1, 2, 6], ddof=1) / 3**0.5
    assert (found.low, found.high) == pytest.approx((3 - half, 3 + half))


def test_a_residual_knows_that_runs_differ():
    units = [Trained(r, f"p{p}") for r in range(3) for p in range(12)]
    erased = [float(unit.first == 0) for unit in units]
    whole = residual(erased, [[1.0] * 36], [[0.0] * 36] * 2, units)
    blind = residual(erased, [[1.0] * 36], [[0.0] * 36] * 2, [unit.second for unit in units])
    assert whole.value == blind.value == pytest.approx(1 / 3)
    assert whole.high - whole.low > 1.5 * (blind.high - blind.low)


# --- chosen for being extreme -----------------------------------------------------------------------------------------


def test_the_worst_stratum_is_named_with_its_n():
    units = asked(24, 3)
    hits = [float(unit.first == "t7" or unit == Asked("t1", "p2")) for unit in units]
    estimate, name = worst_stratum(hits, units)
    assert name == "template \u201ct7\u201d, the highest of 27"
    assert (estimate.value, estimate.n) == (1.0, 3)
    assert estimate.low == pytest.approx((0.05 / 27 / 2) ** (1 / 3))  # three of three, exactly, at 0.05 / 27
    phrase, name = worst_stratum([float(unit.second == "p1") for unit in units], units)
    assert name.startswith("phrase \u201cp1\u201d") and phrase.n == 24


def test_strata_need_two_of_a_kind_and_three_pictures():
    assert worst_stratum([1.0, 0.0], ["a", "b"]) is None
    assert worst_stratum([1.0] * 4, asked(4, 1)) is None  # one picture a template
    assert worst_stratum([1.0] * 12, [Trained(i % 3, i) for i in range(12)]) is None
    assert worst_stratum([], []) is None


def test_the_worst_stratum_of_none_keeps_an_upper_limit():
    estimate, _ = worst_stratum([0.0] * 72, asked(24, 3))
    assert estimate.value == estimate.low == 0 < estimate.high


def test_what_lost_most_is_named_with_a_p_value():
    labels = [str(label) for label in range(9) for _ in range(12)]
    prompts = [f"{label} {i}" for i, label in enumerate(labels)]
    estimate, names, p = lost_most([1.0] * 108, [float(label != "4") for label in labels], prompts, labels)
    assert names == ["4"] and p < 0.01
    assert estimate.value == pytest.approx(-1) and estimate.low == -1 and estimate.high < -0.4
    nothing, _, p = lost_most([1.0] * 108, [1.0] * 108, prompts, labels, count=3)
    assert nothing.value == 0 and p == 1 and nothing.low < 0 < nothing.high
    assert lost_most([], [], [], [])[0].value is None
