"""CURE: take a concept's directions out of the layers that read the text, less those it shares with what is kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

from pydantic import Field

from erasure.backbone import Backbone, Space
from erasure.concept import Concept
from erasure.methods.base import Reference, Request
from erasure.methods.closed_form import TokenSpan, refuse_weights
from erasure.methods.projections import cure
from erasure.methods.ridge import Solution, gathered
from erasure.methods.sentences import Sentences

Expansion = Annotated[float, Field(ge=1)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CURE(Sentences):
    """With the directions ``B`` of the concept's embeddings (f) and of those that are kept (r), and the share ``r_i``
    of the energy of its set that each direction has,

        W' = W (I - P_f + P_f P_r),   P = B diag(f) B^T,   f_i = a r_i / ((a - 1) r_i + 1)

    There is no anchor: of the concept's embeddings only what kept ones share stays. The weights ``f`` are below 1, so
    erasing twice erases more. One strong direction (what all prompts have in common) has most of the energy of either
    set, and the expansions give the others their weight. The settings it shares with other closed forms are those of
    :class:`~erasure.methods.closed_form.ClosedForm` and :class:`~erasure.methods.sentences.Sentences`; ``lamb`` and
    ``erase_scale`` have no part in it.

    Attributes:
        forget_alpha: expansion of the concept's directions. Raise it when the target survives.
        retain_alpha: expansion of the kept directions. Raise it when neighbours suffer.
    """

    keep_span: TokenSpan = "all"
    forget_alpha: Expansion = 2.0
    retain_alpha: Expansion = 2.0

    anchored: ClassVar[bool] = False
    key: ClassVar[str] = "cure"
    summary: ClassVar[str] = "closed form that projects a concept's directions out, without an anchor; seconds"
    reference: ClassVar[Reference] = Reference(
        "CURE: Concept Unlearning via Orthogonal Representation Editing in Diffusion Models",
        "Das Biswas et al., NeurIPS 2025",
        "2505.12677",
        "ShristiDasBiswas/CURE-Concept-Unlearning-via-Orthogonal-Representation-Editing-in-Diffusion-Models",
    )
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        # Screened on Emoji World with eight pictures a group (superhero, cat), so a choice and no result. The paper's 2
        # to 5 move a target's embeddings by about a quarter there: one direction of text has most of its energy.
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

    def validate(self, backbone: Backbone, request: Request) -> None:
        super().validate(backbone, request)
        refuse_weights(self, "CURE", instead="forget_alpha or retain_alpha")

    def solve(
        self, backbone: Backbone, concepts: Sequence[Concept], keep: Sequence[str], space: Space
    ) -> tuple[Solution, None]:
        targets, _, _ = gathered(self.concept_rows(backbone, concepts, space))
        retain = self.kept(backbone, keep, space)
        solution = cure(targets.cpu().double(), retain, forget_alpha=self.forget_alpha, retain_alpha=self.retain_alpha)
        return solution.smallest(), None
