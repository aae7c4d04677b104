"""Half precision for real, on the CPU: every method on float16 and bfloat16 pipelines, and what they make there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import erasure
from erasure.backbone import backbone_of
from erasure.methods import method_class
from erasure.methods.base import Request
from erasure.opening import load_base
from tests.slow import every_method, first
from tests.tiny import ARCHITECTURES, identical, shortest, tiny, weights

HALVES = (torch.float16, torch.bfloat16)
CONCEPT = erasure.Concept("superhero", anchor="ninja", neighbours=("wizard",))
CLOSED = ("uce", "rece", "time", "speed", "mace-cfr", "double-projections", "cure")


def made(pipe: Any, method: str) -> Any:
    return erasure.erase(pipe, CONCEPT, method, keep=["wizard"], apply=False, progress=False, **shortest(method))


def draw(pipe: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return pipe(prompt=["a superhero"], num_inference_steps=2, output_type="latent", generator=generator)[0]


@pytest.mark.parametrize("dtype", first(HALVES, torch.bfloat16), ids=str)
@pytest.mark.parametrize("method", every_method("spm", "gloce", "adv-unlearn", "sld"))  # uce and esd are below
def test_every_method_works_in_half_precision(method, dtype, tmp_path):
    pipe = tiny("sd1").to(dtype)
    before, picture = weights(pipe), draw(pipe)
    edit = made(pipe, method)
    assert identical(weights(pipe), before)
    edit.apply(pipe)
    assert all(tensor.dtype == before[name].dtype for name, tensor in weights(pipe).items())
    drawn = draw(pipe)
    assert torch.isfinite(drawn).all() and not torch.equal(drawn, picture)
    edit.remove(pipe)
    assert identical(weights(pipe), before) and torch.equal(draw(pipe), picture)
    edit.save_pretrained(tmp_path)
    erasure.Erasure.from_pretrained(tmp_path).apply(pipe)
    assert torch.equal(draw(pipe), drawn)


@pytest.mark.parametrize("dtype", first(HALVES, torch.bfloat16), ids=str)
@pytest.mark.parametrize("architecture", first(ARCHITECTURES[1:], "sdxl"))
def test_every_architecture_works_in_half_precision(architecture, dtype):
    pipe = tiny(architecture).to(dtype)
    before = weights(pipe)
    edit = made(pipe, "uce").apply(pipe)
    assert torch.isfinite(draw(pipe)).all()
    edit.remove(pipe)
    assert identical(weights(pipe), before)
    backbone, request = backbone_of(pipe), Request((CONCEPT,), ("wizard",))
    recipe = method_class("esd").preset(None, **shortest("esd"))
    recipe.erase(backbone, request).apply(pipe)
    assert torch.isfinite(draw(pipe)).all()


def change(edit: Any, pipe: Any) -> dict[str, torch.Tensor]:
    """What an erasure does to each weight it changes, in float32."""
    before = weights(pipe)
    edit.apply(pipe)
    after = weights(pipe)
    edit.remove(pipe)
    return {name: after[name] - before[name] for name in before if not torch.equal(after[name], before[name])}


def gap(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """|a - b| / |b| over all weights together."""
    assert a.keys() == b.keys() and b
    difference = torch.cat([(a[name] - b[name]).flatten() for name in b])
    return float(difference.norm() / torch.cat([tensor.flatten() for tensor in b.values()]).norm())


@pytest.mark.parametrize("dtype", first(HALVES, torch.bfloat16), ids=str)
@pytest.mark.parametrize("method", first(CLOSED, "rece", "speed", "cure"))
def test_a_closed_form_made_in_half_precision_is_the_one_made_in_float32(method, dtype):
    """Of the same weights: what is encoded, read and solved in between is not rounded to half precision."""
    half, single = tiny("sd1").to(dtype), tiny("sd1").to(dtype).to(torch.float32)
    assert gap(change(made(half, method), single), change(made(single, method), single)) < 0.01


@pytest.mark.parametrize("architecture", first(ARCHITECTURES[1:], "sdxl"))
def test_uce_made_in_bfloat16_is_the_one_made_in_float32(architecture):
    half = tiny(architecture).to(torch.bfloat16)
    single = tiny(architecture).to(torch.bfloat16).to(torch.float32)
    assert gap(change(made(half, "uce"), single), change(made(single, "uce"), single)) < 0.01


@pytest.mark.parametrize("dtype", first(HALVES, torch.float16), ids=str)
def test_an_erasure_of_the_world_is_the_same_from_each_precision(dtype):
    single, half = load_base(device="cpu"), load_base(device="cpu", dtype=dtype)
    assert gap(change(made(half, "uce"), single), change(made(single, "uce"), single)) < 0.01


def test_esd_trains_in_pure_bfloat16_where_it_is_asked_to():
    """As the official scripts do: every trained weight is a bfloat16 number, and what is below its rounding is lost."""
    pipe, preset = tiny("sd1").to(torch.bfloat16), "official-2025-x"
    before = weights(pipe)
    moved, exact = {}, {}
    for pure in (False, True):
        edit = erasure.erase(
            pipe,
            "superhero",
            "esd",
            preset=preset,
            apply=False,
            progress=False,
            pure=pure,
            **{**shortest("esd"), "lr": 2e-5},
        )
        assert edit.config["settings"]["pure"] is pure
        old = {name: before[f"unet.{name}"].float() for name in edit.tensors}
        changed = {name: edit.edit(name, weight, 1.0) for name, weight in old.items()}
        moved[pure] = sum(int((new != old[name]).sum()) for name, new in changed.items())
        exact[pure] = all(torch.equal(new.bfloat16().float(), new) for new in changed.values())
    assert identical(weights(pipe), before)
    assert exact == {False: False, True: True}
    assert 0 < moved[True] < 0.5 * moved[False]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_smoke_runs_in_half_precision(dtype, tmp_path):
    """Every probe of the preset has a number, or a reason that is none of precision."""
    from erasure.eval import assess
    from erasure.eval.detectors.choice import detectors_for
    from erasure.eval.run.controls import controls_for, material_for

    suite = erasure.Suite.load("superhero")
    pipe = load_base(device="cpu", dtype=dtype)
    edit = erasure.erase(pipe, suite.concepts, "uce", keep=suite.kept, apply=False, progress=False)
    (detectors, judge), controls = detectors_for(suite, device="cpu"), controls_for(suite, pipe, "smoke")[:1]
    found = assess(
        pipe, {"UCE": edit}, suite, preset="smoke", detectors=detectors, controls=controls, clip=judge,
        material=material_for(suite, None), out=tmp_path, progress=False, autocast=False,
    )  # fmt: skip
    raised = {cell.probe: cell.missing for cell in found.cells if cell.missing and "Error" in cell.missing}
    assert not raised
    assert found.evidence
