"""AGE: move the concept onto the nearest other concept, and hold that one still."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, ClassVar

import torch
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor

from erasure.backbone import Backbone
from erasure.backbone.text import Text
from erasure.methods.bank import TrajectoryBank
from erasure.methods.base import Reference, Request, replacements
from erasure.methods.finetune import SMALL_BANK, FineTune, Loss
from erasure.methods.students import Student
from erasure.train import Checkpoint, Draw


@dataclasses.dataclass(frozen=True, kw_only=True)
class AGE(FineTune):
    """Match the concept with a neighbour that the model itself finds, and hold the neighbour:

        | e_student(x_t, t, c) - e(x_t, t, a) |^2 + hold | e_student(x_t, t, a) - e(x_t, t, a) |^2

    with c the concept, e the frozen base and a, of the keep list, the prompt whose predictions are nearest to the
    concept's on its own trajectories. Mapping to a near and different concept damages others least (Bui et al. 2025);
    the empty prompt, ESD's target, is far from everything.

    The paper goes on choosing during training, by gradient steps on a mixture of up to 100 words; here the nearest is
    chosen once, for each name of the concept. A concept's own anchor, if it has one, is taken instead. The settings it
    shares with other fine-tunes are those of :class:`~erasure.methods.finetune.FineTune`.

    Attributes:
        hold: weight of the term that holds the neighbour.
    """

    hold: NonNegativeFloat = 1.0
    lr: float = 1e-5
    iterations: PositiveInt = 1000
    retain: NonNegativeFloat = 1.0

    key: ClassVar[str] = "age"
    summary: ClassVar[str] = "fine-tune the concept onto the nearest one to keep; minutes"
    reference: ClassVar[Reference] = Reference(
        "Fantastic Targets for Concept Erasure in Diffusion Models and Where to Find Them",
        "Bui et al., ICLR 2025",
        "2501.18950",
        "tuananhbui89/Adaptive-Guided-Erasure",
    )
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "recommended": {
            **SMALL_BANK,
            "lr": 3e-4,
            "iterations": 150,
        },
        "paper": {"trajectories": 1000, "keep_steps": 1, "adapter": "weights"},
    }

    @property
    def needs_keep(self) -> bool:
        return True

    @property
    def uses_keep(self) -> bool:
        return True  # the concept's replacement comes from it

    @property
    def selector(self) -> str:
        return "cross_attention"

    def validate(self, backbone: Backbone, request: Request) -> None:
        super().validate(backbone, request)
        if not request.keep and any(not concept.anchor for concept in request.concepts):
            raise ValueError(
                "AGE chooses the concept's replacement from the keep list; got an empty one; give prompts to keep, or "
                "the concept an anchor"
            )

    def objective(self, backbone: Backbone, student: Student, request: Request, checkpoint: Checkpoint | None) -> Loss:
        prompts = self.prompts(backbone, request)
        text = backbone.encode(prompts).text
        bank = self.bank(backbone, text, request, checkpoint, "bank")
        anchors, targets = self.anchors(backbone, request, bank, text)
        hold = self.holding(backbone, request, checkpoint)

        def loss(draw: Draw) -> Tensor:
            with student.active():
                value = self.erasing(backbone, bank, targets, text, draw)
                chosen = bank.pick(self.batch_size, draw.generator)
                value = value + self.hold * self.error(backbone, bank, targets, anchors, chosen)
                return value + hold(draw)

        return loss

    def anchors(self, backbone: Backbone, request: Request, bank: TrajectoryBank, text: Text) -> tuple[Text, Tensor]:
        """The neighbour of each prompt, one row each, and the base's predictions for it at every row of the bank."""
        choices = replacements(self.prompts(backbone, request), request.concepts, request.keep)
        names = list(dict.fromkeys(itertools.chain.from_iterable(choices)))
        candidates = backbone.encode(names).text
        nearest = torch.full((len(text),), torch.inf)
        chosen, targets = torch.zeros(len(text), dtype=torch.long), torch.empty_like(bank.conditional)
        for i, name in enumerate(names):
            predicted = bank.predicted(backbone, candidates[i : i + 1].repeat(len(text)))
            apart = (predicted - bank.conditional).square().flatten(1).mean(1)
            for row in range(len(text)):
                rows = bank.prompt == row
                if name in choices[row] and apart[rows].mean() < nearest[row]:
                    nearest[row], chosen[row] = apart[rows].mean(), i
                    targets[rows] = predicted[rows]
        return candidates[chosen.to(candidates.hidden.device)], targets
