"""SAFREE: the words of a prompt that lead to a concept are projected away from it. No weight changes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from erasure.artifact import Erasure
from erasure.backbone import Backbone
from erasure.backbone.text import Conditioning, Segment
from erasure.methods.base import Method, Reference, Request, expanded

Bases = dict[str, Tensor]  # (d, r) orthonormal, by the name of the rows they span
Share = Annotated[float, Field(gt=0, le=1)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SAFREE(Method):
    """With C the span of the embeddings of the concept's names, and e_i that of the prompt without its i-th word:

        d_i = |(I - P_C) e_i|      word i is a trigger where d_i >= (1 + alpha) mean_{j != i} d_j
        h <- h + s (safe(h) - h)   for the token embeddings h of triggers
        safe(h) = (I - P_C) P_M h, M the span of the e_i
        beta = 1 - mean cos(safe(h), h) over the prompt's tokens
        steps = round(max_steps / (1 + exp(-2 steepness (10 beta - midpoint))))

    with s the erasure's scale; the projection acts on the first ``steps`` steps of a picture (Yoon et al. 2025,
    section 3). The embedding e of a prompt is that of its end token. Guidance stays as it is, and it works without.

    Re-attention: in the features that cross the U-Net, the low frequencies that the projected prompt raises above those
    of the original one are multiplied by ``reattention``. In the released code this does nothing, as it is never
    switched on (its issue 13). Here it acts, and a step then costs half as much again.

    It differs from the released code in three more things. That masks one word piece after another with the token 0,
    here a whole word is left out, which every tokenizer can do. That acts on one step more. And its commands give the
    concept's names as the negative prompt as well: put the erasure ``negative-prompt`` beside this one for that.

    A prompt is recognised by its embedding. An embedding that the pipeline's text encoders did not make of one prompt
    (weighted, optimised, with a second prompt) is drawn as it is, and a warning says so. Each prompt is
    encoded once more for each of its words, when it is first drawn.

    Attributes:
        alpha: how much farther from the concept a prompt must be without a word. Lower finds more triggers.
        max_steps: the most steps it acts on. None: on all of them where beta is above ``midpoint / 10``, else on none.
        midpoint, steepness: of the steps in beta. Raise the midpoint when similar things change; 0 lets all prompts in.
        tail: project what stands behind the words as well, where encoders collect the whole prompt, if any word is a
            trigger. The released code leaves it.
        pooled: project the pooled embedding too, where there is one.
        reattention: 1 is off; below, the factor. It did not help on Emoji World. U-Nets only.
        radius: of the low frequencies, in periods a picture.
        articles, synonyms: names of the concept that span C, as in other methods.
    """

    alpha: NonNegativeFloat = 0.01
    max_steps: PositiveInt | None = 10
    midpoint: float = 5.333
    steepness: PositiveFloat = 2.5
    tail: bool = False
    pooled: bool = False
    reattention: Share = 1.0
    radius: PositiveInt = 1
    articles: bool = False
    synonyms: bool = True

    architectures: ClassVar[tuple[str, ...] | None] = ("sd-unet", "sdxl", "sd3")  # whose first encoder is CLIP's
    anchored: ClassVar[bool] = False
    key: ClassVar[str] = "safree"
    kind: ClassVar[str | None] = "filtered-text"
    summary: ClassVar[str] = "words that lead to the concept projected away from it while drawing; changes no weight"
    reference: ClassVar[Reference] = Reference(
        "SAFREE: Training-Free and Adaptive Guard for Safe Text-to-Image and Video Generation",
        "Yoon et al., ICLR 2025",
        "2410.12761",
        "jaehong31/SAFREE",
    )
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        # On Emoji World, by its two classifiers: target seen in 17 and 17 % of 72 pictures (base: 92 and 86),
        # neighbours right in 94 and 94 % of 108 (97 and 96), unrelated things in 93 and 92 % of 120 (93 and 92). There,
        # beta is above 0.6 for all prompts of the target, for 8 % of the neighbours' and 3 % of the unrelated. Screened
        # with 18 pictures of the target, seen in 6 %: in 100 and 89 % without the tail, and with official-2025, as with
        # the base; in 6 % with a reattention of 0.8, in 11 % with 0.5.
        "recommended": {"max_steps": None, "midpoint": 6.0, "tail": True, "articles": True},
        "official-2025": {},
        "official-2025-artist": {"midpoint": 5.5, "steepness": 3.5},
    }

    def validate(self, backbone: Backbone, request: Request) -> None:
        super().validate(backbone, request)
        if self.reattention < 1 and not hasattr(backbone, "skipping"):
            raise ValueError(
                f"re-attention works on features that cross a U-Net; {backbone.pipelines} has none; leave reattention=1"
            )
        if self.pooled and "pooled" not in backbone.spaces:
            raise ValueError(f"{backbone.pipelines} has no pooled text embedding; leave pooled=False")

    def erase(self, backbone: Backbone, request: Request) -> Erasure:
        """Encode the concept's names; everything else happens while pictures are drawn."""
        from erasure.pipelines.filtered_text import FilteredText

        phrases = request.names(synonyms=self.synonyms)
        names = expanded(backbone, phrases, articles=self.articles)
        text = backbone.encode(names)
        tensors = {f"concept.{i}": end_rows(segment) for i, segment in enumerate(text.segments)}
        if self.pooled:
            tensors["pooled"] = torch.cat(text.pooled_rows())
        tensors = {name: rows.float().cpu().contiguous().clone() for name, rows in tensors.items()}
        self._check_acts(backbone, names, {name: span(rows) for name, rows in tensors.items()})
        return FilteredText(self.name_for(request), self.record(backbone, request, prompts=names), tensors)

    def _check_acts(self, backbone: Backbone, names: Sequence[str], concept: Bases) -> None:
        """Raise where no name of the concept would be projected on any step."""
        plans = [planned(backbone.encode(shortened(name)), concept, self) for name in names]
        if not any(plan is not None and plan.steps for plan in plans):
            best = max((plan.beta for plan in plans if plan is not None), default=0.0)
            raise ValueError(
                f"safree with these settings acts on no name of the concept; the largest beta of {list(names)} is "
                f"{best:.2f}, the midpoint {self.midpoint}; lower the midpoint below {10 * best:.1f}"
            )


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is done to a prompt.

    Attributes:
        hidden: ``(length, d)``, added to its token embeddings.
        pooled: ``(d_pooled,)``, added to its pooled embedding; None where that stays.
        steps: the number of steps, from the first, on which it is done.
        beta: how far the prompt is changed by it, which decides the steps.
    """

    hidden: Tensor
    pooled: Tensor | None
    steps: float
    beta: float


def shortened(prompt: str) -> list[str]:
    """The prompt, and the prompt without each of its words."""
    words = prompt.split()
    return [prompt, *(" ".join(words[:i] + words[i + 1 :]) for i in range(len(words)))]


def end_rows(segment: Segment) -> Tensor:
    """``(n, d)``: the embedding of each prompt, which is that of its end token."""
    return torch.cat(segment.take("eos"))


def span(rows: Tensor) -> Tensor:
    """``(d, r)``: an orthonormal basis Q of the span of rows ``(n, d)``, so that ``P = Q Q^T``; float64."""
    rows = rows.detach().cpu().double()
    _, size, basis = torch.linalg.svd(rows, full_matrices=False)
    return basis[size > size[0] * max(rows.shape) * torch.finfo(torch.float32).eps].T


def projected(x: Tensor, q: Tensor) -> Tensor:
    """``P x`` for rows ``(..., d)``."""
    return x @ q @ q.T


def safe(x: Tensor, concept: Tensor, prompt: Tensor) -> Tensor:
    """``(I - P_C) P_M x``: in the span of the prompt, without the concept's."""
    inside = projected(x, prompt)
    return inside - projected(inside, concept)


def triggers(distances: Tensor, alpha: float) -> Tensor:
    """``(n,)``: which words are triggers, by the distance ``(n,)`` of the prompt without each. A single word is one."""
    n = len(distances)
    if n == 1:
        return torch.ones(1, dtype=torch.bool)
    others = (distances.sum() - distances) / (n - 1)
    return distances >= (1 + alpha) * others


def steps_of(beta: float, max_steps: int | None, midpoint: float, steepness: float) -> float:
    """The number of steps on which a prompt is projected."""
    if max_steps is None:
        return math.inf if 10 * beta >= midpoint else 0
    return round(max_steps * float(torch.sigmoid(torch.tensor(2 * steepness * (10 * beta - midpoint)))))


def planned(text: Conditioning, concept: Bases, settings: SAFREE) -> Plan | None:
    """What is done to a prompt; None where none of its words is a trigger.

    Args:
        text: the prompt, and the prompt without each of its words.
        concept: bases of the concept's span by the names of the erasure's tensors.
    """
    first = text.segments[0]
    masked = end_rows(first)[1:].cpu().double()
    distances = (masked - projected(masked, concept["concept.0"])).norm(dim=1)
    found = triggers(distances, settings.alpha)
    if not found.any():
        return None
    change, offset = torch.zeros(text.hidden.shape[1:], dtype=torch.float64), 0
    for i, segment in enumerate(text.segments):
        h = segment.hidden[0].cpu().double()
        better = safe(h, concept[f"concept.{i}"], span(end_rows(segment)[1:]))
        if i == 0:
            beta = 1 - float(F.cosine_similarity(better, h, dim=-1)[: segment.counts[0]].mean())
        rows = positions(segment, found, tail=settings.tail)
        change[offset : offset + len(h)][rows] = (better - h)[rows]
        offset += len(h)
    pooled = None
    if settings.pooled and text.pooled is not None:
        whole, *parts = text.pooled.cpu().double()
        pooled = (safe(whole, concept["pooled"], span(torch.stack(parts))) - whole).float()
    steps = steps_of(beta, settings.max_steps, settings.midpoint, settings.steepness)
    return Plan(change.float(), pooled, steps, beta)


def positions(segment: Segment, words: Tensor, *, tail: bool) -> list[int]:
    """Positions of the tokens of some words of the first prompt, and of what stands behind all words.

    The other prompts lack one word each, so that their lengths say how many tokens it has.
    """
    whole, *without = segment.counts
    found: list[int] = []
    start = segment.starts[0]
    for count, wanted in zip(without, words.tolist(), strict=True):
        tokens = max(whole - count, 0)
        found += range(start, start + tokens) if wanted else ()
        start += tokens
    return found + (list(range(segment.ends[0], segment.stops[0])) if tail else [])
