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

ANYWHERE = ("divergence", "membership", "linear_probe", "relearning", "resurgence", "adapter_on_top", "construction")
DDIM_ONLY = ("noise", "completion", "inpainting", "image_to_image", "latent_inversion")
WORDS_ONLY = ("inversion", "soft_prompt", "p4d", "unlearn_diff_atk", "ring_a_bell")
WITH_LATENTS = ("sd2", "sdxl", "sd3")


@pytest.fixture(scope="module", params=first(WITH_LATENTS, "sd3"))
def context(request):
    return tiny_context(architecture=request.param)


@pytest.fixture(scope="module")
def sd3():
    return tiny_context(architecture="sd3")


@pytest.fixture(scope="module")
def flux():
    return tiny_context(architecture="flux")


@pytest.mark.parametrize("key", ANYWHERE)
def test_a_probe_of_losses_and_predictions_works_and_gives_the_weights_back(key, context):
    probe, before = probe_class(key).preset("smoke"), weights_hash(context.pipe)
    rows = {name: probe.run(context.models[name], context) for name in ("base", "noise", "gold-0", "gold-1")}
    assert weights_hash(context.pipe) == before
    assert all(np.isfinite(row.value) for own in rows.values() for row in own if row.reason is None)
    assert [row.value for row in rows["base"]] and probe.run(context.models["noise"], context) == rows["noise"]
    assert probe.weigh(rows, {name: context.models[name].role for name in rows})


def test_the_distance_of_an_edit_is_seen_on_a_flow_model(sd3):
    probe = probe_class("divergence").preset("smoke")
    base, edited = (probe.run(sd3.models[name], sd3) for name in ("base", "noise"))
    assert any(a.value != b.value for a, b in zip(base, edited, strict=True))


@pytest.mark.parametrize("key", ["delta_side_channel", "quantised"])
def test_what_needs_no_latents_runs_on_packed_ones_too(key, sd3, flux):
    for context in (sd3, flux):
        rows, before = (
            probe_class(key).preset("smoke").run(context.models["noise"], context),
            weights_hash(context.pipe),
        )
        assert rows and all(row.value is not None and np.isfinite(row.value) for row in rows)
        assert key != "delta_side_channel" or max(row.value for row in rows) > 0
        assert weights_hash(context.pipe) == before


@pytest.mark.parametrize("key", ANYWHERE)
def test_packed_latents_are_missing_with_the_reason(key, flux):
    if key == "construction":  # which has parts that need no latents
        seen = [row.reason for row in probe_class(key).preset("smoke").run(flux.base, flux) if row.reason]
        assert seen and "packed" in seen[0]
        return
    with pytest.raises(Missing, match="FLUX.1 are packed"):
        probe_class(key).preset("smoke").run(flux.base, flux)


@pytest.mark.parametrize("key", DDIM_ONLY)
def test_sampling_by_ddim_is_missing_on_flow_models(key, sd3, flux):
    with pytest.raises(Missing, match="flow model"):
        probe_class(key).preset("smoke").run(sd3.base, sd3)
    with pytest.raises(Missing, match="packed"):
        probe_class(key).preset("smoke").run(flux.base, flux)


@pytest.mark.parametrize("key", WORDS_ONLY)
def test_free_words_are_missing_without_one_clip_encoder(key, sd3, flux):
    for context in (sd3, flux):
        with pytest.raises(Missing):
            probe_class(key).preset("smoke").run(context.base, context)


def test_a_pipeline_that_is_not_supported_is_missing_with_the_reason():
    with pytest.raises(Missing, match="not supported"):
        backbone_for(object())


def test_pictures_go_to_latents_and_back_on_every_such_architecture(context):
    backbone = backbone_for(context.pipe)
    images = [example.image for example in context.material.target(3)]
    latents = backbone.latents(images)
    assert latents.shape == (3, *backbone.latent_shape) and latents.dtype == torch.float32
    assert len({image.size for image in backbone.pictures(latents)}) == 1
    x, t = latents, thousandth(backbone.noise, 500, latents)
    text = backbone.encode(["a cat", "a dog", ""]).text
    eps = noise_like(x, torch.Generator().manual_seed(0))
    losses = backbone.losses(x, t, eps, text)
    each = [backbone.losses(x[i : i + 1], t[i : i + 1], eps[i : i + 1], text[i : i + 1]).item() for i in range(3)]
    assert torch.allclose(losses, torch.tensor(each), rtol=1e-3)


def test_the_middle_is_run_once_and_holds_the_pictures_part(context):
    backbone, seen = backbone_of(context.pipe), []
    x = torch.randn(2, *backbone.latent_shape)
    handle = backbone.middle().register_forward_hook(lambda m, a, out: seen.append(backbone.middle_mean(out)))
    try:
        for prompt in ("a cat", "a dog"):
            text = backbone.encode([prompt]).text.repeat(2)
            backbone.predict_float(x, thousandth(backbone.noise, 300, x), text)
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
