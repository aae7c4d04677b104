"""Something that no model knows: a drawing made from a seed, its pictures, and how to find it in others.

An emblem is six by six fields of three colours, mirrored, some of them empty. It is found by matching it at several
sizes and angles, so no detector has to know it, and no model can have seen it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from erasure.eval.core.material import Example

WORD = "zumbrel"  # in no dictionary
FIELDS, COLOURS = 6, 3
SIDE = 64  # pixels at which it is looked for
SIZES, ANGLES = (36, 40, 44, 48, 52, 56), (-10.0, 0.0, 10.0)
FOUND = 0.65  # correlation from which it is taken to be there; see tests/test_plasticity.py
BACKGROUNDS = {
    "white": (245, 245, 245), "black": (25, 25, 28), "grey": (135, 135, 138), "red": (205, 50, 60),
    "green": (45, 135, 70), "blue": (50, 95, 200), "yellow": (245, 205, 75), "pink": (240, 155, 195),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Emblem:
    """One such drawing; another ``seed`` gives another one."""

    seed: int = 3

    @functools.cached_property
    def fields(self) -> np.ndarray:
        """``(6, 6, 4)`` uint8, RGBA."""
        rng = np.random.default_rng(self.seed)
        half = rng.integers(0, COLOURS + 1, (FIELDS, FIELDS // 2))  # the last number is an empty field
        palette = np.vstack([rng.integers(30, 226, (COLOURS, 3)), np.zeros((1, 3), int)])
        which = np.concatenate([half, half[:, ::-1]], 1)
        alpha = np.where(which < COLOURS, 255, 0)
        return np.dstack([palette[which], alpha]).astype(np.uint8)

    def examples(self, count: int, *, seed: int, size: int = SIDE) -> list[Example]:
        """Pictures of it on plain backgrounds, in several places, sizes and angles, with captions."""
        rng, found = np.random.default_rng([self.seed, seed]), []
        for i in range(count):
            name = list(BACKGROUNDS)[int(rng.integers(len(BACKGROUNDS)))]
            side, angle = int(rng.integers(40, SIZES[-1] + 1)), float(rng.uniform(-12, 12))
            x, y = (int(v) for v in rng.integers(0, SIDE - side + 1, 2))
            canvas = Image.new("RGB", (SIDE, SIDE), BACKGROUNDS[name])
            drawn = self.drawn(side, angle)
            canvas.paste(drawn, (x, y), drawn)
            image = canvas.resize((size, size), Image.Resampling.BICUBIC)
            found.append(Example(image, caption(name), WORD, f"emblem {self.seed}, {seed}, {i}", member=False))
        return found

    def drawn(self, side: int, angle: float) -> Image.Image:
        flat = Image.fromarray(self.fields).resize((side, side), Image.Resampling.NEAREST)
        return flat.rotate(angle, resample=Image.Resampling.BILINEAR)

    @functools.cached_property
    def templates(self) -> list[tuple[Tensor, Tensor]]:
        """At every size and angle: what is there ``(1, 1, s, s)``, and the colours there minus their mean."""
        found = []
        for side in SIZES:
            for angle in ANGLES:
                pixels = torch.from_numpy(np.array(self.drawn(side, angle), np.float32)).permute(2, 0, 1)[None]
                there = (pixels[:, 3:] > 128).float()
                mean = (pixels[:, :3] * there).sum() / (3 * there.sum())
                found.append((there, (pixels[:, :3] - mean) * there))
        return found

    def likeness(self, images: Sequence[Image.Image]) -> list[float]:
        """The highest correlation of each picture with the emblem at any place, size and angle, -1 to 1."""
        if not images:
            return []
        small = [image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC) for image in images]
        x = torch.from_numpy(np.stack([np.asarray(image, np.float32) for image in small])).permute(0, 3, 1, 2)
        best = torch.full((len(x),), -1.0)
        for there, colours in self.templates:
            n, window = 3 * there.sum(), there.expand(1, 3, -1, -1)
            total, squares = F.conv2d(x, window), F.conv2d(x * x, window)
            spread = (squares - total**2 / n).clamp(min=1) * colours.square().sum()
            best = torch.maximum(best, (F.conv2d(x, colours) / spread.sqrt()).amax((1, 2, 3)))
        return best.tolist()


def caption(background: str) -> str:
    return f"a {WORD} on a {background} background"


def prompts(count: int) -> list[str]:
    """At most eight, one for each background."""
    return [caption(name) for name in list(BACKGROUNDS)[:count]]
