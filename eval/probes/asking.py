"""Probes of prompts: the model draws them, and the judge says whether the target is in the pictures."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import json
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

from PIL import Image

from erasure.concept import Suite
from erasure.eval.core.pictures import evenly
from erasure.eval.probes.base import Access, Context, Level, Missing, Model, Observation, Probe, Section
from erasure.eval.probes.weigh import units
from erasure.eval.stats import effective_size, wilson
from erasure.wording import with_article

MOST = 8  # pictures of a prompt, where a family has few sentences


@dataclasses.dataclass(frozen=True)
class Ask:
    """One prompt of a probe.

    Attributes:
        family: what the prompt varies.
        sampler: settings in place of the suite's (``guidance_scale``, ``num_inference_steps``).
        beside: labels of other things that the prompt asks for.
        template, phrase: what the prompt is made of, for intervals; "" where it is not made of two.
    """

    text: str
    family: str
    sampler: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    beside: Sequence[str] = ()
    template: str = ""
    phrase: str = ""


@dataclasses.dataclass(frozen=True)
class PromptProbe(Probe):
    """A probe of outputs under a family of prompts.

    Attributes:
        wide: use more sentences than the templates of the concept: an interval is about sentences, and six are few.
        resolve: upper limit that no hit at all has to reach. Families of few sentences are drawn more often until it
            does, up to 8 times a prompt. None draws ``images_per_prompt`` everywhere.
    """

    section: ClassVar[Section] = "suppression"
    level: ClassVar[Level] = "outputs"
    access: ClassVar[Access] = "black_box"
    controls: ClassVar[int | None] = 1
    known: ClassVar[float] = 0.3

    images_per_prompt: int = 2
    limit: int | None = None
    wide: bool = False
    resolve: float | None = None

    @abc.abstractmethod
    def asks(self, context: Context) -> list[Ask]:
        """The prompts, the same for every model; ``Missing`` where the suite has no words for them."""

    def run(self, model: Model, context: Context) -> list[Observation]:
        asks = self.limited(self.asks(context))
        cut = context.too_long([ask.text for ask in asks])
        images = self.images([ask for ask in asks if ask.text not in cut])
        found = [
            Observation(model.name, ask.family, ask.text, seed, None, cut[ask.text], facts_of(ask))
            for ask in asks
            if ask.text in cut
            for seed in range(images.get(ask.family, self.images_per_prompt))
        ]
        batches: dict[tuple[str, int], list[Ask]] = {}  # by the settings of the sampler, and pictures of a prompt
        for ask in asks:
            if ask.text not in cut:
                key = json.dumps(dict(ask.sampler), sort_keys=True), images[ask.family]
                batches.setdefault(key, []).append(ask)
        with context.open(model) as pipe:
            for (sampler, count), batch in batches.items():
                with self.sampling(pipe, context, json.loads(sampler)) as settings:
                    found += self.drawn(pipe, model, context, batch, range(count), **settings)[1]
        return found

    def images(self, asks: Sequence[Ask]) -> dict[str, int]:
        """Pictures of each prompt, by family: at least ``images_per_prompt``, and as many as ``resolve`` asks for."""
        least, reached = self.images_per_prompt, 1.0 if self.resolve is None else self.resolve
        families: dict[str, list[Observation]] = {}
        for ask in asks:
            row = Observation("", ask.family, ask.text, 0, 0.0, None, facts_of(ask))
            families.setdefault(ask.family, []).append(row)
        return {
            family: next((k for k in range(least, MOST) if none_of(units(rows) * k) <= reached), max(least, MOST))
            for family, rows in families.items()
        }

    def drawn(
        self, pipe: Any, model: Model, context: Context, asks: Sequence[Ask], seeds: Sequence[int], **sampler: Any
    ) -> tuple[list[Image.Image], list[Observation]]:
        """Every prompt with every seed from an opened pipeline: the pictures, and what is seen in them."""
        drawn = context.pictures(pipe, model, [ask.text for ask in asks], seeds=seeds, **sampler)
        images = [image for _, _, image in drawn]
        each = [ask for ask in asks for _ in seeds]
        return images, self.look(model, context, images, each, [seed for _, seed, _ in drawn])

    @contextlib.contextmanager
    def sampling(self, pipe: Any, context: Context, settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The pipeline under the settings of some prompts; yields the settings that its call takes."""
        yield settings

    def look(
        self, model: Model, context: Context, images: Sequence[Image.Image], asks: Sequence[Ask], seeds: Sequence[int]
    ) -> list[Observation]:
        """One observation per picture, from the prompt and the seed that drew it."""
        return context.observe(
            model,
            images,
            family=[ask.family for ask in asks],
            clusters=[ask.text for ask in asks],
            seeds=seeds,
            facts=[facts_of(ask) for ask in asks],
        )

    def limited(self, asks: Sequence[Ask]) -> list[Ask]:
        """At most ``limit`` prompts of each family, spread evenly over it."""
        kept = []
        for family in dict.fromkeys(ask.family for ask in asks):
            kept += evenly([ask for ask in asks if ask.family == family], self.limit)
        return kept


def none_of(clusters: Sequence[Hashable]) -> float:
    """The upper limit of a rate without a hit, from the cluster of each picture."""
    return wilson(0, effective_size(clusters))[1]


def facts_of(ask: Ask) -> dict[str, Any]:
    """The facts of an observation about its prompt."""
    made_of = {"template": ask.template, "phrase": ask.phrase} if ask.template else {}
    return {"prompt": ask.text, **made_of, **ask.sampler}


class Sentence(NamedTuple):
    """A prompt and what it is made of."""

    text: str
    template: str
    phrase: str

    def ask(self, family: str, **more: Any) -> Ask:
        """The sentence as a prompt of a probe."""
        return Ask(self.text, family, template=self.template, phrase=self.phrase, **more)


def named(suite: Suite, *, wide: bool = False) -> list[Sentence]:
    """The suite's sentences for the name of its target and its synonyms; with ``wide`` all that it can make."""
    asked = suite.prompts(wide=10**6) if wide else suite.prompts()
    chosen = [p for p in asked if p.group == "target" and p.label == suite.concept.name]
    return [Sentence(p.text, p.template, p.phrase) for p in chosen]


def everywhere(suite: Suite) -> tuple[str, ...]:
    """The templates of the concept and of every scene, for more prompts from few words."""
    return (*suite.concept.templates, *(text for texts in suite.words.scenes.values() for text in texts))


def sentences(context: Context, phrases: Sequence[str], **how: Any) -> list[str]:
    """The texts of :func:`spelled`."""
    return [sentence.text for sentence in spelled(context, phrases, **how)]


def spelled(
    context: Context, phrases: Sequence[str], *, article: bool = True, templates: Sequence[str] | None = None
) -> list[Sentence]:
    """Every phrase in every template, and with every subject of a style suite; each sentence once.

    Args:
        article: put one before a phrase that names a thing.
        templates: those of the suite's concept by default.
    """
    suite = context.suite
    if not phrases:
        raise Missing(f"the suite {suite.name} lists no such words for {suite.target}; add them under `words`")
    out: dict[str, Sentence] = {}
    for phrase in phrases:
        noun = with_article(phrase) if article and suite.attribute == "concept" else phrase
        for template in suite.concept.templates if templates is None else templates:
            for subject in suite.subjects or ("",):
                frame = template.replace("{subject}", with_article(subject))
                out.setdefault(text := frame.replace("{}", noun), Sentence(text, frame, phrase))
    return list(out.values())
