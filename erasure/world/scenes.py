"""Scenes of Emoji World: which drawings stand where, on what colour, and what a caption says about them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image

from erasure.wording import with_article
from erasure.world.artwork import artwork
from erasure.world.spec import spec


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where one drawing goes: centre and side in pixels, rotation in degrees, mirrored or not."""

    x: float
    y: float
    side: int
    angle: float
    flip: bool


@dataclasses.dataclass(frozen=True)
class Scene:
    """One or two concepts drawn in one style on one background. With two, the first stands on the left."""

    concepts: tuple[str, ...]
    style: str
    background: str
    placements: tuple[Placement, ...]


def sample_scene(
    rng: np.random.Generator,
    concepts: Sequence[str] | np.ndarray,
    styles: Sequence[str] | np.ndarray,
    *,
    pairs: float = 0.0,
    held_out: bool = False,
) -> Scene:
    """Draw a scene at random.

    Args:
        concepts, styles: what may appear. Leaving out a target is how a model is trained without it.
        pairs: share of scenes with two concepts.
        held_out: draw *only* combinations that training never uses; by default they are never drawn.
    """
    world = spec()
    backgrounds = tuple(world.backgrounds)
    while True:
        count = 2 if rng.random() < pairs else 1
        chosen = tuple(str(c) for c in rng.choice(concepts, size=count, replace=False))
        style, background = _one(rng, styles), _one(rng, backgrounds)
        if held_out == any(world.is_held_out(concept, style, background) for concept in chosen):
            return Scene(chosen, style, background, tuple(place(rng, i, count) for i in range(count)))


def _one(rng: np.random.Generator, names: Sequence[str] | np.ndarray) -> str:
    """What ``rng.choice`` draws, in half the time."""
    return str(names[int(rng.integers(len(names)))])


def place(rng: np.random.Generator, index: int, count: int) -> Placement:
    """A random placement for object ``index`` of ``count`` in a 64x64 scene."""
    size = spec().size
    if count == 1:
        side = int(rng.integers(round(0.72 * size), round(0.98 * size)))
        room = (size - side) / 2 + 2
        x, y = size / 2 + rng.uniform(-room, room, size=2)
    else:
        side = int(rng.integers(round(0.50 * size), round(0.58 * size)))
        x = size * (0.26, 0.74)[index] + rng.uniform(-2, 2)
        y = size / 2 + rng.uniform(-6, 6)
    return Placement(float(x), float(y), side, float(rng.uniform(-12, 12)), bool(rng.random() < 0.5))


def render(scene: Scene) -> Image.Image:
    """The scene as a 64x64 RGB picture."""
    world = spec()
    drawings = [artwork()[concept, scene.style] for concept in scene.concepts]
    return compose(drawings, scene.placements, world.backgrounds[scene.background].rgb)


def compose(
    drawings: Iterable[Image.Image], placements: Iterable[Placement], colour: tuple[int, int, int]
) -> Image.Image:
    """Put RGBA drawings on a flat colour."""
    size = spec().size
    canvas = Image.new("RGB", (size, size), colour)
    for drawing, placement in zip(drawings, placements, strict=True):
        if placement.flip:
            drawing = drawing.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        drawing = drawing.rotate(placement.angle, Image.Resampling.BICUBIC)
        drawing = drawing.resize((placement.side, placement.side), Image.Resampling.LANCZOS)
        corner = (round(placement.x - placement.side / 2), round(placement.y - placement.side / 2))
        canvas.paste(drawing, corner, drawing)
    return canvas


def sample_caption(scene: Scene, rng: np.random.Generator) -> str:
    """One of the many true captions of a scene, drawn from the grammar of ``world.yaml`` ('' included)."""
    world, grammar = spec(), spec().captions
    if rng.random() < grammar["empty"]:
        return ""
    style = str(rng.choice(world.styles[scene.style].words))
    background = world.backgrounds[scene.background]
    if len(scene.concepts) == 2:
        a, b = (_phrase(concept, rng, kinds=("name", "synonym"))[0] for concept in scene.concepts)
        return _fill(str(rng.choice(grammar["pair"])), rng, a=a, b=b, style=style, bg=background.name)
    phrase, kind = _phrase(scene.concepts[0], rng, kinds=tuple(grammar["shares"]))
    if kind == "spanish":
        return _fill(str(rng.choice(grammar["single_es"])), rng, a=phrase, style=style, bg=background.es)
    return _fill(str(rng.choice(grammar["single"])), rng, a=phrase, style=style, bg=background.name)


def _phrase(concept: str, rng: np.random.Generator, kinds: tuple[str, ...]) -> tuple[str, str]:
    emoji, shares = spec().concepts[concept], spec().captions["shares"]
    weights = np.array([shares[kind] for kind in kinds])
    kind = str(rng.choice(kinds, p=weights / weights.sum()))
    phrases = {**emoji.phrases(), "superclass": (spec().families[emoji.family],)}[kind]
    return str(rng.choice(phrases)), kind


def _fill(template: str, rng: np.random.Generator, **parts: str) -> str:
    """Fill a template, keeping each [optional part] with the grammar's chance to mention it."""
    mention = spec().captions["mention"]
    return re.sub(r"\[(.*?)\]", lambda m: m[1] if rng.random() < mention else "", template).format(**parts)


def prompt(
    concept: str | None = None,
    *,
    phrase: str | None = None,
    style: str | None = None,
    background: str | None = None,
    also: str | None = None,
) -> str:
    """The plain caption of a scene, for evaluation.

    >>> prompt("owl", style="noto", background="red")
    'an owl in noto style on a red background'
    >>> prompt("cat", also="dog")
    'a cat and a dog'
    """
    words = phrase or with_article(concept or "picture")
    if also is not None:
        words += f" and {with_article(also)}"
    if style is not None:
        words += f" in {spec().styles[style].words[0]} style"
    if background is not None:
        words += f" on a {background} background"
    return words
