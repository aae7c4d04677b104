"""Concept Ablation: draw what is asked for by the concept's name as the anchor is drawn."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

from pydantic import NonNegativeFloat
from torch import Tensor

from erasure.backbone import Backbone
from erasure.methods.base import Reference, Request, with_anchors
from erasure.methods.finetune import SMALL_BANK, FineTune, Loss
from erasure.methods.students import Student
from erasure.train import Checkpoint, Draw

SELECTORS = {"x-strict": "cross_attention_kv", "attention": "attention", "all": "all"}
# What the published runs share.
PUBLISHED: dict[str, Any] = {
    "optimizer": "adamw",
    "clip": 1.0,
    "adapter": "weights",
    "trajectories": 1000,
    "keep_steps": 1,
    "num_inference_steps": 25,
    "guidance_scale": 6.0,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConceptAblation(FineTune):
    """Match what the concept's prompt draws with what the anchor's does, on pictures of the anchor:

        model:  | e_student(x_t, t, c) - e(x_t, t, a) |^2       noise:  | e_student(x_t, t, c) - eps |^2

    with c the concept in a sentence, a the anchor in the same one, x_t a picture the base drew for a, mixed with eps,
    and e the frozen base (Kumari et al. 2023). ``prior`` adds ``| e_student(x_t, t, a) - eps |^2``,
    which holds the anchor where the two overlap ("grumpy cat", "cat").

    The anchor is the concept's own (:attr:`Concept.anchor`); with none, the empty prompt. Sentences are the concept's
    templates. The keep list is held by ``retain``, which the paper does not have.

    Three things of the official script are not repeated. Its teacher is the model in training itself, which lets the
    anchor drift. It stops the gradient at the first token's keys and values. It scales and flips the pictures.

    The settings it shares with other fine-tunes are those of :class:`~erasure.methods.finetune.FineTune`. Its bank
    holds ``trajectories`` pictures with ``keep_steps`` noisy copies of each.

    Attributes:
        target: what the student is to predict: ``model``, the base's prediction for the anchor, or ``noise``, the noise
            itself, which the paper found weaker.
        variant: what is trained: ``x-strict`` keys and values of cross-attention (styles, objects), ``attention`` every
            attention (nudity), ``all`` every layer (a memorised picture).
        prior: weight of the term that holds the anchor. 1 where anchor and concept overlap.
    """

    target: Literal["model", "noise"] = "model"
    variant: Literal["x-strict", "attention", "all"] = "x-strict"
    prior: NonNegativeFloat = 0.0

    key: ClassVar[str] = "concept-ablation"
    summary: ClassVar[str] = "fine-tune the concept onto an anchor, on the anchor's pictures; minutes"
    reference: ClassVar[Reference] = Reference(
        "Ablating Concepts in Text-to-Image Diffusion Models",
        "Kumari et al., ICCV 2023",
        "2303.13516",
        "nupurkmr9/concept-ablation",
    )
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "recommended": {
            **SMALL_BANK,
            "lr": 3e-4,
            "iterations": 150,
            "trajectories": 16,
            "keep_steps": 16,
            "retain": 1.0,
        },
        # On two devices with a batch of 4, 4 and 2; the script multiplies its rate of 2e-6, 4e-6 and 5e-7 by both, and
        # doubles it where there is a prior. For nudity it draws the anchor with the target as negative prompt.
        "paper": {**PUBLISHED, "iterations": 100, "lr": 1.6e-5, "batch_size": 8},
        "paper-nudity": {
            **PUBLISHED, "iterations": 400, "lr": 6.4e-5, "batch_size": 8, "variant": "attention", "prior": 1.0,
        },
        "paper-memorised": {
            **PUBLISHED, "iterations": 400, "lr": 4e-6, "batch_size": 4, "variant": "all", "prior": 1.0,
        },
    }  # fmt: skip

    @property
    def selector(self) -> str:
        return SELECTORS[self.variant]

    def pairs(self, backbone: Backbone, request: Request) -> list[tuple[str, str]]:
        """The concept in a sentence and the anchor in the same one, for every name and template."""
        return with_anchors(backbone, request.concepts, synonyms=self.synonyms, articles=self.articles, templates=True)

    def prompts(self, backbone: Backbone, request: Request) -> list[str]:
        return [concept for concept, _ in self.pairs(backbone, request)]

    def objective(self, backbone: Backbone, student: Student, request: Request, checkpoint: Checkpoint | None) -> Loss:
        concepts, anchors = (list(part) for part in zip(*self.pairs(backbone, request), strict=True))
        text, anchor = backbone.encode(concepts).text, backbone.encode(anchors).text
        bank = self.pictures(backbone, anchor, request, checkpoint, "bank")
        targets = bank.conditional if self.target == "model" else bank.truth
        aim = bank.predicted(backbone, text) if self.robust else None
        hold = self.holding(backbone, request, checkpoint)

        def loss(draw: Draw) -> Tensor:
            with student.active():
                value = self.erasing(backbone, bank, targets, text, draw, aim=aim)
                if self.prior:
                    chosen = bank.pick(self.batch_size, draw.generator)
                    value = value + self.prior * self.error(backbone, bank, bank.truth, anchor, chosen)
                return value + hold(draw)

        return loss


__all__ = ["ConceptAblation"]
