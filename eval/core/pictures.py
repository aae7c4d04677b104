"""Paired pictures: the same prompt and the same noise, before and after an edit, each drawn once.

A picture is cached under the hash of everything it depends on, so the same weights are never drawn twice, and an edited
model never gets the pictures of another. The kind of device and the library versions are part of the hash.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import itertools
import json
import numbers
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import diffusers
import numpy as np
import torch
import transformers
from PIL import Image
from tqdm.auto import tqdm

from erasure import runtime
from erasure.backbone import denoiser_of
from erasure.concept import Prompt
from erasure.eval.core.hashes import weights_hash
from erasure.eval.core.records import GROUPS
from erasure.io import blake2b, is_whole, named, seed_of, sha256_json, shown, write_atomically
from erasure.pictures import called, pictures_of

T = TypeVar("T")


class _Job(NamedTuple):
    """One picture to draw, where it is cached, and embeddings in the place of the prompt's own."""

    prompt: str
    seed: int
    file: Path | None
    embeds: torch.Tensor | None


def generate(
    pipe: Any,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int] = (0,),
    num_inference_steps: int = 25,
    guidance_scale: float = 5.0,
    batch_size: int = 16,
    cache_dir: str | Path | None = None,
    progress: bool = True,
    autocast: bool = False,
    description: str = "pictures",
    prompt_embeds: torch.Tensor | None = None,
    clip_skip: int | None = None,
    hash_weights: Callable[[Any], str] = weights_hash,
) -> list[list[Image.Image]]:
    """Draw every prompt with every seed on a stock text-to-image pipeline.

    Args:
        pipe: the pipeline; it is left as it was found.
        prompts, seeds: the initial noise of a picture depends on its (prompt, seed) alone, so it is the same before and
            after an edit.
        num_inference_steps, guidance_scale: of the sampler.
        batch_size: pictures per call. Larger is faster until memory ends; it changes results only by rounding.
        cache_dir: folder for finished pictures; None keeps nothing. A corrupt file in it is drawn again.
        progress: show a progress bar.
        autocast: bfloat16 arithmetic, part of the cache key. Much faster where the processor has it and much slower
            elsewhere (see :mod:`erasure.runtime`); off when pictures must match a float32 run.
        description: text of the progress bar.
        prompt_embeds: ``(n, length, d)`` conditioning that replaces the prompts, which then only determine the noise.
            Nothing is cached. For pipelines without pooled text embeddings (Stable Diffusion 1.x and 2.x).
        clip_skip: layers of the text encoder to skip, for pipelines whose call has it.
        hash_weights: for the cache key; a run that draws often passes one
            :class:`~erasure.eval.core.hashes.WeightHashes`.

    Returns:
        One list of pictures per prompt, in the order of ``seeds``.
    """
    prompts, seeds = list(prompts), list(seeds)
    _check(prompts, seeds, batch_size, prompt_embeds, cache_dir)
    sampler = _sampler(num_inference_steps, guidance_scale, clip_skip)
    common = {} if cache_dir is None else _settings_key(pipe, hash_weights(pipe), autocast=autocast, **sampler)
    folder, given = None if cache_dir is None else named(cache_dir), itertools.repeat(None, len(prompts))
    jobs = [
        _Job(prompt, seed, None if folder is None else folder / f"{_key(common, prompt, seed)}.png", embeds)
        for prompt, embeds in zip(prompts, given if prompt_embeds is None else prompt_embeds, strict=True)
        for seed in seeds
    ]
    images = list(map(_read, (job.file for job in jobs)))
    todo = [i for i, image in enumerate(images) if image is None]
    known = len(jobs) - len(todo)
    bar = tqdm(total=len(jobs), initial=known, desc=description, unit="img", disable=not progress, leave=False)
    if known:
        bar.set_postfix_str(f"{known} from the cache")
    with bar, _ready(pipe, autocast=autocast, clip_skip=clip_skip):
        for start in range(0, len(todo), batch_size):
            batch = todo[start : start + batch_size]
            for i, image in zip(batch, _draw(pipe, [jobs[i] for i in batch], **sampler), strict=True):
                images[i] = image
                if (file := jobs[i].file) is not None:
                    write_atomically(file, _png(image), durable=False)  # a corrupt one is drawn again
            bar.update(len(batch))
    done = [image for image in images if image is not None]  # all of them
    return [done[i : i + len(seeds)] for i in range(0, len(done), len(seeds))]


def _check(
    prompts: list[str],
    seeds: list[int],
    batch_size: int,
    prompt_embeds: torch.Tensor | None,
    cache_dir: str | Path | None,
) -> None:
    if not isinstance(batch_size, numbers.Integral) or batch_size < 1 or not seeds:
        raise ValueError(
            f"need at least one seed and batch_size >= 1; got {len(seeds)} seeds and batch_size={shown(batch_size)}"
        )
    if prompt_embeds is not None and (len(prompt_embeds) != len(prompts) or cache_dir is not None):
        raise ValueError(
            f"prompt_embeds take one row per prompt and no cache; got {len(prompt_embeds)} rows for {len(prompts)} "
            f"prompts and cache_dir={cache_dir!r}; give as many rows, and cache_dir=None"
        )
    if bad := [seed for seed in seeds if not is_whole(seed)]:
        raise ValueError(f"seeds are whole numbers from 0 on; got {shown(bad[0])}; give others")


def _sampler(steps: int, guidance: float, clip_skip: int | None) -> dict[str, Any]:
    if not 1 <= steps <= 1000 or steps != int(steps) or not 0 <= guidance <= 100:
        raise ValueError(
            f"a sampler takes 1 to 1,000 steps and a guidance_scale from 0 to 100; got {shown(steps)} steps and "
            f"guidance_scale={shown(guidance)}; give others"
        )
    skipped = {} if clip_skip is None else {"clip_skip": clip_skip}
    return {"num_inference_steps": steps, "guidance_scale": guidance, **skipped}


def _draw(pipe: Any, batch: Sequence[_Job], **sampler: Any) -> list[Image.Image]:
    denoiser = denoiser_of(pipe)
    # A second stream of generators for schedulers that draw noise in every step (ancestral samplers).
    given: dict[str, Any] = {"generator": [_generator(job.prompt, job.seed, "steps") for job in batch]}
    videos = "num_frames" in inspect.signature(pipe).parameters  # of what stands around it, the pipeline's own
    if getattr(denoiser.config, "sample_size", None) is not None and not videos:
        noise = [initial_noise(pipe, job.prompt, job.seed) for job in batch]
        given["latents"] = torch.stack(noise).to(denoiser.dtype)
    # The pipeline itself draws packed latents, as FLUX's, and videos, from the generators.
    if embeds := [job.embeds for job in batch if job.embeds is not None]:
        given["prompt_embeds"] = torch.stack(embeds)
    prompts = None if embeds else [job.prompt for job in batch]
    return pictures_of(called(pipe, prompts, {"output_type": "pil", **given}, **sampler))


def initial_noise(pipe: Any, prompt: str, seed: int) -> torch.Tensor:
    """The standard normal latent (channels, h, w) that a picture starts from, by (prompt, seed) alone."""
    config = denoiser_of(pipe).config
    side = config.sample_size
    height, width = side if isinstance(side, list | tuple) else (side, side)
    return noise_of((config.in_channels, height, width), prompt, seed)


def noise_of(shape: Sequence[int], prompt: str, seed: int) -> torch.Tensor:
    """Standard normal latents of a shape: a function of (prompt, seed) alone."""
    return torch.randn(*shape, generator=_generator(prompt, seed, "start"))


def _generator(prompt: str, seed: int, stream: str) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed_of(f"{stream}\0{seed}\0{prompt}") >> 1)


def evenly(items: Sequence[T], count: int | None) -> list[T]:
    """At most ``count`` of the items, spread evenly over them, in their order; all of them for None."""
    if count is None or len(items) <= count:
        return list(items)
    return [items[i] for i in np.linspace(0, len(items) - 1, count).round().astype(int)]


def limited(prompts: Sequence[Prompt], limit: int | None) -> tuple[Prompt, ...]:
    """At most ``limit`` prompts of each group, evenly spread."""
    if limit is None:
        return tuple(prompts)
    groups = [[p for p in prompts if p.group == group] for group in GROUPS]
    return tuple(p for group in groups for p in evenly(group, limit))


def image_hash(image: Image.Image) -> str:
    """BLAKE2b of the RGB pixels."""
    rgb = image.convert("RGB")
    return blake2b(repr(rgb.size).encode() + rgb.tobytes(), size=16)


def _settings_key(pipe: Any, weights: str, **sampler: Any) -> dict[str, Any]:
    """What all pictures of one call depend on."""
    config = {k: v for k, v in dict(pipe.scheduler.config).items() if not k.startswith("_")}
    denoiser = denoiser_of(pipe)
    side = getattr(denoiser.config, "sample_size", None) or getattr(pipe, "default_sample_size", None)
    return {
        "weights": weights,
        "pipeline": type(pipe).__name__,
        "scheduler": [type(pipe.scheduler).__name__, json.dumps(config, sort_keys=True, default=str)],
        "size": [denoiser.config.in_channels, side, getattr(pipe, "vae_scale_factor", None)],
        "dtype": str(denoiser.dtype),
        "device": torch.device(pipe.device).type,
        "versions": [torch.__version__, diffusers.__version__, transformers.__version__],
        "safety_checker": type(getattr(pipe, "safety_checker", None)).__name__,  # it blacks pictures out
        **sampler,
    }


def _key(common: dict[str, Any], prompt: str, seed: int) -> str:
    return sha256_json({**common, "prompt": prompt, "seed": seed}, default=str, spaced=True)


def _read(file: Path | None) -> Image.Image | None:
    """A cached picture; None if there is none or it cannot be read."""
    if file is None or not file.exists():
        return None
    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:  # PIL reports a broken PNG as any of these
        warnings.warn(f"cached picture {file} cannot be read ({error}); drawing it again", stacklevel=3)
        return None


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="PNG")
    return buffer.getvalue()


@contextlib.contextmanager
def _ready(pipe: Any, *, autocast: bool, clip_skip: int | None) -> Iterator[None]:
    """A pipeline ready to draw: quiet, in its arithmetic."""
    # a half-precision pipeline that is being trained runs under an autocast of its own, which stays
    alone = autocast or getattr(pipe, "dtype", torch.float32) == torch.float32
    casting = runtime.autocast(pipe.device, autocast) if alone else contextlib.nullcontext()
    with _quiet(pipe), casting, _skipping(pipe) if clip_skip else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def _skipping(pipe: Any) -> Iterator[None]:
    """Give the text encoder the attribute in which diffusers 0.42 looks for the norm behind a skipped layer.

    transformers 5 removed it. It is not set as a module, so that no weight is in the state twice.
    """
    encoder = getattr(pipe, "text_encoder", None)
    lacking = hasattr(encoder, "final_layer_norm") and not hasattr(encoder, "text_model")
    if lacking:
        object.__setattr__(encoder, "text_model", encoder)
    try:
        yield
    finally:
        if lacking:
            object.__delattr__(encoder, "text_model")


@contextlib.contextmanager
def _quiet(pipe: Any) -> Iterator[None]:
    """Silence the pipeline's own progress bar, and give it back as it was."""
    had = hasattr(pipe, "_progress_bar_config")
    before = dict(pipe._progress_bar_config) if had else {}
    pipe.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield
    finally:
        if had:
            pipe.set_progress_bar_config(**before)
        else:
            del pipe._progress_bar_config
