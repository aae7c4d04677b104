"""Forget-Me-Not: stop the cross-attentions from looking at the concept's words. A reference point, not to ship."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor

from erasure.backbone import Backbone
from erasure.backbone.attention import attention_maps, cross_attentions
from erasure.methods.base import Reference, Request
from erasure.methods.finetune import FineTune, Loss
from erasure.methods.students import Student
from erasure.train import Checkpoint, Draw


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForgetMeNot(FineTune):
    """Attention re-steering: on pictures of the concept, make the attention to its words small (Zhang et al. 2024):

        sum over cross-attentions of  | A[:, :, places, words] |_F

    with A the attention probabilities for the concept's prompt and words the columns of its tokens. It needs no target
    and few steps; published tests found the concept easy to get back. The settings it shares with other fine-tunes are
    those of :class:`~erasure.methods.finetune.FineTune`; its bank holds ``trajectories`` pictures with ``keep_steps``
    noisy copies of each.

    The official settings count the columns of the end and of the padding as well, and name the concept by a learnt
    token; here it is its own words. The keep list is held by ``retain``, which the paper does not have.

    Attributes:
        variant: what is trained: ``x`` cross-attention, ``all`` every layer (the official script's default).
    """

    variant: Literal["x", "all"] = "x"
    iterations: PositiveInt = 35
    lr: float = 2e-6
    trajectories: PositiveInt = 8
    keep_steps: PositiveInt | None = 8

    architectures: ClassVar[tuple[str, ...]] = ("sd-unet", "sdxl")
    on_attention: ClassVar[bool] = True
    anchored: ClassVar[bool] = False
    key: ClassVar[str] = "forget-me-not"
    summary: ClassVar[str] = "make attention to the concept's words small; a reference point; seconds"
    reference: ClassVar[Reference] = Reference(
        "Forget-Me-Not: Learning to Forget in Text-to-Image Diffusion Models",
        "Zhang et al., CVPR Workshops 2024",
        "2303.17591",
        "SHI-Labs/Forget-Me-Not",
    )
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "recommended": {
            "lr": 1e-4,
            "iterations": 60,
            "batch_size": 8,
            "trajectories": 16,
            "num_inference_steps": 25,
            "articles": True,
            "synonyms": True,
            "retain": 1.0,
        },
        "paper": {"optimizer": "adamw", "adapter": "weights", "clip": 1.0},
        "official-2023": {"optimizer": "adamw", "adapter": "weights", "variant": "all", "clip": 1.0},
    }

    @property
    def selector(self) -> str:
        return "cross_attention" if self.variant == "x" else "all"

    def validate(self, backbone: Backbone, request: Request) -> None:
        if self.robust:
            raise ValueError("Forget-Me-Not compares no predictions, so there is nothing to attack; leave robust out")
        super().validate(backbone, request)
        cross_attentions(backbone)  # refuses models without them

    def objective(self, backbone: Backbone, student: Student, request: Request, checkpoint: Checkpoint | None) -> Loss:
        encoded = backbone.encode(self.prompts(backbone, request))
        text, segment = encoded.text, encoded.segments[0]
        words = torch.zeros(len(text), segment.hidden.shape[1])
        for row, span in zip(words, segment.span("content"), strict=True):
            row[span] = 1
        bank = self.pictures(backbone, text, request, checkpoint, "bank")
        hold = self.holding(backbone, request, checkpoint)

        def loss(draw: Draw) -> Tensor:
            chosen = bank.pick(self.batch_size, draw.generator)
            with student.active(), attention_maps(backbone) as maps:
                x, t, rows = bank.inputs(backbone, text, chosen)
                backbone.predict(x, t, rows, guidance=backbone.plain_guidance)
                value = attention_mass(list(maps.values()), words[bank.prompt[chosen]])
            with student.active():
                return value + hold(draw)

        return loss


def attention_mass(maps: list[Tensor], words: Tensor) -> Tensor:
    """Sum over layers of the Frobenius norm of the maps ``(n, heads, places, tokens)`` at the words ``(n, tokens)``."""
    return torch.stack([(a * words.to(a)[:, None, None]).norm() for a in maps]).sum()


__all__ = ["ForgetMeNot", "attention_mass"]
