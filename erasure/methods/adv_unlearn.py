"""Adversarial erasing in the text encoder: AdvUnlearn with the fast attack of R.A.C.E."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor

from erasure.backbone import Backbone
from erasure.backbone.text import Text
from erasure.methods.bank import TrajectoryBank
from erasure.methods.base import Reference, Request
from erasure.methods.finetune import SMALL_BANK, FineTune, Loss
from erasure.methods.students import Student, Weights
from erasure.train import Checkpoint, Draw


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdvUnlearn(FineTune):
    """Train the text encoder so that even the worst embedding near the concept's is drawn as something else:

        min_theta  | e(x_t, t, z + d) - [ e(x_t, t, c) - eta ( e(x_t, t, c) - e(x_t, t) ) ] |^2   + retain term
        d = argmin_{|d|_inf <= epsilon} | e(x_t, t, z + d) - e(x_t, t, c) |^2,      z = encoder_theta(concept)

    with e the frozen denoiser, c the original embedding of the concept. The inner problem, bringing the concept back,
    is solved by projected sign-gradient steps on the embedding (R.A.C.E., Kim et al. 2024, algorithm 1), which costs
    ``attack_steps`` passes instead of AdvUnlearn's 30 on a prefix word. The erasure is a text encoder: it goes on every
    model that reads it.

    The retain term is ``retain`` times the squared error of the denoiser on the keep list, as in AdvUnlearn's equation
    8. Name a keep list: without one the encoder forgets more than the concept. The settings it shares with other
    fine-tunes are those of :class:`~erasure.methods.finetune.FineTune`.

    Attributes:
        eta: how far to push away from the concept.
        warmup_steps: first steps without an attack, in which the concept itself goes.
    """

    iterations: PositiveInt = 1000
    lr: float = 1e-5
    eta: NonNegativeFloat = 1.0
    retain: NonNegativeFloat = 0.3
    robust: bool = True
    warmup_steps: int = 200

    architectures: ClassVar[tuple[str, ...]] = ("sd-unet", "sdxl")
    anchored: ClassVar[bool] = False
    key: ClassVar[str] = "adv-unlearn"
    kind: ClassVar[str | None] = "delta"
    part: ClassVar[Literal["denoiser", "text encoder"]] = "text encoder"
    summary: ClassVar[str] = "adversarial fine-tune of the text encoder; minutes; a drop-in encoder"
    reference: ClassVar[Reference] = Reference(
        "Defensive Unlearning with Adversarial Training for Robust Concept Erasure in Diffusion Models",
        "Zhang et al., NeurIPS 2024",
        "2405.15234",
        "OPTML-Group/AdvUnlearn",
    )
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "recommended": {
            **SMALL_BANK,
            "iterations": 200,
            "lr": 1e-4,
            "retain": 1.0,
            "warmup_steps": 40,
            "attack_steps": 3,
        },
        "paper": {"trajectories": 1000, "keep_steps": 1},
    }

    @property
    def needs_keep(self) -> bool:
        return True

    def validate(self, backbone: Backbone, request: Request) -> None:
        if self.adapter != "auto":
            raise ValueError(
                f"AdvUnlearn trains the weights of the text encoder; got adapter {self.adapter!r}; leave it out"
            )
        super().validate(backbone, request)

    def student(self, backbone: Backbone) -> Student:
        return Weights(backbone, "text_encoder")

    def objective(self, backbone: Backbone, student: Student, request: Request, checkpoint: Checkpoint | None) -> Loss:
        prompts, kept = self.prompts(backbone, request), self.kept(backbone, request)
        bank = self.bank(backbone, backbone.encode(prompts).text, request, checkpoint, "bank")
        held = self.bank(backbone, backbone.encode(kept).text, request, checkpoint, "kept") if kept else None
        targets = bank.conditional - self.eta * (bank.conditional - bank.unconditional)

        def loss(draw: Draw) -> Tensor:
            chosen = bank.pick(self.batch_size, draw.generator)
            text = self.spoken(backbone, bank, prompts, chosen)
            value = self.erasing_rows(backbone, bank, targets, text, chosen, draw)
            if held is None:
                return value
            chosen = held.pick(self.batch_size * self.retain_hardest, draw.generator)
            text = self.spoken(backbone, held, kept, chosen)
            errors = self.errors(backbone, held, held.conditional, text, chosen)
            return value + self.retain * errors.topk(self.batch_size).values.mean()

        return loss

    def attacks(self, step: int) -> bool:
        return super().attacks(step) and step >= self.warmup_steps

    def spoken(self, backbone: Backbone, bank: TrajectoryBank, prompts: list[str], chosen: Tensor) -> Text:
        """The prompts of chosen rows by the encoder as it is now, with its graph."""
        return backbone.encode([prompts[i] for i in bank.prompt[chosen].tolist()], grad=True).text
