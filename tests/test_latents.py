"""Between pictures and what a denoiser reads: held against the pipelines' own decoding and their own steps."""

from __future__ import annotations

import contextlib
from unittest import mock

import pytest
import torch

from erasure.backbone import backbone_of
from erasure.backbone.latents import pack, unpack
from erasure.eval.core.pictures import generate
from erasure.eval.probes.sampling import DDIM
from tests.probe_helpers import TinyMaterial
from tests.slow import first
from tests.small import small

WITH_PICTURES = ("sd1", "sdxl", "sd3", "flux", "flux2", "flux2-klein", "qwen-image", "z-image", "wan", "wan2.2",
                 "chroma", "pixart-sigma", "lumina2", "auraflow", "cogview4")  # fmt: skip
QUICK = ("sd3", "flux", "flux2-klein", "qwen-image", "z-image", "wan")
EULER = ("sd3", "flux", "flux2", "flux2-klein", "qwen-image", "z-image", "chroma", "lumina2", "auraflow")
# pipelines that shift latents; the others leave that out
SHIFTED = ("StableDiffusion3Pipeline", "FluxPipeline", "ChromaPipeline", "ZImagePipeline", "Lumina2Pipeline")
RESCALED = ("qwen-image", "lumina2")  # by guidance, to the norm of the prompt's own prediction


@pytest.fixture(scope="module", params=first(WITH_PICTURES, *QUICK))
def backbone(request):
    pipe = small(request.param)
    spread_out(pipe)
    return backbone_of(pipe)


def spread_out(pipe) -> None:
    """Statistics of latents that are told apart by channel, where a fresh autoencoder has zeros and ones."""
    vae, generator = pipe.vae, torch.Generator().manual_seed(3)
    if hasattr(vae, "bn"):
        vae.bn.running_mean.copy_(torch.randn(vae.bn.running_mean.shape, generator=generator))
        vae.bn.running_var.copy_(torch.rand(vae.bn.running_var.shape, generator=generator) + 0.5)
    elif getattr(vae.config, "latents_mean", None):
        channels = len(vae.config.latents_mean)
        vae.register_to_config(latents_mean=torch.randn(channels, generator=generator).tolist(),
                               latents_std=(torch.rand(channels, generator=generator) + 0.5).tolist())  # fmt: skip
    elif type(pipe).__name__ in SHIFTED:
        vae.register_to_config(shift_factor=0.3, scaling_factor=0.7)


@contextlib.contextmanager
def stepping(backbone):
    """The latents after each step of a scheduler, as the denoiser would read them."""
    kind, seen = type(backbone.pipe.scheduler), []
    step = kind.step

    def heard(self, *args, **settings):
        out = step(self, *args, **settings)
        x = out[0] if isinstance(out, tuple) else out.prev_sample
        seen.append(x if x.ndim == len(backbone.latent_shape) + 1 else backbone.of_grid(x))
        return out

    _ = backbone.latent_shape  # which calls the pipeline
    with mock.patch.object(kind, "step", heard):
        yield seen


def test_latents_are_unpacked_and_decoded_as_the_pipeline_does(backbone):
    text = backbone.encode(["a cat"]).text
    noise = torch.randn(1, *backbone.latent_shape, generator=torch.Generator().manual_seed(1))
    given = {**backbone.prompt_inputs(text), **backbone.call, "latents": backbone.call_latents(noise)}
    if backbone.guidance == "cfg":
        given[backbone.guidance_argument] = backbone.no_guidance
    vae, heard = backbone.pipe.vae, []
    decode = vae.decode
    with stepping(backbone) as seen, mock.patch.object(
        vae, "decode", lambda z, *args, **more: heard.append(z) or decode(z, *args, **more)
    ):  # fmt: skip
        out = backbone.pipe(**given, num_inference_steps=2, output_type="pil")
    (z,), (image,) = heard, out.images if hasattr(out, "images") else out.frames[0]
    found = backbone.encoded_from(backbone.to_grid(seen[-1]))
    assert torch.allclose(found, z.squeeze(2) if z.ndim == 5 else z, atol=1e-4, rtol=1e-4)
    (mine,) = backbone.pictures(seen[-1])
    assert mine.size == image.size
    assert max(abs(a - b) for a, b in zip(mine.tobytes(), image.tobytes(), strict=True)) <= 1


def test_real_pictures_come_back_as_the_autoencoder_alone_gives_them_back(backbone):
    images = [example.image for example in TinyMaterial().target(2)]
    latents = backbone.latents(images)
    assert latents.shape == (2, *backbone.latent_shape) and latents.dtype == torch.float32
    grid = backbone.to_grid(latents)
    assert grid.shape[1:] == backbone.grid_shape and torch.equal(backbone.of_grid(grid), latents)
    assert torch.allclose(backbone.normalised(backbone.encoded_from(grid)), grid, atol=1e-5)
    vae, (_, h, w) = backbone.autoencoder, backbone.grid_shape
    size = (w * backbone.factor, h * backbone.factor)
    assert {image.size for image in backbone.pictures(latents)} == {size}
    pixels = torch.stack(
        [torch.frombuffer(bytearray(im.resize(size, 1).tobytes()), dtype=torch.uint8) for im in images]
    )
    x = pixels.reshape(2, size[1], size[0], 3).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        out = vae.encode(x.unsqueeze(2) if backbone.video_autoencoder else x)
        z = out.latent_dist.mean.squeeze(2) if backbone.video_autoencoder else out.latent_dist.mean
        wanted = vae.decode(z.unsqueeze(2)).sample.squeeze(2) if backbone.video_autoencoder else vae.decode(z).sample
    assert torch.allclose(backbone.decode(latents), wanted, atol=1e-3)


def test_tokens_are_two_by_two_places_row_by_row():
    grid = torch.arange(2 * 3 * 4 * 6).reshape(2, 3, 4, 6).float()
    packed = pack(grid)
    assert packed.shape == (2, 6, 12) and torch.equal(unpack(packed, 2), grid)
    assert packed[1, 4].tolist() == [
        grid[1, c, 2 + i, 2 + j].item() for c in range(3) for i in range(2) for j in range(2)
    ]


STEPS = [(name, guided) for name in EULER for guided in (False, True) if not (guided and name in RESCALED)]


@pytest.mark.parametrize(
    ("name", "guided"), first(STEPS, *((name, True) for name in ("sd3", "flux", "z-image")), ("qwen-image", False))
)
def test_on_flow_models_the_sampler_takes_the_pipelines_own_steps(name, guided):
    backbone = backbone_of(small(name))
    scale = 4.0 if guided or backbone.guidance == "embedded" else backbone.no_guidance
    sampler = DDIM(backbone, num_inference_steps=5, guidance_scale=scale)
    assert len(sampler.steps) == 5 and sampler.steps[-1].sigma_prev == 0
    keys = [("a cat", 0), ("a dog", 1)]
    noise, prompts = sampler.starts(keys), [name for name, _ in keys]
    mine = sampler.sample(noise, prompts)
    text = backbone.encode(prompts).text
    with stepping(backbone) as seen:
        backbone.draw(text, num_inference_steps=5, guidance_scale=scale, noise=noise)
    assert len(seen) == 5 and torch.allclose(mine, seen[-1].float(), atol=2e-3)


@pytest.mark.parametrize("name", first(("qwen-image", "z-image", "flux2", "wan"), "qwen-image"))
def test_pictures_are_drawn_with_the_guidance_that_was_asked_for(name):
    pipe = small(name)
    scales = (0.0, 9.0) if name == "z-image" else (1.0, 9.0)
    one, nine = (
        generate(pipe, ["a cat"], num_inference_steps=2, guidance_scale=scale, progress=False)[0][0] for scale in scales
    )
    assert one.tobytes() != nine.tobytes()
