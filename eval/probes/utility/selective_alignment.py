"""U5: what a prompt names beside the target: another thing, a style, a background."""

from __future__ import annotations

import dataclasses
import itertools

from erasure.eval.core.verdicts import among
from erasure.eval.probes.base import Context, Evidence, Missing, Model, Observation, Roles, Rows
from erasure.eval.probes.utility.binding import Binding, Composed, choose, looked_at, things
from erasure.eval.probes.utility.neighbours import side_effects
from erasure.eval.probes.weigh import base_rows, families
from erasure.wording import with_article

NAMES = {"concept": "object", "style": "style", "background": "background"}  # attribute to family


@dataclasses.dataclass(frozen=True)
class SelectiveAlignment(Binding):
    """Share of the *other* attributes that are right in pictures of prompts that name the target.

    A prompt names the target, one kept thing, and a style and a background where the judge has labels for them: "a
    superhero and a castle in noto style on a green background". An erasure should remove the superhero and keep the
    castle, the style and the background. In a suite about a style, the thing is the subject drawn in that style.

    Families: "object" (the thing is among the judge's two likeliest labels, or is the likeliest where it is alone),
    "style", "background" (the likeliest label is the one asked for), and "" for all together, which is HUB's share. The
    gate ``known`` fails for a family of which the base misses more than half.

    Attributes:
        prompts: in all.
    """

    key, code, title = "selective_alignment", "U5", "what else target prompts name"
    presets = {
        "smoke": {"prompts": 2, "images_per_prompt": 1},
        "standard": {"prompts": 40, "images_per_prompt": 1},
        "full": {"prompts": 100, "images_per_prompt": 2},
    }
    measures = {"rate": "right, as asked"}
    licences = "what these prompts for the target lost beside it, by this detector"
    not_licensed = "relations, counts, attributes without a label; that the target itself is kept out"
    reference = "HUB, ICCV 2025, arXiv 2410.05664 (selective alignment, there by questions to a VLM)"

    prompts: int = 40
    images_per_prompt: int = 1

    def run(self, model: Model, context: Context) -> list[Observation]:
        asked = with_others(context, self.prompts, seed=self.seed)
        if not asked:
            raise Missing(f"{context.judge.name} has labels for none of the kept things in {context.suite.name}")
        found = []
        for one, seed, facts in looked_at(context, model, asked, self.images_per_prompt):
            for attribute, wanted in one.wanted.items():
                right = dataclasses.replace(one, wanted={attribute: wanted}).met(facts["likeliest"])
                found.append(Observation(model.name, NAMES[attribute], one.text, seed, float(right), None, facts))
        return found

    def weigh(self, rows: Rows, models: Roles) -> list[Evidence]:
        base = base_rows(rows, models)
        return [e for family in ("", *families(base)) for e in side_effects(self.key, rows, models, family)]


def with_others(context: Context, count: int, *, seed: int) -> list[Composed]:
    """At most ``count`` prompts that name the target, another thing, a style and a background."""
    suite, named = context.suite, things(context)
    labels = {
        attribute: [x for x in context.judge.labels(attribute) if not among(x, suite.phrases)]
        for attribute in ("style", "background")
        if attribute != suite.attribute
    }
    frames = {"style": " in {} style", "background": " on a {} background"}
    present = [attribute for attribute, own in labels.items() if own]
    found = []
    for thing, chosen in itertools.product(named, itertools.product(*(labels[attribute] for attribute in present))):
        option = dict(zip(present, chosen, strict=True))
        end = "".join(frames[attribute].format(label) for attribute, label in option.items())
        wanted = {"concept": (thing,), **{attribute: (label,) for attribute, label in option.items()}}
        found += [Composed(text + end, "", wanted, number) for text, number in _together(context, thing)]
    return choose(found, count, seed)


def _together(context: Context, thing: str) -> list[tuple[str, int]]:
    """The target and another thing in words, and how many things the words name."""
    suite = context.suite
    if suite.attribute == "style":
        return [(f"{with_article(thing)} in {concept.name} style", 1) for concept in suite.concepts]
    pairs = [pair for concept in suite.concepts for pair in ((concept.name, thing), (thing, concept.name))]
    return [(" and ".join(map(with_article, pair)), 2) for pair in pairs]
