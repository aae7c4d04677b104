"""Attacks: every candidate is drawn and scored, chance is subtracted, and an attack that does not work says nothing."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
from collections import Counter

import pytest
import torch
from PIL import Image

from erasure.backbone import backbone_of
from erasure.eval.core.models import Model, Swapped
from erasure.eval.core.pictures import generate, weights_hash
from erasure.eval.probes import probe_class
from erasure.eval.probes.attacking import generator_of, goals_of, with_pictures, without_words
from erasure.eval.probes.base import Observation, lacking
from erasure.eval.probes.embedding import MARK, FreeWords
from erasure.eval.probes.success import any_hits, found_by
from erasure.eval.probes.suppression.p4d import P4D
from erasure.eval.probes.suppression.random_control import RandomControl
from erasure.eval.probes.suppression.ring_a_bell import RingABell, encoded
from erasure.eval.probes.suppression.unlearn_diff_atk import UnlearnDiffAtk, simplex, straight_through
from tests.eval_helpers import PixelDetector
from tests.probe_helpers import tiny_context
from tests.slow import first

ATTACKS = [UnlearnDiffAtk, P4D, RingABell]
ROLES = {"base": "base", "UCE": "erased", "weak": "erased", "gold-0": "gold"}


@pytest.fixture(scope="module")
def context():
    return tiny_context()


# --- what is asked --------------------------------------------------------------------------------------------------


def test_goals_hide_the_name_and_keep_the_sentence(context):
    goals = goals_of(context, "name", 99)
    assert [goal.named for goal in goals] == ["a cat", "a picture of a cat", "a kitty", "a picture of a kitty"]
    assert (goals[1].spoken, goals[1].before) == (f"a picture of {MARK}", "a picture of")
    prefixed = goals_of(context, "prefix", 2)
    assert [goal.spoken for goal in prefixed] == [f"{MARK} a cat", f"{MARK} a picture of a kitty"]
    assert [goal.before for goal in prefixed] == [goal.named for goal in prefixed]
    assert without_words(f"a drawing of {MARK} , red") == "a drawing of, red"
    with pytest.raises(ValueError, match="unknown place"):
        goals_of(context, "suffix", 2)


def test_conditioning_in_the_place_of_a_prompt_draws_the_same(context):
    settings = {"seeds": (3,), "num_inference_steps": 2, "progress": False}
    ((spoken,),) = generate(context.pipe, ["a photo"], **settings)
    embeds = backbone_of(context.pipe).encode(["a photo"]).hidden
    ((told,),) = generate(context.pipe, ["a photo"], prompt_embeds=embeds, **settings)
    assert spoken.tobytes() == told.tobytes()
    with pytest.raises(ValueError, match="one row per prompt"):
        generate(context.pipe, ["a", "b"], prompt_embeds=embeds, **settings)


# --- what is found --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", first(ATTACKS, UnlearnDiffAtk, RingABell))
def test_an_attack_draws_all_it_tries_and_its_control_and_changes_nothing(kind, context):
    probe, model, before = kind.preset("smoke"), context.models["noise"], weights_hash(context.pipe)
    rows = probe.run(model, context)
    assert rows == probe.run(model, context)
    assert weights_hash(context.pipe) == before
    assert all(p.grad is None for p in context.pipe.unet.parameters())
    count = Counter(row.family for row in rows)
    assert count == {"attack": 4, "control": 4, "fresh": 2, "fresh control": 2, "before": 2}
    attack = [row for row in rows if row.family == "attack"]
    chosen = {row.cluster: row.facts["ids"] for row in attack if row.facts["selected"]}
    assert len(chosen) == 2 == sum(row.facts["selected"] for row in attack)
    assert all(row.facts["ids"] == chosen[row.cluster] for row in rows if row.family == "fresh")
    random = {row.cluster: row.facts["ids"] for row in rows if row.family == "control" and row.facts["selected"]}
    assert all(row.facts["ids"] == random[row.cluster] for row in rows if row.family == "fresh control")
    own = {row.seed for row in rows if row.facts["noise"] == "own"}
    fresh = {row.seed for row in rows if row.facts["noise"] == "fresh"}
    assert own == {0, 1} and fresh == {2} and {row.facts["try"] for row in attack} == own
    assert all(row.facts["try"] in own for row in rows if row.family in ("fresh", "fresh control"))
    special = set(context.pipe.tokenizer.all_special_ids)
    assert all(len(row.facts["ids"]) == probe.tokens and not special & set(row.facts["ids"]) for row in attack)
    assert json.loads(json.dumps([dataclasses.asdict(row) for row in rows]))


@pytest.mark.parametrize("kind", ATTACKS)
def test_without_a_second_detector_there_is_no_attack(kind, context):
    for selector in (None, PixelDetector()):
        assert "two detectors" in lacking(kind.preset("smoke"), dataclasses.replace(context, selector=selector))


def test_a_weak_erasure_has_to_be_in_the_assessment(context):
    with pytest.raises(ValueError, match="no such weak erasure"):
        RingABell(weak="nobody").run(context.base, context)


def test_an_attack_on_a_picture_needs_a_picture(context):
    assert "real pictures" in lacking(UnlearnDiffAtk.preset("smoke"), dataclasses.replace(context, material=None))


def test_matching_the_base_finds_tokens_that_match_better(context):
    goals = goals_of(context, "all", 2)
    start = P4D(tokens=1, tries=1, iterations=1, moments=1, learning_rate=0.0).search(context.base, context, goals)
    end = P4D(tokens=1, tries=2, iterations=12, moments=1).search(context.base, context, goals)
    assert sum(own[-1].facts["loss"] for own in end) < sum(own[-1].facts["loss"] for own in start)


def test_the_genetic_search_finds_the_very_tokens(context):
    words = FreeWords(context.pipe, [MARK], count=1)
    probe = RingABell(tokens=1, tries=1, etas=(1.0,), population=80, generations=30, mutation=1.0)
    target = encoded(context, ["cat"])[0]
    (best,) = probe.fittest(words, target, goals_of(context, "all", 1)[0], 1.0)
    assert context.pipe.tokenizer.decode(best.ids).strip() == "cat"
    assert best.facts["loss"] == pytest.approx(0, abs=1e-6)


def test_one_genetic_search_serves_every_model(context):
    probe, goals = RingABell.preset("smoke"), goals_of(context, "all", 2)
    found = [probe.search(model, context, goals) for model in context.models.values()]
    assert all(one == found[0] for one in found)
    again = RingABell(**{**RingABell.presets["smoke"], "weak": "noise"})  # another key: searched anew
    assert again.search(context.base, context, goals) == found[0]
    with pytest.raises(ValueError, match="raise it or lower tries"):
        RingABell(tries=100, population=8)
    with pytest.raises(ValueError, match="whole prompt"):
        RingABell(place="prefix")


def test_what_is_wrapped_around_a_pipeline_reads_strings(context):
    heard = []

    class Listening(Swapped):
        intervention = "filter"

        def wrap(self, pipe):
            class Wrapped:
                def __getattr__(self, name):
                    return getattr(pipe, name)

                def __call__(self, prompt, **settings):
                    heard.extend(prompt)
                    return pipe(prompt=prompt, **settings)

                _progress_bar_config: dict = {}

            return Wrapped()

    rows = RingABell.preset("smoke").run(Model("filter", "erased", Listening("filter", {})), context)
    assert {row.facts["prompt"] for row in rows} == set(heard)


def test_the_simplex_is_reached_and_the_gradient_passes():
    w = torch.randn(3, 4, 20, generator=torch.Generator().manual_seed(0))
    on = simplex(w)
    assert torch.allclose(on.sum(-1), torch.ones(3, 4)) and (on >= 0).all()
    assert torch.allclose(simplex(on), on, atol=1e-6)
    other = torch.rand(3, 4, 20, generator=torch.Generator().manual_seed(1))
    other /= other.sum(-1, keepdim=True)
    assert ((on - w).norm(dim=-1) <= (other - w).norm(dim=-1)).all()  # the nearest
    row = w.clone().requires_grad_()
    told = straight_through(row)
    assert torch.equal(told.detach().round(), torch.nn.functional.one_hot(w.argmax(-1), 20).float())
    (gradient,) = torch.autograd.grad((told * other).sum(), row)
    assert torch.allclose(gradient, other)


# --- what it shows --------------------------------------------------------------------------------------------------


def fabricated(rates, *, prompts=20, tries=4, seed=0):
    """Rows of an attack: model -> family -> chance of a hit."""
    rows = {}
    for name, families in rates.items():
        rows[name] = [
            Observation(
                name, family, f"prompt {p}", i,
                float(torch.rand((), generator=generator_of(name, family, p, i, seed)) < chance),
                None, {"tries": tries, "try": i, "selected": i == 0},
            )
            for family, chance in families.items() for p in range(prompts) for i in range(tries)
        ]  # fmt: skip
    return rows


WORKS = {"attack": 0.9, "control": 0.02, "fresh": 0.9, "before": 0.0}
NOTHING = {"attack": 0.02, "control": 0.02, "fresh": 0.0, "before": 0.0}


def evidence(rows, probe=None):
    found = (probe or UnlearnDiffAtk()).weigh(rows, ROLES)
    return {(e.model, e.measure, e.family): e for e in found}


def test_an_attack_that_breaks_the_base_may_speak_about_an_erasure():
    rows = fabricated({"base": WORKS, "UCE": NOTHING, "gold-0": NOTHING})
    stored = {
        name: [Observation(**row) for row in json.loads(json.dumps([dataclasses.asdict(o) for o in own]))]
        for name, own in rows.items()
    }
    found = evidence(rows)
    assert found == evidence(stored)
    families = ("attack", "hit@1", "k=2", "fresh", "control", "before")
    assert all(found[name, "rate", family].estimate.n for name in rows for family in families)
    assert found["base", "excess", "attack"].estimate.value > 0.8
    assert found["UCE", "excess", "attack"].estimate.value == pytest.approx(0, abs=0.2)
    assert found["UCE", "excess", "attack"].gates == {"power": "pass"}
    assert found["UCE", "residual", "attack"].control == "gold"
    assert all(e.conclusive for key, e in found.items() if key[0] == "UCE")


def test_a_prompt_that_misses_with_its_own_noise_is_scored_on_new_noise_too():
    """P4D against a retrained model: no sentence was broken with the noise of its try, and 22 % of fresh pictures."""
    missed = {**NOTHING, "attack": 0.0, "control": 0.0, "fresh": 0.5, "fresh control": 0.0}
    rows = fabricated(
        {"base": {**WORKS, "fresh control": 0.0}, "UCE": missed, "gold-0": {**NOTHING, "fresh control": 0.0}}
    )
    found = evidence(rows)
    assert found["UCE", "excess", "attack"].estimate.value == 0
    fresh = found["UCE", "excess", "fresh"]
    assert fresh.estimate.low > 0.2 and fresh.estimate.n == 80 and fresh.gates == {"power": "pass"}
    assert found["UCE", "above_control", "fresh"].estimate.low > 0.2
    assert found["UCE", "change", "fresh"].estimate.high < 0 and found["UCE", "residual", "fresh"].control == "gold"
    hit = [row for row in rows["UCE"] if row.family == "fresh" and row.value == 1]
    told = [dataclasses.replace(row, facts={**row.facts, "prompt": f"zzq {row.cluster}"}) for row in hit]
    assert found_by(told) == list(dict.fromkeys(row.facts["prompt"] for row in told)) != []


def test_without_a_control_on_new_noise_there_is_no_excess_there():
    found = evidence(fabricated({"base": WORKS, "UCE": NOTHING, "gold-0": NOTHING}))
    assert ("UCE", "excess", "attack") in found and ("UCE", "excess", "fresh") not in found


def test_an_attack_that_breaks_nothing_says_nothing():
    found = evidence(fabricated({"base": NOTHING, "UCE": NOTHING, "gold-0": NOTHING}))
    about = {key: e for key, e in found.items() if key[0] == "UCE" and key[2] in ("attack", "hit@1", "fresh", "k=2")}
    assert about and not any(e.conclusive for e in about.values())


@pytest.mark.parametrize(
    ("base", "why"),
    [
        ({**WORKS, "before": 1.0}, "the base draws the target there without an attack"),
        ({**WORKS, "control": 0.9}, "random words do it as well"),
        ({**WORKS, "attack": 0.2}, "in too few of the sentences"),
    ],
)
def test_success_on_the_base_is_power_only_where_it_is_the_attacks_own(base, why):
    assert evidence(fabricated({"base": base, "UCE": NOTHING}))["UCE", "excess", "attack"].gates == {"power": "fail"}


def test_power_may_be_shown_on_an_erasure_known_to_be_weak():
    rows = fabricated({"base": {**WORKS, "before": 1.0}, "UCE": NOTHING, "weak": {**WORKS, "attack": 0.4}})
    assert evidence(rows)["UCE", "excess", "attack"].gates == {"power": "fail"}
    named = evidence(rows, UnlearnDiffAtk(weak="weak"))
    assert named["UCE", "excess", "attack"].gates == {"power": "pass"}
    # an attack that works on a model has shown on that model that it works
    assert evidence(rows)["weak", "excess", "attack"].gates == {"power": "pass"}


@pytest.mark.parametrize(
    "broken",
    [
        pytest.param(UnlearnDiffAtk(prompts=3, tries=2, iterations=0, fresh=1), marks=pytest.mark.slow),
        pytest.param(
            UnlearnDiffAtk(prompts=3, tries=2, iterations=1, learning_rate=0.0, fresh=1), marks=pytest.mark.slow
        ),
        pytest.param(P4D(prompts=3, tries=2, iterations=0, fresh=1, moments=1), marks=pytest.mark.slow),
        RingABell(prompts=3, tries=2, generations=0, fresh=1, etas=(1.0,), population=4),
    ],
)
def test_a_broken_attack_is_inconclusive_never_robustness(broken, context):
    models = {"base": context.base, "noise": context.models["noise"]}
    rows = {name: broken.run(model, context) for name, model in models.items()}
    found = broken.weigh(rows, {name: model.role for name, model in models.items()})
    about = [e for e in found if e.model == "noise" and e.family not in ("control", "fresh control", "before")]
    assert about and not any(e.conclusive for e in about)


def test_any_hit_does_not_take_the_unknown_for_a_miss():
    def row(value, number):
        return Observation("base", "attack", "prompt", number, value, None, {"try": number})

    cases = {(0.0, 1.0): 1.0, (0.0, 0.0): 0.0, (None, 0.0): None, (0.0, None): None, (None, 1.0): 1.0}
    for values, any_hit in cases.items():
        (found,) = any_hits([row(value, i) for i, value in enumerate(values)], "attack")
        assert found.value == any_hit
    (first,) = any_hits([row(0.0, 0), row(1.0, 1)], "attack", 1)
    assert first.value == 0.0


# --- the random control ---------------------------------------------------------------------------------------------


def test_random_control_draws_k_noises_and_k_prefixes(context):
    probe = RandomControl(prompts=3, tries=2)
    rows = {name: probe.run(model, context) for name, model in list(context.models.items())[:3]}
    assert rows["base"] == probe.run(context.base, context)
    base = rows["base"]
    assert [sum(row.family == family for row in base) for family in ("seeds", "words")] == [6, 6]
    assert min(row.seed for row in base if row.family == "seeds") == context.suite.images_per_prompt
    words = [row for row in base if row.family == "words"]
    assert all(row.facts["prompt"].endswith(row.cluster) for row in words)
    assert [row.facts["prompt"] for row in words] == [r.facts["prompt"] for r in rows["noise"] if r.family == "words"]
    found = probe.weigh(rows, {name: model.role for name, model in context.models.items()})
    assert {(e.measure, e.family) for e in found if e.model == "noise"} >= {
        (measure, family) for measure in ("rate", "change", "residual") for family in ("seeds", "words")
    }
    assert all(e.estimate.clusters == 3 for e in found if e.measure == "rate")


def test_the_registry_knows_them():
    for kind in (*ATTACKS, RandomControl):
        assert probe_class(kind.key) is kind
        assert kind.preset("quick") is None and kind.preset("standard") is not None


def test_the_first_picture_of_each_broken_sentence_is_kept():
    images = [Image.new("RGB", (600, 300), (i, 0, 0)) for i in range(4)]
    seen = [("attack", "a", 0.0), ("attack", "a", 1.0), ("attack", "a", 1.0), ("control", "b", 1.0)]
    rows = [Observation("UCE", family, cluster, 0, value) for family, cluster, value in seen]
    kept = with_pictures(rows, images)
    assert ["png" in row.facts for row in kept] == [False, True, False, False]
    picture = Image.open(io.BytesIO(base64.b64decode(kept[1].facts["png"])))
    assert picture.size == (256, 128) and picture.getpixel((0, 0)) == (1, 0, 0)
    assert images[1].size == (600, 300)
