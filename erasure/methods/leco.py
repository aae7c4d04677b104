"""LECO, and concept sliders used as erasers: negative guidance from a neutral prompt, kept in a low-rank adapter."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from erasure.backbone import Backbone
from erasure.methods.base import Reference, Request
from erasure.methods.esd import SELECTORS
from erasure.methods.finetune import SMALL_BANK, FineTune, Loss
from erasure.methods.students import Student
from erasure.train import Checkpoint, Draw
from erasure.wording import is_name


@dataclasses.dataclass(frozen=True, kw_only=True)
class LECO(FineTune):
    """Train a low-rank adapter so that the concept's prompt is drawn as a neutral one, and away from the concept:

        | e_student(x_t, t, c) - [ e(x_t, t, n) - eta ( e(x_t, t, c) - e(x_t, t) ) ] |^2

    with c the concept, n the neutral prompt and e the frozen base, the adapter switched off (Gandikota et al. 2024,
    with the sign that erases). With n the empty prompt this is ESD in the convention of its paper. What
    comes out is a standard LoRA with a strength: what user interfaces load.

    The script samples x_t with the adapter on; here it comes from the base's bank. The settings it shares with other
    fine-tunes are those of :class:`~erasure.methods.finetune.FineTune`.

    Attributes:
        variant: where the adapter sits; the names are ESD's. ``u``, everything but cross-attention, is the paper's.
        neutral: n, "" by default. Name what the concept is one of ("a person") when pictures should stay pictures of
            something.
        eta: how far to push away. 1 to 4; 0 only moves the concept onto the neutral prompt.
    """

    variant: Literal["x", "x-strict", "u", "all"] = "u"
    neutral: str = ""
    eta: NonNegativeFloat = 4.0
    iterations: PositiveInt = 1000
    lr: float = 2e-4
    optimizer: Literal["adam", "adamw", "sgd", "adamw8bit"] = "adamw"
    adapter: Literal["auto", "weights", "lora"] = "lora"
    rank: PositiveInt = 4
    alpha: PositiveFloat | None = 1.0

    anchored: ClassVar[bool] = False
    prompt_settings: ClassVar[tuple[str, ...]] = ("neutral",)
    key: ClassVar[str] = "leco"
    summary: ClassVar[str] = "negative guidance into a LoRA with a strength; minutes, a small file"
    reference: ClassVar[Reference] = Reference(
        "Concept Sliders: LoRA Adaptors for Precise Control in Diffusion Models",
        "Gandikota et al., ECCV 2024",
        "2311.12092",
        "rohitgandikota/sliders",
    )
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "recommended": {
            **SMALL_BANK,
            "variant": "x",
            "eta": 1.0,
            "alpha": None,
            "lr": 1e-3,
            "iterations": 150,
            "retain": 1.0,
        },
        "paper": {"trajectories": 1000, "keep_steps": 1},
    }

    def validate(self, backbone: Backbone, request: Request) -> None:
        super().validate(backbone, request)
        if self.neutral and any(is_name(phrase, self.neutral) for phrase in request.phrases):
            raise ValueError(
                f"neutral is drawn in the concept's place, and {self.neutral!r} is itself to be erased; choose another"
            )

    @property
    def selector(self) -> str:
        return SELECTORS[self.variant]

    def objective(self, backbone: Backbone, student: Student, request: Request, checkpoint: Checkpoint | None) -> Loss:
        text = backbone.encode(self.prompts(backbone, request)).text
        bank = self.bank(backbone, text, request, checkpoint, "bank")
        base = bank.unconditional
        if self.neutral:
            base = bank.predicted(backbone, backbone.encode([self.neutral]).text.repeat(len(text)))
        targets: Tensor = base - self.eta * (bank.conditional - bank.unconditional)
        hold = self.holding(backbone, request, checkpoint)

        def loss(draw: Draw) -> Tensor:
            with student.active():
                value = self.erasing(backbone, bank, targets, text, draw)
                return value + hold(draw)

        return loss
