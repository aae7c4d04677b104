"""An assessment asks every probe of every model, keeps what it knows, and says why it does not know the rest."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook

import erasure
import erasure.runtime
import erasure.train.modules
from erasure.eval import Assessment, assess
from erasure.eval import probes as registry
from erasure.eval.core.models import Model, Swapped
from erasure.eval.core.pictures import weights_hash
from erasure.eval.judge.policy import Policy
from erasure.eval.probes import probe_class
from erasure.eval.probes.base import LACKING, Missing, Observation
from erasure.eval.probes.removal.divergence import Divergence
from erasure.eval.probes.removal.linear_probe import LinearProbe
from erasure.eval.probes.suppression.paraphrase import Paraphrase
from erasure.eval.probes.suppression.ring_a_bell import RingABell
from erasure.eval.run.assessment import LONGEST, Cell, slug, stated
from erasure.eval.run.controls import controls_for, held_out
from erasure.pipelines.guardrails import Guard
from studies.cheats import Declared
from tests.eval_helpers import PixelDetector
from tests.probe_helpers import SUITE, TinyMaterial, tiny_context
from tests.tiny import make

FEW = ("direct", "paraphrase", "neighbours", "unrelated", "degeneracy", "construction")


@pytest.fixture(scope="module")
def context(tmp_path_factory):
    return dataclasses.replace(tiny_context(), cache_dir=tmp_path_factory.mktemp("pictures"))  # drawn once for all


def run(context, out=None, **changes):
    erased = {m.name: m.change for m in context.models.values() if m.role == "erased"}
    given = {
        "preset": "smoke",
        "detectors": [context.judge, context.selector],
        "controls": [m for m in context.models.values() if m.role in ("gold", "null")],
        "material": context.material,
        "probes": FEW,
        "out": out,
        "cache_dir": context.cache_dir,
        "progress": False,
    }
    return assess(context.pipe, erased, changes.pop("suite", SUITE), **{**given, **changes})


@pytest.fixture(scope="module")
def folder(context, tmp_path_factory):
    out = tmp_path_factory.mktemp("assessment")
    before = weights_hash(context.pipe)
    run(context, out)
    assert weights_hash(context.pipe) == before
    return out


def test_what_is_stored_is_what_was_found(folder):
    first = Assessment.load(folder)
    assert {cell.probe for cell in first.cells} == set(FEW)
    assert [m.role for m in first.models] == ["base", "erased", "gold", "gold", "null"]
    again = Assessment.load(first.save(folder).parent)
    assert again.evidence == first.evidence
    assert again.to_dict() == first.to_dict()
    (claim,) = first.claims()
    assert (claim.model, claim.suppression) == ("noise", "C0")  # smoke is no evidence
    assert "membership" in claim.not_assessed


def test_a_second_run_takes_up_what_is_stored(context, folder, monkeypatch):
    def never(self, model, context):
        raise AssertionError("a stored cell was run again")

    before = Assessment.load(folder)
    monkeypatch.setattr(Paraphrase, "run", never)
    assert run(context, folder).evidence == before.evidence


@pytest.mark.slow
def test_another_control_repeats_only_what_looks_at_it(context, tmp_path, monkeypatch):
    probes = ("linear_probe", "divergence")
    *_, null = controls = [m for m in context.models.values() if m.role in ("gold", "null")]
    run(context, tmp_path, probes=probes, controls=controls)
    asked = []
    for probe in (LinearProbe, Divergence):
        monkeypatch.setattr(probe, "run", lambda self, model, context: asked.append((self.key, model.name)) or [])
    more = [*controls[:-1], Model("gold-2", "gold", null.change)]
    run(context, tmp_path, probes=probes, controls=more)
    assert {model for probe, model in asked if probe == "linear_probe"} == {"gold-2"}
    assert {model for probe, model in asked if probe == "divergence"} == {"base", "noise", "gold-0", "gold-1", "gold-2"}


def test_observations_of_another_version_of_a_probe_are_not_read_as_this_one(context, folder, monkeypatch):
    monkeypatch.setattr(Paraphrase, "version", Paraphrase.version + 1)
    with pytest.raises(ValueError, match="run the same evaluation into the folder again"):
        Assessment.load(folder)


@pytest.mark.slow
def test_prompts_that_got_through_are_put_to_the_guardrails(context, monkeypatch):
    def breaks(self, model, context):
        hits = {"base": 1.0, "noise": 0.0, "gold-0": 1.0}
        facts = {"prompt": f"zzq of {model.name}", "tries": 1, "try": 0}
        return [Observation(model.name, "attack", "a cat", 0, hits.get(model.name, 0.0), None, facts)]

    monkeypatch.setattr(RingABell, "run", breaks)
    kept = dataclasses.replace(SUITE, keep=("bird", "tree"))
    found = run(context, probes=("ring_a_bell", "input_filter", "end_to_end"), suite=kept)
    for probe in ("input_filter", "end_to_end"):
        rows = [row for row in found.rows(probe)["base"] if row.family.startswith("attack")]
        assert {(row.family, row.cluster) for row in rows} == {("attack ring_a_bell", "zzq of base")}


@pytest.mark.slow
def test_one_control_is_asked_in_words_and_all_of_them_from_inside(context):
    found = run(context, probes=("direct", "paraphrase", "linear_probe"))
    asked = {probe: {cell.model for cell in found.cells if cell.probe == probe} for probe in found.facts().ran}
    assert asked["direct"] == asked["linear_probe"] == {"base", "noise", "gold-0", "gold-1"}  # no null beside them
    assert asked["paraphrase"] == {"base", "noise", "gold-0"}


def test_behind_a_filter_stand_the_weights_of_the_base(context):
    found = assess(
        context.pipe, {"filter": Guard.of_words(["cat"])}, SUITE, preset="smoke", progress=False, probes=("inversion",),
        detectors=[context.judge, context.selector], material=context.material,
        controls=[m for m in context.models.values() if m.role == "null"],
    )  # fmt: skip
    rows = found.rows("inversion")
    assert [dataclasses.replace(row, model="base") for row in rows["filter"]] == rows["base"]
    assert {row.model for row in rows["filter"]} == {"filter"}


@pytest.mark.slow
def test_a_retrained_model_is_looked_at_once_and_held_against_the_others(context, monkeypatch):
    """Judged and a control at once; its own numbers, which it would equal, are not among those it is compared with."""
    controls = [m for m in context.models.values() if m.role in ("gold", "null")]
    asked = []
    real = LinearProbe.run
    monkeypatch.setattr(LinearProbe, "run", lambda self, m, c: asked.append(m.name) or real(self, m, c))
    found = assess(
        context.pipe, {"retrained": held_out(controls)}, SUITE, preset="smoke", progress=False, controls=controls,
        detectors=[context.judge, context.selector], material=context.material, probes=("linear_probe", "divergence"),
    )  # fmt: skip
    assert asked == ["base", "gold-0", "gold-1"]
    assert found.same_as == {"retrained": "gold-0"}
    values = {e.model: e.estimate.value for e in found.evidence if (e.probe, e.measure) == ("linear_probe", "auc")}
    (gap,) = (e for e in found.evidence if e.measure == "auc_gap")
    assert values["retrained"] == values["gold-0"]
    assert (gap.model, gap.estimate.value) == ("retrained", pytest.approx(values["gold-0"] - values["gold-1"]))
    rows = found.rows("divergence")["retrained"]
    assert all(set(row.facts["to"]) == {"gold-1"} for row in rows if row.value is not None)


@pytest.mark.slow
def test_one_model_under_two_names_is_asked_once_and_weighed_twice(context, monkeypatch):
    """What it says of itself may differ; what it draws cannot."""
    (edit,) = (m.change for m in context.models.values() if m.role == "erased")
    controls = [m for m in context.models.values() if m.role == "gold"]
    asked = []
    real = Divergence.run
    monkeypatch.setattr(Divergence, "run", lambda self, m, c: asked.append(m.name) or real(self, m, c))
    found = assess(
        context.pipe, {"edit": edit, "declared": Declared(edit, "declared")}, SUITE, preset="smoke", progress=False,
        controls=controls, detectors=[context.judge, context.selector], material=context.material,
        probes=("divergence", "construction"),
    )  # fmt: skip
    assert asked == ["base", "gold-0", "gold-1", "edit"]
    rows = found.rows("divergence")
    assert [dataclasses.replace(row, model="edit") for row in rows["declared"]] == rows["edit"]
    made = {cell.model: cell.seconds for cell in found.cells if cell.probe == "construction"}
    assert made["declared"] > 0  # it reads what a model says of itself


@pytest.mark.slow
def test_what_another_run_left_in_the_folder_is_not_read(context, tmp_path):
    out = tmp_path / "out"
    first = run(context, out, probes=("direct", "paraphrase"))
    run(context, out, probes=("direct",))
    assert {cell.probe for cell in Assessment.load(out).cells} == {"direct"}  # the cell of the other run lies beside
    first.save(out)
    assert {cell.probe for cell in Assessment.load(out).cells} == {"direct", "paraphrase"}
    wider = dataclasses.replace(SUITE, guidance_scale=2.0)
    kept = (out / "assessment.json").read_text()
    run(context, out, suite=wider, probes=("paraphrase",))
    (out / "assessment.json").write_text(kept)  # as if that run had been interrupted
    with pytest.raises(ValueError, match="another run wrote into the folder"):
        Assessment.load(out)


def test_observations_that_somebody_changed_are_not_weighed(folder):
    file = Cell.file(folder, "paraphrase", "noise")
    whole = file.read_text()
    head, row, *rows = whole.splitlines()
    other = json.dumps({**json.loads(row), "value": 1.0 - json.loads(row)["value"]})
    file.write_text("\n".join([head, other, *rows]) + "\n")
    with pytest.raises(ValueError, match="by paraphrase on noise was changed after the assessment was written"):
        Assessment.load(folder)
    file.write_text(whole)
    assert Assessment.load(folder)


@pytest.mark.parametrize("lie", [{"kind": "retrained"}, {"role": "gold"}, {"weights": "0" * 40}, {"name": "other"}])
def test_a_model_that_is_called_something_else_afterwards_is_refused(folder, tmp_path, lie):
    shutil.copytree(folder, tmp_path / "lie")
    file = tmp_path / "lie" / "assessment.json"
    raw = json.loads(file.read_text())
    raw["models"][1] |= lie
    file.write_text(json.dumps({**raw, "stated": stated(raw)}))
    with pytest.raises(ValueError, match="it calls .* and its pictures are of .*; it was changed"):
        Assessment.load(tmp_path / "lie")


def test_half_a_cell_is_run_again(context, folder):
    file = Cell.file(folder, "paraphrase", "base")
    whole = file.read_text()
    file.write_text(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="delete it to run it again"):
        Assessment.load(folder)
    run(context, folder)
    rows = [json.loads(line) for line in file.read_text().splitlines()][1:]
    assert rows == [json.loads(line) for line in whole.splitlines()][1:]


def test_a_probe_that_lacks_an_input_or_fails_leaves_its_reason(context, monkeypatch):
    def lacks(self, model, context):
        raise Missing("no words for that")

    monkeypatch.setattr(Paraphrase, "run", lacks)
    assert run(context, probes=("paraphrase",)).missing["paraphrase"]["noise"] == "no words for that"

    def fails(self, model, context):
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(Paraphrase, "run", fails)
    with pytest.warns(UserWarning, match="it failed: ZeroDivisionError: oh"):
        found = run(context, probes=("paraphrase",))
    assert "it failed" in found.claims()[0].not_assessed["paraphrase"]
    monkeypatch.setenv("ERASURE_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        run(context, probes=("paraphrase",))


@pytest.mark.parametrize("need", LACKING)
def test_the_runner_asks_for_what_a_probe_needs_before_it_runs(need, context, monkeypatch):
    asked = []
    monkeypatch.setattr(Paraphrase, "needs", (need,))
    monkeypatch.setattr(Paraphrase, "run", lambda self, model, context: asked.append(model.name) or [])
    material = TinyMaterial()
    monkeypatch.setattr(material, "target", lambda count, **which: [])
    found = run(context, probes=("paraphrase",), controls=(), detectors=[PixelDetector()],
                material=material if need == "members" else None)  # fmt: skip
    if need in ("evaluation", "base"):  # which an assessment always has
        assert asked and not found.missing.get("paraphrase")
    else:
        assert set(found.missing["paraphrase"].values()) == {LACKING[need]} and not asked


def test_a_probe_that_keeps_weights_is_found_out(context, monkeypatch):
    def spoils(self, model, context):
        next(context.pipe.unet.parameters()).data.mul_(2)
        return []

    monkeypatch.setattr(Paraphrase, "run", spoils)
    try:
        with pytest.raises(RuntimeError, match="paraphrase on base"):
            run(context, probes=("paraphrase",))
    finally:
        next(context.pipe.unet.parameters()).data.div_(2)


def test_what_a_policy_requires_and_nobody_looked_at_is_an_objection(context):
    policy = Policy(removal_required=True, suppression_required=None, rationale="a test", decided_by="the tests")
    assert run(context, policy=policy, probes=FEW[:1]).objections()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preset": "fast"}, "unknown preset"),
        ({"probes": ("telepathy",)}, "unknown probe"),
        ({"detectors": []}, "needs a detector"),
    ],
)
def test_bad_requests_are_refused(context, changes, message):
    with pytest.raises(ValueError, match=message):
        run(context, **changes)


def test_every_registered_probe_is_what_it_says():
    for name in registry.names():
        kind = registry.probe_class(name)
        assert kind.key == name
        assert set(kind.presets) <= set(registry.PRESETS)
        for preset in kind.presets:
            probe = kind.preset(preset)
            assert dataclasses.asdict(probe) == probe.settings()
        assert kind.licences
        assert kind.not_licensed


def test_held_out_needs_two_retrained_models(context):
    golds = [m for m in context.models.values() if m.role == "gold"]
    assert held_out(golds).name == "gold-0"
    with pytest.raises(ValueError, match="two or more"):
        held_out(golds[:1])


def test_held_out_is_the_retrained_model_whose_record_was_replayed(context):
    golds = [m for m in context.models.values() if m.role == "gold"]
    audits = [{"replayed": ""}, {"replayed": "2026-12-01"}]
    given = [
        dataclasses.replace(m, change=Swapped(m.name, m.change.modules, config={"audit": audit}))
        for m, audit in zip(golds, audits, strict=False)
    ]
    assert held_out(given).name == "gold-1"


def test_without_retrained_models_the_null_is_random_weights(context):
    (random,) = controls_for(SUITE, context.pipe, "quick")
    assert (random.name, random.role) == ("random", "null")


def test_controls_have_the_dtype_of_the_pipeline():
    pipe = erasure.world.load(dtype=torch.float16)
    controls = controls_for(erasure.Suite.load("superhero"), pipe, "smoke")
    assert [model.role for model in controls] == ["gold", "gold", "null"]
    for model in controls:
        with model.on(pipe) as drawn:
            assert (drawn.unet.dtype, drawn.text_encoder.dtype) == (torch.float16, torch.float16)
            assert not drawn.unet.training


@pytest.mark.parametrize("name", ["UCE", "gold 0", "a/b", "../x", "Pokémon"])
def test_names_make_safe_file_names(name):
    assert "/" not in slug(name)
    assert slug(name) == slug(name)
    assert slug("a/b") != slug("a_b")
    long = [slug("é" * count) for count in (40, 200, 201)]
    assert long[0] == "é" * 40 and len(set(long)) == 3 and all(len(name.encode()) <= LONGEST for name in long)


@pytest.mark.slow
def test_every_probe_runs_on_a_tiny_pipeline(context):
    found = run(context, probes=None)
    failed = {p: why for p, by in found.missing.items() for why in by.values() if why.startswith("it failed")}
    assert not failed


LEARNING = ("soft_prompt", "inversion", "relearning", "resurgence")


@contextlib.contextmanager
def arithmetic():
    """Whether autocast was on, in any forward pass of any module of the time of a block."""
    seen = set()
    hook = register_module_forward_pre_hook(lambda module, inputs: seen.add(torch.is_autocast_enabled("cpu")))
    try:
        yield seen
    finally:
        hook.remove()


@pytest.mark.slow
@pytest.mark.parametrize("probes", [LEARNING, None])
def test_autocast_is_on_nowhere_when_it_is_asked_off(context, probes, monkeypatch):
    for module in (erasure.runtime, erasure.train.modules):  # as on a processor that is fast in bfloat16
        monkeypatch.setattr(module, "fast_bfloat16", lambda device: True)
    with arithmetic() as seen:
        found = run(context, probes=probes, autocast=False)
    assert seen == {False}
    assert {cell.probe for cell in found.cells if cell.rows} >= set(LEARNING)
    for probe in LEARNING if probes else ():  # each of them learns in bfloat16 where it is asked on
        with arithmetic() as seen:
            model = context.models["noise"]
            probe_class(probe).preset("smoke").run(model, dataclasses.replace(context, autocast=True))
        assert True in seen


def test_one_model_does_not_count_as_two_controls(context):
    golds = [m for m in context.models.values() if m.role == "gold"]
    twice = [*golds, dataclasses.replace(golds[0], name="gold-9")]
    with pytest.raises(ValueError, match="gold-9 and gold-0 have the same weights"):
        run(context, controls=twice)
    with pytest.raises(ValueError, match="gold-9 and the base have the same weights"):
        run(context, controls=[Model("gold-9", "gold", Swapped("gold-9", {"unet": context.pipe.unet}))])


def test_a_copy_of_a_control_does_not_count_as_another(context):
    golds = [m for m in context.models.values() if m.role == "gold"]
    halved = {part: copy.deepcopy(module).half().float() for part, module in golds[0].change.modules.items()}
    with pytest.raises(ValueError, match="gold-9 is all but a copy of gold-0"):
        run(context, controls=[*golds, Model("gold-9", "gold", Swapped("gold-9", halved))])


def test_a_copy_with_other_numbers_that_compute_the_same_does_not_count_as_another(context):
    """Values times 8 and outputs through an eighth: far away in numbers, and bit for bit the same predictions."""
    golds = [m for m in context.models.values() if m.role == "gold"]
    same = {part: copy.deepcopy(module) for part, module in golds[0].change.modules.items()}
    with torch.no_grad():
        for layer in same["unet"].modules():
            if hasattr(layer, "to_v"):
                layer.to_v.weight.mul_(8)
                layer.to_out[0].weight.div_(8)
    with pytest.raises(ValueError, match="gold-9 is all but a copy of gold-0"):
        run(context, controls=[*golds, Model("gold-9", "gold", Swapped("gold-9", same))])


def test_a_copy_of_the_base_is_no_control(context):
    near = {part: copy.deepcopy(module) for part, module in (("unet", context.pipe.unet),)}
    with torch.no_grad():
        for parameter in near["unet"].parameters():
            parameter.mul_(1.001)
    with pytest.raises(ValueError, match="gold-9 is all but a copy of the base"):
        run(context, controls=[Model("gold-9", "gold", Swapped("gold-9", near))])


def test_a_judged_model_is_not_held_against_a_copy_of_itself(context):
    golds = [m for m in context.models.values() if m.role == "gold"]
    near = {part: copy.deepcopy(module) for part, module in golds[0].change.modules.items()}
    with torch.no_grad():
        for parameter in next(iter(near.values())).parameters():
            parameter.mul_(1.001)
    given = {
        "preset": "smoke", "detectors": [context.judge], "controls": golds, "probes": ("direct",), "progress": False
    }  # fmt: skip
    with pytest.raises(ValueError, match="mine is all but a copy of the control gold-0"):
        assess(context.pipe, {"mine": Swapped("mine", near)}, SUITE, **given)


def test_adapters_that_no_picture_tells_apart_do_not_share_their_cells(context, monkeypatch):
    """Without a picture, and with the weights as they were, the numbers of the adapter say which one it is."""
    first, second = (
        dataclasses.replace(edit, name="mine", tensors={name: scale * t for name, t in edit.tensors.items()})
        for edit in [
            make(context.pipe, "cat", "spm", iterations=1, trajectories=1, keep_steps=1, num_inference_steps=2)
        ]
        for scale in (1.0, 2.0)
    )
    found = []
    monkeypatch.setattr(
        "erasure.eval.run.assess._cell",
        lambda probe, card, c, inputs, *_: found.append(inputs) or Cell(probe.key, 1, {}, card.name, inputs),
    )
    for edit in (first, first, second):
        assess(
            context.pipe, {"mine": edit}, SUITE, preset="no-draw", detectors=[context.judge], probes=("divergence",),
            progress=False,
        )  # fmt: skip
    mine = [inputs for inputs in found if inputs["config"] is not None]
    assert mine[0] == mine[1] != mine[2]


class Echo(PixelDetector):
    """A CLIP model whose cosines are one number."""

    def __init__(self, level):
        super().__init__("echo")
        self.level = level

    def cosines(self, images, texts):
        return np.full(len(images), self.level)


@pytest.mark.slow
def test_cosines_of_another_clip_are_not_those_that_lie_there(context, tmp_path):
    def cosines(clip):
        found = run(context, tmp_path, probes=("distances",), clip=clip)
        return {row.value for own in found.rows("distances").values() for row in own if row.family == "clip cosine"}

    assert cosines(None) == set()
    assert cosines(Echo(0.3)) == {0.3}
    assert cosines(Echo(0.9)) == {0.9}
