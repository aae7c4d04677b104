"""Probes that look inside work wherever their mathematics does, and elsewhere say why not."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from erasure.backbone import backbone_of
from erasure.eval.core.hashes import weights_hash
from erasure.eval.core.models import randomised
from erasure.eval.probes import probe_class
from erasure.eval.probes.base import Missing
from erasure.eval.probes.denoising import backbone_for, noise_like, thousandth
from tests.probe_helpers import tiny_context
from tests.slow import first

INSIDE = ("divergence", "membership", "linear_probe", "construction")  # what it predicts for real pictures
TRAINED = ("relearning", "resurgence", "adapter_on_top", "plasticity", "gradient_reversal")
SAMPLED = ("noise", "completion", "inpainting", "image_to_image", "latent_inversion")
DRAWN = ("output_distance",)
KINDS = ("linear_probe", "relearning", "noise", "latent_inversion")  # features, training, drawing, its inverse
EVERY = (*INSIDE, *TRAINED, *SAMPLED, *DRAWN)
WORDS_ONLY = ("inversion", "soft_prompt", "p4d", "unlearn_diff_atk", "ring_a_bell")
WITH_LATENTS = ("sd2", "sdxl", "sd3", "flux", "flux2", "flux2-klein", "qwen-image", "z-image", "wan", "wan2.2",
                "chroma", "pixart-sigma", "sana", "lumina2", "auraflow", "cogview4", "kolors")  # fmt: skip
QUICK = ("flux",)
VIDEOS = ("cogvideox", "ltx", "animatediff")  # of several frames, or packed in a way of its own


pytestmark = pytest.mark.usefixtures("few_steps")


@pytest.fixture(scope="module", params=first(WITH_LATENTS, *QUICK))
def context(request):
    return tiny_context(architecture=request.param)


@pytest.fixture(scope="module")
def sd3():
    return tiny_context(architecture="sd3")


@pytest.fixture(scope="module")
def flux():
    return tiny_context(architecture="flux")


@pytest.fixture(scope="module", params=first(VIDEOS))
def video(request):
    return tiny_context(architecture=request.param)


def numbers(row) -> list[float]:
    return row.facts["features"] if row.value is None else [row.value]


@pytest.mark.parametrize("key", first(EVERY, *KINDS))
def test_a_probe_from_inside_gives_numbers_repeats_itself_and_gives_the_weights_back(key, context):
    probe, before = probe_class(key).preset("smoke"), weights_hash(context.pipe)
    rows = {name: probe.run(context.models[name], context) for name in ("base", "noise", "gold-0", "gold-1")}
    assert weights_hash(context.pipe) == before
    assert all(np.isfinite(numbers(row)).all() for own in rows.values() for row in own if row.reason is None)
    assert all(any(row.reason is None for row in own) for own in rows.values())
    assert probe.run(context.models["noise"], context) == rows["noise"]
    assert probe.weigh(rows, {name: context.models[name].role for name in rows})


@pytest.mark.parametrize("key", ["divergence", "completion"])
def test_an_edit_where_the_text_enters_is_seen(key, context):
    probe = probe_class(key).preset("smoke")
    base, edited = (probe.run(context.models[name], context) for name in ("base", "noise"))
    seen = [[(row.facts.get("image_hash"), numbers(row)) for row in rows] for rows in (base, edited)]
    assert seen[0] != seen[1]


@pytest.mark.parametrize("key", (*INSIDE, "relearning", "resurgence", "adapter_on_top", "plasticity", *SAMPLED))
def test_videos_have_no_pictures_and_say_so_in_one_sentence(key, video):
    probe, before = probe_class(key).preset("smoke"), weights_hash(video.pipe)
    if key == "construction":  # which has parts that need no latents
        seen = [row.reason for row in probe.run(video.base, video) if row.reason]
        assert seen and "how a picture becomes the latents" in seen[0]
        return
    with pytest.raises(Missing, match="how a picture becomes the latents that .* denoises is not known") as told:
        probe.run(video.base, video)
    assert ". " not in str(told.value) and weights_hash(video.pipe) == before


@pytest.mark.parametrize("key", first(["delta_side_channel", "quantised"], "quantised"))
def test_what_needs_no_latents_runs_on_packed_ones_too(key, sd3, flux):
    for context in (sd3, flux):
        rows, before = (
            probe_class(key).preset("smoke").run(context.models["noise"], context),
            weights_hash(context.pipe),
        )
        assert rows and all(row.value is not None and np.isfinite(row.value) for row in rows)
        assert key != "delta_side_channel" or max(row.value for row in rows) > 0
        assert weights_hash(context.pipe) == before


@pytest.mark.parametrize("key", WORDS_ONLY)
def test_free_words_are_missing_without_one_clip_encoder(key, sd3, flux):
    for context in (sd3, flux):
        with pytest.raises(Missing):
            probe_class(key).preset("smoke").run(context.base, context)


def test_a_pipeline_that_is_not_supported_is_missing_with_the_reason():
    with pytest.raises(Missing, match="not supported"):
        backbone_for(object())


def test_the_loss_of_a_picture_is_the_same_alone_and_among_others(context):
    backbone = backbone_for(context.pipe)
    images = [example.image for example in context.material.target(3)]
    latents = backbone.latents(images)
    x, t = latents, thousandth(backbone.noise, 500, latents)
    text = backbone.encode(["a cat", "a dog", ""]).text
    eps = noise_like(x, torch.Generator().manual_seed(0))
    losses = backbone.losses(x, t, eps, text)
    each = [backbone.losses(x[i : i + 1], t[i : i + 1], eps[i : i + 1], text[i : i + 1]).item() for i in range(3)]
    assert torch.allclose(losses, torch.tensor(each), rtol=1e-3)


def test_the_middle_is_run_once_and_holds_the_pictures_part(context):
    backbone, seen = backbone_of(context.pipe), []
    x = torch.randn(2, *backbone.latent_shape)
    middle = backbone.middles()[0]  # pure noise is the first one's, where there are two
    handle = middle.register_forward_hook(lambda m, a, out: seen.append(backbone.middle_mean(out)))
    try:
        for prompt in ("a cat", "a dog"):
            text = backbone.encode([prompt]).text.repeat(2)
            backbone.predict_float(x, thousandth(backbone.noise, 950, x), text)
    finally:
        handle.remove()
    cat, dog = seen
    assert cat.shape[0] == 2 and cat.ndim == 2 and not torch.allclose(cat[0], cat[1])
    assert not torch.equal(cat, dog)  # it stands behind layers that read the text


def test_a_random_denoiser_is_made_for_every_architecture(context, flux):
    for one in (context, flux):
        change = randomised(one.pipe, seed=3)
        before = weights_hash(one.pipe)
        change.apply(one.pipe)
        assert weights_hash(one.pipe) != before
        change.remove(one.pipe)
        assert weights_hash(one.pipe) == before
