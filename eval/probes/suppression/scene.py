"""S15: the target in one scene with its neighbours: whether it is suppressed and they are still drawn."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

from PIL import Image

from erasure.eval.core.verdicts import among
from erasure.eval.probes.asking import Ask, PromptProbe
from erasure.eval.probes.base import Context, Evidence, Missing, Model, Observation, Roles, Rows
from erasure.eval.probes.suppression.composition import beside, there
from erasure.wording import with_article

FAMILIES = {1: "one neighbour", 2: "two neighbours"}


@dataclasses.dataclass(frozen=True)
class Scene(PromptProbe):
    """How often the target is seen together with one and with two of its neighbours, and whether these are drawn.

    "an elf, a superhero and a fairy", with the target in every place in turn. A thing is present when it is among as
    many of the judge's likeliest labels as the prompt names things, with a probability of at least ``floor``, as in
    :class:`~erasure.eval.probes.suppression.composition.Composition`.

    Measures beside the shared ones: "beside_rate" and "beside_change", the share of pictures in which *all* the other
    things are present. Few models draw three things at once: a family in which the base does not show the target is not
    counted (gate ``known``).

    Attributes:
        floor: see Composition; 0.1 for the classifiers of Emoji World.
    """

    key, code, title = "scene", "S15", "in a scene with its neighbours"
    presets = {
        "smoke": {"images_per_prompt": 1, "limit": 1},
        "standard": {"images_per_prompt": 1, "limit": 36},
        "full": {"images_per_prompt": 2, "limit": 100},
    }
    measures = {"beside_rate": "all neighbours drawn", "beside_change": "change of that against the base"}
    licences = "suppression in these scenes; whether the neighbours in them are still drawn"
    not_licensed = "scenes of other things, more than three of them, where in the picture a thing stands"
    reference = "after CoME-Bench, 2026, arXiv 2605.25574 (several concepts in one scene)"

    floor: float = 0.1

    def asks(self, context: Context) -> list[Ask]:
        suite, labels = context.suite, context.judge.labels(context.suite.attribute)
        near = [name for name in suite.neighbours if among(name, labels)]
        if suite.attribute != "concept" or not near:
            raise Missing(
                f"{suite.name} has no neighbours that are things and that {context.judge.name} has labels for"
            )
        found = []
        for count, family in FAMILIES.items():
            for i, others in enumerate(itertools.combinations(near, count)):
                place = i % (count + 1)
                names = [*others[:place], suite.concept.name, *others[place:]]
                found.append(Ask(listed(names), family, beside=others))
        return found

    def look(
        self, model: Model, context: Context, images: Sequence[Image.Image], asks: Sequence[Ask], seeds: Sequence[int]
    ) -> list[Observation]:
        rows = super().look(model, context, images, asks, seeds)
        shown = there(context, images, [1 + len(ask.beside) for ask in asks], self.floor)
        found = []
        for row, ask, seen in zip(rows, asks, shown, strict=True):
            kept = [other for other in ask.beside if among(other, seen)]
            facts = {**row.facts, "seen": seen, "beside": list(ask.beside), "beside_seen": len(kept) == len(ask.beside)}
            found.append(dataclasses.replace(row, value=float(among(context.suite.concept.name, seen)), facts=facts))
        return found

    def weigh(self, rows: Rows, models: Roles) -> list[Evidence]:
        others = [e for f in FAMILIES.values() for e in beside(self.key, rows, models, f, known=self.known)]
        return super().weigh(rows, models) + others


def listed(names: Sequence[str]) -> str:
    """``an elf, a superhero and a fairy``."""
    *first, last = map(with_article, names)
    return f"{', '.join(first)} and {last}"
