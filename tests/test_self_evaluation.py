"""The evaluation judged by what is known beforehand: copies, filters, destroyed models, retrained ones, broken attacks.

The broken attack that is inconclusive and not "robust" stands in test_probe_attacks; the protocol traps of other
evaluations stand with what they are about (test_generate, test_evaluate, test_prompt_files, test_probe_sampling).
"""

from __future__ import annotations

import dataclasses
import itertools

import pytest

import erasure
from erasure.eval import assess
from erasure.eval.core.models import Model, Swapped, randomised
from erasure.eval.judge.licences import NOT_BY_CONSTRUCTION
from erasure.eval.probes.removal.inversion import ConceptInversion
from erasure.eval.probes.weigh import contrasts
from erasure.eval.stats import difference
from erasure.eval.worldkit import detectors
from erasure.eval.worldkit.material import WorldMaterial
from erasure.pipelines.guardrails import Guard
from tests.probe_helpers import ROLES, SUITE, rows_of, tiny_context


def hits(rows, family="name"):
    return [row.value for row in rows], [row.cluster for row in rows]


def test_a_copy_of_the_base_is_no_different_from_it():
    context = tiny_context()
    found = assess(
        context.pipe,
        {"copy": Swapped("copy", {"unet": context.pipe.unet})},
        SUITE,
        preset="quick",
        detectors=[context.judge, context.selector],
        controls=[m for m in context.models.values() if m.role == "gold"],
        probes=("direct", "paraphrase", "neighbours", "unrelated", "degeneracy"),
        progress=False,
    )
    changes = [e.estimate.value for e in found.evidence if e.measure == "change" and e.model == "copy"]
    assert changes
    assert set(changes) == {0.0}
    (claim,) = found.claims()
    assert (claim.suppression, claim.removal) == ("C0", "C0")


def test_two_retrained_models_are_mostly_found_equal_and_the_base_never():
    """In at least 90 % of repeats, at a rate of 2 % and 400 pictures; equality with the base in none.

    With 200 it is found in 60 %: the intervals assume that pictures of one prompt are alike, and these are not.
    """
    accepted = {"gold-1": 0, "base": 0}
    for repeat in range(30):
        rows = rows_of({"gold-0": 0.02, "gold-1": 0.02, "base": 0.95}, prompts=200, seeds=2, seed=repeat)
        first, names = hits(rows["gold-0"])
        for other in accepted:
            gap = difference(first, hits(rows[other])[0], names, level=0.90)
            accepted[other] += -0.05 < gap.low and gap.high < 0.05
    assert accepted["gold-1"] >= 27
    assert accepted["base"] == 0


def test_a_retrained_model_passes_at_the_level_of_the_others_and_the_base_does_not():
    for rate, inside in ((0.03, True), (0.95, False)):
        rows = rows_of({"base": 0.95, "UCE": rate, "gold-0": 0.03, "gold-1": 0.03}, prompts=50)
        (left,) = (e for e in contrasts("inversion", rows, ROLES) if e.measure == "residual")
        assert left.conclusive
        assert (left.estimate.high <= 0.25) is inside


def test_a_filter_of_prompts_is_nothing_to_whoever_holds_the_weights():
    """What a learned word finds behind the filter is, picture by picture, what it finds in the base."""
    context = tiny_context()
    probe = ConceptInversion.preset("smoke")
    guarded = Model("prompt filter", "erased", Guard.of_words(SUITE.phrases))
    rows = {model.name: probe.run(model, context) for model in (context.base, guarded)}
    plain, behind = ([dataclasses.replace(r, model="") for r in own] for own in rows.values())
    assert plain == behind


@pytest.fixture(scope="module")
def world():
    """A small assessment of the real thing: a filter and a destroyed model, on the world's superhero."""
    pipe, suite = erasure.world.load(), erasure.Suite.load("superhero")
    pipe.set_progress_bar_config(disable=True)
    small = dataclasses.replace(
        suite,
        concept=dataclasses.replace(suite.concept, templates=("{} on a black background",)),
        unrelated=suite.unrelated[:4],
        words=dataclasses.replace(suite.words, scenes={}),
        further=(),
    )
    arms = {"prompt filter": Guard.of_words(suite.phrases), "destroyed": randomised(pipe)}
    return assess(
        pipe, arms, small, preset="quick", detectors=detectors.detectors(), material=WorldMaterial("superhero"),
        probes=("direct", "neighbours", "unrelated", "degeneracy", "construction"), progress=False,
    )  # fmt: skip


@pytest.mark.slow
def test_a_filter_suppresses_and_is_never_called_removal(world):
    filtered = next(claim for claim in world.claims() if claim.model == "prompt filter")
    assert filtered.removal == NOT_BY_CONSTRUCTION
    shown = {e.model: e.estimate.value for e in world.evidence if (e.probe, e.measure) == ("direct", "rate")}
    assert shown["base"] == 1
    assert shown["prompt filter"] == 0


@pytest.mark.slow
def test_a_destroyed_model_is_caught_and_nothing_is_claimed_of_it(world):
    ruin = next(claim for claim in world.claims() if claim.model == "destroyed")
    shown = {e.model: e.estimate.value for e in world.evidence if (e.probe, e.measure) == ("direct", "rate")}
    assert shown["destroyed"] == 0  # suppression alone would pass it
    assert ruin.banners
    assert (ruin.suppression, ruin.removal) == ("C0", "C0")
    assert ruin.utility["neighbours"] in ("degraded", "destroyed")


@pytest.mark.slow
def test_every_sentence_names_its_model_or_target(world):
    for claim, sentence in itertools.chain(*([(c, s) for s in c.sentences] for c in world.claims())):
        assert claim.model in sentence or "superhero" in sentence or "filter" in sentence, sentence
