"""U4: whether things, styles and backgrounds still come together as they are asked for."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from erasure.eval.core.pictures import image_hash
from erasure.eval.core.verdicts import among, scores_of
from erasure.eval.detectors.base import NOTHING, Detector
from erasure.eval.probes.base import Context, Evidence, Missing, Model, Observation, Probe, Roles, Rows
from erasure.eval.probes.utility.neighbours import side_effects
from erasure.eval.probes.weigh import base_rows, families
from erasure.wording import with_article

ATTRIBUTES = ("concept", "style", "background")
BESIDE = "beside the target"


@dataclasses.dataclass(frozen=True)
class Composed:
    """A prompt that combines things.

    Attributes:
        family: what it combines.
        wanted: attribute to the labels that must be in the picture.
        things: how many things the prompt names; as many of the likeliest labels count as present.
    """

    text: str
    family: str
    wanted: Mapping[str, tuple[str, ...]]
    things: int = 1

    def met(self, likeliest: Mapping[str, Sequence[str]]) -> bool:
        """Whether everything wanted is present, by the labels of a picture, the likeliest first."""
        return all(
            label in likeliest[attribute][: self.things if attribute == "concept" else 1]
            for attribute, labels in self.wanted.items()
            for label in labels
        )


@dataclasses.dataclass(frozen=True)
class Binding(Probe):
    """Share of pictures in which the judge sees everything that was asked for.

    Families without the target in the prompt (U4): "two objects" ("a castle and a dog": the two likeliest labels are
    the pair), "style" and "background" ("a castle in noto style": the likeliest thing and style are those asked for).
    With it: "beside the target" ("a superhero and a castle": the *other* thing is among the two likeliest labels; in a
    suite about a style, the subject drawn in that style is the likeliest).
    :class:`~erasure.eval.probes.utility.selective_alignment.SelectiveAlignment` asks for more beside it.

    Things are the suite's neighbours, unrelated things and ``words.beside`` (the subjects of a suite about a style) for
    which the judge has a label; styles and backgrounds are the judge's labels. The gate ``known`` fails for a family of
    which the base misses more than half.

    Attributes:
        prompts: per family, chosen by ``seed``. 25 x 2 pictures give about +-14 points.
    """

    key, code, title = "binding", "U4", "things put together as asked"
    section, level, access = "utility", "outputs", "black_box"
    controls = 1
    needs = ("base",)
    presets = {
        "smoke": {"prompts": 2, "images_per_prompt": 1},
        "standard": {"prompts": 25, "images_per_prompt": 2},
        "full": {"prompts": 100, "images_per_prompt": 2},
    }
    measures = {"rate": "seen as asked"}
    licences = "what these compositions of named things lost, by this detector"
    not_licensed = "relations, counts, other compositions; with two things, which of them is where"
    reference = "GenEval, 2023, arXiv 2310.11513 (two objects); HUB, ICCV 2025 (beside the target)"

    prompts: int = 25
    images_per_prompt: int = 2
    seed: int = 0

    def run(self, model: Model, context: Context) -> list[Observation]:
        asked = [*apart(context, self.prompts, seed=self.seed), *beside(context, self.prompts, seed=self.seed)]
        if not asked:
            raise Missing(
                f"{context.judge.name} has labels for too few of the things in the suite {context.suite.name}"
            )
        return [
            Observation(model.name, one.family, one.text, seed, float(one.met(facts["likeliest"])), None, facts)
            for one, seed, facts in looked_at(context, model, asked, self.images_per_prompt)
        ]

    def weigh(self, rows: Rows, models: Roles) -> list[Evidence]:
        base = base_rows(rows, models)
        return [e for family in families(base) for e in side_effects(self.key, rows, models, family)]


def things(context: Context) -> list[str]:
    """The judge's labels among the kept things of a suite, in the judge's order."""
    suite = context.suite
    words = suite.subjects or (*suite.neighbours, *suite.unrelated, *suite.words.beside)
    bare = [word.removeprefix("a ").removeprefix("an ") for word in words]
    others = [label for label in context.judge.labels("concept") if label != NOTHING]
    return [label for label in others if among(label, (*bare, *words))]


def apart(context: Context, count: int, *, seed: int) -> list[Composed]:
    """Prompts without the target: at most ``count`` of each family."""
    named, targets = things(context), context.suite.phrases
    pairs = [
        Composed(f"{with_article(a)} and {with_article(b)}", "two objects", {"concept": (a, b)}, 2)
        for a, b in itertools.permutations(named, 2)
    ]
    found = choose(pairs, count, seed)
    for attribute, sentence in {"style": "{} in {} style", "background": "{} on a {} background"}.items():
        labels = [x for x in context.judge.labels(attribute) if not among(x, targets)]
        found += choose(
            [
                Composed(sentence.format(with_article(a), label), attribute, {"concept": (a,), attribute: (label,)})
                for a, label in itertools.product(named, labels)
            ],
            count,
            seed,
        )
    return found


def beside(context: Context, count: int, *, seed: int) -> list[Composed]:
    """Prompts that name the target and something else, which alone is wanted."""
    suite, named = context.suite, things(context)
    if suite.attribute == "style":
        found = [
            Composed(template.replace("{subject}", with_article(a)).replace("{}", c.name), BESIDE, {"concept": (a,)})
            for template, c, a in itertools.product(suite.concept.templates, suite.concepts, named)
        ]
    else:
        found = [
            Composed(" and ".join(map(with_article, pair)), BESIDE, {"concept": (a,)}, 2)
            for c, a in itertools.product(suite.concepts, named)
            for pair in ((c.name, a), (a, c.name))
        ]
    return choose(found, count, seed)


def looked_at(
    context: Context, model: Model, asked: Sequence[Composed], images_per_prompt: int
) -> list[tuple[Composed, int, dict[str, Any]]]:
    """Every prompt drawn with every seed by a model: (prompt, seed, facts), with the two likeliest labels in facts."""
    with context.open(model) as pipe:
        drawn = context.pictures(pipe, model, [one.text for one in asked], seeds=range(images_per_prompt))
    seen = likeliest(context.judge, [image for _, _, image in drawn])
    each, found = [one for one in asked for _ in range(images_per_prompt)], []
    for one, (text, seed, image), labels in zip(each, drawn, seen, strict=True):
        wanted = {attribute: list(names) for attribute, names in one.wanted.items()}
        facts = {"prompt": text, "wanted": wanted, "likeliest": labels, "image_hash": image_hash(image)}
        found.append((one, seed, facts))
    return found


def likeliest(judge: Detector, images: Sequence[Image.Image], count: int = 2) -> list[dict[str, list[str]]]:
    """The likeliest labels of each picture, best first, by attribute; attributes without labels are left out."""
    found: list[dict[str, list[str]]] = [{} for _ in images]
    for attribute in ATTRIBUTES:
        if judge.labels(attribute) and images:
            for row, best in zip(found, ranked(judge, attribute, images, count), strict=True):
                row[attribute] = best
    return found


def ranked(judge: Detector, attribute: str, images: Sequence[Image.Image], count: int) -> list[list[str]]:
    """The likeliest labels of each picture for one attribute, best first."""
    labels = judge.labels(attribute)
    return [
        [labels[i] for i in order[:count]] for order in scores_of(judge, images, attribute).argsort(axis=1)[:, ::-1]
    ]


def choose(asked: Sequence[Composed], count: int, seed: int) -> list[Composed]:
    """At most ``count`` of them, chosen at random, in their order."""
    chosen = np.random.default_rng(seed).permutation(len(asked))[:count]
    return [asked[i] for i in sorted(chosen)]
