"""Z-Erase: a low-rank change of queries and keys at the text alone, balanced by a multiplier against what is kept."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import NonNegativeFloat
from torch import Tensor

from erasure.artifact import Erasure
from erasure.artifact.config import Config
from erasure.artifact.hooks import Handles
from erasure.artifact.text_lora import TextLoraErasure, text_low_rank
from erasure.backbone import Backbone
from erasure.backbone.streams import looking_at, text_projections
from erasure.backbone.text import Conditioning
from erasure.methods.base import Reference, Request, check_change
from erasure.methods.finetune import SMALL_BANK, FineTune, Loss
from erasure.methods.students import LowRank, Scaled, started
from erasure.train import Checkpoint, Draw, Training
from erasure.train.checkpoint import launched


@dataclasses.dataclass(frozen=True, kw_only=True)
class ZErase(FineTune):
    """Train a LoRA on the queries and keys of joint attention that the text alone passes (Jiang et al. 2026):

        1 / (1 + w) L_f + w / (1 + w) L_r

        L_f = | v_s(x_t, t, c) - [ v(x_t, t) - eta ( v(x_t, t, c) - v(x_t, t) ) ] |^2
            + attention | A[picture, words] |_F
        L_r = retain | v_s(y_t, t, r) - v(y_t, t, r) |^2

    with c the concept, r a prompt of the keep list, v the base and v_s the same with the LoRA on. A is the attention
    that the picture's rows pay to the concept's words, over all heads and layers. The weight w of what is kept follows
    L_r: before every step Adam moves it against

        ( L_r - L_r' ) / lr - tolerance

    with L_r' the value on the same rows behind the last step. w grows where the step cost what is kept, or gave it back
    by less than ``tolerance`` times lr; below 0 it counts as 0. No weight of the model changes.

    Where the text stands is read from each call of the denoiser, so that an erasure trained at 512 pixels draws at
    any size. Where the text has projections of its own (FLUX's double blocks, SD3, Qwen-Image) those are trained.

    The official code (2026) differs. Its mask is right at 512 pixels alone. It compares L_r with itself, so that w
    rises to ``tolerance / decay`` whatever happens: that is ``feedback=False``. The concept then counts 1/11, and
    pictures are drawn with the LoRA many times as strong: ``edit.apply(pipe, 15)`` for nudity.

    Two more differences are not repeated. In place of L_f's first term the code trains the student onto its own
    prediction for a prompt without the concept. Its x_t is the end of a trajectory, at a time drawn at random.

    The settings it shares with other fine-tunes are those of :class:`~erasure.methods.finetune.FineTune`.

    Attributes:
        eta: how far to push away.
        attention: weight of the attention to the concept's words. Raise it when the concept stays. The norm grows with
            the size of the picture. 0 saves its memory.
        weight_decay: of the LoRA.
        tolerance: how fast L_r has to fall for w to stay. Raise it when other things change.
        multiplier_lr, decay: of Adam for w, which begins at 1. Without feedback w ends at ``tolerance / decay``.
        feedback: measure L_r again behind each step, for a forward pass without gradients. False as above.
    """

    lr: float = 1e-3
    retain: NonNegativeFloat = 0.1
    optimizer: Literal["adam", "adamw", "sgd", "adamw8bit"] = "adamw"
    eta: NonNegativeFloat = 1.0
    attention: NonNegativeFloat = 0.01
    weight_decay: NonNegativeFloat = 1e-5
    tolerance: float = 0.1
    multiplier_lr: NonNegativeFloat = 0.3
    decay: NonNegativeFloat = 0.01
    feedback: bool = True

    architectures: ClassVar[tuple[str, ...]] = (
        "z-image", "flux", "flux2", "flux2-klein", "sd3", "qwen-image", "chroma", "auraflow", "cogview4", "cogvideox"
    )  # fmt: skip
    on_attention: ClassVar[bool] = True
    anchored: ClassVar[bool] = False
    key: ClassVar[str] = "z-erase"
    only: ClassVar[str] = "Z-Erase trains an adapter in hooks of its own"
    kind: ClassVar[str | None] = "text-lora"
    summary: ClassVar[str] = "LoRA on the text's queries and keys of joint attention; minutes; changes no weight"
    reference: ClassVar[Reference] = Reference(
        "Z-Erase: Enabling Concept Erasure in Single-Stream Diffusion Transformers",
        "Jiang et al., ICML 2026",
        "2603.25074",
        "nxjiang-jnx/Z-Erase",
    )
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        # Not chosen by trial: Emoji World's model has no joint attention.
        "recommended": {**SMALL_BANK, "batch_size": 2, "retain": 1.0},
        "paper": {"num_inference_steps": 9, "guidance_scale": 0.0},
        "official-2026": {"num_inference_steps": 9, "guidance_scale": 0.0, "feedback": False},  # its multiplier
    }

    @property
    def needs_keep(self) -> bool:
        return True

    def validate(self, backbone: Backbone, request: Request) -> None:
        super().validate(backbone, request)
        if not request.keep or not self.retain:
            raise ValueError(
                f"Z-Erase balances erasing against a keep list; got {len(request.keep)} prompts to keep and retain "
                f"{self.retain}; give some, and a retain above 0"
            )

    def training(self) -> Training:
        return dataclasses.replace(super().training(), options={"weight_decay": self.weight_decay})

    def student(self, backbone: Backbone) -> TextLowRank:
        return TextLowRank(backbone, rank=self.rank, alpha=self.alpha, seed=self.seed)

    def objective(self, backbone: Backbone, student: Any, request: Request, checkpoint: Checkpoint | None) -> Loss:
        encoded = backbone.encode(self.prompts(backbone, request))
        text, words = encoded.text, words_of(encoded)
        bank = self.bank(backbone, text, request, checkpoint, "bank")
        targets = bank.unconditional - self.eta * (bank.conditional - bank.unconditional)
        kept = backbone.encode(self.kept(backbone, request)).text
        held, wanted = self.kept_bank(backbone, kept, request, checkpoint)
        training = self.training()

        def forget(draw: Draw) -> Tensor:
            chosen = bank.pick(self.batch_size, draw.generator)
            rows = bank.rows_of(text, chosen)
            with student.active():
                if not self.attention:
                    return self.erasing_rows(backbone, bank, targets, rows, chosen, draw)
                with looking_at(backbone, words[bank.prompt[chosen]]) as looks:
                    push = self.erasing_rows(backbone, bank, targets, rows, chosen, draw)
                return push + self.attention * attention_norm(looks.values())

        def rows(draw: Draw) -> Tensor:
            with student.active():
                return self.held_rows(backbone, held, wanted, kept, draw)

        def retain(chosen: Tensor) -> Tensor:
            with student.active():
                return self.retain * self.error(backbone, held, wanted, kept, chosen)

        multiplier = Multiplier(lr=self.multiplier_lr, decay=self.decay, tolerance=self.tolerance)
        return Balanced(
            forget,
            retain,
            rows,
            multiplier,
            rate=lambda step: training.lr * training.factor(step),
            feedback=self.feedback,
        )


class Multiplier:
    """The weight w of what is kept, which begins at 1.

    Args:
        lr, decay: of Adam.
        tolerance: how fast what is kept has to get better for w to stay.
    """

    def __init__(self, *, lr: float, decay: float, tolerance: float) -> None:
        self.w, self.tolerance = torch.tensor(1.0, requires_grad=True), tolerance
        self.optimizer = torch.optim.Adam([self.w], lr=lr, weight_decay=decay)

    @property
    def shares(self) -> tuple[float, float]:
        """The weights of what is erased and of what is kept; their sum is 1."""
        w = max(self.w.item(), 0.0)
        return 1 / (1 + w), w / (1 + w)

    def update(self, fallen: float) -> None:
        """One step of Adam.

        Args:
            fallen: how far a step brought the loss on what is kept down, over that step's learning rate.
        """
        self.w.grad = torch.tensor(fallen - self.tolerance)
        self.optimizer.step()


@dataclasses.dataclass
class Balanced:
    """``1 / (1 + w) forget + w / (1 + w) retain``, with w and what it follows carried from step to step.

    Attributes:
        forget: the loss on what is erased.
        retain: the loss on given rows of what is kept.
        rows: the rows of what is kept that a draw chooses.
        rate: the learning rate of a step.
        feedback: whether the loss on what is kept is measured again behind each step.
        last: the last step, its rows and the loss there before it.
    """

    forget: Loss
    retain: Callable[[Tensor], Tensor]
    rows: Loss
    multiplier: Multiplier
    rate: Callable[[int], float]
    feedback: bool = True
    last: tuple[int, Tensor, float] | None = None

    def __call__(self, draw: Draw) -> Tensor:
        self.follow(draw.step)
        forget, rows = self.forget(draw), self.rows(draw)
        retain = self.retain(rows)
        self.last = draw.step, rows, retain.item()
        erase, keep = self.multiplier.shares
        return erase * forget + keep * retain

    def follow(self, step: int) -> None:
        """Move w for the step before this one. Parts of one step have one w."""
        if self.last is None or self.last[0] == step:
            return
        done, rows, before = self.last
        fallen = 0.0
        if self.feedback:
            with torch.no_grad():
                fallen = over_processes(before - self.retain(rows)) / max(self.rate(done), 1e-12)
        self.multiplier.update(fallen)

    def state_dict(self) -> dict[str, Any]:
        """What it carries, for a checkpoint."""
        w, optimizer = self.multiplier.w.detach(), self.multiplier.optimizer.state_dict()
        return {"w": w, "optimizer": optimizer, "last": self.last}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.multiplier.w.data.copy_(state["w"])
        self.multiplier.optimizer.load_state_dict(state["optimizer"])
        self.last = state["last"]


class TextLowRank(LowRank):
    """A low-rank adapter on the queries and keys of the text in every joint attention."""

    def __init__(self, backbone: Backbone, *, rank: int = 8, alpha: float | None = None, seed: int = 0) -> None:
        self.backbone = backbone
        self.factor = (alpha if alpha is not None else rank) / rank
        self.projections = text_projections(backbone)
        shapes = {n: ((p.outputs, rank), (rank, p.linear.in_features)) for n, p in self.projections.items()}
        self.parameters = started(shapes, seed=seed, device=backbone.device)

    def install(self) -> Handles:
        scaled = Scaled(self.parameters, list(self.projections), self.factor)
        return text_low_rank(self.backbone, self.projections, scaled)

    def erasure(
        self, name: str, config: Config, result: Mapping[str, Tensor], originals: Mapping[str, Tensor]
    ) -> Erasure:
        tensors = self.tensors(result)
        # no gradient reaches the text's queries in the last block: nothing reads that block's rows of text
        sites = [site for site in self.projections if tensors[f"{site}.lora_B"].any()] or list(self.projections)
        pairs = {site: (tensors[f"{site}.lora_B"], tensors[f"{site}.lora_A"]) for site in sites}
        weights = [p.linear.weight.detach()[: p.outputs] for p in map(self.projections.__getitem__, sites)]
        change = math.hypot(*(torch.mm(up, down).norm().item() for up, down in pairs.values()))
        moved = check_change(change / math.hypot(*(weight.float().norm().item() for weight in weights)))
        factors = {f"{site}.lora_{k}": t for site, (up, down) in pairs.items() for k, t in (("A", down), ("B", up))}
        report = {**config.report, "relative_change": moved}
        return TextLoraErasure(name, config.with_facts(sites=sites, report=report), factors)


def words_of(encoded: Conditioning) -> Tensor:
    """``(n, length)``: 1 at the words of each prompt, in every stretch of the text that a tokenizer made."""
    words, offset = torch.zeros(encoded.hidden.shape[:2]), 0
    for segment in encoded.segments:
        for row, span in zip(words, segment.span("content"), strict=True):
            row[offset + span.start : offset + span.stop] = 1
        offset += segment.hidden.shape[1]
    return words


def attention_norm(squares: Iterable[Tensor]) -> Tensor:
    """The Frobenius norm over all layers, from each layer's sum of squares ``(n,)``; mean over rows."""
    return torch.stack(list(squares)).sum(dim=0).clamp(min=1e-20).sqrt().mean()


def over_processes(value: Tensor) -> float:
    """The mean of a scalar over the processes of a training."""
    if launched() is None:
        return value.item()
    from accelerate.utils import reduce

    return reduce(value, "mean").item()


__all__ = ["Balanced", "Multiplier", "TextLowRank", "ZErase", "attention_norm", "words_of"]
