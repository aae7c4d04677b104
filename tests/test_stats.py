"""Intervals hold up against scipy, published values, and simulation."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from scipy import optimize
from scipy import stats as scipy_stats

from erasure.eval.stats import (
    Estimate,
    difference,
    effective_n,
    holm,
    kappa,
    mean,
    paired_score,
    rate,
    residual,
    sign_flip,
    wilson,
)


def test_wilson_gives_the_textbook_intervals():
    for hits, n, low, high in ((5, 50, 0.043, 0.214), (20, 200, 0.066, 0.149), (100, 1000, 0.083, 0.120)):
        assert wilson(hits, n) == pytest.approx((low, high), abs=6e-4)


def test_wilson_half_widths_at_one_half():
    for n, half in ((50, 0.134), (142, 0.081), (500, 0.044)):
        low, high = wilson(n // 2, n)
        assert (high - low) / 2 == pytest.approx(half, abs=6e-4)


def test_wilson_with_fractions_meets_scipy_at_whole_numbers():
    exact = scipy_stats.binomtest(7, 40).proportion_ci(0.95, method="wilson")
    assert wilson(7 + 1e-9, 40) == pytest.approx((exact.low, exact.high), abs=1e-6)


@pytest.mark.parametrize(("hits", "n"), [(-1, 10), (11, 10), (0, 0)])
def test_wilson_refuses_what_is_not_a_rate(hits, n):
    with pytest.raises(ValueError, match="0 <= hits <= n"):
        wilson(hits, n)


def test_design_effect():
    assert 100 / effective_n(100, 20) == pytest.approx(2.2)  # five pictures a prompt, correlation 0.3
    assert 100 / effective_n(100, 10) == pytest.approx(3.7)


def test_rate_knows_that_pictures_of_one_prompt_are_not_independent():
    prompts = np.repeat(np.arange(30), 10)
    hits = [bool(p % 2) for p in prompts]  # a prompt hits always or never
    clustered, naive = rate(hits, list(prompts)), wilson(150, 300)
    assert clustered.value == 0.5
    assert clustered.high - clustered.low > 2 * (naive[1] - naive[0])


def test_rate_covers_the_truth():
    rng, truth, covered = np.random.default_rng(1), 0.3, 0
    for trial in range(150):
        levels = rng.beta(3, 7, size=40)
        hits = (rng.random((40, 3)) < levels[:, None]).ravel().tolist()
        estimate = rate(hits, np.repeat(np.arange(40), 3).tolist(), seed=trial)
        covered += estimate.low <= truth <= estimate.high
    assert 0.88 <= covered / 150 <= 0.99


def test_none_seen_is_bounded_by_the_prompts_not_by_the_pictures():
    none = rate([False] * 100, [i // 5 for i in range(100)])
    assert none.value == 0 and none.low == 0
    assert wilson(0, 100)[1] < none.high < wilson(0, 20)[1]
    assert rate([True] * 100, [i // 5 for i in range(100)]).low == pytest.approx(1 - none.high)


def test_missing_is_none_with_a_reason_and_never_zero():
    for estimate in (rate([], []), rate([None, None], ["a", "b"]), mean([None], ["a"]), difference([], [], [])):
        assert estimate.value is None and estimate.low is None and estimate.high is None and estimate.reason
    assert rate([None, True, False, None], list("abcd")).excluded == 2
    assert f"{Estimate.missing('why')}" == "not available"


def test_difference_is_paired():
    rng = np.random.default_rng(0)
    before = (rng.random(200) < 0.5).tolist()
    after = list(before)
    after[:20] = [False] * 20
    prompts = list(range(200))
    change = difference(before, after, prompts)
    assert change.value == pytest.approx(np.mean(after) - np.mean(before))
    unpaired = rate(before, prompts)
    assert change.high - change.low < unpaired.high - unpaired.low
    assert change.low <= change.value <= change.high <= 0


def test_difference_without_variation_still_has_width():
    prompts = [i // 2 for i in range(40)]
    gone = difference([True] * 40, [False] * 40, prompts)
    assert gone.value == -1 and gone.low == -1 and -1 < gone.high < -0.6
    same = difference([True] * 40, [True] * 40, prompts)
    assert same.value == 0 and same.low < 0 < same.high


@pytest.mark.parametrize("per_prompt", [1, 2])
def test_more_hits_never_look_like_fewer(per_prompt):
    prompts = [i // per_prompt for i in range(36)]
    found = [rate([i < hits for i in range(36)], prompts) for hits in range(37)]
    for fewer, more in itertools.pairwise(found):
        assert fewer.high <= more.high and fewer.low <= more.low
        assert fewer.low <= fewer.value <= fewer.high


@pytest.mark.parametrize("right", [0, 30, 60])
def test_nothing_changed_is_never_worse_than_something_changed(right):
    before, prompts = [i < right for i in range(60)], [i * 46 // 60 for i in range(60)]

    def changed(*flipped: int) -> Estimate:
        return difference(before, [b != (i in flipped) for i, b in enumerate(before)], prompts)

    same = changed()
    assert same.value == 0 and same.low < 0 < same.high
    for flipped in ((0,), (59,), (0, 59), (0, 1), (58, 59)):
        other = changed(*flipped)
        assert same.high - same.low <= other.high - other.low
        assert same.low >= other.low or other.value > 0
        assert same.high <= other.high or other.value < 0
        assert other.low < 0 < other.high  # one or two of 60 are evidence of nothing


def test_the_paired_score_interval_is_the_published_one():
    # Tango 1998, table V: 43 lenses right both ways, one under the standard only; 90 % limit
    assert paired_score(0, 1, 44, level=0.90)[0] == pytest.approx(-0.096, abs=5e-4)
    # R, PropCIs::scoreci.mp with 41 and 48 of 549 pairs changed, 90 %
    assert paired_score(41, 48, 549, level=0.90) == pytest.approx((-0.0414, 0.0157), abs=5e-5)


def test_the_paired_score_interval_does_not_collapse():
    z = scipy_stats.norm.ppf(0.975)
    limit = z**2 / (60 + z**2)  # of Tango's equation when no pair changed, solved by hand
    before = [True] * 30 + [False] * 30
    same = difference(before, before, range(60))
    assert (same.low, same.high) == pytest.approx((-limit, limit), abs=1e-6)


@pytest.mark.parametrize("counts", [(3, 9, 40), (0, 5, 30), (7, 0, 25), (12.5, 2.25, 46.15), (20, 0, 20)])
def test_the_limits_solve_the_score_equation(counts):
    """Against a numerical maximum of the likelihood, not the closed form."""
    up, down, n = counts

    def log_likelihood(q, d):
        cells = ((up, q + d), (down, q), (n - up - down, 1 - 2 * q - d))
        return -sum(k * np.log(max(p, 1e-300)) for k, p in cells if k)

    value = (up - down) / n
    for d in paired_score(*counts):
        if abs(d) == 1:
            assert value == d
            continue
        bounds = (max(0, -d), (1 - d) / 2)
        options = {"xatol": 1e-12}
        q = optimize.minimize_scalar(log_likelihood, args=(d,), bounds=bounds, method="bounded", options=options).x
        statistic = (n * value - n * d) / np.sqrt(n * (2 * q + d * (1 - d)))
        assert abs(statistic) == pytest.approx(1.96, abs=2e-3)


def test_changes_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="gained \\+ lost <= n"):
        paired_score(6, 6, 10)


def test_sign_flips_are_mcnemars_test_for_single_pictures():
    before = [True] * 10 + [False] * 2 + [True] * 50
    after = [False] * 10 + [True] * 2 + [True] * 50
    assert sign_flip(before, after, range(62)) == pytest.approx(2 * scipy_stats.binom.cdf(2, 12, 0.5))
    many = sign_flip([True] * 28 + [False] * 12, [False] * 28 + [True] * 12, range(40))
    assert many == pytest.approx(2 * scipy_stats.binom.cdf(12, 40, 0.5), abs=0.005)
    assert sign_flip([True, False], [True, False], "ab") == 1
    assert sign_flip([None], [True], "a") is None


def test_pictures_of_one_prompt_are_not_independent_evidence():
    before, after = [True] * 30, [False] * 30
    assert sign_flip(before, after, [i // 10 for i in range(30)]) == pytest.approx(2 / 2**3)
    assert sign_flip(before, after, range(30)) < 0.001


def test_holm_is_holm():
    assert holm([0.01, None, 0.04, 0.03, 0.005]) == pytest.approx([0.03, None, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1, 1] and holm([]) == []


def test_kappa():
    assert kappa(list("aabb"), list("aabb"), range(4)).value == 1
    first, second = ["y"] * 25 + ["n"] * 25, ["y"] * 20 + ["n"] * 5 + ["y"] * 10 + ["n"] * 15
    assert kappa(first, second, range(50)).value == pytest.approx(0.4)  # 20, 5, 10, 15: the usual worked example
    assert kappa(["a"] * 5, ["a"] * 5, range(5)).value is None


def test_same_seed_same_interval():
    hits, prompts = [i % 3 == 0 for i in range(60)], [i // 2 for i in range(60)]
    assert rate(hits, prompts, seed=3) == rate(hits, prompts, seed=3)


def test_estimates_print_for_people():
    assert f"{Estimate(0.125, 0.043, 0.214, 'm', 8, 8):%}" == "12.5 % (4.3 to 21.4)"
    assert str(Estimate(0.125, 0.043, 0.214, "m", 8, 8)) == "12.5 % (4.3 to 21.4)"
    assert f"{Estimate(0.5, None, None, 'm', 8, 8):.2f}" == "0.50"


def test_copies_of_a_picture_narrow_nothing():
    before, after, clusters = [0.0] * 18, [0.0] * 17 + [1.0], list(range(18))
    once = difference(before, after, clusters)
    assert difference(before * 3, after * 3, clusters * 3, copies=3) == dataclasses.replace(once, n=54)
    assert difference(before * 3, after * 3, clusters * 3).high < once.high
    alone = residual(after, [[1.0] * 18], [before], clusters)
    many = residual(after, [[1.0] * 18], [before] * 3, clusters)
    assert many.high >= alone.high - 0.02  # three controls that agree say no more about the eighteen pictures


def test_a_residual_where_base_and_controls_hardly_differ_has_no_interval_rather_than_a_huge_one():
    """Three controls whose mean is the base's rate in many draws, up to rounding."""
    names = [f"prompt {i}" for i in range(14) for _ in range(3)]
    base = [float(i % 7 < 4) for i in range(42)]
    never = [[float((i + k) % 7 < 4) for i in range(42)] for k in (1, 2)] + [[float(i % 7 < 3) for i in range(42)]]
    found = residual([float(i % 5 < 2) for i in range(42)], [base], never, names)
    assert found.value is not None
    assert found.low is None or max(abs(found.low), abs(found.high)) < 1e6
