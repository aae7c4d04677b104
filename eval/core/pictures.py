"""Paired pictures: the same prompt and the same noise, before and after an edit, each made once.

A picture is cached under the hash of everything it depends on, so a second evaluation of the same weights costs nothing
and an edited model can never be served its predecessor's pictures. The kind of device and the versions of the libraries
that draw are part of it: they change pixels.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import json
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import diffusers
import numpy as np
import torch
import transformers
from PIL import Image
from tqdm.auto import tqdm

from erasure import runtime
from erasure.backbone import backbone_of, denoiser_of
from erasure.concept import Prompt
from erasure.eval.core.hashes import weights_hash
from erasure.eval.core.records import GROUPS
from erasure.io import blake2b, seed_of, sha256_json, write_atomically

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class _Job:
    """One picture to make: where it goes in the answer, and where it is cached."""

    row: int
    column: int
    prompt: str
    seed: int
    file: Path | None
    embeds: torch.Tensor | None  # what the prompt is taken to say; None = what it says


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
        prompts, seeds: the initial noise of a picture depends on its (prompt, seed) and nothing else, so it is the same
            before and after an edit and whatever else is in the batch.
        num_inference_steps, guidance_scale: of the sampler.
        batch_size: pictures per call. Larger is faster until memory ends; it changes results only by rounding.
        cache_dir: folder for finished pictures; None keeps nothing. A corrupt file in it is drawn again.
        progress: show a progress bar.
        autocast: bfloat16 arithmetic, recorded in the cache key. Much faster where the processor has it and much slower
            elsewhere (see :mod:`erasure.runtime`); off when pictures must match a float32 run.
        description: what the progress bar says.
        prompt_embeds: ``(n, length, d)`` text conditioning in the place of what the prompts say, which then only name
            the noise. Nothing is cached. For pipelines without pooled text embeddings (Stable Diffusion 1.x and 2.x).
        clip_skip: layers of the text encoder that are left out, for pipelines whose call has it.
        hash_weights: the weights' part of the cache key; a run that draws often passes one
            :class:`~erasure.eval.core.hashes.WeightHashes`.

    Returns:
        One list of pictures per prompt, in the order of ``seeds``.
    """
    prompts, seeds = list(prompts), list(seeds)
    if batch_size < 1 or not seeds:
        raise ValueError(
            f"need at least one seed and batch_size >= 1; got {len(seeds)} seeds and batch_size={batch_size}"
        )
    if num_inference_steps < 1 or not 0 <= guidance_scale < math.inf:
        raise ValueError(
            f"a sampler needs at least one step and a guidance_scale of 0 or more; got {num_inference_steps} steps and "
            f"guidance_scale={guidance_scale}"
        )
    if prompt_embeds is not None and (len(prompt_embeds) != len(prompts) or cache_dir is not None):
        raise ValueError(
            f"prompt_embeds take one row per prompt and no cache; got {len(prompt_embeds)} rows for {len(prompts)} "
            f"prompts and cache_dir={cache_dir!r}; give as many rows, and cache_dir=None"
        )
    sampler = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
    sampler |= {} if clip_skip is None else {"clip_skip": clip_skip}
    common = {} if cache_dir is None else _settings_key(pipe, hash_weights(pipe), autocast=autocast, **sampler)
    answer: list[list[Image.Image | None]] = [[None] * len(seeds) for _ in prompts]
    todo: list[_Job] = []
    for row, prompt in enumerate(prompts):
        for column, seed in enumerate(seeds):
            file = None if cache_dir is None else Path(cache_dir) / f"{_key(common, prompt, seed)}.png"
            answer[row][column] = _read(file)
            if answer[row][column] is None:
                embeds = None if prompt_embeds is None else prompt_embeds[row]
                todo.append(_Job(row, column, prompt, seed, file, embeds))
    total = len(prompts) * len(seeds)
    bar = tqdm(total=total, initial=total - len(todo), desc=description, unit="img", disable=not progress, leave=False)
    bar.set_postfix_str(f"{total - len(todo)} from the cache")
    # a half-precision pipeline that is being trained runs under an autocast of its own, which stays
    alone = autocast or getattr(pipe, "dtype", torch.float32) == torch.float32
    casting = runtime.autocast(pipe.device, autocast) if alone else contextlib.nullcontext()
    with bar, _quiet(pipe), casting, _skipping(pipe) if clip_skip else contextlib.nullcontext():
        for start in range(0, len(todo), batch_size):
            batch = todo[start : start + batch_size]
            for job, image in zip(batch, _draw(pipe, batch, **sampler), strict=True):
                answer[job.row][job.column] = image
                if job.file is not None:
                    write_atomically(job.file, _png(image))
            bar.update(len(batch))
    return [[image for image in row if image is not None] for row in answer]


def _draw(pipe: Any, batch: Sequence[_Job], **sampler: Any) -> list[Image.Image]:
    """One call of the pipeline."""
    denoiser = denoiser_of(pipe)
    # A second stream of generators for schedulers that draw noise on the way (ancestral samplers).
    given: dict[str, Any] = {"generator": [_generator(job.prompt, job.seed, "steps") for job in batch]}
    videos = "num_frames" in inspect.signature(pipe.__call__).parameters
    if getattr(denoiser.config, "sample_size", None) is not None and not videos:
        noise = [initial_noise(pipe, job.prompt, job.seed) for job in batch]
        given["latents"] = torch.stack(noise).to(denoiser.dtype)
    # else the latents are packed, as FLUX's, or videos: the pipeline draws them itself, from the generators
    if embeds := [job.embeds for job in batch if job.embeds is not None]:
        given["prompt_embeds"] = torch.stack(embeds)
    prompts = None if embeds else [job.prompt for job in batch]
    drawn = called(pipe, prompts, {"output_type": "pil", **given}, **sampler)
    return list(drawn.images) if hasattr(drawn, "images") else [frames[0] for frames in drawn.frames]  # of a video


def called(pipe: Any, prompts: list[str] | None, given: dict[str, Any], **sampler: Any) -> Any:
    """The pipeline's call, with settings as it names them.

    Some take guidance by another argument, or compare with a prompt that has to be given; a model of videos draws as
    many frames as its backbone says, one. Unknown architectures are called as Stable Diffusion is.
    """
    try:
        backbone = backbone_of(getattr(pipe, "pipe", pipe))
    except ValueError:
        return pipe(prompts, **given, **sampler)
    named = {backbone.guidance_argument if key == "guidance_scale" else key: value for key, value in sampler.items()}
    if backbone.null_prompt and backbone.guidance == "cfg":  # the others compare with the empty one by themselves
        named["negative_prompt"] = [backbone.null_prompt] * len(prompts or ())
    return pipe(prompt=prompts, **{**backbone.call, **given, **named})


def initial_noise(pipe: Any, prompt: str, seed: int) -> torch.Tensor:
    """The standard normal latent (channels, h, w) a picture starts from: a function of (prompt, seed) alone."""
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
    """A cached picture, or None when there is none that can be read."""
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
def _skipping(pipe: Any) -> Iterator[None]:
    """Give the text encoder the name under which Stable Diffusion's call looks for the norm behind a skipped layer.

    transformers 5 took the name away, and diffusers 0.42 still asks for it. It is set beside the modules, so that no
    weight is there twice.
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
