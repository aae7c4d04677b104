"""Closed forms that can also edit the concept inside sentences: "photo of a cat" beside "cat"."""

from __future__ import annotations

import dataclasses

from erasure.concept import Concept
from erasure.methods.closed_form import ClosedForm

EXPANSIONS = {
    "style": ("painting by {}", "art by {}", "artwork by {}", "picture by {}", "style of {}"),
    "other": ("image of {}", "photo of {}", "portrait of {}", "picture of {}", "painting of {}"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sentences(ClosedForm):
    """A closed form with the setting ``expand_prompts``.

    Attributes:
        expand_prompts: also edit the concept inside five sentences such as "photo of {}". Stronger and less selective.
    """

    expand_prompts: bool = False

    def prompt_pairs(self, concept: Concept) -> list[tuple[str, str]]:
        pairs = super().prompt_pairs(concept)
        return [*pairs, *sentences(concept, synonyms=self.synonyms)] if self.expand_prompts else pairs


def sentences(concept: Concept, *, synonyms: bool) -> list[tuple[str, str]]:
    """The concept inside five sentences, and its anchor inside the same."""
    phrases = concept.phrases if synonyms else (concept.name,)
    templates = EXPANSIONS["style" if concept.kind == "style" else "other"]
    return [(t.replace("{}", p), t.replace("{}", concept.anchor).strip()) for t in templates for p in phrases]


__all__ = ["EXPANSIONS", "Sentences", "sentences"]
