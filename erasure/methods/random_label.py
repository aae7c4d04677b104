"""Random-label fine-tuning: the concept's name is trained to draw other things. A reference point, not to ship."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, ClassVar

import torch
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor

from erasure.backbone import Backbone
from erasure.backbone.text import Text
from erasure.methods.bank import Bank
from erasure.methods.base import Reference, Request, replacements
from erasure.methods.finetune import SMALL_BANK, FineTune, Loss
from erasure.methods.students import Student
from erasure.train import Checkpoint, Draw


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomLabel(FineTune):
    """On pictures of the concept, match its prompt with the prompt of something else:

        | e_student(x_t, t, c) - e(x_t, t, a) |^2 + retain | e_student(y_t, t, r) - eps |^2

    with x_t a picture the base drew for the concept c, mixed with noise, and y_t one that it drew for r of the keep
    list, mixed with eps (Fan et al. 2024, equation 6). a is a random prompt of the keep list, or the concept's anchor;
    e is the frozen base. It is the simplest fine-tune on data, and what others should beat.

    The settings it shares with other fine-tunes are those of :class:`~erasure.methods.finetune.FineTune`. Its banks
    hold ``trajectories`` pictures with ``keep_steps`` noisy copies of each.
    """

    lr: float = 1e-5
    iterations: PositiveInt = 1000
    batch_size: PositiveInt = 8
    retain: NonNegativeFloat = 1.0
    trajectories: PositiveInt = 100
    keep_steps: PositiveInt | None = 8

    key: ClassVar[str] = "random-label"
    summary: ClassVar[str] = "fine-tune the concept's name onto others; a reference point; minutes"
    reference: ClassVar[Reference] = Reference(
        "SalUn: Empowering Machine Unlearning via Gradient-based Weight Saliency in Both Image Classification and "
        "Generation",
        "Fan et al., ICLR 2024",
        "2310.12508",
        "OPTML-Group/Unlearn-Saliency",
    )
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "recommended": {
            **SMALL_BANK,
            "lr": 3e-4,
            "iterations": 150,
            "trajectories": 16,
            "keep_steps": 16,
        },
        "paper": {"adapter": "weights"},
    }

    @property
    def needs_keep(self) -> bool:
        return True

    @property
    def uses_keep(self) -> bool:
        return True  # the concept's replacement comes from it

    @property
    def selector(self) -> str:
        return "all"

    def validate(self, backbone: Backbone, request: Request) -> None:
        super().validate(backbone, request)
        if not request.keep and any(not concept.anchor for concept in request.concepts):
            raise ValueError(
                f"{self.key} trains the concept's name to draw something else; got neither an anchor nor prompts to "
                "keep; give one of them"
            )

    def objective(self, backbone: Backbone, student: Student, request: Request, checkpoint: Checkpoint | None) -> Loss:
        prompts = self.prompts(backbone, request)
        text = backbone.encode(prompts).text
        bank = self.pictures(backbone, text, request, checkpoint, "bank")
        choices = replacements(prompts, request.concepts, request.keep)
        names = list(dict.fromkeys(itertools.chain.from_iterable(choices)))
        drawn = torch.randint(max(map(len, choices)), (len(bank),), generator=torch.Generator().manual_seed(self.seed))
        rows = zip(bank.prompt.tolist(), drawn.tolist(), strict=True)
        label = torch.tensor([names.index(choices[row][i % len(choices[row])]) for row, i in rows])
        relabelled = dataclasses.replace(bank, prompt=label).predicted(backbone, backbone.encode(names).text)
        hold = self.holding(backbone, request, checkpoint)

        def loss(draw: Draw) -> Tensor:
            with student.active():
                value = self.erasing(backbone, bank, relabelled, text, draw)
                return value + hold(draw)

        return loss

    def kept_bank(
        self, backbone: Backbone, text: Text, request: Request, checkpoint: Checkpoint | None
    ) -> tuple[Bank, Tensor]:
        """Pictures of what is kept, and their true noise."""
        bank = self.pictures(backbone, text, request, checkpoint, "kept")
        return bank, bank.truth
