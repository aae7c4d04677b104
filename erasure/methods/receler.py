"""Receler: a small eraser behind every cross-attention, kept to the concept's place and trained under an attack."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from erasure.artifact import Erasure
from erasure.artifact.config import Config
from erasure.artifact.hooks import Handles
from erasure.artifact.residual import ResidualErasure, residual
from erasure.backbone import Backbone
from erasure.backbone.attention import cross_attentions
from erasure.methods.adversary import with_soft_tokens
from erasure.methods.base import Reference, Request, check_change
from erasure.methods.finetune import SMALL_BANK, FineTune, Loss
from erasure.methods.mace import height_of, masks_of
from erasure.methods.students import Student
from erasure.train import Checkpoint, Draw


@dataclasses.dataclass(frozen=True, kw_only=True)
class Receler(FineTune):
    """Train erasers E_l, which add to what each cross-attention l gives back (Huang et al. 2024):

        o_l' = o_l + E_l(o_l),     E_l(o) = B gelu(A o + a) + b

        | e_student(x_t, t, c*) - [ e(x_t, t) - eta ( e(x_t, t, c) - e(x_t, t) ) ] |^2
            + locality / L sum_l | (1 - M) E_l(o_l) |^2
        c* = argmin over soft tokens behind the words of c of | e_student(x_t, t, c*) - e(x_t, t, c) |^2

    with c the concept and e the base, the erasers off. M is where the concept is: the base's attention to its words,
    mean over layers and scaled to 0..1, above ``threshold``. Squares are means over numbers. The soft tokens are
    vectors in the text's embedding, in place of the ``words`` ones behind the concept's; they are learnt anew in every
    step. No weight changes; whoever takes the erasers off has the base.

    The official code loses its soft tokens on the way to the model, so that it trains without an attack: that is
    ``robust=False``. The paper samples x_t with the erasers on; here it comes from the base's bank. The settings it
    shares with other fine-tunes are those of :class:`~erasure.methods.finetune.FineTune`; ``adapter``, ``alpha`` and
    ``epsilon`` have no part.

    Attributes:
        eta: how far to push away.
        locality: weight of the second term. Raise it when the rest of the picture changes.
        threshold: of the mask. Raise it for a smaller place.
        words: soft tokens of the attack.
        attack_steps, attack_lr: of the attack.
        rank: width of an eraser's middle.
    """

    iterations: PositiveInt = 500
    lr: float = 3e-4
    rank: PositiveInt = 128
    eta: NonNegativeFloat = 1.0
    locality: NonNegativeFloat = 0.1
    threshold: Annotated[float, Field(ge=0, lt=1)] = 0.1
    robust: bool = True
    words: PositiveInt = 16
    attack_steps: NonNegativeInt = 50
    attack_lr: PositiveFloat = 0.1

    architectures: ClassVar[tuple[str, ...]] = ("sd-unet", "sdxl")
    anchored: ClassVar[bool] = False
    key: ClassVar[str] = "receler"
    only: ClassVar[str] = "Receler trains erasers of its own"
    kind: ClassVar[str | None] = "residual"
    summary: ClassVar[str] = "erasers behind cross-attention, trained under attack; minutes; changes no weight"
    reference: ClassVar[Reference] = Reference(
        "Receler: Reliable Concept Erasing of Text-to-Image Diffusion Models via Lightweight Erasers",
        "Huang et al., ECCV 2024",
        "2311.17717",
        "jasper0314-huang/Receler",
    )
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        # On Emoji World: the target was seen in 2 and 0 of 12 pictures by its two classifiers (base: 12 and 11),
        # neighbours were right in 10 and 12 of 12 (10 and 12), unrelated things in 11 and 11 of 12 (12 and 10).
        "recommended": {
            **SMALL_BANK,
            "iterations": 150,
            "lr": 1e-3,
            "attack_steps": 3,
            "retain": 1.0,
        },
        "paper": {"trajectories": 500, "keep_steps": 1},
        "official-2025": {"trajectories": 500, "keep_steps": 1, "robust": False},  # its soft tokens reach no model
    }

    def validate(self, backbone: Backbone, request: Request) -> None:
        super().validate(backbone, request)
        cross_attentions(backbone)  # refuses models without them

    def student(self, backbone: Backbone) -> Erasers:
        return Erasers(backbone, rank=self.rank, seed=self.seed)

    def objective(self, backbone: Backbone, student: Any, request: Request, checkpoint: Checkpoint | None) -> Loss:
        encoded = backbone.encode(self.prompts(backbone, request))
        text, spans = encoded.text, encoded.segments[0].span("content")
        bank = self.bank(backbone, text, request, checkpoint, "bank")
        targets = bank.unconditional - self.eta * (bank.conditional - bank.unconditional)
        words, ends = torch.zeros(len(text), text.hidden.shape[1]), torch.tensor([span.stop for span in spans])
        for row, span in zip(words, spans, strict=True):
            row[span] = 1
        masks = masks_of(backbone, bank, text, words, above=self.threshold)
        hold = self.holding(backbone, request, checkpoint)

        def loss(draw: Draw) -> Tensor:
            chosen = bank.pick(self.batch_size, draw.generator)
            rows = bank.rows_of(text, chosen)
            with student.active():
                if self.attacks(draw.step):
                    rows = with_soft_tokens(
                        rows,
                        ends[bank.prompt[chosen]],
                        lambda moved: self.errors(backbone, bank, bank.conditional, moved, chosen).mean(),
                        count=self.words,
                        steps=self.attack_steps,
                        lr=self.attack_lr,
                        generator=draw.generator,
                    )
                value = self.errors(backbone, bank, targets, rows, chosen).mean()
                value = value + self.locality * outside(list(student.added.values()), masks[chosen])
                return value + hold(draw)

        return loss


class Erasers(Student):
    """An eraser behind every cross-attention. A starts as torch starts linear layers, B and both biases at zero.

    Attributes:
        added: what each eraser added in the last prediction, by name, with its graph.
    """

    def __init__(self, backbone: Backbone, *, rank: int, seed: int) -> None:
        self.backbone = backbone
        self.attentions = cross_attentions(backbone)
        self.parameters, self.added = {}, dict[str, Tensor]()
        generator = torch.Generator().manual_seed(seed)
        for name, module in self.attentions.items():
            width = module.to_out[0].out_features
            start = (2 * torch.rand(rank, width, generator=generator) - 1) / math.sqrt(width)
            zeros = {"down_bias": (rank,), "up": (width, rank), "up_bias": (width,)}
            parts = {"down": start, **{part: torch.zeros(shape) for part, shape in zeros.items()}}
            self.parameters |= {f"{name}.{k}": nn.Parameter(part.to(backbone.device)) for k, part in parts.items()}

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        with super().active():
            yield
        if not self.standing:
            self.added.clear()

    def install(self) -> Handles:
        return residual(self.attentions, self.parameters, heard=self.added.__setitem__)

    def erasure(
        self, name: str, config: Config, result: Mapping[str, Tensor], originals: Mapping[str, Tensor]
    ) -> Erasure:
        tensors = {key: tensor.detach().float().cpu().contiguous() for key, tensor in result.items()}
        change = math.hypot(*((tensor - originals[key].float().cpu()).norm().item() for key, tensor in tensors.items()))
        size = math.hypot(*(tensor.float().norm().item() for tensor in originals.values()))
        check_change(change / size)
        return ResidualErasure(name, config.with_facts(sites=list(self.attentions)), tensors)


def outside(added: Sequence[Tensor], masks: Tensor) -> Tensor:
    """Mean over layers of the mean square of what erasers add ``(n, places, d)`` where masks ``(n, h, w)`` are 0."""
    total = []
    for more in added:
        height = height_of(more.shape[1], masks.shape[1:])
        there = F.interpolate(masks[:, None], (height, more.shape[1] // height)).flatten(1).to(more)
        total.append(((1 - there)[..., None] * more).float().square().mean())
    return torch.stack(total).mean()


__all__ = ["Erasers", "Receler", "outside"]
