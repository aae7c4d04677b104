"""The drop-in: erasures on stock pipelines with the verbs of LoRA loading."""

import copy
import dataclasses
import json
import pickle

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline

from erasure import Erasure, erase, save_denoiser
from erasure.pipelines import (
    ErasedStableDiffusionPipeline,
    active_erasures,
    fuse_erasures,
    load_erasure,
    set_erasures,
    unload_erasures,
)
from tests.tiny import identical, make, tiny_pipeline, weights


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A saved base and two saved erasures of it."""
    root, pipe = tmp_path_factory.mktemp("saved"), tiny_pipeline()
    pipe.save_pretrained(root / "base")
    for concept in ("superhero", "ninja"):
        make(pipe, concept, "uce", preset="official-2025").save_pretrained(root / concept)
    return root


def test_the_life_of_an_erasure(folders):
    pipe = StableDiffusionPipeline.from_pretrained(folders / "base")
    before = weights(pipe)
    assert load_erasure(pipe, folders / "superhero") == "superhero-uce"
    load_erasure(pipe, folders / "ninja", name="stealth", scale=0.5)
    assert active_erasures(pipe) == {"superhero-uce": 1.0, "stealth": 0.5}
    set_erasures(pipe, "stealth")
    assert active_erasures(pipe) == {"stealth": 1.0}
    set_erasures(pipe, ["superhero-uce", "stealth"], [0.0, 0.0])
    assert active_erasures(pipe) == {} and identical(before, weights(pipe))
    set_erasures(pipe, ["superhero-uce", "stealth"], 1.0)
    assert not identical(before, weights(pipe))
    unload_erasures(pipe)
    assert identical(before, weights(pipe)) and type(pipe) is StableDiffusionPipeline


def test_fusing_keeps_the_weights_and_forgets_the_originals(folders):
    pipe = StableDiffusionPipeline.from_pretrained(folders / "base")
    load_erasure(pipe, folders / "superhero")
    erased = weights(pipe)
    fuse_erasures(pipe)
    unload_erasures(pipe)
    assert identical(erased, weights(pipe)) and active_erasures(pipe) == {}


@pytest.mark.parametrize(
    ("names", "scales", "fault"),
    [
        ("nobody", 1.0, "not loaded"),
        (["superhero-uce"], [1.0, 0.5], "one scale"),
        (["superhero-uce", "superhero-uce"], [0.1, 0.5], "named twice"),
    ],
)
def test_bad_names_and_scales_are_refused(folders, names, scales, fault):
    pipe = StableDiffusionPipeline.from_pretrained(folders / "base")
    load_erasure(pipe, folders / "superhero")
    with pytest.raises(ValueError, match=fault):
        set_erasures(pipe, names, scales)


def test_the_pipeline_class_saves_a_folder_that_plain_diffusers_opens(folders, tmp_path):
    pipe = ErasedStableDiffusionPipeline.from_pretrained(
        folders / "base", erasures=[folders / "superhero", folders / "ninja"]
    )
    assert list(pipe.active_erasures) == ["superhero-uce", "ninja-uce"]
    pipe.save_pretrained(tmp_path / "erased")
    assert (
        json.loads((tmp_path / "erased" / "model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline"
    )
    for opener in (StableDiffusionPipeline, DiffusionPipeline):
        plain = opener.from_pretrained(tmp_path / "erased")
        assert type(plain) is StableDiffusionPipeline and identical(weights(pipe), weights(plain))


def test_erased_pictures_differ_and_come_back(folders):
    pipe = ErasedStableDiffusionPipeline.from_pretrained(folders / "base", erasures=[folders / "superhero"])
    pipe.set_progress_bar_config(disable=True)

    def draw():
        return torch.from_numpy(
            pipe(
                "superhero", num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="np"
            ).images
        )

    erased = draw()
    pipe.set_erasures([])
    base = draw()
    pipe.unload_erasures()
    assert not torch.equal(erased, base) and torch.equal(base, draw())


def test_an_erasure_that_was_loaded_again_is_the_one_on_the_pipeline(folders):
    pipe = StableDiffusionPipeline.from_pretrained(folders / "base")
    untouched = weights(pipe)
    load_erasure(pipe, folders / "superhero")
    again = Erasure.from_pretrained(folders / "superhero")
    assert active_erasures(pipe) == {"superhero-uce": 1.0}
    again.apply(pipe, 0.5)
    assert active_erasures(pipe) == {"superhero-uce": 0.5}
    pipe.unet = pickle.loads(pickle.dumps(pipe.unet))
    Erasure.from_pretrained(folders / "superhero").remove(pipe)
    assert identical(untouched, weights(pipe))


def test_another_one_of_its_name_is_said_to_be_another(folders):
    pipe = StableDiffusionPipeline.from_pretrained(folders / "base")
    edit = Erasure.from_pretrained(folders / "superhero")
    other = dataclasses.replace(edit, tensors={name: 2 * tensor for name, tensor in edit.tensors.items()})
    edit.apply(pipe)
    with pytest.raises(ValueError, match="the 'superhero-uce' on it is another one"):
        other.remove(pipe)
    assert active_erasures(pipe) == {"superhero-uce": 1.0}


def test_loading_under_another_name_leaves_the_callers_erasure_alone(folders):
    pipe = StableDiffusionPipeline.from_pretrained(folders / "base")
    edit = Erasure.from_pretrained(folders / "superhero")
    load_erasure(pipe, edit, name="other")
    assert edit.name == "superhero-uce" and list(active_erasures(pipe)) == ["other"]


def test_one_erasure_needs_no_list(tmp_path):
    base = tmp_path / "base"
    tiny_pipeline().save_pretrained(base)
    pipe = ErasedStableDiffusionPipeline.from_pretrained(base)
    edit = make(pipe, "superhero", "uce", preset="official-2025", keep="ninja")
    assert edit.config["keep"] == ["ninja"]
    edit.save_pretrained(tmp_path / "edit")
    for source in (str(tmp_path / "edit"), tmp_path / "edit", edit):
        assert ErasedStableDiffusionPipeline.from_pretrained(base, erasures=source).active_erasures == {edit.name: 1.0}


def test_erasures_are_unloaded_by_name():
    pipe = tiny_pipeline()
    before = weights(pipe)
    edits = {c: make(pipe, c, "uce", preset="official-2025", name=c, keep=["wizard"]) for c in ("superhero", "ninja")}
    for edit in edits.values():
        load_erasure(pipe, edit)
    unload_erasures(pipe, "superhero")
    assert active_erasures(pipe) == {"ninja": 1.0}
    with pytest.raises(ValueError, match="not loaded on this pipeline: .'superhero'"):
        unload_erasures(pipe, ["ninja", "superhero"])
    assert active_erasures(pipe) == {"ninja": 1.0}
    unload_erasures(pipe)
    assert identical(before, weights(pipe))


def test_what_is_attached_is_in_no_weight_and_is_not_written_as_if_it_were(tmp_path):
    pipe = ErasedStableDiffusionPipeline(**tiny_pipeline().components, requires_safety_checker=False)
    edit = make(pipe, "superhero", "uce", preset="official-2025", keep=["ninja"])
    with pipe.attach_erasures(edit):
        for write in (pipe.save_pretrained, lambda folder: save_denoiser(pipe, folder)):
            with pytest.raises(ValueError, match="attached"):
                write(tmp_path / "erased")
        with pytest.raises(ValueError, match="attached"):
            erase(pipe, "cat", keep=["dog"])
    assert not (tmp_path / "erased").exists()
    pipe.save_pretrained(tmp_path / "erased")


def test_an_erasure_survives_a_textual_inversion():
    def pipeline():
        found = tiny_pipeline()
        found.tokenizer = copy.deepcopy(found.tokenizer)  # the tests share one, and words are added to it
        return found

    def learn(pipe):
        pipe.load_textual_inversion({"<bad>": torch.randn(pipe.text_encoder.config.hidden_size)}, token="<bad>")

    pipe = pipeline()
    edit = make(pipe, "superhero", "uce", preset="official-2025", keep=["ninja"]).apply(pipe)
    learn(pipe)
    edit.apply(pipe, 0.5)
    edit.remove(pipe)
    other = pipeline()
    learn(other)
    edit.apply(other)
    with torch.no_grad():
        other.text_encoder.get_input_embeddings().weight[:100].add_(1)
    edit.remove(other)
    with pytest.raises(ValueError, match="wrong base model"):
        edit.apply(other)
