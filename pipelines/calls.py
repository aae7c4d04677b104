"""A pipeline's call taken apart: a copy of the pipeline for one call, and the arguments of some of its prompts."""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from erasure.backbone import denoiser_of
from erasure.io import shown
from erasure.pipelines.around import Around

PROMPTS = ("prompt", "prompt_2", "prompt_3", "negative_prompt", "negative_prompt_2", "negative_prompt_3")
PICTURES = ("generator", "latents")  # arguments with one for each picture


class Copies:
    """Copies of pipelines around the same models, for calls from several threads.

    What a call changes is its own: the scheduler, which counts steps; settings kept on the pipeline; and the
    tokenizers, which set padding and cutting on themselves and so mix up the prompts of two threads. Each thread copies
    those once.
    """

    def __init__(self) -> None:
        self._kept = threading.local()

    def make(self, pipe: Any) -> Any:
        """A copy for one call. The pipeline itself is not changed."""
        other = copy.copy(pipe)
        if isinstance(pipe, Around):
            other.pipe = self.make(pipe.pipe)
            return other
        other.scheduler = copy.deepcopy(pipe.scheduler)
        for name, tokenizer in tokenizers_of(pipe).items():
            setattr(other, name, self._own(tokenizer))
        return other

    def _own(self, original: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
        kept = self._kept.__dict__.setdefault("tokenizers", {})
        found = kept.get(id(original))
        if found is None or found[0] is not original or found[1] != len(original):  # words may have been added
            found = kept[id(original)] = original, len(original), copy.deepcopy(original)
        return found[2]


def texts_of(given: Any, name: str = "prompt") -> list[str]:
    """The texts of an argument that is one, or a list of them.

    Raises:
        ValueError: it is neither.
    """
    several = given if isinstance(given, list | tuple) else [given]
    if not several or not all(isinstance(text, str) for text in several):
        raise ValueError(f"{name} is a text or a list of texts; got {shown(given)}")
    return list(several)


def tokenizers_of(pipe: Any) -> dict[str, PreTrainedTokenizerBase]:
    """The tokenizers of a pipeline by name."""
    return {name: part for name, part in pipe.components.items() if isinstance(part, PreTrainedTokenizerBase)}


def image_to_image(pipe: Any) -> Any:
    """The image-to-image pipeline of diffusers around the models, scheduler and tokenizers of a pipeline.

    Raises:
        ValueError: diffusers has none that starts from a noised picture.
    """
    from diffusers import AutoPipelineForImage2Image  # which takes a second to import

    stock = next(kind for kind in type(pipe).__mro__ if kind.__module__.startswith("diffusers."))
    plain = copy.copy(pipe)
    plain.__class__ = stock  # diffusers goes by the name of the class, and does not know a subclass
    try:
        made = AutoPipelineForImage2Image.from_pipe(plain)
    except ValueError:
        made = None
    if made is None or not {"image", "strength"} <= inspect.signature(made.__call__).parameters.keys():
        raise ValueError(
            f"diffusers has no image-to-image with a strength for {stock.__name__}; give strength=None and, on a "
            "U-Net, attention"
        )
    made.set_progress_bar_config(**getattr(pipe, "_progress_bar_config", {}))
    return made


def size_of(pipe: Any, given: Mapping[str, Any]) -> tuple[int, int]:
    """Width and height in pixels of what a call draws.

    Raises:
        ValueError: neither the call nor the pipeline says.
    """
    side = getattr(pipe, "default_sample_size", None) or getattr(denoiser_of(pipe).config, "sample_size", None)
    height, width = side if isinstance(side, list | tuple) else (side, side)
    factor = getattr(pipe, "vae_scale_factor", None) or 0
    width, height = given.get("width") or factor * (width or 0), given.get("height") or factor * (height or 0)
    if not width or not height:
        raise ValueError(f"how large {type(pipe).__name__} draws is not known; give height and width")
    return int(width), int(height)


def rows_of(
    given: Mapping[str, Any], rows: Sequence[int], count: int, images: int, *, repeated: bool = False
) -> dict[str, Any]:
    """The arguments of a call for some of its prompts.

    Args:
        rows: which of ``count`` prompts.
        images: pictures of each prompt.
        repeated: each prompt as often as it has pictures.
    """
    pictures = [i * images + j for i in rows for j in range(images)]
    prompts = [i for i in rows for _ in range(images)] if repeated else list(rows)
    out = dict(given)
    for name, value in out.items():
        if name in PROMPTS and isinstance(value, str):
            value = [value] * count
        of_prompts = (name in PROMPTS and isinstance(value, list | tuple)) or (
            isinstance(value, Tensor) and ("embeds" in name or name.endswith("mask"))
        )
        of_pictures = name in PICTURES and isinstance(value, list | tuple | Tensor)
        if not of_prompts and not of_pictures:
            continue
        wanted = count if of_prompts else count * images
        if len(value) != wanted:
            raise ValueError(f"{name} has {len(value)} rows for {wanted}; give one for each")
        chosen = prompts if of_prompts else pictures
        out[name] = value[chosen] if isinstance(value, Tensor) else [value[i] for i in chosen]
    return out


def is_default(parameters: Mapping[str, inspect.Parameter], name: str, value: Any) -> bool:
    default = parameters[name].default if name in parameters else inspect.Parameter.empty
    return value is default or (isinstance(value, int | float | str | list) and value == default)


def ordered(parts: Sequence[Any], at: Sequence[int]) -> Any:
    """Pictures, or what is said about each, of several calls in one order."""
    if isinstance(parts[0], list):
        flat = [one for part in parts for one in part]
        return [flat[i] for i in at]
    return torch.cat(list(parts))[list(at)] if isinstance(parts[0], Tensor) else np.concatenate(parts)[list(at)]


__all__ = ["Copies", "image_to_image", "is_default", "ordered", "rows_of", "size_of", "texts_of", "tokenizers_of"]
