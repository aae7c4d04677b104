"""Paired pictures: noise depends on (prompt, seed) alone, the cache never lies, the pipeline is left as it was."""

from __future__ import annotations

import itertools
import sys

import numpy as np
import pytest
import torch

from erasure.eval.core.pictures import generate, image_hash, initial_noise, weights_hash
from tests.eval_helpers import AddNoise
from tests.every import EVERY
from tests.slow import first
from tests.small import small
from tests.tiny import tiny_pipeline

QUICK = {"num_inference_steps": 2, "progress": False}


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


def close(a, b) -> bool:
    return np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max() <= 1  # batches differ by rounding


def test_noise_depends_on_prompt_and_seed_and_on_nothing_else(pipe):
    torch.manual_seed(5)
    first = initial_noise(pipe, "a cat", 0)
    torch.manual_seed(6)
    assert torch.equal(first, initial_noise(pipe, "a cat", 0))
    others = [initial_noise(pipe, "a cat", 1), initial_noise(pipe, "a dog", 0)]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations([first, *others], 2))
    assert first.shape == (4, 8, 8)


def test_a_picture_does_not_depend_on_its_companions(pipe):
    together = generate(pipe, ["a cat", "a dog", "a sun"], seeds=[0, 1], **QUICK)
    alone = generate(pipe, ["a dog"], seeds=[1], batch_size=1, **QUICK)
    assert close(together[1][1], alone[0][0])
    assert not close(together[1][0], together[1][1])
    assert [len(row) for row in together] == [2, 2, 2]


@pytest.mark.parametrize("architecture", first(EVERY, "flux2", "flux2-klein"))  # whose first argument is a picture
def test_every_architecture_draws_the_prompt(architecture):
    pipe, cat = small(architecture), ["a cat"]
    drawn, again, other = (generate(pipe, prompts, **QUICK)[0][0] for prompts in (cat, cat, ["a violin"]))
    assert image_hash(drawn) == image_hash(again) != image_hash(other)


def test_pictures_answer_to_every_setting(pipe):
    def draw(**settings):
        return image_hash(generate(pipe, ["a cat"], seeds=[0], **{**QUICK, **settings})[0][0])

    assert draw() == draw()
    assert draw() != draw(num_inference_steps=3)
    assert draw() != draw(guidance_scale=1.5)


def test_cache_gives_the_same_pictures_and_is_used(pipe, tmp_path, monkeypatch):
    fresh = generate(pipe, ["a cat"], seeds=[0, 1], cache_dir=tmp_path, **QUICK)
    assert len(list(tmp_path.iterdir())) == 2

    def refuse(*args, **kwargs):
        raise AssertionError("drew a picture that was in the cache")

    monkeypatch.setattr(type(pipe), "__call__", refuse)
    again = generate(pipe, ["a cat"], seeds=[1, 0], cache_dir=tmp_path, **QUICK)
    assert [image_hash(i) for i in again[0]] == [image_hash(i) for i in fresh[0]][::-1]


@pytest.mark.parametrize("package", ["torch", "diffusers", "transformers"])
def test_cache_tells_versions_apart(pipe, tmp_path, package, monkeypatch):
    generate(pipe, ["a cat"], cache_dir=tmp_path, **QUICK)
    monkeypatch.setattr(sys.modules[package], "__version__", "0.0.1")
    generate(pipe, ["a cat"], cache_dir=tmp_path, **QUICK)
    assert len(list(tmp_path.iterdir())) == 2


def test_cache_tells_kinds_of_devices_apart(pipe, tmp_path, monkeypatch):
    """A picture that lies there under another kind of device is not served: the drawing that follows fails."""
    generate(pipe, ["a cat"], cache_dir=tmp_path, **QUICK)
    monkeypatch.setattr(type(pipe), "device", property(lambda self: torch.device("cuda")))
    monkeypatch.setattr(type(pipe), "__call__", lambda *args, **kwargs: pytest.fail("drew"))
    with pytest.raises(pytest.fail.Exception, match="drew"):
        generate(pipe, ["a cat"], cache_dir=tmp_path, **QUICK)


@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae"])
def test_cache_never_serves_pictures_of_other_weights(pipe, tmp_path, part):
    generate(pipe, ["a cat"], cache_dir=tmp_path, **QUICK)
    tensor = next(iter(getattr(pipe, part).state_dict().values()))
    kept = tensor.clone()
    try:
        tensor += 1e-3
        generate(pipe, ["a cat"], cache_dir=tmp_path, **QUICK)
    finally:
        tensor.copy_(kept)
    assert len(list(tmp_path.iterdir())) == 2


def test_cache_tells_samplers_apart(pipe, tmp_path):
    generate(pipe, ["a cat"], cache_dir=tmp_path, **QUICK)
    generate(pipe, ["a cat"], cache_dir=tmp_path, guidance_scale=2.0, **QUICK)
    generate(pipe, ["a cat"], cache_dir=tmp_path, autocast=True, **QUICK)
    before = pipe.scheduler
    try:
        pipe.scheduler = type(before).from_config(before.config, prediction_type="v_prediction")
        generate(pipe, ["a cat"], cache_dir=tmp_path, **QUICK)
    finally:
        pipe.scheduler = before
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("damage", [b"", b"not a picture", None])
def test_a_corrupt_cache_file_is_drawn_again(pipe, tmp_path, damage):
    first = generate(pipe, ["a cat"], cache_dir=tmp_path, **QUICK)[0][0]
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:60] if damage is None else damage)
    with pytest.warns(UserWarning, match="drawing it again"):
        second = generate(pipe, ["a cat"], cache_dir=tmp_path, **QUICK)[0][0]
    assert image_hash(first) == image_hash(second)
    assert image_hash(generate(pipe, ["a cat"], cache_dir=tmp_path, **QUICK)[0][0]) == image_hash(first)


def test_the_pipeline_is_left_as_it_was():
    pipe = tiny_pipeline()
    before = weights_hash(pipe)
    for setting in ({"disable": True}, {"desc": "mine"}, None):
        del pipe._progress_bar_config
        if setting is not None:
            pipe.set_progress_bar_config(**setting)
        generate(pipe, ["a cat"], **QUICK)
        assert getattr(pipe, "_progress_bar_config", None) == setting
        pipe._progress_bar_config = {}
    assert weights_hash(pipe) == before


def test_weights_hash_sees_one_bit_and_its_undoing(pipe):
    before, edit = weights_hash(pipe), AddNoise()
    edit.apply(pipe)
    assert weights_hash(pipe) != before
    edit.remove(pipe)
    assert weights_hash(pipe) == before


def test_bad_requests_are_named(pipe):
    with pytest.raises(ValueError, match="an empty path"):  # it would be the current folder
        generate(pipe, ["a cat"], cache_dir="")
    for batch_size in (0, 1.5, None):
        with pytest.raises(ValueError, match="batch_size >= 1; got 1 seeds and batch_size="):
            generate(pipe, ["a cat"], batch_size=batch_size)
    with pytest.raises(ValueError, match="at least one seed"):
        generate(pipe, ["a cat"], seeds=[])
    for wrong in ({"num_inference_steps": 0}, {"guidance_scale": float("nan")}, {"guidance_scale": -1.0}):
        with pytest.raises(ValueError, match="1 to 1,000 steps and a guidance_scale from 0 to 100"):
            generate(pipe, ["a cat"], **wrong)
