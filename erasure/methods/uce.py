"""UCE, Unified Concept Editing: move what the cross-attention keys and values make of a concept onto its anchor."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from erasure.artifact import OperatorErasure
from erasure.artifact.base import new_config
from erasure.backbone import Backbone
from erasure.backbone.text import Conditioning
from erasure.concept import Concept, same, with_article
from erasure.methods.base import Method, Reference, check_moved, check_request
from erasure.methods.closed_form import solve

EXPANSIONS = {
    "style": ("painting by {}", "art by {}", "artwork by {}", "picture by {}", "style of {}"),
    "other": ("image of {}", "photo of {}", "portrait of {}", "picture of {}", "painting of {}"),
}

# A sample of what prompts are about. An edit of padding tokens reaches every prompt, so something has to stand for
# "everything else": on Emoji World these words keep unrelated things as they were, where neighbours alone halve them.
EVERYDAY = tuple(
    """
    person bicycle car motorcycle airplane bus train truck boat bird cat dog horse sheep cow elephant bear zebra
    giraffe backpack umbrella ball kite skateboard bottle cup fork knife spoon bowl banana apple sandwich orange
    broccoli carrot pizza donut cake chair couch bed table laptop phone clock book vase scissors toy house tree
    flower mountain river beach city street sky sun moon fish insect fruit food drink hat shirt shoe window door
    bridge tower ship rocket computer guitar piano drum painting statue robot child woman man king castle garden
    forest island
    """.split()
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class UCE(Method):
    """Solve the ridge regression of :mod:`erasure.methods.closed_form` for the embeddings of the concept.

    Attributes:
        token_span: which token of a prompt stands for the concept. ``last_subject`` is the official code's: exact for
            prompts that end with the concept, weak elsewhere, because end and padding tokens carry the concept too.
            ``subject_to_end`` edits those as well: it erases in whole sentences, and needs a keep list.
        empty_anchor: what the empty prompt contributes when there is no anchor: ``bos`` its start token (official),
            ``eos`` its first end token, ``mean_pad`` the mean of all that follow. Only for ``last_subject``.
        lamb: ridge towards the original weights. Raise it when neighbours suffer, lower it when the target survives.
        erase_scale, preserve_scale: weight of each erased and each kept embedding.
        expand_prompts: also edit the concept inside five sentences such as "photo of {}". Stronger and less selective.
        articles: also edit "a superhero" beside "superhero", and keep "a ninja" beside "ninja".
        synonyms: edit the concept's synonyms as well as its name.
        keep_all_tokens: keep every token of a kept prompt, not only its last word.
        keep_everyday: keep a hundred everyday nouns (``EVERYDAY``) beside the keep list, so that the edit of padding
            tokens does not reach what nobody thought to name.
    """

    token_span: Literal["last_subject", "tail", "subject_to_end"] = "last_subject"
    empty_anchor: Literal["bos", "eos", "mean_pad"] = "bos"
    lamb: float = 0.5
    erase_scale: float = 1.0
    preserve_scale: float = 1.0
    expand_prompts: bool = False
    articles: bool = False
    synonyms: bool = False
    keep_all_tokens: bool = False
    keep_everyday: bool = False

    key: ClassVar[str] = "uce"
    summary: ClassVar[str] = "closed form on cross-attention keys and values; seconds, kilobytes"
    reference: ClassVar[Reference] = Reference(
        "Unified Concept Editing in Diffusion Models",
        "Gandikota et al., WACV 2024",
        "2308.14761",
        "rohitgandikota/unified-concept-editing",
    )
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "recommended": {
            "token_span": "subject_to_end",
            "articles": True,
            "synonyms": True,
            "keep_all_tokens": True,
            "keep_everyday": True,
        },
        "official-2025": {},
    }

    @property
    def needs_keep(self) -> bool:
        return self.token_span != "last_subject"

    def erase(
        self,
        backbone: Backbone,
        concepts: Sequence[Concept],
        *,
        keep: Sequence[str] = (),
        checkpoint: str | os.PathLike[str] | None = None,
        progress: bool = True,
    ) -> OperatorErasure:
        """Solve and return the operator. Takes as long as encoding the prompts."""
        check_request(concepts, keep)
        targets, anchors = self.pairs(backbone, concepts)
        everyday = self.everyday(concepts)
        kept = self.kept(backbone, [*keep, *everyday], width=targets.shape[1])
        solution = solve(
            targets, anchors, kept, lamb=self.lamb, erase_scale=self.erase_scale, preserve_scale=self.preserve_scale
        )
        sites = backbone.text_sites()
        weights = {name: site.weight.detach() for name, site in sites.items()}
        u, v = solution.u.float().cpu().contiguous(), solution.v.float().cpu().contiguous()
        config = new_config(
            backbone,
            method=self.key,
            settings=self.settings(),
            concepts=concepts,
            keep=keep,
            sites=list(sites),
        )
        change = {name: weight.cpu().double() @ solution.u @ solution.v.T for name, weight in weights.items()}
        config["keep_everyday"] = everyday
        config["prompts"] = list(
            dict.fromkeys(target for concept in concepts for target, _ in self._prompt_pairs(concept))
        )
        config["report"] = {
            "relative_change": check_moved(change, weights),
            "condition": solution.condition,
            "rank": u.shape[1],
        }
        return OperatorErasure(self.name_for(concepts), config, {"u": u, "v": v})

    def pairs(self, backbone: Backbone, concepts: Sequence[Concept]) -> tuple[Tensor, Tensor]:
        """Target and anchor embeddings ``(n, d)``, row by row."""
        prompts = [pair for concept in concepts for pair in self._prompt_pairs(concept)]
        target = backbone.encode([t for t, _ in prompts])
        anchor = backbone.encode([a for _, a in prompts])
        if self.token_span == "last_subject":
            x = torch.cat(target.take("last_subject"))
            y = torch.stack([self._last_subject(anchor, i, prompts[i][1]) for i in range(len(prompts))])
            return x, y
        x_rows, y_rows = target.take(self.token_span), anchor.take(self.token_span)
        lengths = [min(len(x), len(y)) for x, y in zip(x_rows, y_rows, strict=True)]
        # aligned at the concept's last token; the longer tail is cut at its far end, which is padding
        return (
            torch.cat([x[:n] for x, n in zip(x_rows, lengths, strict=True)]),
            torch.cat([y[:n] for y, n in zip(y_rows, lengths, strict=True)]),
        )

    def everyday(self, concepts: Sequence[Concept]) -> list[str]:
        """The everyday nouns that are kept: those that name no target."""
        phrases = [phrase for concept in concepts for phrase in concept.phrases]
        return [noun for noun in EVERYDAY if self.keep_everyday and not any(same(noun, phrase) for phrase in phrases)]

    def kept(self, backbone: Backbone, keep: Sequence[str], *, width: int) -> Tensor:
        """Embeddings ``(m, width)`` that must not move."""
        if not keep:
            return torch.zeros(0, width, device=backbone.device, dtype=backbone.dtype)
        prompts = list(dict.fromkeys([*keep, *map(with_article, keep)] if self.articles else keep))
        return torch.cat(backbone.encode(prompts).take("all" if self.keep_all_tokens else "last_subject"))

    def _prompt_pairs(self, concept: Concept) -> list[tuple[str, str]]:
        phrases = concept.phrases if self.synonyms else (concept.name,)
        pairs = [(phrase, concept.anchor) for phrase in phrases]
        if self.articles:
            pairs += [
                (with_article(phrase), with_article(concept.anchor))
                for phrase in phrases
                if with_article(phrase) != phrase
            ]
        if self.expand_prompts:
            templates = EXPANSIONS["style" if concept.kind == "style" else "other"]
            pairs += [
                (template.format(phrase), template.format(concept.anchor).strip())
                for template in templates
                for phrase in phrases
            ]
        return pairs

    def _last_subject(self, anchor: Conditioning, i: int, prompt: str) -> Tensor:
        if prompt.strip() or self.empty_anchor == "bos":
            return anchor.take("last_subject")[i][0]
        return anchor.take("first_eos")[i][0] if self.empty_anchor == "eos" else anchor.take("tail")[i].mean(dim=0)
