"""TIME: let a prompt mean what another prompt means, token by token."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

from pydantic import NonNegativeFloat
from torch import Tensor

from erasure.backbone import Backbone, Site, Space
from erasure.backbone.text import Segment
from erasure.concept import Concept
from erasure.methods.base import Reference
from erasure.methods.closed_form import ClosedForm, TokenSpan, encoded, joined

SENTENCES = ("{}", "A photo of {}", "An image of {}", "A picture of {}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TIME(ClosedForm):
    """Move each token of a source prompt onto the token that matches it in the destination prompt.

    The ridge regression of :mod:`erasure.methods.closed_form` with, for every source position ``i``,

        x_i = source[i],   y_i = destination[m(i)]

    where ``m`` pairs the prompts' tokens (:func:`matched`). The source is the concept in a sentence, the destination
    its anchor in the same sentence. The words they share are pairs ``x = y``: they hold the sentence in place.

    The settings it shares with other closed forms are those of :class:`~erasure.methods.closed_form.ClosedForm`.

    Attributes:
        keys: edit keys as well as values. Values say what is drawn, keys where. Set it when the target survives.
        templates: sentences in which the edit is made. One, ``{}``, is gentler on everything else.
        token_span: which source tokens are moved. ``all`` is the paper's.
    """

    token_span: TokenSpan = "all"
    keep_span: TokenSpan = "all"
    lamb: NonNegativeFloat = 0.1
    keys: bool = False
    templates: tuple[str, ...] = SENTENCES

    key: ClassVar[str] = "time"
    summary: ClassVar[str] = "closed form on cross-attention values, token by token between two prompts; seconds"
    reference: ClassVar[Reference] = Reference(
        "Editing Implicit Assumptions in Text-to-Image Diffusion Models",
        "Orgad, Kawar and Belinkov, ICCV 2023",
        "2303.08084",
        "bahjat-kawar/time-diffusion",
    )
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "recommended": {
            "keys": True,
            "templates": ("{}",),
            "articles": True,
            "synonyms": True,
            "keep_everyday": True,
            "lamb": 0.5,
        },
        "paper": {"keys": True},
        "official-2023": {"templates": ("{}",)},
    }

    def sites(self, backbone: Backbone, space: Space) -> dict[str, Site]:
        sites = super().sites(backbone, space)
        return {name: site for name, site in sites.items() if self.keys or site.role != "key"}

    def prompt_pairs(self, concept: Concept) -> list[tuple[str, str]]:
        if not self.templates or any("{}" not in template for template in self.templates):
            raise ValueError(
                f"TIME's templates are sentences with {{}} where the concept goes; got {list(self.templates)}; "
                "write at least '{}'"
            )
        pairs = super().prompt_pairs(concept)
        return [
            (template.replace("{}", target), template.replace("{}", anchor).strip())
            for template in self.templates
            for target, anchor in pairs
        ]

    def pair_rows(
        self, backbone: Backbone, pairs: Sequence[tuple[str, str]], space: Space
    ) -> list[tuple[Tensor, Tensor]]:
        """Source and destination embeddings ``(n, d)`` of every pair of prompts, matched token by token."""
        if space == "pooled":
            return super().pair_rows(backbone, pairs, space)
        articles = _articles(backbone)
        found = []
        for sources, destinations in zip(
            encoded(backbone, [source for source, _ in pairs]),
            encoded(backbone, [destination for _, destination in pairs]),
            strict=True,
        ):
            by_segment = []
            for source, destination, article in zip(sources.segments, destinations.segments, articles, strict=True):
                places = [
                    matched(a, b, length=source.hidden.shape[1])
                    for a, b in zip(_words(source, article), _words(destination, article), strict=True)
                ]
                spans = enumerate(source.span(self.token_span))
                by_segment.append([(source.hidden[i, s], destination.hidden[i, places[i][s]]) for i, s in spans])
            found += [joined(segments) for segments in zip(*by_segment, strict=True)]
        return found


def matched(source: Sequence[int], destination: Sequence[int], *, length: int) -> list[int]:
    """For each of ``length`` positions of the source, its position in the destination.

    A source token goes to the next token of the destination that is the same. Tokens without one go to those that
    stand between the same neighbours, last piece to last piece; where the source has more of them, the first repeats;
    where nothing stands there, to the token that follows. Padding goes on from the end tokens, both of which match.

    Args:
        source, destination: token ids from the first to the end token, without padding.
    """
    found: list[int | None] = []
    following = 0
    for token in source:
        at = next((j for j in range(following, len(destination)) if destination[j] == token), None)
        found.append(at)
        following = following if at is None else at + 1
    places: list[int] = []
    after, distance = len(destination), 0  # the match that follows, and how far behind it we are
    for i in reversed(range(len(source))):
        at = found[i]
        if at is None:
            distance += 1
            before = next((j for j in reversed(found[:i]) if j is not None), -1)
            places.append(max(before + 1, after - distance))
        else:
            after, distance = at, 0
            places.append(at)
    padding = range(following, following + length - len(source))
    return [*reversed(places), *(min(j, length - 1) for j in padding)]


def _words(segment: Segment, articles: dict[int, int]) -> list[list[int]]:
    """Token ids of each prompt from the first to the end token, without padding and with one article."""
    rows = zip(segment.ids.tolist(), segment.counts, strict=True)
    return [[articles.get(token, token) for token in row[:count]] for row, count in rows]


def _articles(backbone: Backbone) -> list[dict[int, int]]:
    """For each tokenizer, the token "an" to the token "a": one word to this method. Empty where it splits them."""
    found = []
    for segment in backbone.read(["a", "an"]).segments:
        a, an = (ids[span].tolist() for ids, span in zip(segment.ids, segment.span("content"), strict=True))
        found.append({an[0]: a[0]} if len(a) == len(an) == 1 else {})
    return found
