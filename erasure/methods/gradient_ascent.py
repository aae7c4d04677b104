"""Gradient ascent: make the model worse at its own pictures of the concept. A reference point, not to ship."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from pydantic import PositiveInt
from torch import Tensor

from erasure.backbone import Backbone
from erasure.methods.base import Reference, Request
from erasure.methods.finetune import Loss
from erasure.methods.random_label import RandomLabel
from erasure.methods.students import Student
from erasure.train import Checkpoint, Draw


@dataclasses.dataclass(frozen=True, kw_only=True)
class GradientAscent(RandomLabel):
    """Ascend the denoising error on pictures of the concept, descend it on pictures of what is kept:

        - | e_student(x_t, t, c) - eps |^2 + retain | e_student(y_t, t, r) - eps |^2

    with x_t and y_t pictures the base drew for the concept c and for r of the keep list, mixed with eps (Thudi et al.
    2022 for classifiers). The first term has no lower bound: run long enough, it destroys the model, so look at the
    quick report. Settings as :class:`~erasure.methods.random_label.RandomLabel`.
    """

    iterations: PositiveInt = 200

    anchored: ClassVar[bool] = False
    key: ClassVar[str] = "gradient-ascent"
    summary: ClassVar[str] = "unlearn by ascending the loss; destroys in the end; a reference point"
    reference: ClassVar[Reference] = Reference(
        "Unrolling SGD: Understanding Factors Influencing Machine Unlearning",
        "Thudi et al., EuroS&P 2022",
        "2109.13398",
        "cleverhans-lab/unrolling-sgd",
    )
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "recommended": {**RandomLabel.presets["recommended"], "lr": 2e-5},
        "paper": {"adapter": "weights"},
    }

    def objective(self, backbone: Backbone, student: Student, request: Request, checkpoint: Checkpoint | None) -> Loss:
        text = backbone.encode(self.prompts(backbone, request)).text
        bank = self.pictures(backbone, text, request, checkpoint, "bank")
        hold = self.holding(backbone, request, checkpoint)

        def loss(draw: Draw) -> Tensor:
            with student.active():
                value = -self.erasing(backbone, bank, bank.truth, text, draw)
                return value + hold(draw)

        return loss
