"""Pictures before and after an erasure, on one labelled sheet."""

from __future__ import annotations

import bisect
import copy
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

from erasure.concept import WORLD
from erasure.io import printable, shown

COLUMNS = 12  # of a sheet
LARGEST_SEED = 2**63 - 1  # of torch's generators


def usual_settings(base: str) -> dict[str, Any]:
    """Steps and guidance that a base is usually drawn with."""
    steps, guidance = (8, 3.0) if base == WORLD else (25, 7.5)
    return {"num_inference_steps": steps, "guidance_scale": guidance}


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
        out = quiet(prompt, generator=torch.Generator("cpu").manual_seed(seed), **call)
        found.append(out.images[0] if hasattr(out, "images") else out.frames[0][0])
    return found


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


__all__ = ["check_seed", "drawn", "png", "sheet", "usual_settings"]
