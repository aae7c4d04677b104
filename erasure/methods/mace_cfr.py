"""MACE, stage 1: take what the words around a concept know of it out of them, in closed form."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from pydantic import NonNegativeFloat
from torch import Tensor

from erasure.backbone import Backbone, Space
from erasure.backbone.text import Segment
from erasure.concept import Concept
from erasure.methods.base import Reference, Request, expanded
from erasure.methods.closed_form import ClosedForm, encoded, joined, stretched
from erasure.methods.gram import Gram
from erasure.methods.kept import Kept
from erasure.methods.ridge import condensed
from erasure.wording import with_article

# Thirty plain sentences, because the words around a concept know it differently in each. Some go on after the concept:
# a causal text encoder tells only what follows.
THINGS = (
    "{}",
    "a photo of {}",
    "a picture of {}",
    "an image of {}",
    "a drawing of {}",
    "a painting of {}",
    "a sketch of {}",
    "a portrait of {}",
    "a close-up of {}",
    "a poster of {}",
    "a toy of {}",
    "a cartoon of {}",
    "a statue of {}",
    "a postcard of {}",
    "a black and white photo of {}",
    "{} on a white background",
    "{} on a black background",
    "{} in a city",
    "{} in a forest",
    "{} by the sea",
    "{} at night",
    "{} in the rain",
    "{} in the snow",
    "{} seen from far away",
    "{} seen from above",
    "{} next to a tree",
    "{} in front of a house",
    "a photo of {} in the sun",
    "a picture of {} on a table",
    "two people looking at {}",
)
STYLES = (
    "{}",
    "{} style",
    "art by {}",
    "a work by {}",
    "a drawing by {}",
    "a painting by {}",
    "a portrait by {}",
    "a landscape by {}",
    "a sketch by {}",
    "a poster by {}",
    "in the style of {}",
    "in {} style",
    "a picture in {} style",
    "a painting in {} style",
    "a cat in {} style",
    "a house in {} style",
    "a city in {} style",
    "a flower in {} style",
    "a portrait of a woman in {} style",
    "a landscape in {} style",
    "a {} painting of a river",
    "a {} painting of a street at night",
    "a {} drawing of a dog",
    "a {} drawing of a tree",
    "a {} picture of a boat by the sea",
    "a mountain in the style of {}",
    "a bowl of fruit in the style of {}",
    "a horse in the style of {} on a white background",
    "an old man in the style of {}, in a garden",
    "a bridge in the style of {}, in the rain",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MACECFR(ClosedForm):
    """MACE's closed-form refinement: edit the words around a concept, not the concept.

    In "a photo of a cat asleep" the later words, the end token and the padding all know of the cat. Each of thirty
    sentences is written once with the concept and once with its anchor; the tokens the two have in common are matched
    and moved, in the ridge regression of :mod:`erasure.methods.closed_form`:

        x_i = common token i of the sentence with the concept,   y_i = the same token of the sentence with the anchor
        a_p X_p X_p^T = s (G + w G_domain)

    with ``G (d, d)`` the Gram matrix of a general corpus and ``G_domain`` that of things close to the concept.

    **This is the first of MACE's three stages.** The concept's own tokens are left to the paper's LoRAs and their
    fusion; ``include_concept`` moves them too, to the anchor's own. It is not all of MACE. How much it suppresses alone
    depends on where the encoder keeps the concept: on Emoji World, whose end and padding tokens carry it, as much as
    with ``include_concept``.

    Every concept needs an anchor: the words of a sentence with nothing in it are other words. The settings it shares
    with other closed forms are those of :class:`~erasure.methods.closed_form.ClosedForm`; what stands around the
    concept takes the place of ``token_span``.

    Attributes:
        include_concept: move the concept's own tokens to the anchor's as well, matched at their ends. Leave it out
            only where something else erases the concept itself.
        all_words: match the two sentences position by position, every token of them. Blunter: where concept and anchor
            differ in length, words are moved onto other words.
        preserve_scale: s, the weight of all that is preserved. Raise it when neighbours suffer.
        domain: file of a Gram matrix over prompts close to the concept (``Gram.save``); the keep list and the everyday
            nouns are added to it. "" for the keep list alone.
        domain_scale: w, how much more each of those weighs than each of the corpus.
        preserve_scale_squared: weigh with ``s^2``, as the published code does by applying s twice. Set it to compare
            with weights made by that code.
        articles: write "a photo of a cat", not "a photo of cat", and keep "a dog" beside "dog".
    """

    include_concept: bool = False
    all_words: bool = False
    preserve_scale: NonNegativeFloat = 1.0
    domain: str = ""
    domain_scale: NonNegativeFloat = 1.0
    preserve_scale_squared: bool = False

    files: ClassVar[tuple[str, ...]] = ("corpus", "domain")
    key: ClassVar[str] = "mace-cfr"
    summary: ClassVar[str] = "closed form on the words around the concept (MACE, stage 1); seconds; needs an anchor"
    reference: ClassVar[Reference] = Reference(
        "MACE: Mass Concept Erasure in Diffusion Models",
        "Lu et al., CVPR 2024",
        "2403.06135",
        "Shilin-LU/MACE",
    )
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "recommended": {
            "include_concept": True,
            "articles": True,
            "synonyms": True,
            "keep_span": "all",
            "keep_everyday": True,
            "lamb": 10.0,  # thousands of rows are moved, hundreds kept: 0.5 would be next to nothing
        },
        "object": {"lamb": 1e2, "preserve_scale": 0.0},
        "celebrity": {
            "lamb": 0.0,
            "preserve_scale": 1e-4,
            "domain_scale": 8e3,
            "corpus_scale": 0.0,
            "keep_span": "all",
            "preserve_scale_squared": True,  # as the published runs did, by applying it twice
        },
        "style": {
            "lamb": 0.0,
            "preserve_scale": 1e-4,
            "domain_scale": 8e4,
            "corpus_scale": 0.0,
            "keep_span": "all",
            "preserve_scale_squared": True,  # as the published runs did, by applying it twice
        },
    }

    @property
    def needs_keep(self) -> bool:
        return self.preserve_scale > 0 and not self.domain

    def validate(self, backbone: Backbone, request: Request) -> None:
        super().validate(backbone, request)
        if self.token_span != "last_subject":
            raise ValueError(
                f"MACE-CFR edits the words around the concept; got token_span={self.token_span!r}; leave it out, and "
                "set include_concept or all_words for more"
            )
        if bare := next((concept.name for concept in request.concepts if not concept.anchor), None):
            raise ValueError(
                f"MACE-CFR needs an anchor, whose sentences have the same words around it; {bare!r} has none; name a "
                f"near, harmless thing, e.g. Concept({bare!r}, anchor=...) or --anchor"
            )
        if request.keep and not (self.preserve_scale and self.domain_scale):
            warnings.warn("the keep list has no weight: preserve_scale or domain_scale is 0", stacklevel=3)

    # --- the steps ----------------------------------------------------------------------------------------------------

    def prompt_pairs(self, concept: Concept) -> list[tuple[str, str]]:
        phrases = concept.phrases if self.synonyms else (concept.name,)
        templates = STYLES if concept.kind == "style" else THINGS
        written = with_article if self.articles and concept.kind != "style" else str
        anchor = written(concept.anchor)
        return [(t.replace("{}", written(p)), t.replace("{}", anchor)) for t in templates for p in phrases]

    def concept_rows(
        self, backbone: Backbone, concepts: Sequence[Concept], space: Space
    ) -> Iterator[tuple[Tensor, Tensor]]:
        if space == "pooled":  # one vector a sentence: nothing stands around the concept
            yield from super().concept_rows(backbone, concepts, space)
            return
        for concept in concepts:
            pairs = self.pairs(backbone, concept)
            yield joined([self.sentence_rows(one, pairs, space) for one in backbone.read_at(space)])

    def sentence_rows(
        self, backbone: Backbone, pairs: Sequence[tuple[str, str]], space: Space
    ) -> tuple[Tensor, Tensor]:
        """Embeddings to move and where to, from every pair of sentences; at most ``d`` rows, however many there are."""
        width = next(iter(self.sites(backbone, space).values())).weight.shape[1]
        x = y = torch.zeros(0, width, dtype=torch.float64)
        for ours, theirs in zip(
            encoded(backbone, [sentence for sentence, _ in pairs]),
            encoded(backbone, [sentence for _, sentence in pairs]),
            strict=True,
        ):
            segments = zip(ours.segments, theirs.segments, strict=True)
            found = [self._matched_rows(a, b, i) for a, b in segments for i in range(len(ours))]
            x = torch.cat([x, *(targets for targets, _ in found)])
            y = torch.cat([y, *(anchors for _, anchors in found)])
            x, y = condensed(x, y)
        return x, y

    def _matched_rows(self, ours: Segment, theirs: Segment, i: int) -> tuple[Tensor, Tensor]:
        """The rows of one pair of sentences: before the concept, after it and, if asked for, the concept itself."""
        a, b = (segment.hidden[i].cpu().double() for segment in (ours, theirs))
        if self.all_words:
            return a, b
        words, others = (segment.ids[i, : segment.counts[i]].tolist() for segment in (ours, theirs))
        before, after = common(words, others)
        own, other = a[before : len(words) - after], b[before : len(others) - after]
        a_end, b_end = a[len(words) - after :], b[len(others) - after :]
        n = min(len(a_end), len(b_end))
        if not self.include_concept:
            own = other = a[:0]
        elif len(own):  # an anchor without words of its own is what follows them
            other = stretched(other if len(other) else b_end[:1], len(own))
        else:
            other = own
        return torch.cat([a[:before], a_end[:n], own]), torch.cat([b[:before], b_end[:n], other])

    def kept(self, backbone: Backbone, keep: Sequence[str], space: Space) -> Kept:
        """``s (G + w G_domain)``, with the keep list in the domain."""
        prompts = expanded(backbone, keep, articles=self.articles)
        domain = self.gram(backbone, prompts, space).kept[space]
        if self.domain:
            domain = domain + Gram.load(self.domain).check(backbone).kept[space]
        general = super().kept(backbone, [], space)
        s = self.preserve_scale ** (2 if self.preserve_scale_squared else 1)
        return s * (general + self.domain_scale * domain)


def common(a: Sequence[int], b: Sequence[int]) -> tuple[int, int]:
    """How many tokens two prompts share at their beginning and, of the rest, at their end.

    Words that concept and anchor share there ("red car", "red bus") count as common.
    """
    shorter = min(len(a), len(b))
    before = next((i for i in range(shorter) if a[i] != b[i]), shorter)
    rest = shorter - before
    after = next((i for i in range(rest) if a[-1 - i] != b[-1 - i]), rest)
    return before, after
