"""What every probe relies on: models that come off again, contrasts against base and control, rows that say why not."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from erasure.eval.core.material import FolderMaterial
from erasure.eval.core.models import Model, Role, Swapped
from erasure.eval.core.pictures import weights_hash
from erasure.eval.probes.denoising import backbone_for, noise_like
from erasure.eval.probes.embedding import FreeWords
from erasure.eval.probes.weigh import contrasts
from erasure.eval.stats import residual
from erasure.eval.worldkit.material import WorldMaterial
from tests.probe_helpers import ROLES, rows_of, tiny_context
from tests.tiny import tiny_pipeline


@pytest.fixture(scope="module")
def context():
    return tiny_context()


def test_every_model_comes_off_again(context):
    before, seen = weights_hash(context.pipe), set()
    for model in context.models.values():
        with context.open(model):
            seen.add(weights_hash(context.pipe))
        assert weights_hash(context.pipe) == before
    assert len(seen) == len(context.models)


def test_a_swap_of_a_part_the_base_lacks_is_refused(context):
    with pytest.raises(ValueError, match="text_encoder_2"):
        Swapped("x", {"text_encoder_2": torch.nn.Linear(1, 1)}).apply(context.pipe)


@pytest.mark.parametrize(("role", "change"), [("base", True), ("erased", False)])
def test_only_the_base_has_no_change(role, change):
    with pytest.raises(ValueError, match="the base has no change"):
        Model("x", role, Swapped("x", {}) if change else None)


def test_contrasts_know_base_and_gold():
    rows = rows_of({"base": 1.0, "UCE": 0.0, "gold-0": 0.0, "gold-1": 0.0})
    found = {(e.model, e.measure): e for e in contrasts("direct", rows, ROLES)}
    assert found["UCE", "change"].estimate.value == -1
    assert found["UCE", "residual"].estimate.value == 0
    assert found["UCE", "residual"].control == "gold"
    assert found["UCE", "residual"].gates == {"known": "pass", "power": "pass"}
    low, high = found["UCE", "residual"].estimate.low, found["UCE", "residual"].estimate.high
    assert low < 0 < high < 0.25  # never of no width


def test_a_base_that_does_not_know_the_target_fails_the_gate():
    found = contrasts("direct", rows_of({"base": 0.1, "UCE": 0.0, "gold-0": 0.05}), ROLES)
    assert all(not e.conclusive for e in found if e.model == "UCE")


def test_without_gold_the_null_stands_in_and_is_named():
    found = contrasts("direct", rows_of({"base": 1.0, "UCE": 0.5, "start": 0.0}), ROLES)
    assert {e.control for e in found if e.measure == "residual"} == {"null"}


def test_a_residual_is_read_between_retrained_models_and_their_twins():
    roles: dict[str, Role] = {**ROLES, "twin-0": "twin"}
    shares = {"base": 1.0, "UCE": 0.25, "gold-0": 0.0, "start": 0.0, "twin-0": 0.5}
    for control, reference in (("gold-0", "twin-0"), ("start", "base")):  # a null control has no twin
        kept = {name: share for name, share in shares.items() if name in ("base", "UCE", "twin-0", control)}
        found = {(e.model, e.measure): e.estimate.value for e in contrasts("direct", rows_of(kept), roles)}
        assert found["UCE", "residual"] == pytest.approx(found["UCE", "rate"] / found[reference, "rate"])


def test_residual_is_not_clipped():
    names = [f"p{i}" for i in range(20)]
    base, gold = [1.0] * 20, [[0.5, 0.5] * 10, [0.5] * 20]
    assert residual([0.0] * 20, [base], gold, names).value == pytest.approx(-1)
    assert residual(base, [base], gold, names).value == pytest.approx(1)
    assert residual(base, [base], [base], names).value is None


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_perfect_prediction_has_no_loss_and_names_its_noise(prediction_type):
    model = backbone_for(tiny_pipeline(prediction_type=prediction_type)).noise
    x, t = torch.randn(3, 4, 8, 8), torch.tensor([10, 400, 990])
    noise = noise_like(x, torch.Generator().manual_seed(0))
    wanted, at = model.target(x, noise, t), model.mix(x, noise, t)
    clean, found = model.split(wanted, at, t)
    assert torch.allclose(found, noise, atol=1e-4)
    assert torch.allclose(clean, x, atol=1e-2) and torch.allclose(model.clean(at, noise, t), x, atol=1e-3)


def test_free_words_at_the_embeddings_of_words_are_those_words():
    pipe = tiny_pipeline()
    free = FreeWords(pipe, ["a photo of <v>", "<v> in the style of van gogh"], count=1)
    (cat,) = pipe.tokenizer("cat", add_special_tokens=False).input_ids
    vector = free.table[[cat]].clone().requires_grad_()
    spoken = free.text(vector).hidden
    plain = backbone_for(pipe).encode(["a photo of cat", "cat in the style of van gogh"]).hidden
    assert torch.allclose(spoken, plain, atol=1e-5)
    (gradient,) = torch.autograd.grad(spoken.sum(), vector)
    assert gradient.abs().sum() > 0
    assert free.tokens(vector) == [cat]
    assert free.spelled([cat], row=0) == "a photo of cat"


def test_free_words_refuse_what_does_not_fit():
    pipe = tiny_pipeline()
    with pytest.raises(ValueError, match="needs one <v>"):
        FreeWords(pipe, ["a photo"], count=1)
    with pytest.raises(ValueError, match="fewer free words"):
        FreeWords(pipe, ["<v>"], count=76)


def test_world_material_is_what_it_says():
    material = WorldMaterial("superhero")
    inside, outside = material.target(3, member=True), material.target(3)
    assert all(e.label == "superhero" and e.member for e in inside)
    assert not {e.key for e in inside} & {e.key for e in outside}
    assert [e.key for e in outside] == [e.key for e in material.target(3)]
    assert {e.label for e in material.kept(20, labels=("ninja",))} == {"ninja"}
    with pytest.raises(ValueError, match="neither a concept nor a style"):
        WorldMaterial("spiderman")
    both = WorldMaterial("superhero", also=["ninja"])
    assert both.key != material.key
    with pytest.raises(ValueError, match="the world has 0 fresh scenes"):
        both.kept(1, labels=("ninja",))  # another target is nothing that is kept


def test_folder_material_says_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"metadata\.jsonl"):
        FolderMaterial(tmp_path, "cat")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "1.png", "text": "a cat"}\n')
    with pytest.raises(ValueError, match="line 1: lacks"):
        FolderMaterial(tmp_path, "cat")
    for line, fault in (("[1]", "keys and values are needed"), ('{"member": "false"}', "write true or false")):
        (tmp_path / "metadata.jsonl").write_text(f"{line}\n")
        with pytest.raises(ValueError, match=f"line 1: .*{fault}"):
            FolderMaterial(tmp_path, "cat")
    tiny = tiny_context().material.target(1)[0]
    tiny.image.save(tmp_path / "1.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "1.png", "text": "a cat", "label": "Cat"}\n')
    assert FolderMaterial(tmp_path, "cat").target(1)[0].member is None
    with pytest.raises(ValueError, match="2 are needed"):
        FolderMaterial(tmp_path, "cat").target(2)


def test_pictures_of_a_model_that_only_wraps_are_not_cached(context, tmp_path):
    class Filter(Swapped):
        intervention = "filter"

    cached = dataclasses.replace(context, cache_dir=tmp_path)
    model = Model("filter", "erased", Filter("filter", {}))
    with cached.open(model) as pipe:
        cached.draw(pipe, model, ["a cat"])
    assert not list(tmp_path.iterdir())
    with cached.open(cached.base) as pipe:
        cached.draw(pipe, cached.base, ["a cat"])
    assert list(tmp_path.iterdir())
