"""Whatever draws with a pipeline draws with every kind: prompts by name, guidance by its name, videos."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from unittest import mock

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import erasure
from erasure.artifact.gated import Gate
from erasure.backbone import backbone_of
from erasure.methods.bank import drawn
from erasure.pictures import called, pictures_of, usual_settings
from erasure.pipelines import GuardedPipeline, OutputFilter, WordFilter, eval_unlearn
from erasure.pipelines.serve import Asked, Server
from tests.every import CALLS, EVERY, backbone
from tests.slow import first
from tests.small import small
from tests.tiny import make, shortest

QUICK = {"preset": "official-2025", "keep": ["ninja"], "progress": False}  # no everyday words to keep
MODELS = first(EVERY, "flux2-klein", "qwen-image", "wan")
SIZES = {name: {key: call[key] for key in ("height", "width") if key in call} for name, call in CALLS.items()}


@pytest.fixture(autouse=True, scope="module")
def _models_are_made_once():
    """Of this module: no test leaves a change on one."""
    yield
    pipeline.cache_clear()


@functools.cache
def pipeline(name):
    return small(name)


@functools.cache
def hero(name):
    kind = type(backbone_of(pipe := pipeline(name)))
    short = {"max_sequence_length": 32} if kind.max_sequence_length else {}  # FLUX.2 reads 512 tokens of every prompt
    with mock.patch("erasure.methods.closed_form.quick_report", return_value={}):  # which reads ninety nouns
        return make(kind(pipe, **short), "superhero", **QUICK)


def heard(pipe, monkeypatch):
    """The arguments of every call of the pipeline from now on, by name."""
    found, call = [], type(pipe).__call__

    @functools.wraps(call)
    def listen(self, *args, **given):
        found.append(inspect.signature(call).bind(self, *args, **given).arguments)
        return call(self, *args, **given)

    monkeypatch.setattr(type(pipe), "__call__", listen)
    return found


@pytest.mark.parametrize("name", MODELS)
def test_a_preview_is_drawn_of_every_model(name, monkeypatch):
    calls = heard(pipeline(name), monkeypatch)
    given = {"max_sequence_length": 32} if name == "flux2-klein" else SIZES.get(name, {})
    page = hero(name).preview(pipeline(name), ["a superhero"], num_inference_steps=2, **given)
    assert page.height > 2 * 192 and [call["prompt"] for call in calls] == [["a superhero"]] * 2
    assert all(call.get("num_frames", 1) == CALLS.get(name, {}).get("num_frames", 1) for call in calls)
    if name == "qwen-image":  # which is not guided without one
        assert [call["negative_prompt"] for call in calls] == [[" "]] * 2


@pytest.mark.parametrize("name", MODELS)
def test_the_example_server_draws_with_every_model(name, monkeypatch):
    pipe = pipeline(name)
    server = Server(pipe, {"hero": hero(name)})
    calls = heard(pipe, monkeypatch)
    try:
        size = SIZES.get(name, {"width": None})
        asked = Asked(prompt="a superhero", steps=2, size=f"{w}x{size['height']}" if (w := size["width"]) else None)
        assert len(server.draw(asked, server.call_of(asked), [0])) == 1
    finally:
        server.close()
    (call,) = calls
    own = inspect.signature(pipe).parameters[backbone_of(pipe).guidance_argument].default
    assert call[backbone_of(pipe).guidance_argument] == own


@pytest.mark.parametrize("name", MODELS)
def test_the_technique_of_eval_unlearn_draws_with_every_model(name, monkeypatch, tmp_path):
    pipe = pipeline(name)
    edit = dataclasses.replace(hero(name))
    edit.save_pretrained(tmp_path)
    monkeypatch.setattr(eval_unlearn, "load_base", lambda *_, **__: pipe)
    technique = eval_unlearn.Technique(model_id="x/y", erasure=str(tmp_path), num_inference_steps=2)
    images = technique.generate(["a superhero", "a cat"], seed=0, **SIZES.get(name, {}))
    edit.remove(pipe)
    assert len(images) == 2 and all(isinstance(image, Image.Image) for image in images)


class White:
    """A detector that sees the target wherever there is a picture."""

    name = "white"

    def labels(self, attribute):
        return ("superhero", "nothing")

    def scores(self, images, attribute):
        assert all(isinstance(image, Image.Image) for image in images)
        return np.tile([1.0, 0.0], (len(images), 1))


@pytest.mark.parametrize("kind", ["pil", "np", "pt"])
def test_guards_stand_around_videos(kind):
    pipe = pipeline("wan")
    call = {"num_inference_steps": 2, "num_frames": 17, "height": 32, "width": 32, "output_type": kind}
    out = GuardedPipeline(pipe, WordFilter(["superhero"]))(prompt=["a superhero", "a cat"], **call)
    assert [one.action for one in out.guarded] == ["blanked", "delivered"] and len(out.frames) == 2
    grey, other = (np.asarray([np.asarray(frame, dtype=float) for frame in video]) for video in out.frames)
    assert len(grey) == 17 and np.ptp(grey) == 0 and np.ptp(other) > 0
    out = GuardedPipeline(pipe, None, OutputFilter(White(), "superhero"))(prompt="a cat", **call)
    assert [one.by for one in out.guarded] == ["output"] and len(out.frames) == 1
    assert np.ptp([np.asarray(frame, dtype=float) for frame in out.frames[0]]) == 0


@pytest.mark.parametrize("name", MODELS)
def test_a_guard_around_another_is_called_as_the_pipeline_is(name):
    guarded = GuardedPipeline(GuardedPipeline(pipeline(name), WordFilter(["superhero"])), WordFilter(["hero"]))
    call = {"num_inference_steps": 2, **SIZES.get(name, {})}
    answer = called(guarded, ["a superhero"], {"output_type": "pil", **call}, guidance_scale=2.0)
    (picture,) = pictures_of(answer)
    assert np.ptp(np.asarray(picture)) == 0


def test_guidance_is_the_pipelines_own():
    assert usual_settings("emoji-world", pipeline("wan")) == {"num_inference_steps": 8, "guidance_scale": 3.0}
    own = {"flux2-klein": 4.0, "qwen-image": 4.0, "pixart-sigma": 4.5}
    assert {name: usual_settings("x", pipeline(name))["guidance_scale"] for name in own} == own
    assert usual_settings("x")["guidance_scale"] == usual_settings("x", lambda prompt: None)["guidance_scale"] == 7.5


@pytest.mark.parametrize("name", first(("qwen-image", "z-image"), "qwen-image"))
def test_a_gate_compares_what_stands_behind_words_of_any_number(name):
    concept = erasure.Concept("superhero", synonyms=("a caped man",))
    pipe = pipeline(name)
    edit = make(pipe, concept, "spm", progress=False, **shortest("spm"))
    base = backbone_of(pipe)
    length = len(base.rows_of(base.text_inputs(base.encode([""]).text))[0])
    assert edit.tensors["gate.concept"].shape[1:] == edit.tensors["gate.empty"].shape
    assert 1 < len(edit.tensors["gate.empty"]) <= length
    gate, found = Gate(edit, base, 1.0), {}
    for prompts in (["superhero"], ["", "a caped man"], ["a cat on a roof", "a superhero"]):
        gate.hear(base.text_inputs(base.encode(prompts).text))
        found |= dict(zip(prompts, gate.current.rows.tolist(), strict=True))
    assert found[""] == 0 and found["a cat on a roof"] < 0.99
    assert min(found[one] for one in ("superhero", "a superhero", "a caped man")) > 0.99
    edit.apply(pipe)
    edit.remove(pipe)


@pytest.mark.parametrize("name", first(EVERY, "flux2-klein", "z-image"))
def test_pictures_that_a_pipeline_draws_can_be_trained_on(name):
    base = backbone(pipeline(name), name)
    text = base.encode(["a cat"]).text
    noise = torch.randn(1, *base.latent_shape, generator=torch.Generator().manual_seed(0))
    clean = drawn(base, text, noise, torch.Generator().manual_seed(0), 2, base.no_guidance)
    *_, last = base.trajectory(text, noise, num_inference_steps=2, guidance_scale=base.no_guidance)
    assert clean.shape == noise.shape and torch.isfinite(clean).all()
    if base.architecture in ("flux2-klein", "z-image"):  # Euler's last step leads to what is clean
        share = base.sigmas(2)[-2]
        step = share * last.conditional * (-1 if base.architecture == "z-image" else 1)
        torch.testing.assert_close(clean, last.x - step, rtol=1e-3, atol=1e-3)


def sibling(pipe, kind, **more):
    """Another pipeline around the same models."""
    wanted = inspect.signature(kind.__init__).parameters
    other = kind(**{name: part for name, part in pipe.components.items() if name in wanted}, **more)
    other.set_progress_bar_config(disable=True)
    return other


SIBLINGS = {
    "Flux2KleinInpaintPipeline": ("flux2-klein", {"width": 16, "height": 16, "strength": 0.9}),
    "Flux2KleinKVPipeline": ("flux2-klein", {"width": 16, "height": 16}),
    "WanVideoToVideoPipeline": ("wan", {"width": 32, "height": 32, "strength": 0.9}),
    "ZImageImg2ImgPipeline": ("z-image", {"strength": 0.9}),
}


@pytest.mark.parametrize("kind", first(SIBLINGS, "Flux2KleinKVPipeline", "WanVideoToVideoPipeline"))
def test_an_erasure_goes_on_pipelines_of_pictures_around_the_same_models(kind):
    name, call = SIBLINGS[kind]
    other = sibling(pipeline(name), getattr(diffusers, kind))
    assert backbone_of(other).architecture == name
    picture = Image.new("RGB", (64, 64), "red")
    given = {"mask_image": Image.new("L", (64, 64), 255)} if "Inpaint" in kind else {}
    noise = torch.randn(1, 4, 2, 2, 2, generator=torch.Generator().manual_seed(0))  # of its video, encoded
    image = {"latents": noise} if name == "wan" else {"image": picture}
    latent = {"output_type": "latent", "num_inference_steps": 4, **image, **given, **call}

    def drawing():
        answer = called(other, ["a superhero"], {**latent, "generator": torch.Generator().manual_seed(0)})
        return torch.as_tensor(answer.frames if hasattr(answer, "frames") else answer.images)

    before = drawing()
    hero(name).apply(other)
    after = drawing()
    hero(name).remove(other)
    assert not torch.equal(before, after) and torch.equal(before, drawing())
