"""Bounds, tests of equivalence, corrected rates and sample sizes against scipy, published tables and simulation."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats as scipy_stats

from erasure.eval.inference import equivalence, mcnemar, rogan_gladen, worst_upper, zero_hits
from erasure.eval.power import (
    any_hit,
    auc_half_width,
    pairs_for_change,
    pairs_for_equivalence,
    pictures_for,
    rate_half_width,
)
from erasure.eval.stats import (
    Estimate,
    difference,
    rate,
    sign_flip,
    wilson,
)


def given(hits: float, n: int) -> Estimate:
    """A rate of independent pictures."""
    low, high = wilson(hits, n)
    return Estimate(hits / n, low, high, "Wilson", n, n)


@pytest.mark.parametrize(("n", "bound"), [(50, 0.058), (100, 0.0295), (200, 0.0149), (500, 0.0060), (1000, 0.0030)])
def test_none_seen_leaves_the_published_rates(n, bound):
    assert zero_hits(n) == pytest.approx(bound, abs=6e-4 if n == 50 else 6e-5)
    exact = scipy_stats.binomtest(0, n, alternative="less").proportion_ci(0.95, method="exact")
    assert zero_hits(n) == pytest.approx(exact.high, rel=1e-9)


def test_none_of_none_is_no_bound():
    with pytest.raises(ValueError, match="needs pictures"):
        zero_hits(0)


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (1, 0), (2, 10), (12, 12), (28, 12)])
def test_mcnemar_is_the_exact_binomial_test_and_sign_flips(gained, lost):
    both = gained + lost
    by_hand = min(1, 2 * scipy_stats.binom.cdf(min(gained, lost), both, 0.5)) if both else 1
    assert mcnemar(gained, lost) == pytest.approx(by_hand)
    before, after = [0] * gained + [1] * lost + [1], [1] * gained + [0] * lost + [1]
    assert sign_flip(before, after, range(len(before))) == pytest.approx(mcnemar(gained, lost), abs=0.006)


def test_equivalence_is_the_ninety_per_cent_interval_inside_the_margin():
    rng = np.random.default_rng(3)
    before = rng.integers(0, 2, 400).tolist()
    after = [1 - b if flip else b for b, flip in zip(before, rng.random(400) < 0.1, strict=True)]
    inside, outside = (equivalence(before, after, range(400), margin) for margin in (0.10, 0.01))
    assert inside.estimate == difference(before, after, range(400), level=0.90)
    assert inside.equivalent and max(inside.p_lower, inside.p_upper) < 0.05
    assert not outside.equivalent and max(outside.p_lower, outside.p_upper) > 0.05
    wide = difference(before, after, range(400))
    assert wide.low < inside.estimate.low and inside.estimate.high < wide.high


def test_p_value_and_interval_change_their_mind_at_one_margin():
    before, after = [1] * 100 + [0] * 100, [0] * 8 + [1] * 92 + [1] * 5 + [0] * 95
    estimate = difference(before, after, range(200), level=0.90)
    edge = max(-estimate.low, estimate.high)
    for margin, verdict in ((edge * 0.97, False), (edge * 1.03, True)):
        found = equivalence(before, after, range(200), margin)
        assert found.equivalent is verdict
        assert (max(found.p_lower, found.p_upper) < 0.05) is verdict


def test_the_score_p_value_is_tangos():
    # Tango 1998, table V: 43 lenses alike, one under the standard only, margin 0.1; published Z = 1.709, p = 0.044
    before, after = [1] + [1] * 43, [0] + [1] * 43
    assert equivalence(before, after, range(44), 0.1).p_lower == pytest.approx(0.044, abs=6e-4)


def test_not_significant_is_not_equal():
    before, after = [1, 0] * 6, [1, 0] * 5 + [0, 1]
    assert sign_flip(before, after, range(12)) == 1
    assert not equivalence(before, after, range(12), 0.05).equivalent
    same = equivalence([1, 0] * 6, [1, 0] * 6, range(12), 0.05)  # not one change in twelve pairs
    assert same.estimate.value == 0 and not same.equivalent


def test_equivalence_rarely_accepts_a_difference_of_the_margin():
    accepted = 0
    for trial in range(60):
        rng = np.random.default_rng(trial)
        change = rng.choice((-1, 0, 1), p=(0.05, 0.80, 0.15), size=100)  # a true difference of 0.10
        accepted += bool(equivalence([0.0] * 100, change.tolist(), range(100), 0.10).equivalent)
    assert accepted <= 7  # 3 are expected at most


def test_equivalence_of_other_numbers_and_of_none():
    noise = np.random.default_rng(0).normal(0, 0.1, 60).tolist()
    assert equivalence([0.0] * 60, noise, range(60), 0.1, shares=False).equivalent
    alone = equivalence([0.0, 0.0], [0.1, 0.2], ["a", "a"], 0.5, shares=False)
    assert alone.equivalent is None and alone.p_lower is None
    assert equivalence([None], [1], "a", 0.1).equivalent is None
    with pytest.raises(ValueError, match="declare how much"):
        equivalence([1], [1], "a", 0.0)


def test_rogan_gladen_gives_the_rate_behind_the_errors():
    perfect = Estimate(1.0, 1.0, 1.0, "known", 0, 0)
    seen = given(30, 100)
    assert rogan_gladen(seen, perfect, perfect).value == pytest.approx(0.3)
    assert rogan_gladen(seen, perfect, perfect).low == pytest.approx(seen.low)
    # prevalence 0.2 seen through sensitivity 0.9 and specificity 0.95: 0.2 * 0.9 + 0.8 * 0.05 = 0.22
    found = rogan_gladen(given(220, 1000), given(180, 200), given(190, 200))
    assert found.value == pytest.approx(0.2)


def test_rogan_gladen_is_the_delta_method_for_many_pictures():
    n, n_se, n_sp = 40000, 20000, 20000
    p, se, sp = 0.22, 0.9, 0.95
    found = rogan_gladen(given(p * n, n), given(se * n_se, n_se), given(sp * n_sp, n_sp))
    youden, truth = se + sp - 1, 0.2
    parts = p * (1 - p) / n, truth**2 * se * (1 - se) / n_se, (1 - truth) ** 2 * sp * (1 - sp) / n_sp
    half = 1.96 * np.sqrt(sum(parts)) / youden
    assert (found.low, found.high) == pytest.approx((truth - half, truth + half), abs=2e-4)


def test_rogan_gladen_covers_the_truth():
    covered, rng = 0, np.random.default_rng(1)
    for _ in range(200):
        truth, se, sp = 0.1, 0.85, 0.95
        p = truth * se + (1 - truth) * (1 - sp)
        found = rogan_gladen(*(given(rng.binomial(n, x), n) for x, n in ((p, 300), (se, 150), (sp, 150))))
        covered += found.value is not None and found.low <= truth <= found.high
    assert 0.91 <= covered / 200


def test_rogan_gladen_says_why_it_cannot():
    coin, good = given(50, 100), given(99, 100)
    assert "chance" in rogan_gladen(given(3, 100), coin, coin).reason
    assert "cannot give this rate" in rogan_gladen(given(0, 1000), good, given(500, 1000)).reason
    assert rogan_gladen(Estimate.missing("x"), good, good).value is None
    none = rogan_gladen(given(0, 100), good, good)
    assert none.value == 0 and none.low == 0 < none.high


def test_the_worst_of_several_rates_pays_for_being_looked_for():
    one, other = given(0, 100), given(20, 100)
    assert worst_upper([one]) == pytest.approx(wilson(0, 100)[1])
    four = worst_upper([one] * 4)
    assert four == pytest.approx(wilson(0, 100, level=1 - 0.05 / 4)[1], abs=1e-6)  # equal ones: Bonferroni
    for few, more in itertools.pairwise(([one], [one, one], [one, one, other], [one, one, other, other])):
        assert worst_upper(few) <= worst_upper(more)
    assert worst_upper([given(100, 100), one]) == 1
    clustered = rate([i < 20 for i in range(100)], [i // 20 for i in range(100)])  # a wider interval of its own
    assert worst_upper([clustered, one]) >= clustered.high
    with pytest.raises(ValueError, match="value and an interval"):
        worst_upper([one, Estimate.missing("x")])


def test_half_widths_of_rates():
    table = {50: 0.134, 142: 0.081, 200: 0.069, 500: 0.044, 1000: 0.031, 10000: 0.010}
    for n, half in table.items():
        assert rate_half_width(n) == pytest.approx(half, abs=6e-4)
    for wanted in (0.134, 0.05, 0.01):
        n = pictures_for(wanted)
        assert rate_half_width(n) <= wanted < rate_half_width(n - 1)
    with pytest.raises(ValueError, match="half width"):
        pictures_for(0)


PAIRED = [(0.10, 0.05, 312), (0.10, 0.03, 870), (0.10, 0.02, 1960), (0.20, 0.10, 155), (0.20, 0.05, 626),
          (0.20, 0.03, 1742), (0.30, 0.10, 234), (0.30, 0.05, 940)]  # fmt: skip
EQUIVALENT = [(0.10, 0.10, 86), (0.10, 0.05, 343), (0.10, 0.03, 952), (0.20, 0.10, 172), (0.20, 0.05, 686),
              (0.20, 0.03, 1904), (0.30, 0.10, 257), (0.30, 0.05, 1028), (0.30, 0.03, 2855)]  # fmt: skip


@pytest.mark.parametrize(("discordance", "change", "n"), PAIRED)
def test_pairs_for_a_change(discordance, change, n):
    assert pairs_for_change(change, discordance) == n


@pytest.mark.parametrize(("discordance", "margin", "n"), EQUIVALENT)
def test_pairs_for_equivalence(discordance, margin, n):
    assert pairs_for_equivalence(margin, discordance) == n


def test_so_many_pairs_do_find_the_change():
    n = pairs_for_change(0.10, 0.20)
    counts = np.random.default_rng(0).multinomial(n, (0.15, 0.05, 0.80), size=1500)
    found = [(up - down) ** 2 > scipy_stats.chi2.ppf(0.95, 1) * (up + down) for up, down, _ in counts]
    assert np.mean(found) == pytest.approx(0.80, abs=0.03)


@pytest.mark.parametrize(("change", "discordance"), [(0, 0.1), (0.2, 0.1), (0.1, 1.2)])
def test_pairs_that_cannot_be_are_refused(change, discordance):
    for needed in (pairs_for_change, pairs_for_equivalence):
        with pytest.raises(ValueError, match="change <= discordance"):
            needed(change, discordance)


def test_half_widths_of_aucs():
    table = {50: 0.114, 100: 0.080, 250: 0.051, 500: 0.036, 1000: 0.025}
    for n, half in table.items():
        assert auc_half_width(n) == pytest.approx(half, abs=6e-4)
    draws = np.random.default_rng(0).normal(size=(2000, 100))
    ranks = scipy_stats.rankdata(draws, axis=1)[:, :50].sum(1)
    assert 1.96 * np.std((ranks - 50 * 51 / 2) / 2500) == pytest.approx(auc_half_width(50), rel=0.06)


@pytest.mark.parametrize(
    ("p", "k", "hit"),
    [(0.01, 24, 0.21), (0.01, 50, 0.395), (0.01, 100, 0.63), (0.02, 24, 0.38), (0.02, 50, 0.64), (0.05, 24, 0.71),
     (0.05, 50, 0.92)],
)  # fmt: skip
def test_the_best_of_many(p, k, hit):
    assert any_hit(p, k) == pytest.approx(hit, abs=6e-3)
    assert any_hit(p, k) == pytest.approx(scipy_stats.binom.sf(0, k, p))
