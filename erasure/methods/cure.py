"""CURE: take a concept's directions out of the layers that read the text, less those it shares with what is kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

from pydantic import Field

from erasure.backbone import Backbone, Space
from erasure.concept import Concept
from erasure.methods.base import Reference
from erasure.methods.closed_form import ClosedForm, TokenSpan
from erasure.methods.projections import cure
from erasure.methods.ridge import Solution, gathered
from erasure.methods.uce import sentences

Expansion = Annotated[float, Field(ge=1)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CURE(ClosedForm):
    """With the directions ``B`` of the concept's embeddings (f) and of those that are kept (r), and the share ``r_i``
    of the energy of its set that each direction has,

        W' = W (I - P_f + P_f P_r),   P = B diag(f) B^T,   f_i = a r_i / ((a - 1) r_i + 1)

    There is no anchor: of the concept's embeddings only what kept ones share stays. The weights ``f`` are below 1, so
    erasing twice erases more. One strong direction (what all prompts have in common) has most of the energy of either
    set, and the expansions give the others their weight. The settings it shares with other closed forms are those of
    :class:`~erasure.methods.closed_form.ClosedForm`; ``lamb`` and ``erase_scale`` have no part in it.

    Attributes:
        expand_prompts: also edit the concept inside five sentences such as "photo of {}", as UCE does.
        forget_alpha: expansion of the concept's directions. Raise it when the target survives.
        retain_alpha: expansion of the kept directions. Raise it when neighbours suffer.
    """

    keep_span: TokenSpan = "all"
    expand_prompts: bool = False
    forget_alpha: Expansion = 2.0
    retain_alpha: Expansion = 2.0

    key: ClassVar[str] = "cure"
    summary: ClassVar[str] = "closed form that projects a concept's directions out, without an anchor; seconds"
    reference: ClassVar[Reference] = Reference(
        "CURE: Concept Unlearning via Orthogonal Representation Editing in Diffusion Models",
        "Das Biswas et al., NeurIPS 2025",
        "2505.12677",
        "ShristiDasBiswas/CURE-Concept-Unlearning-via-Orthogonal-Representation-Editing-in-Diffusion-Models",
    )
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        # Chosen on Emoji World: the 2 to 5 of the paper move a target by a quarter there, as one direction of text
        # embeddings has most of their energy. More for what is retained leaves the cat in two pictures of three.
        "recommended": {
            "token_span": "subject_to_end",
            "articles": True,
            "synonyms": True,
            "keep_everyday": True,
            "expand_prompts": True,
            "forget_alpha": 1000.0,
            "retain_alpha": 20.0,
        },
        "paper": {"token_span": "all"},
    }

    def prompt_pairs(self, concept: Concept) -> list[tuple[str, str]]:
        pairs = super().prompt_pairs(concept)
        return [*pairs, *sentences(concept, synonyms=self.synonyms)] if self.expand_prompts else pairs

    def solve(
        self, backbone: Backbone, concepts: Sequence[Concept], keep: Sequence[str], space: Space
    ) -> tuple[Solution, None]:
        if (self.lamb, self.erase_scale) != (ClosedForm.lamb, ClosedForm.erase_scale):
            raise ValueError(
                f"CURE weighs nothing; got lamb={self.lamb}, erase_scale={self.erase_scale}; leave them out, and set "
                "forget_alpha or retain_alpha instead"
            )
        targets, _, _ = gathered(self.concept_rows(backbone, concepts, space))
        retain = self.kept(backbone, keep, space)
        solution = cure(targets.cpu().double(), retain, forget_alpha=self.forget_alpha, retain_alpha=self.retain_alpha)
        return solution.smallest(), None
