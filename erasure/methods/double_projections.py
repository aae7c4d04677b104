"""Double Projections: move a concept onto its anchor, and leave the span of what is kept exactly as it is."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

from pydantic import Field, NonNegativeFloat, NonNegativeInt

from erasure.backbone import Backbone, Space
from erasure.concept import Concept
from erasure.methods.base import Reference, Request
from erasure.methods.closed_form import TokenSpan, refuse_weights
from erasure.methods.projections import double_projection, proxy, subspace
from erasure.methods.ridge import Solution, gathered
from erasure.methods.sentences import Sentences

Share = Annotated[float, Field(gt=0, le=1)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DoubleProjections(Sentences):
    """For targets ``C`` and anchors ``C*``, columns of shape ``(d, n)``,

        W' = W T,   T = I + (C* - C)(R^T R + rho I)^-1 R^T,   R = (I - P) C

    with ``P`` the projector on the span of what is kept (the keep list, the everyday nouns and the corpus), or on its
    directions of most energy. ``T`` leaves that span exactly as it is. It is the limit of UCE for endless weights of
    what is kept and no ridge.

    What decides is the rank of the preserved span: the embeddings of whole prompts fill every direction a little, and
    what lies in the span cannot be moved. The report says how much of the targets is left outside of it (``residual``,
    ``|R| / |C|``) and the span's rank. The settings it shares with other closed forms are those of
    :class:`~erasure.methods.closed_form.ClosedForm` and :class:`~erasure.methods.sentences.Sentences`; ``lamb`` and
    ``erase_scale`` have no part in it.

    Attributes:
        energy: share of the energy of what is kept that the preserved span holds. Lower it when the target survives,
            raise it when neighbours suffer.
        rank: number of directions of the preserved span, instead of a share; 0 for the share.
        ridge: the ``|r| / |c|`` at which a direction of the concept is moved half way; 0 moves all of them whole.
        floor: least ``|r| / |c|`` of each moved embedding, below which the erasure is refused unless there is a ridge.
        proxy: move each target to its projection on the preserved span instead of to the anchor.
    """

    keep_span: TokenSpan = "all"
    energy: Share = 0.9999
    rank: NonNegativeInt = 0
    ridge: NonNegativeFloat = 0.0
    floor: NonNegativeFloat = 0.02
    proxy: bool = False

    key: ClassVar[str] = "double-projections"
    summary: ClassVar[str] = "closed form that leaves the span of what is kept exactly as it is; seconds"
    reference: ClassVar[Reference] = Reference(
        "Closed-Form Concept Erasure via Double Projections",
        "Zhang et al., CVPR 2026",
        "2604.10032",
        "",
    )
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        # Screened on Emoji World with eight pictures a group among energies of .99 to .9999 and ridges of .02 to .5, so
        # a choice and no result: lower energies moved what nobody named, smaller ridges the neighbours.
        "recommended": {
            "token_span": "subject_to_end",
            "articles": True,
            "synonyms": True,
            "keep_everyday": True,
            "expand_prompts": True,
            "energy": 0.9999,
            "ridge": 0.05,
        },
        "paper": {"keep_span": "last_subject", "energy": 1.0, "proxy": True},
    }

    def validate(self, backbone: Backbone, request: Request) -> None:
        super().validate(backbone, request)
        refuse_weights(self, "Double Projections", instead="ridge or energy")

    def solve(
        self, backbone: Backbone, concepts: Sequence[Concept], keep: Sequence[str], space: Space
    ) -> tuple[Solution, None]:
        targets, anchors, _ = gathered(self.concept_rows(backbone, concepts, space))
        x, y = targets.cpu().double(), anchors.cpu().double()
        basis = subspace(self.kept(backbone, keep, space), energy=self.energy, rank=self.rank)
        if self.proxy:
            y = proxy(x, basis)
        solution = double_projection(x, y, basis, floor=self.floor, ridge=self.ridge)
        residual, moved = solution.notes["residual"], solution.notes["moved"]
        if moved < 1e-6:
            raise ValueError(
                f"what is kept spans the concept, so that nothing of it can move (residual {residual:.1e}); keep less, "
                "lower energy, or give a rank"
            )
        if moved < 0.5:
            warnings.warn(
                f"what is kept holds all but {residual:.2g} of the concept's length, and the ridge lets {moved:.0%} of "
                "that move; lower ridge or energy, or keep less",
                stacklevel=4,
            )
        return solution.smallest(), None
