"""Intervals hold up against scipy, published values, and simulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats as scipy_stats

from erasure.eval.stats import (
    Estimate,
    _newcombe,
    difference,
    effective_n,
    kappa,
    mcnemar,
    mean,
    rate,
    wilson,
    zero_hit_bound,
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


def test_zero_hits_bound_is_the_published_one():
    for n, bound in ((50, 0.058), (100, 0.0295), (200, 0.0149), (500, 0.0060), (1000, 0.0030)):
        assert zero_hit_bound(n) == pytest.approx(bound, abs=6e-4)
        assert scipy_stats.binom.cdf(0, n, zero_hit_bound(n)) == pytest.approx(0.05)


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
    assert zero_hit_bound(100) < none.high < zero_hit_bound(20)
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


def test_few_prompts_give_the_large_sample_interval_of_a_paired_difference():
    counts = {(True, True): 900, (True, False): 300, (False, True): 100, (False, False): 700}
    before, after = zip(*[pair for pair, count in counts.items() for _ in range(count)], strict=True)
    pairs, n = np.array(list(zip(before, after, strict=True))), len(before)
    low, high = _newcombe(pairs, n)
    error = np.sqrt((300 + 100) / n - (200 / n) ** 2) / np.sqrt(n)  # Wald, exact in the limit
    assert (low, high) == pytest.approx((-0.1 - 1.96 * error, -0.1 + 1.96 * error), abs=2e-3)


def test_mcnemar_is_the_exact_test():
    before = [True] * 10 + [False] * 3 + [True] * 50
    after = [False] * 10 + [True] * 3 + [True] * 50
    assert mcnemar(before, after) == pytest.approx(2 * scipy_stats.binom.cdf(3, 13, 0.5))
    assert mcnemar([True, False], [True, False]) == 1
    assert mcnemar([None], [True]) is None


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
