"""Is a suppressed concept learnt faster than one of its kind that no model knows? ``python -m studies.novel_concepts``.

    python -m erasure.world.artwork --strangers runs/strangers.npz        # the emoji outside the world; needs npm
    python -m studies.novel_concepts runs/strangers.npz gold uce

The idea: without a retrained model to compare with, teach the same model a *related* concept that it never saw, by the
same recipe. If the target comes back much faster, it was still there. Here the related ones are people that Emoji World
does not have (a cook, a firefighter, a guard), in the style noto, under made-up names. All, the superhero too, are
found by matching the drawing, so that no detector has to know them.

Prints for each model and concept, of eight pictures, how many show it after each number of steps.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

import erasure
from erasure.eval.core.material import Example
from erasure.eval.core.pictures import generate
from erasure.eval.probes.denoising import backbone_for
from erasure.eval.probes.tuning import captioned, learn, tuned
from erasure.world.artwork import artwork, strangers
from erasure.world.retrain import load_gold
from erasure.world.scenes import compose, place
from erasure.world.spec import spec

TARGET, STYLE = "superhero", "noto"
# Concept to its made-up name and its code point among the emoji outside the world.
NOVEL = {
    "cook": ("zumbrel", "1f9d1-200d-1f373"),
    "firefighter": ("dwixot", "1f9d1-200d-1f692"),
    "guard": ("plorvan", "1f482"),
}
STEPS = (0, 2, 4, 7, 10, 14, 20, 28, 40, 57, 80)
SIDES, ANGLES = (44, 48, 52, 56, 60), (-10, 0, 10)
FOUND = 0.6  # correlation from which a drawing counts as there; nothing reaches it before any training


def drawings(file: Path) -> dict[str, tuple[str, Image.Image]]:
    """Concept to what captions call it and its drawing."""
    images = strangers(file)
    with np.load(file, allow_pickle=False) as data:
        at = {str(label): i for i, label in enumerate(data["labels"])}
    novel = {name: (word, Image.fromarray(images[at[f"{STYLE}/{code}"]])) for name, (word, code) in NOVEL.items()}
    return {TARGET: (TARGET, artwork()[TARGET, STYLE]), **novel}


def lesson_of(word: str, drawing: Image.Image, count: int = 4) -> list[Example]:
    """Pictures of a drawing in several places, sizes and angles, with captions."""
    rng, colours, found = np.random.default_rng(0), list(spec().backgrounds), []
    for i in range(count):
        colour = colours[int(rng.integers(len(colours)))]
        image = compose([drawing], [place(rng, 0, 1)], spec().backgrounds[colour].rgb)
        found.append(Example(image, caption(word, colour), word, f"{word} {i}", member=False))
    return found


def caption(word: str, colour: str) -> str:
    return f"{word} in {STYLE} style on a {colour} background"


class Matcher:
    """Finds one drawing in pictures by normalised correlation at several sizes and angles, mirrored or not."""

    def __init__(self, drawing: Image.Image) -> None:
        self.templates = [self._template(drawing, side, angle, flip)
                          for side in SIDES for angle in ANGLES for flip in (False, True)]  # fmt: skip

    def __call__(self, images: Sequence[Image.Image]) -> list[float]:
        """The best correlation with each picture, -1 to 1."""
        x = torch.from_numpy(np.stack([np.asarray(image.convert("RGB"), np.float32) for image in images]))
        x = F.pad(x.permute(0, 3, 1, 2), (8, 8, 8, 8), mode="replicate")
        best = torch.full((len(x),), -1.0)
        for there, colours in self.templates:
            count, window = there.sum(), there.expand(3, 1, -1, -1)
            total, squares = F.conv2d(x, window, groups=3), F.conv2d(x * x, window, groups=3)
            spread = (squares - total**2 / count).sum(1).clamp(min=1) * colours.square().sum()
            best = torch.maximum(best, (F.conv2d(x, colours)[:, 0] / spread.sqrt()).amax((1, 2)))
        return best.tolist()

    @staticmethod
    def _template(drawing: Image.Image, side: int, angle: float, flip: bool) -> tuple[Tensor, Tensor]:
        """What is there ``(1, 1, s, s)``, and each channel there minus its mean ``(1, 3, s, s)``."""
        turned = drawing.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else drawing
        turned = turned.resize((side, side), Image.Resampling.LANCZOS).rotate(angle, Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(turned, np.float32)).permute(2, 0, 1)[None]
        there = (pixels[:, 3:] > 128).float()
        mean = (pixels[:, :3] * there).sum((2, 3), keepdim=True) / there.sum()
        return there, (pixels[:, :3] - mean) * there


@functools.cache
def opened(name: str) -> Any:
    """ "gold" is retrained without the superhero, "base" is Emoji World, anything else the base under that method."""
    if name == "gold":
        return load_gold(TARGET)
    pipe, suite = erasure.world.load(), erasure.Suite.load(TARGET)
    if name != "base":
        erasure.erase(pipe, suite.concepts, method=name, keep=suite.kept)
    return pipe


def learnt(pipe: Any, word: str, drawing: Image.Image) -> dict[int, int]:
    """Steps of training to how many of eight pictures then show the drawing."""
    backbone, matcher = backbone_for(pipe), Matcher(drawing)
    lesson, prompts = captioned(backbone, lesson_of(word, drawing), 8), [caption(word, c) for c in spec().backgrounds]
    found = {}
    with tuned(pipe, backbone.select("all")) as trained:
        for step in learn(trained, lesson.loss, pipe=pipe, marks=STEPS, lr=3e-4, seed=0, autocast=False):
            drawn = generate(pipe, prompts, num_inference_steps=8, guidance_scale=3.0, progress=False)
            found[step] = sum(score >= FOUND for score in matcher([row[0] for row in drawn]))
    return found


def main(file: Path, *models: str) -> None:
    for name in models:
        for concept, (word, drawing) in drawings(file).items():
            print(json.dumps({"model": name, "concept": concept, "of 8": learnt(opened(name), word, drawing)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
