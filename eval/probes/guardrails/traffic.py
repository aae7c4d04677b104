"""What a guardrail meets: requests for the target in all their forms, and what should pass; and default filters."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

from erasure.concept import Prompt
from erasure.eval.probes import probe_class
from erasure.eval.probes.asking import Ask, PromptProbe, named, sentences
from erasure.eval.probes.base import Context, Missing, Model
from erasure.eval.probes.guardrails.curve import NAME
from erasure.pipelines.filters import (
    AnyOf,
    EmbeddingFilter,
    InputFilter,
    OutputFilter,
    WordFilter,
    calibrated,
    text_embeddings,
)
from erasure.wording import same

SUPERCLASS = "superclass"
NAMES = 4  # times as many prompts
OTHERWISE = {  # stratum to the probe of suppression whose prompts it takes, S2 to S7
    "paraphrase": "paraphrase",
    "description": "description",
    SUPERCLASS: "hierarchy",
    "composition": "composition",
    "translation": "translation",
    "negation": "negation",
}
PASSING = {"neighbours": "neighbours", "benign": "unrelated"}  # stratum to the suite's group of prompts


@dataclasses.dataclass(frozen=True)
class Requests(PromptProbe):
    """Prompts from a list."""

    code = "G"

    texts: tuple[str, ...] = ()

    def asks(self, context: Context) -> list[Ask]:
        return [Ask(text, "request") for text in self.texts]


def asking(context: Context, *, images_per_prompt: int, limit: int | None) -> dict[str, PromptProbe]:
    """What asks for the target, by stratum: its names, everything else that may mean it, the prompts of attacks.

    ``limit`` is of each family of a stratum, and four times as many of the names, which say whether the base knows the
    target.
    """
    size: dict[str, Any] = {"images_per_prompt": images_per_prompt, "limit": limit}
    names = {**size, "limit": None if limit is None else NAMES * limit}
    return {
        NAME: Requests(texts=tuple(sentence.text for sentence in named(context.suite)), **names),
        **{stratum: cast(type[PromptProbe], probe_class(key))(**size) for stratum, key in OTHERWISE.items()},
        **{f"attack {attack}": Requests(texts=tuple(prompts), **size) for attack, prompts in context.attacks.items()},
    }


def passing(context: Context) -> dict[str, list[Prompt]]:
    """What should pass, by stratum: the suite's neighbours and its unrelated things, where it has them."""
    prompts = context.suite.prompts()
    found = {stratum: [p for p in prompts if p.group == group] for stratum, group in PASSING.items()}
    return {stratum: own for stratum, own in found.items() if own}


def to_pass(context: Context, **size: Any) -> dict[str, PromptProbe]:
    """The same as probes, of which ``size`` is the images_per_prompt and limit."""
    return {s: Requests(texts=tuple(p.text for p in own), **size) for s, own in passing(context).items()}


def input_filter_of(model: Model, context: Context, false_positive_rate: float) -> tuple[InputFilter, str]:
    """The input filter of a model, or a default one for the base; and what it is, in a few words.

    The default stops the target's names by their letters, and similar prompts by the unmodified text encoder. Its
    threshold is set on the suite's ``keep`` list, which is not tested on. Call it before a model is opened.
    """
    if model.kind == "filter":
        found = getattr(model.change, "input_filter", None)
        if found is None:
            raise Missing(f"{model.name} has no input filter")
        return found, str(found.name)
    suite = context.suite
    if not suite.keep:
        raise Missing(f"the suite {suite.name} has no `keep` list to set the threshold of a filter on")
    # A kept phrase of a style suite is a thing or a style, and fits only one of the places in its templates.
    samples = list(suite.keep) if suite.attribute == "style" else sentences(context, suite.keep)
    allowed = max(false_positive_rate, 1 / len(samples))
    try:
        encode = text_embeddings(context.pipe)
    except ValueError as error:
        raise Missing(str(error)) from None
    window = 1 + max(len(phrase.split()) for phrase in suite.phrases)
    meaning = calibrated(EmbeddingFilter(encode, suite.phrases, window=window), samples, false_positive_rate=allowed)
    what = f"cosine above {meaning.threshold:.3f}: {100 * allowed:.2g} % of {len(samples)} other prompts"
    return AnyOf([WordFilter(suite.phrases), meaning]), f"names, and {what}"


def output_filter_of(model: Model, context: Context, threshold: float) -> tuple[OutputFilter, str]:
    """The output filter of a model, or the second detector for the base, never the judge; and what it is, in words."""
    if model.kind == "filter":
        found = getattr(model.change, "output_filter", None)
        if found is None:
            raise Missing(f"{model.name} has no output filter")
    elif context.selector is None:
        raise Missing("there is no second detector for an output filter; the one that judges cannot filter too")
    else:
        try:
            found = OutputFilter(context.selector, context.suite.concept.name, threshold, context.suite.attribute)
        except ValueError as error:
            raise Missing(str(error)) from None
    if same(found.name, context.judge.name):
        raise Missing(f"the output filter is {found.name}, which judges; nothing would pass it that it then finds")
    return found, f"{found.name}, probability above {found.threshold:g}"


def eliciting(probe: PromptProbe, context: Context) -> dict[str, bool]:
    """Whether each prompt of a probe makes the base draw the target, in half of its pictures or more."""
    values: dict[str, list[float]] = {}
    for row in probe.run(context.base, context):
        values.setdefault(row.cluster, []).append(row.value or 0.0)
    return {prompt: sum(own) / len(own) >= 0.5 for prompt, own in values.items()}
