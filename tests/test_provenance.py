"""A model that is erased says so: in its copies, its files, and to whoever erases it again."""

import copy
import dataclasses
import json
import pickle
import warnings

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open

from erasure import erase, save_denoiser
from erasure.artifact import export_single_file
from erasure.artifact.stack import fused_in
from erasure.cli import app
from erasure.opening import load_base
from erasure.pipelines import ErasedStableDiffusionPipeline, active_erasures, unload_erasures
from tests.slow import first
from tests.tiny import identical, make, tiny_pipeline, weights


def made(pipe, name="superhero"):
    return make(pipe, name, "uce", preset="official-2025", keep=["wizard"])


def reopened(source, **given):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pipe = load_base(source, device="cpu", **given)
    return pipe, " ".join(str(one.message) for one in caught)


# --- copies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "shallow"])
def test_a_copy_of_a_model_has_its_erasures_and_gives_back_every_bit(how):
    pipe, other = tiny_pipeline(), tiny_pipeline()
    before = weights(pipe)
    edits = [made(pipe), made(pipe, "ninja")]
    edits[0].apply(pipe), edits[1].apply(pipe, 0.5)
    copies = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m)), "shallow": copy.copy}
    other.unet = copies[how](pipe.unet)
    assert active_erasures(other) == {"superhero-uce": 1.0, "ninja-uce": 0.5}
    if how == "deepcopy":
        edits[1].remove(other)
        assert list(active_erasures(pipe)) == ["superhero-uce", "ninja-uce"]
    unload_erasures(other)
    assert identical(before, weights(other))
    assert identical(before, weights(pipe)) is (how == "shallow")  # it shares the weights, and the record


@pytest.mark.parametrize("method", ["spm", "sld", "safree", "adavd", "negative-prompt"])
def test_a_model_erased_by_hooks_is_neither_copied_nor_saved_as_if_it_were_erased(method, tmp_path):
    pipe = tiny_pipeline()
    more = {"iterations": 1, "trajectories": 1, "num_inference_steps": 2, "progress": False} if method == "spm" else {}
    edit = make(pipe, "superhero", method, preset=None, keep=["wizard"], **more).apply(pipe)
    doors = [lambda: copy.deepcopy(pipe.unet), lambda: pickle.dumps(pipe.unet), lambda: copy.deepcopy(pipe)]
    for door in [*doors, lambda: pipe.save_pretrained(tmp_path / "saved")]:
        with pytest.raises(ValueError, match=r"hooks.*remove"):
            door()
    edit.remove(pipe)
    doors[0](), pipe.unet.save_pretrained(tmp_path / "unet")


# --- files -----------------------------------------------------------------------------------------------------------


def write(kind, pipe, folder):
    """A saved erased model, and what opens it: the pipeline class of the library, or plain diffusers."""
    if kind == "own":
        erased = ErasedStableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
        erased.save_pretrained(folder / "model")
        return folder / "model"
    if kind == "single file":
        return export_single_file(pipe, folder / "model.safetensors")
    pipe.save_pretrained(folder / "model")
    return folder / "model"


@pytest.mark.parametrize("fused", first([False, True], True))
@pytest.mark.parametrize("kind", ["own", "stock", "single file"])
def test_a_saved_erased_model_says_so_and_is_not_erased_twice(kind, fused, tmp_path):
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path / "base")
    edit, other = made(pipe), made(pipe, "ninja")
    edit.fuse(pipe) if fused else edit.apply(pipe)
    path = write(kind, pipe, tmp_path)
    config = {"config": tmp_path / "base"} if path.is_file() else {}
    found, said = reopened(path, **config)
    assert identical(weights(found), weights(pipe))
    assert "already erased with ['superhero-uce']" in said and fused_in(found.unet) == ["superhero-uce"]
    now = weights(found)
    for again in (edit, copy.deepcopy(edit)):
        for allow in (None, "same-text-encoder"):
            with pytest.raises(ValueError, match="already erased with .'superhero-uce'.*twice") as caught:
                again.apply(found, allow=allow)
            assert "allow=" not in str(caught.value)
    renamed = dataclasses.replace(edit, name="mine")
    with pytest.raises(ValueError, match="already erased with"):
        renamed.apply(found, allow="same-text-encoder")
    with pytest.raises(ValueError, match="already erased with.*made for") as caught:
        other.apply(found)
    assert "allow=" not in str(caught.value)
    assert identical(now, weights(found))


def test_facts_stand_beside_the_weights_and_in_a_card(tmp_path):
    pipe = tiny_pipeline()
    made(pipe).apply(pipe, 0.5)
    erased = ErasedStableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    erased.save_pretrained(tmp_path / "model")
    facts = json.loads((tmp_path / "model" / "erasures.json").read_text("utf-8"))
    [entry] = facts["parts"]["unet"]
    assert {**entry, "base": 0} == {
        "name": "superhero-uce", "method": "uce", "concepts": ["superhero"], "scale": 0.5, "base": 0
    }  # fmt: skip
    card = (tmp_path / "model" / "README.md").read_text("utf-8")
    assert "superhero-uce" in card and "suppresses" in card and "twice" in card
    export_single_file(pipe, tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["erasures"])["parts"] == facts["parts"]
    save_denoiser(pipe, tmp_path / "unet")
    assert json.loads((tmp_path / "unet" / "erasures.json").read_text("utf-8"))["parts"] == facts["parts"]
    assert "_erasures" in json.loads((tmp_path / "unet" / "config.json").read_text("utf-8"))
    unload_erasures(pipe)
    erased.save_pretrained(tmp_path / "model")  # the base, over it
    assert not (tmp_path / "model" / "erasures.json").exists() and not (tmp_path / "model" / "README.md").exists()
    assert reopened(tmp_path / "model")[1] == ""


def test_somebody_elses_card_stays_and_a_damaged_record_is_no_record(tmp_path):
    pipe = tiny_pipeline()
    made(pipe).apply(pipe)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "README.md").write_text("mine")
    ErasedStableDiffusionPipeline(**pipe.components, requires_safety_checker=False).save_pretrained(tmp_path / "model")
    assert (tmp_path / "model" / "README.md").read_text() == "mine"
    config = tmp_path / "model" / "unet" / "config.json"
    facts = json.loads(config.read_text())
    beside = ("[1]", "{", '{"parts": {"unet": [3]}}', '{"parts": 3}')
    for record, text in zip((5, "superhero", [5, {"name": 5}], {"name": "x"}), beside, strict=True):
        config.write_text(json.dumps({**facts, "_erasures": record}))
        (tmp_path / "model" / "erasures.json").write_text(text)
        pipe, said = reopened(tmp_path / "model")
        assert fused_in(pipe.unet) == [] and "already" not in said


def test_an_erased_model_may_be_erased_further_and_is_told_apart(tmp_path):
    pipe = tiny_pipeline()
    made(pipe).fuse(pipe)
    with pytest.warns(UserWarning, match="already erased with"):
        second = erase(pipe, "ninja", "uce", preset="official-2025", keep=["wizard"])
    assert second.config["base"]["erased"] == ["superhero-uce"] and list(active_erasures(pipe)) == ["ninja-uce"]
    second.remove(pipe)
    with pytest.warns(UserWarning, match="already erased with"):  # again, as the first one did not suffice
        stronger = erase(pipe, "superhero", "uce", preset="official-2025", keep=["wizard"], name="stronger")
    assert list(active_erasures(pipe)) == ["stronger"] and stronger.config["base"]["erased"] == ["superhero-uce"]
    pipe.save_pretrained(tmp_path)
    plain = StableDiffusionPipeline.from_pretrained(tmp_path)
    assert fused_in(plain.unet) == ["superhero-uce", "stronger"]


def test_the_command_line_writes_it(tmp_path):
    from typer.testing import CliRunner

    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path / "base")
    base = load_base(tmp_path / "base", device="cpu")
    made(base).save_pretrained(tmp_path / "edit")
    arguments = ["export", tmp_path / "edit", "--base", tmp_path / "base", "--format", "pipeline", "--out"]
    assert CliRunner().invoke(app, [*map(str, arguments), str(tmp_path / "erased")]).exit_code == 0
    assert (tmp_path / "erased" / "erasures.json").exists() and "already erased" in reopened(tmp_path / "erased")[1]


# --- a scale under a LoRA --------------------------------------------------------------------------------------------


def test_the_scale_of_an_applied_erasure_may_change_under_a_lora_loaded_later():
    from peft import LoraConfig

    pipe = tiny_pipeline()
    edit = made(pipe)
    before = weights(pipe)
    edit.apply(pipe)
    pipe.unet.add_adapter(LoraConfig(r=1, target_modules=["to_k"]))
    edit.apply(pipe, 0.5)
    assert active_erasures(pipe) == {edit.name: 0.5}
    edit.apply(pipe, 0.0)
    pipe.unet.delete_adapters("default")
    now = {name.replace(".base_layer", ""): tensor for name, tensor in weights(pipe).items()}
    assert all(torch.equal(now[name], tensor) for name, tensor in before.items())
