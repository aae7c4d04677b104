"""ESD, Erased Stable Diffusion: fine-tune the denoiser to be guided away from a concept when asked for it."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

import torch
from pydantic import NonNegativeFloat
from torch import Tensor

from erasure.backbone import Backbone
from erasure.backbone.text import Text
from erasure.methods.bank import TrajectoryBank
from erasure.methods.base import Reference, Request
from erasure.methods.finetune import SMALL_BANK, FineTune, Loss
from erasure.methods.students import Student
from erasure.train import Checkpoint, Draw
from erasure.wording import is_name

SELECTORS = {"x": "cross_attention", "x-strict": "cross_attention_kv", "u": "not_cross_attention", "all": "all"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ESD(FineTune):
    """Train the student on the base's own negative guidance:

        | e_student(x_t, t, c0) - [ e(x_t, t, c0) - eta ( e(x_t, t, c) - e(x_t, t) ) ] |^2

    with c the concept, c0 the prompt it is erased from (the concept itself by default), e the frozen base and x_t a
    step of a trajectory the base samples for c0 with guidance. The target is linear in e, so it is the same for
    epsilon, v and flow models. The settings it shares with other fine-tunes are those of
    :class:`~erasure.methods.finetune.FineTune`.

    Attributes:
        variant: what is trained. ``x`` cross-attention (styles, names), ``x-strict`` the layers in it that receive the
            text, ``u`` everything else (concepts that must go whatever the prompt says), ``all``. On transformers whose
            attention is joint, ``x`` is every attention and ``x-strict`` its keys and values.
        eta: how far to push away. 1 to 2; larger distorts.
        on_policy: sample x_t from the student as it is at each step, as the paper's own script does, and not from the
            base. A step then costs a trajectory, some fifty times as much.
        erase_from: c0, when it is not the concept itself: "santa" to take the "beard" from what "santa" draws, say. The
            concept's own prompt is then not trained.
    """

    variant: Literal["x", "x-strict", "u", "all"] = "x"
    eta: NonNegativeFloat = 2.0
    erase_from: str | None = None
    on_policy: bool = False

    anchored: ClassVar[bool] = False
    prompt_settings: ClassVar[tuple[str, ...]] = ("erase_from",)
    key: ClassVar[str] = "esd"
    summary: ClassVar[str] = "fine-tune with negative guidance; minutes, the size of the trained layers"
    reference: ClassVar[Reference] = Reference(
        "Erasing Concepts from Diffusion Models", "Gandikota et al., ICCV 2023", "2303.07345", "rohitgandikota/erasing"
    )
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "recommended": {
            **SMALL_BANK,
            "variant": "x-strict",
            "lr": 3e-4,
            "iterations": 150,
            "retain": 1.0,
        },
        # The official scripts train in pure bfloat16, where an update of 5e-5 is often less than a weight's rounding.
        # These presets do so on a pipeline loaded in bfloat16 with pure=True, and train float32 weights without it.
        "official-2025-x": {"variant": "x", "adapter": "weights"},
        "official-2025-x-strict": {"variant": "x-strict", "adapter": "weights"},
        "official-2025-u": {"variant": "u", "adapter": "weights"},
        "official-2025-all": {"variant": "all", "adapter": "weights"},
        # The paper's script: its eta of 1 counts from the empty prompt, which is 2 from the concept. It trains norms as
        # well, and pairs each latent with a time drawn from its bin; neither is repeated.
        "official-2023-x": {
            "variant": "x", "lr": 1e-5, "iterations": 1000, "on_policy": True, "adapter": "weights"
        },
        "official-2023-u": {
            "variant": "u", "lr": 1e-5, "iterations": 1000, "on_policy": True, "adapter": "weights"
        },
        # SDXL has a script of its own. Its oversight, inputs that are not scaled under Euler, is not repeated.
        "official-2025-sdxl-x": {
            "variant": "x", "lr": 2e-4, "eta": 1.0, "guidance_scale": 2.0, "null": "empty", "adapter": "weights"
        },
        "official-2025-sdxl-x-strict": {
            "variant": "x-strict", "lr": 2e-4, "eta": 1.0, "guidance_scale": 2.0, "null": "empty", "adapter": "weights"
        },
        "official-2025-sdxl-u": {
            "variant": "u", "lr": 1e-5, "eta": 1.0, "guidance_scale": 2.0, "null": "empty", "adapter": "weights"
        },
        "official-2025-sdxl-all": {
            "variant": "all", "lr": 1e-5, "eta": 1.0, "guidance_scale": 2.0, "null": "empty", "adapter": "weights"
        },
    }  # fmt: skip

    def validate(self, backbone: Backbone, request: Request) -> None:
        super().validate(backbone, request)
        kept = request.keep if self.uses_keep and self.erase_from else ()
        if clash := next((prompt for prompt in kept if is_name(self.erase_from or "", prompt)), None):
            raise ValueError(
                f"erase_from={self.erase_from!r} is to be drawn without the concept, and {clash!r} is kept as it is; "
                "take it out of the keep list"
            )

    @property
    def selector(self) -> str:
        return SELECTORS[self.variant]

    def objective(self, backbone: Backbone, student: Student, request: Request, checkpoint: Checkpoint | None) -> Loss:
        text = backbone.encode(self.prompts(backbone, request)).text
        base = backbone.encode([self.erase_from]).text.repeat(len(text)) if self.erase_from else text
        bank = None if self.on_policy else self.bank(backbone, base, request, checkpoint, "bank")
        targets = None if bank is None else self.targets(backbone, bank, text)
        hold = self.holding(backbone, request, checkpoint)

        def loss(draw: Draw) -> Tensor:
            if bank is None or targets is None:
                value = self.on_own_trajectory(backbone, student, base, text, draw)
            else:
                with student.active():
                    value = self.erasing(backbone, bank, targets, base, draw)
            with student.active():
                return value + hold(draw)

        return loss

    def on_own_trajectory(self, backbone: Backbone, student: Student, base: Text, text: Text, draw: Draw) -> Tensor:
        """The error at one step of trajectories that the student takes, to the base's predictions there."""
        chosen = torch.randint(len(base), (self.batch_size,), generator=draw.generator)
        base, text, empty = base[chosen], text[chosen], backbone.encode([""]).text
        sampling = {
            **self.sampling(Request((), progress=False)),
            "trajectories": len(base),
            "seed": int(draw.rng(2).integers(2**31)),
        }
        with student.active():
            bank = TrajectoryBank.sample(backbone, base, empty, keep=1, **sampling)
        with student.frozen():
            bank = dataclasses.replace(
                bank,
                conditional=bank.predicted(backbone, base),
                unconditional=bank.predicted(backbone, empty.repeat(len(base))),
            )
            targets = self.targets(backbone, bank, text)
        with student.active():
            everything = torch.arange(len(bank))
            return self.erasing_rows(backbone, bank, targets, bank.rows_of(base, everything), everything, draw)

    def targets(self, backbone: Backbone, bank: TrajectoryBank, text: Text) -> Tensor:
        """``(n, ...)``: e(c0) - eta (e(c) - e()), from the bank's predictions where they suffice."""
        concept = bank.predicted(backbone, text) if self.erase_from else bank.conditional
        return bank.conditional - self.eta * (concept - bank.unconditional)
