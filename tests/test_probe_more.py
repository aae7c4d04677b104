"""Probes of durability and of side effects beyond the first: scenes, rounding, adapters, what a file tells."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image

import erasure.world
from erasure import Concept, Suite
from erasure.eval import Assessment, assess
from erasure.eval.core.models import Model
from erasure.eval.core.pictures import weights_hash
from erasure.eval.detectors.base import DetectorCard
from erasure.eval.probes import PRESETS, names, probe_class
from erasure.eval.probes.base import Missing, Observation
from erasure.eval.probes.removal.adapter_on_top import AdapterOnTop
from erasure.eval.probes.removal.side_channel import DeltaSideChannel
from erasure.eval.probes.suppression.quantised import WHOLE, Quantised, quantised, rounded
from erasure.eval.probes.suppression.scene import Scene
from erasure.eval.probes.utility.selective_alignment import SelectiveAlignment, with_others
from erasure.eval.report.evidence import MEASURES
from erasure.eval.report.html import render
from erasure.eval.worldkit.classifier import labels as world_labels
from erasure.pipelines.guardrails import Guard
from tests.probe_helpers import ROLES, SUITE, rows_of, tiny_context
from tests.tiny import make, tiny, tiny_pipeline

KEYS = ("scene", "quantised", "adapter_on_top", "delta_side_channel", "selective_alignment")
WIDER = dataclasses.replace(SUITE, concept=dataclasses.replace(SUITE.concept, neighbours=("dog", "sun")), unrelated=())


@pytest.fixture(scope="module")
def context():
    return tiny_context(suite=WIDER)


def through_json(rows):
    return {
        name: [Observation(**json.loads(json.dumps(dataclasses.asdict(r)))) for r in own] for name, own in rows.items()
    }


def evidence(probe, rows, roles=ROLES):
    return {(e.model, e.measure, e.family): e for e in probe.weigh(through_json(rows), roles)}


@pytest.mark.parametrize("key", KEYS)
def test_every_probe_runs_restores_repeats_itself_and_weighs_what_was_stored(key, context):
    probe, before = probe_class(key).preset("smoke"), weights_hash(context.pipe)
    models = [context.models[name] for name in ("base", "noise", "gold-0") if probe.concerns(context.models[name])]
    rows = {model.name: probe.run(model, context) for model in models}
    assert weights_hash(context.pipe) == before
    assert probe.run(context.models["noise"], context) == rows["noise"]
    roles = {model.name: model.role for model in models}
    found = probe.weigh(rows, roles)
    assert found and found == probe.weigh(through_json(rows), roles)
    assert {e.model for e in found} == set(rows)
    shared = {"rate", "worst_stratum", "change", "above_control", "residual", *MEASURES}
    assert {e.measure for e in found} <= shared | {*probe.measures}  # the report has a name for every one


# --- scenes -----------------------------------------------------------------------------------------------------------


class Listed:
    """Sees in a picture, whatever it shows, what its size in pixels stands for."""

    name, known = "listed", ("cat", "dog", "sun", "house", "nothing")
    card = DetectorCard("listed", "1", labels={"concept": known})

    def __init__(self, *seen):
        self.seen = seen

    def labels(self, attribute):
        return self.known if attribute == "concept" else ()

    def scores(self, images, attribute):
        rows = [[0.9 - 0.1 * self.seen[i.width].index(x) if x in self.seen[i.width] else 0 for x in self.known]
                for i in images]  # fmt: skip
        return np.array(rows) / np.sum(rows, axis=1, keepdims=True)


def test_a_scene_names_the_target_in_every_place_and_its_neighbours(context):
    asked = {ask.family: [] for ask in Scene().asks(context)}
    for ask in Scene().asks(context):
        asked[ask.family].append((ask.text, ask.beside))
    assert asked["one neighbour"] == [("a cat and a dog", ("dog",)), ("a sun and a cat", ("sun",))]
    assert asked["two neighbours"] == [("a cat, a dog and a sun", ("dog", "sun"))]
    with pytest.raises(Missing, match="no neighbours"):
        style = dataclasses.replace(WIDER, attribute="style", subjects=("dog",))
        Scene().asks(dataclasses.replace(context, suite=style))


def test_of_three_things_in_a_scene_each_is_looked_for(context):
    seen = [("sun", "dog", "cat"), ("dog", "sun"), ("cat", "dog"), ("house", "dog", "sun", "cat")]
    (ask,) = (ask for ask in Scene().asks(context) if len(ask.beside) == 2)
    told = dataclasses.replace(context, judge=Listed((), *seen))
    images = [Image.new("RGB", (width, 1)) for width in range(1, 5)]
    rows = Scene().look(Model("base", "base"), told, images, [ask] * 4, list(range(4)))
    assert [row.value for row in rows] == [1, 0, 1, 0]
    assert [row.facts["beside_seen"] for row in rows] == [True, True, False, True]


def test_a_scene_that_loses_its_neighbours_shows_and_one_the_base_cannot_draw_does_not_count():
    rows = rows_of({"base": 1.0, "UCE": 0.0, "gold-0": 0.0}, family="one neighbour")
    kept = {"base": True, "UCE": False, "gold-0": True}
    rows = {
        name: [dataclasses.replace(r, facts={"beside_seen": kept[name]}) for r in own] for name, own in rows.items()
    }
    found = evidence(Scene(), rows)
    assert found["UCE", "change", "one neighbour"].estimate.value == -1
    assert found["UCE", "beside_change", "one neighbour"].estimate.value == -1
    assert found["gold-0", "beside_rate", "one neighbour"].estimate.value == 1
    never = evidence(Scene(), rows_of({"base": 0.0, "UCE": 0.0}, family="two neighbours"))
    assert never["UCE", "rate", "two neighbours"].gates["known"] == "fail"


# --- rounding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_rounded_matrix_has_few_levels_and_is_half_a_step_away(bits):
    weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    weight[2] = 0
    found, levels = quantised(weight, bits), 2 ** (bits - 1) - 1
    for row, new in zip(weight, found, strict=True):
        step = row.abs().max() / levels
        assert (row - new).abs().max() <= step / 2 + 1e-6 and len(new.unique()) <= 2 * levels + 1
        assert new.abs().max() == pytest.approx(row.abs().max().item())
    torch.testing.assert_close(quantised(found, bits), found)
    assert quantised(weight.half(), bits).dtype == torch.float16


def test_every_linear_layer_is_rounded_for_the_time_of_a_block_and_nothing_else():
    pipe = tiny_pipeline()
    before = {part: {n: p.clone() for n, p in getattr(pipe, part).named_parameters()} for part in ("unet", "vae")}
    digest = weights_hash(pipe)
    with pytest.raises(RuntimeError, match="inside"), rounded(pipe, 4):
        moved = {n for n, p in pipe.unet.named_parameters() if not torch.equal(p, before["unet"][n])}
        linear = {f"{n}.weight" for n, m in pipe.unet.named_modules() if isinstance(m, torch.nn.Linear)}
        assert moved and moved <= linear and len(moved) > 0.9 * len(linear)
        assert all(torch.equal(p, before["vae"][n]) for n, p in pipe.vae.named_parameters())
        raise RuntimeError("inside")
    assert weights_hash(pipe) == digest
    with rounded(pipe, None):
        assert weights_hash(pipe) == digest


def test_rounded_pictures_are_others_and_never_come_out_of_the_cache_of_the_whole_model(context, tmp_path):
    probe = Quantised(images_per_prompt=1, limit=2, bits=(2,))
    rows = probe.run(context.base, context)
    again = probe.run(context.base, dataclasses.replace(context, cache_dir=tmp_path))
    assert rows == again == probe.run(context.base, dataclasses.replace(context, cache_dir=tmp_path))
    hashes = {family: [r.facts["image_hash"] for r in rows if r.family == family] for family in (WHOLE, "int2")}
    assert len(hashes[WHOLE]) == len(hashes["int2"]) == 2 and not {*hashes[WHOLE]} & {*hashes["int2"]}
    assert {r.facts.get("bits") for r in rows if r.family == "int2"} == {2}


def test_suppression_that_rounding_undoes_is_an_increase():
    rows = {name: [] for name in ("base", "UCE", "gold-0")}
    for family, left in ((WHOLE, 0.0), ("int8", 1.0)):
        for name, own in rows_of({"base": 1.0, "UCE": left, "gold-0": 0.0}, family=family).items():
            rows[name] += own
    found = evidence(Quantised(), rows)
    assert found["UCE", "increase", "int8"].estimate.value == 1 and found["UCE", "increase", "int8"].conclusive
    assert found["base", "increase", "int8"].estimate.value == 0
    rows["base"] = rows_of({"base": 1.0}, family=WHOLE)["base"] + rows_of({"base": 0.0}, family="int8")["base"]
    assert not evidence(Quantised(), rows)["UCE", "increase", "int8"].conclusive  # rounding ruined the base
    for bits in ((), (1,), (16,)):
        with pytest.raises(ValueError, match="from 2 to 8"):
            Quantised(bits=bits)


# --- an adapter on top ------------------------------------------------------------------------------------------------


def test_an_adapter_changes_pictures_and_no_weight_and_is_never_cached_as_the_model_below(context, tmp_path):
    probe, digest = dataclasses.replace(AdapterOnTop.preset("smoke"), steps=6, lr=0.1), weights_hash(context.pipe)
    rows = probe.run(context.base, dataclasses.replace(context, cache_dir=tmp_path))
    assert weights_hash(context.pipe) == digest and rows == probe.run(context.base, context)
    before, after = ([r for r in rows if r.family == family] for family in ("before", "after"))
    assert [r.facts["image_hash"] for r in before] != [r.facts["image_hash"] for r in after]
    ((plain,),) = context.draw(context.pipe, context.base, [before[0].cluster])
    (seen,) = context.observe(context.base, [plain], family="", clusters=[""], seeds=[0])
    assert seen.facts["image_hash"] == before[0].facts["image_hash"]  # it starts as nothing


def test_an_adapter_learns_from_neighbours_and_one_that_learns_nothing_is_inconclusive(context):
    asked = []

    class Watched(type(context.material)):
        def kept(self, count, *, labels=None, **which):
            asked.append(labels)
            return super().kept(count, labels=labels, **which)

        def target(self, count, **which):
            raise AssertionError("no picture of the target is needed")

    told = dataclasses.replace(context, material=Watched())
    probe = dataclasses.replace(AdapterOnTop.preset("smoke"), lr=0.0)
    rows = {name: probe.run(context.models[name], told) for name in ("base", "noise")}
    assert {tuple(labels) for labels in asked} == {WIDER.neighbours}
    found = probe.weigh(rows, {"base": "base", "noise": "erased"})
    (increase,) = (e for e in found if (e.model, e.measure) == ("noise", "increase"))
    assert increase.gates["trained"] == "fail" and not increase.conclusive


# --- what the file tells ----------------------------------------------------------------------------------------------


def told_by(pipe, erased, suite, known, **settings):
    judge = Listed()
    judge.known = known
    models = {"base": Model("base", "base"), "e": Model("e", "erased", erased)}
    context = tiny_context(pipe=pipe, suite=suite, models=models, judge=judge)
    probe = DeltaSideChannel(**settings)
    rows = {"e": probe.run(models["e"], context)}
    return rows["e"], evidence(probe, rows, {"base": "base", "e": "erased"})


def test_the_word_that_a_closed_form_moves_most_is_the_one_it_erases():
    pipe = tiny("sd1")
    suite = Suite(version=1, name="tiny", concept=Concept("superhero", neighbours=("wizard",)))
    edit = make(pipe, suite.concept, keep=["wizard"], preset="official-2025")
    rows, found = told_by(pipe, edit, suite, ("superhero", "dog", "sun", "nothing"), words=60)
    rank = found["e", "rank", ""]
    assert rank.estimate.value <= 3 and found["e", "below", ""].estimate.value > 0.95  # of words read at random
    assert (
        f"of {len(rows)}; moved most: " in rank.note
        and "superhero" in rank.note
        and "nothing" not in {row.cluster for row in rows}
    )
    assert len(rows) > 60 and [row.cluster for row in rows if row.family == "target"] == ["superhero"]


def test_how_far_a_word_moves_is_the_relative_square_over_all_layers_that_receive_it(context):
    from erasure.backbone import backbone_of
    from erasure.methods.closed_form import rows as embeddings

    probe, model = DeltaSideChannel(words=0), context.models["noise"]
    (row, *_) = probe.run(model, context)
    backbone = backbone_of(context.pipe)
    sites = backbone.text_sites()
    before = {name: site.weight.clone() for name, site in sites.items()}
    x = embeddings(backbone, [row.cluster], "subject_to_end")[0]
    with context.open(model):
        after = {name: site.weight.clone() for name, site in backbone.text_sites().items()}
    moved = sum((x @ (after[name] - before[name]).T).square().sum(1) for name in sites)
    whole = sum((x @ before[name].T).square().sum(1) for name in sites)
    assert len(x) > 1 and row.value == pytest.approx((moved / whole).max().item(), rel=1e-3)


def test_in_emoji_world_too_the_file_tells():
    pipe, suite = erasure.world.load(), Suite.load("superhero")
    edit = erasure.erase(pipe, suite.concept, method="uce", preset="official-2025", keep=suite.neighbours, apply=False)
    _, found = told_by(pipe, edit, suite, world_labels("concept"), words=0)
    assert found["e", "rank", ""].estimate.value <= 3 and found["e", "below", ""].estimate.value > 0.95


def test_a_file_that_moves_no_word_gives_no_rank_and_a_filter_is_not_asked(context):
    rows = {"UCE": [Observation("UCE", family, family, 0, 0.0) for family in ("target", "others")]}
    found = evidence(DeltaSideChannel(), rows)
    assert found["UCE", "rank", ""].estimate.value is None and "text" in found["UCE", "rank", ""].estimate.reason
    assert not DeltaSideChannel().concerns(Model("f", "erased", Guard.of_words(["cat"])))
    assert not DeltaSideChannel().concerns(context.base) and DeltaSideChannel.descriptive


# --- what else target prompts name ------------------------------------------------------------------------------------


class Attributes(Listed):
    """Has styles and backgrounds, and sees in every picture what it was told to."""

    def __init__(self, **top):
        self.top = top

    def labels(self, attribute):
        return {"concept": self.known, "style": ("noto", "flat"), "background": ("red", "blue")}[attribute]

    def scores(self, images, attribute):
        said = self.top[attribute]
        row = [len(said) - said.index(x) if x in said else -1.0 for x in self.labels(attribute)]
        return np.array([row] * len(images))


def test_prompts_name_the_target_another_thing_a_style_and_a_background(context):
    told = dataclasses.replace(context, judge=Attributes())
    asked = with_others(told, 1000, seed=0)
    assert "a cat and a dog in flat style on a red background" in {one.text for one in asked}
    assert all("cat" in one.text and set(one.wanted) == {"concept", "style", "background"} for one in asked)
    assert {one.wanted["concept"] for one in asked} == {("dog",), ("sun",), ("house",)}
    assert len(asked) == 3 * 2 * 2 * 2 and with_others(told, 5, seed=1) != with_others(told, 5, seed=2)
    assert {one.text for one in with_others(context, 9, seed=0)} >= {"a cat and a dog"}  # a judge of things alone


def test_each_of_the_other_attributes_is_right_or_not(context):
    judge = Attributes(concept=("dog", "cat"), style=("flat",), background=("blue",))
    rows = SelectiveAlignment(prompts=24).run(context.base, dataclasses.replace(context, judge=judge))
    assert {row.family for row in rows} == {"object", "style", "background"} and len(rows) == 3 * 24
    for row in rows:
        wanted = row.facts["wanted"]
        right = {"object": wanted["concept"] == ["dog"], "style": wanted["style"] == ["flat"],
                 "background": wanted["background"] == ["blue"]}  # fmt: skip
        assert row.value == right[row.family]


def test_a_style_that_is_lost_beside_the_target_shows():
    rows = {name: [] for name in ("base", "UCE", "gold-0")}
    for family, left in (("object", 1.0), ("style", 0.0)):
        for name, own in rows_of({"base": 1.0, "UCE": left, "gold-0": 1.0}, family=family).items():
            rows[name] += own
    found = evidence(SelectiveAlignment(), rows)
    assert found["UCE", "change", "style"].estimate.value == -1 and found["UCE", "change", "style"].conclusive
    assert found["UCE", "change", "object"].estimate.value == 0
    assert found["UCE", "rate", ""].estimate.value == 0.5
    weak = evidence(SelectiveAlignment(), rows_of({"base": 0.2, "UCE": 0.0}, family="style"))
    assert not weak["UCE", "change", "style"].conclusive


# --- nothing drawn ----------------------------------------------------------------------------------------------------

FEWER = {
    "construction": {"images": 0},
    "divergence": {"images": 2, "bins": 2},
    "linear_probe": {"images": 10, "timesteps": (300,), "folds": 2},
    "membership": {"images": 6, "others": 6, "times": 2, "noises": 1, "until": 20},
    "delta_side_channel": {"words": 20},
}


@pytest.mark.slow
def test_the_preset_that_draws_nothing_decodes_nothing(context, monkeypatch, tmp_path):
    quiet = [name for name in names() if "no-draw" in probe_class(name).presets]
    assert sorted(quiet) == sorted(FEWER) and "no-draw" in PRESETS
    assert probe_class("construction").preset("no-draw").images == 0  # which decodes real pictures otherwise
    for name, settings in FEWER.items():
        monkeypatch.setattr(probe_class(name), "presets", {"no-draw": settings})

    def decodes(*given, **more):
        raise AssertionError("a picture was decoded")

    monkeypatch.setattr(context.pipe.vae, "decode", decodes)
    given = {
        "preset": "no-draw",
        "detectors": [context.judge],
        "controls": [model for model in context.models.values() if model.role in ("gold", "null")],
        "material": context.material,
        "progress": False,
    }
    found = assess(context.pipe, {"noise": context.models["noise"].change}, WIDER, **given, out=tmp_path)
    assert not found.missing and {cell.probe for cell in found.cells} == set(FEWER)
    assert found.evaluation.records == () and found.evaluation.pictures == () and not list(tmp_path.rglob("*.png"))
    assert "No picture was drawn" in found.evaluation.warnings[0]
    (claim,) = found.claims()
    assert claim.suppression == "C0" and "not run" in claim.not_assessed["direct"]
    assert Assessment.load(tmp_path).evidence == found.evidence
    assert "whether the file reveals its target" in render(found).lower()
    with pytest.raises(ValueError, match="needs a detector"):
        assess(context.pipe, {}, WIDER, **{**given, "detectors": []})
    with pytest.raises(ValueError, match="share a name"):
        assess(context.pipe, {"gold-0": context.models["noise"].change}, WIDER, **given)
    with pytest.raises(ValueError, match="preset 'no-draw' has no probe 'direct'"):
        assess(context.pipe, {}, WIDER, **{**given, "probes": ("direct",)})
