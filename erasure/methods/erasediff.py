"""EraseDiff: make the concept's pictures noise, as far as that does not cost what is kept."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

import torch
from pydantic import PositiveFloat
from torch import Tensor

from erasure.backbone import Backbone
from erasure.methods.base import Reference, Request
from erasure.methods.finetune import Loss
from erasure.methods.random_label import RandomLabel
from erasure.methods.students import Student
from erasure.train import Checkpoint, Draw


@dataclasses.dataclass(frozen=True, kw_only=True)
class EraseDiff(RandomLabel):
    """A first-order step on two levels (Wu et al. 2025):

        L_r + lambda L_f,   lambda = max(0, eta - <grad L_f, grad L_r> / |grad L_f|^2)

        L_f = | e_student(x_t, t, c) - u |^2,   u uniform in [0, 1),      L_r = | e_student(y_t, t, r) - eps |^2

    with x_t and y_t pictures the base drew for the concept c and for r of the keep list, mixed with eps. lambda is the
    smallest weight with which a step also lowers L_f, by eta |grad L_f|^2. The paper's inner steps on L_f change the
    value of its constraint and not this gradient, so they are not done; the official code fixes lambda at 1
    (``eta=None``). Settings as :class:`~erasure.methods.random_label.RandomLabel`.

    Attributes:
        eta: how fast the concept goes. None weights both terms alike.
    """

    eta: PositiveFloat | None = 1.0
    adapter: Literal["auto", "weights", "lora"] = "weights"

    anchored: ClassVar[bool] = False
    key: ClassVar[str] = "erasediff"
    summary: ClassVar[str] = "turn the concept's pictures into noise; a reference point; minutes"
    reference: ClassVar[Reference] = Reference(
        "Erasing Undesirable Influence in Diffusion Models", "Wu et al., CVPR 2025", "2401.05779", "JingWu321/EraseDiff"
    )
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "recommended": {**RandomLabel.presets["recommended"]},
        "paper": {},
        "official-2024": {"eta": None, "batch_size": 16, "iterations": 160},  # for nudity; there 160 steps are enough
    }

    @property
    def selector(self) -> str:
        return "not_cross_attention"

    def validate(self, backbone: Backbone, request: Request) -> None:
        super().validate(backbone, request)
        if not request.keep or not self.retain:
            raise ValueError(
                f"EraseDiff erases as far as the keep list allows; got {len(request.keep)} prompts to keep and retain "
                f"{self.retain}; give some, and a retain above 0"
            )

    def objective(self, backbone: Backbone, student: Student, request: Request, checkpoint: Checkpoint | None) -> Loss:
        text = backbone.encode(self.prompts(backbone, request)).text
        bank = self.pictures(backbone, text, request, checkpoint, "bank")
        uniform = torch.rand(bank.truth.shape, generator=torch.Generator().manual_seed(self.seed))
        hold = self.holding(backbone, request, checkpoint)
        parameters = list(student.parameters.values())

        def loss(draw: Draw) -> Tensor:
            with student.active():
                forget = self.erasing(backbone, bank, uniform, text, draw)
                keep = hold(draw)
                return keep + (1.0 if self.eta is None else weight(forget, keep, parameters, self.eta)) * forget

        return loss


def weight(forget: Tensor, keep: Tensor, parameters: list[Any], eta: float) -> Tensor:
    """lambda: a scalar without a graph."""
    f, r = (torch.autograd.grad(part, parameters, retain_graph=True, allow_unused=True) for part in (forget, keep))
    pairs = [(a, b) for a, b in zip(f, r, strict=True) if a is not None and b is not None]
    product, square = sum((a * b).sum() for a, b in pairs), sum((a * a).sum() for a in f if a is not None)
    return (eta - torch.as_tensor(product) / torch.as_tensor(square).clamp(min=1e-20)).clamp(min=0).detach()
