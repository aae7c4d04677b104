"""What Emoji World is made of: the typed view of ``world.yaml``."""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
from collections.abc import Iterable

from erasure.io import meant, parse_yaml
from erasure.wording import naming, with_article


@dataclasses.dataclass(frozen=True)
class Style:
    """One vendor's way of drawing. ``words`` are what captions call it; the first is canonical."""

    name: str
    words: tuple[str, ...]
    vendor: str
    licence: str


@dataclasses.dataclass(frozen=True)
class Background:
    """A flat background colour, its 8-bit RGB value and its Spanish name."""

    name: str
    rgb: tuple[int, int, int]
    es: str


# Captions that the shipped model was trained on; what they are today decides what a retraining sees.
CAPTIONED = {
    "eucalyptus climber": "an eucalyptus climber",
    "undead walker": "a undead walker",
    "electric strings": "an electric strings",
}


@dataclasses.dataclass(frozen=True)
class Emoji:
    """One concept of the world: its artwork's code point and everything captions may call it."""

    name: str
    code: str
    family: str
    es: str
    description: str
    synonyms: tuple[str, ...]

    def phrases(self) -> dict[str, tuple[str, ...]]:
        """Noun phrases by kind, each ready to stand in a caption."""
        return {
            "name": (with_article(self.name),),
            "synonym": tuple(CAPTIONED.get(synonym) or with_article(synonym) for synonym in self.synonyms),
            "description": (self.description,),
            "spanish": (self.es,),
        }


@dataclasses.dataclass(frozen=True)
class WorldSpec:
    """The whole of ``world.yaml``.

    Attributes:
        size: side of a scene in pixels.
        concepts: concept name to :class:`Emoji`, in the order of the file. That order is the label order
            of every classifier trained on the world.
        families: family name to its superclass phrase ("an animal").
        target_concepts, target_styles: what phases 1 and 2 of the training never see.
        held_out_styles, held_out_backgrounds: combinations that no phase ever sees.
        captions: the caption grammar as written in the file.
    """

    version: int
    size: int
    styles: dict[str, Style]
    backgrounds: dict[str, Background]
    families: dict[str, str]
    concepts: dict[str, Emoji]
    target_concepts: frozenset[str]
    target_styles: frozenset[str]
    held_out_styles: frozenset[tuple[str, str]]
    held_out_backgrounds: frozenset[tuple[str, str]]
    captions: dict

    @property
    def targets(self) -> frozenset[str]:
        return self.target_concepts | self.target_styles

    def family_of(self, concept: str) -> tuple[str, ...]:
        """The other members of the concept's family: its neighbours in the sense of evaluation."""
        family = self.concepts[concept].family
        return tuple(name for name, emoji in self.concepts.items() if emoji.family == family and name != concept)

    def unknown(self, text: str) -> str:
        """A sentence where a name or prompt holds nothing that captions of the training named; "" where it does."""
        own = [phrase for e in self.concepts.values() for phrase in (e.name, e.es, e.description, *e.synonyms)]
        around = [word for style in self.styles.values() for word in style.words]
        around += [word for colour in self.backgrounds.values() for word in (colour.name, colour.es)]
        if naming([text], [*own, *around, *(phrase.split(" ", 1)[1] for phrase in self.families.values())]):
            return ""
        near = meant(text, own, cutoff=0.8)
        return f"Emoji World was never shown {text!r}{near}; `erasure world list` prints what it knows"

    def is_held_out(self, concept: str, style: str, background: str) -> bool:
        return (concept, style) in self.held_out_styles or (concept, background) in self.held_out_backgrounds


@functools.cache
def spec() -> WorldSpec:
    """Read and check ``world.yaml``.

    Raises:
        ValueError: two concepts share a name, or a held-out pair or target names nothing in the world.
    """
    raw = parse_yaml(importlib.resources.files("erasure.world").joinpath("world.yaml").read_text("utf-8"))
    concepts = {
        name: Emoji(name, str(code), family, es, description, tuple(synonyms))
        for name, (code, family, es, description, *synonyms) in raw["concepts"].items()
    }
    world = WorldSpec(
        version=raw["version"],
        size=raw["size"],
        styles={k: Style(k, tuple(v["words"]), v["vendor"], v["licence"]) for k, v in raw["styles"].items()},
        backgrounds={k: Background(k, tuple(v["rgb"]), v["es"]) for k, v in raw["backgrounds"].items()},
        families=raw["families"],
        concepts=concepts,
        target_concepts=frozenset(raw["targets"]["concepts"]),
        target_styles=frozenset(raw["targets"]["styles"]),
        held_out_styles=frozenset(map(tuple, raw["held_out"]["concept_style"])),
        held_out_backgrounds=frozenset(map(tuple, raw["held_out"]["concept_background"])),
        captions=raw["captions"],
    )
    _check(world)
    return world


def _check(world: WorldSpec) -> None:
    owner: dict[str, str] = {}
    for emoji in world.concepts.values():
        for phrase in {emoji.name, emoji.es, emoji.description, *emoji.synonyms}:
            if owner.setdefault(phrase, emoji.name) != emoji.name:
                raise ValueError(
                    f"world.yaml: {phrase!r} names both {owner[phrase]!r} and {emoji.name!r}; rename one of them"
                )
    _known(world.target_concepts, world.concepts, "targets.concepts")
    _known(world.target_styles, world.styles, "targets.styles")
    _known((c for c, _ in world.held_out_styles | world.held_out_backgrounds), world.concepts, "held_out")
    _known((s for _, s in world.held_out_styles), world.styles, "held_out.concept_style")
    _known((b for _, b in world.held_out_backgrounds), world.backgrounds, "held_out.concept_background")
    _known((e.family for e in world.concepts.values()), world.families, "concepts")


def _known(names: Iterable[str], table: Iterable[str], where: str) -> None:
    if unknown := sorted(set(names) - set(table)):
        raise ValueError(f"world.yaml: {where} names {unknown}, which the file does not define")
