"""CoGFD: erase a combination, "a child with a cigarette", and keep its parts."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from erasure.backbone import Backbone
from erasure.methods.base import Reference, Request
from erasure.methods.finetune import FineTune, Loss
from erasure.methods.students import Student
from erasure.train import Checkpoint, Draw

START = 1e-3  # of the weights' own size


@dataclasses.dataclass(frozen=True, kw_only=True)
class CoGFD(FineTune):
    """Move the predictions for a combination away, and hold those for its parts (Nie et al. 2025; the official code):

        push exp( - | e_student(x_t, t, ab) - e(x_t, t, ab) |^2 ) + exp( | e_student(y_t, t, r) - e(y_t, t, r) |^2 )

    with ab the combination, r of the keep list, and e the frozen base. x_t and y_t are pictures the base drew for them,
    mixed with noise at the noisiest times, where what is in a picture is decided. The first term fades as the
    combination moves away, so it has no direction of its own to run off in.

    Where student and base agree its gradient is zero: the official run is set going by rounding errors, this one by a
    random change of the weights by a thousandth. The official run trains no values of cross-attention and masks the
    padding of a prompt; this one does neither.

    Name the combination in every way it may be asked for (:attr:`Concept.synonyms`: "a teenager smoking", "a boy with a
    cigar"; the paper asks a language model for them), and its parts, each alone, in the keep list. The settings it
    shares with other fine-tunes are those of :class:`~erasure.methods.finetune.FineTune`; its banks hold
    ``trajectories`` pictures with ``keep_steps`` noisy copies of each.

    Attributes:
        push: weight of the first term. Raise it when the combination survives.
        window: times to train at, of the range from 0 (clean) to 1 (noise).
    """

    push: PositiveFloat = 0.1
    window: tuple[NonNegativeFloat, Annotated[float, Field(le=1)]] = (0.99, 1.0)
    iterations: PositiveInt = 130
    lr: float = 2.5e-5
    batch_size: PositiveInt = 20
    retain: NonNegativeFloat = 1.0
    optimizer: Literal["adam", "adamw", "sgd", "adamw8bit"] = "adamw"
    synonyms: bool = True
    trajectories: PositiveInt = 60
    keep_steps: PositiveInt | None = 4

    anchored: ClassVar[bool] = False
    key: ClassVar[str] = "cogfd"
    summary: ClassVar[str] = "erase a combination of things and keep each of them; minutes"
    reference: ClassVar[Reference] = Reference(
        "Erasing Concept Combination from Text-to-Image Diffusion Model",
        "Nie et al., ICLR 2025",
        "",
        "Sirius11311/CoGFD-ICLR25",
    )
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "recommended": {"lr": 1e-4, "articles": True, "num_inference_steps": 25, "precision": "auto"},
        "official-2025": {"adapter": "weights", "clip": 1.0},
    }

    @property
    def needs_keep(self) -> bool:
        return True

    @property
    def selector(self) -> str:
        return "cross_attention"

    def validate(self, backbone: Backbone, request: Request) -> None:
        if not request.keep or not self.retain:
            raise ValueError(
                f"{self.key} erases a combination and keeps its parts; got {len(request.keep)} prompts to keep and "
                f"retain {self.retain}; name each part alone in the keep list"
            )
        if self.saliency is not None:
            raise ValueError(
                f"{self.key} begins by changing all weights a little, so none can be left out; got saliency "
                f"{self.saliency}; leave it out"
            )
        if not self.window[0] < self.window[1]:
            raise ValueError(f"window goes from the cleaner time to the noisier; got {self.window}; swap them")
        super().validate(backbone, request)

    @torch.no_grad()
    def begin(self, student: Student) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        for parameter in student.parameters.values():
            size = parameter.square().mean().sqrt()
            change = torch.randn(parameter.shape, generator=generator).to(parameter)
            parameter.add_(START * (size if size > 0 else 1.0) * change)

    def objective(self, backbone: Backbone, student: Student, request: Request, checkpoint: Checkpoint | None) -> Loss:
        text = backbone.encode(self.prompts(backbone, request)).text
        parts = backbone.encode(self.kept(backbone, request)).text
        bank = self.pictures(backbone, text, request, checkpoint, "bank", window=self.window)
        held = self.pictures(backbone, parts, request, checkpoint, "kept", window=self.window)

        def loss(draw: Draw) -> Tensor:
            with student.active():
                moved = self.erasing(backbone, bank, bank.conditional, text, draw)
                still = self.holding_on(backbone, held, held.conditional, parts, draw)
            return self.push * (-moved).exp() + self.retain * still.exp()

        return loss
