"""Pictures before and after an erasure, on one labelled sheet."""

from __future__ import annotations

import bisect
import copy
import inspect
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

from erasure.backbone import backbone_of
from erasure.concept import WORLD
from erasure.io import printable, shown

COLUMNS = 12  # of a sheet
LARGEST_SEED = 2**63 - 1  # of torch's generators


def usual_settings(base: str, pipe: Any = None) -> dict[str, Any]:
    """Steps and guidance that a base is usually drawn with.

    Args:
        pipe: its pipeline, whose own guidance it is (FLUX.1's is 3.5). Stable Diffusion's where none is given.
    """
    if base == WORLD:
        return {"num_inference_steps": 8, "guidance_scale": 3.0}
    return {"num_inference_steps": 25, "guidance_scale": 7.5 if pipe is None else own_guidance(pipe)}


def own_guidance(pipe: Any) -> float:
    """The guidance of a call that names none; Stable Diffusion's, 7.5, where the pipeline has no default."""
    try:
        name = backbone_of(pipe).guidance_argument
    except ValueError:  # an architecture of which nothing is known
        name = "guidance_scale"
    own = getattr(inspect.signature(pipe).parameters.get(name), "default", None)
    return float(own) if isinstance(own, int | float) else 7.5


def check_seed(seed: Any) -> int:
    """A seed, if it is one.

    Raises:
        ValueError: it is no whole number from 0 to 2^63 - 1.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= LARGEST_SEED:
        raise ValueError(f"a seed is a whole number from 0 to 2^63 - 1; got {shown(seed)}; give another")
    return seed


def drawn(pipe: Any, prompts: Sequence[str], seed: int, **call: Any) -> list[Image.Image]:
    """One picture of each prompt, each from the same seed and in a call of its own; of a video the first frame."""
    quiet = copy.copy(pipe)
    quiet.set_progress_bar_config(disable=True)
    found = []
    for prompt in prompts:
        given = {"generator": torch.Generator("cpu").manual_seed(seed), "output_type": "pil", **call}
        found += pictures_of(called(quiet, [prompt], given))
    return found


def called(pipe: Any, prompts: list[str] | None, given: Mapping[str, Any], **sampler: Any) -> Any:
    """The pipeline's call, with settings as it names them.

    Some take guidance by another argument, or compare with a prompt that has to be given; a model of videos draws as
    many frames as its backbone says, one. Unknown architectures are called as Stable Diffusion is.
    """
    inner = pipe
    while (inside := getattr(inner, "pipe", None)) is not None:  # of what stands around it
        inner = inside
    try:
        backbone = backbone_of(inner)
    except ValueError:
        return pipe(prompt=prompts, **given, **sampler)
    taken = inspect.signature(inner).parameters
    named = {backbone.guidance_argument if key == "guidance_scale" else key: value for key, value in sampler.items()}
    if backbone.guidance_argument not in taken:  # a distilled model's
        named.pop(backbone.guidance_argument, None)
    asks = backbone.null_prompt and backbone.guidance == "cfg"  # the others compare with the empty one by themselves
    if asks and "negative_prompt" in taken:
        named.setdefault("negative_prompt", [backbone.null_prompt] * len(prompts or ()))
    own = {key: value for key, value in backbone.call.items() if key in taken}  # from a video it has the video's frames
    return pipe(prompt=prompts, **{**own, **named, **given})  # by name: FLUX.2's first argument is a picture


def pictures_of(answer: Any) -> list[Any]:
    """The pictures in a pipeline's answer; of each video the first frame."""
    return list(answer.images) if hasattr(answer, "images") else [frames[0] for frames in answer.frames]


def png(image: Image.Image) -> bytes:
    """A picture as the bytes of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def sheet(rows: Mapping[str, Sequence[Any]], titles: Sequence[str], *, side: int = 192, margin: int = 64) -> Any:
    """Pictures in rows, each with a name, under their titles; behind :data:`COLUMNS` of them, further down.

    Args:
        titles: their lines are kept apart; the last one is broken where the picture ends, and cut with an ellipsis.
    """
    font, head = _font(13), 54
    bands = [range(start, min(start + COLUMNS, len(titles))) for start in range(0, len(titles), COLUMNS)]
    tall = head + side * len(rows)
    page = Image.new("RGB", (margin + side * len(bands[0]), tall * len(bands)), "white")
    pen = ImageDraw.Draw(page)
    for top, band in zip(range(0, page.height, tall), bands, strict=True):
        for x, i in zip(range(margin, page.width, side), band, strict=False):
            pen.multiline_text((x + 4, top + 4), _fitted(titles[i], font, side - 12, lines=3), "black", font)
            for y, images in enumerate(rows.values()):
                page.paste(images[i].resize((side - 4, side - 4)), (x, top + head + y * side))
        for y, name in enumerate(rows):
            pen.text((4, top + head + y * side + side // 2), name, "black", font)
    return page


def _fitted(title: str, font: Any, width: int, *, lines: int) -> str:
    """A title in at most so many lines that are no wider than ``width`` pixels."""
    *first, text = title.split("\n")
    left = printable(text, limit=None)
    found: list[str] = []
    while left and len(found) + len(first) < lines:
        end = max(1, bisect.bisect_right(range(1, len(left) + 1), width, key=lambda n: font.getlength(left[:n])))
        if end < len(left) and (space := left.rfind(" ", 0, end + 1)) > 0:
            end = space
        found.append(left[:end])
        left = left[end:].lstrip()
    if left:
        cut = found[-1]
        while cut and font.getlength(f"{cut}…") > width:
            cut = cut[:-1]
        found[-1] = f"{cut}…"
    return "\n".join([*first, *found])


def _font(size: int) -> Any:
    """A font that every installation has: matplotlib's own, which knows more letters than PIL's."""
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)


__all__ = ["called", "check_seed", "drawn", "own_guidance", "pictures_of", "png", "sheet", "usual_settings"]
