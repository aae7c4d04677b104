"""R22: whether a few steps against the erasure's own objective bring the target back, without any picture of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from erasure import runtime
from erasure.backbone import Backbone
from erasure.backbone.text import Text
from erasure.eval.probes.base import Context, Evidence, Model, Observation, Roles, Rows
from erasure.eval.probes.denoising import denoiser_for
from erasure.eval.probes.removal.relearning import advantages, check_steps, points
from erasure.eval.probes.sampling import target_prompts
from erasure.eval.probes.tuning import Learning, Teaches
from erasure.methods.bank import TrajectoryBank


@dataclasses.dataclass(frozen=True)
class GradientReversal(Learning):
    """Train the model on what it still predicts itself, made stronger or turned round, and ask for the target.

        | e(x_t, t, c) - [ e*(x_t, t) + g (e*(x_t, t, c) - e*(x_t, t)) ] |^2

    with e* the model's own predictions before this training, c the target's prompts and x_t steps of its own
    trajectories for them. This is ESD's objective with the model in the place of its base and the other sign. g > 1
    makes what the target's name still does stronger; g < 0 turns it round, for erasers that push past the empty prompt:
    ESD with its eta is undone by -1 / eta. No picture of the target is needed, and none is shown: what comes back was
    in the weights. A model without anything left for the name has nothing to make stronger.

    Families "amplified N" and "reversed N" are the points of the two curves after N steps, with "advantage" and
    "above_control" as in :class:`~erasure.eval.probes.removal.relearning.Relearning`, against models that never saw the
    target and were trained the same way on their own predictions. Those seldom draw the target at any step; then the
    advantage is a bound. The base is only asked, not trained.

    Attributes:
        amplify, reverse: the two g; None leaves one out. Larger ones move more in fewer steps and ruin pictures
            sooner.
        steps: where to look, from 0. Few: the objective follows the first predictions, and drifts from them.
        lr: 1e-5 to 1e-4 for Stable Diffusion.
        batch_size: rows of the bank. trajectories: of the bank, one for all runs.
        prompts: per look and run; the same are trained on.
    """

    key, code, title = "gradient_reversal", "R22", "against the erasure's own objective"
    needs = ("control",)
    presets = {
        "smoke": {"steps": (0, 2), "batch_size": 2, "trajectories": 2, "runs": 1, "prompts": 2, "images_per_prompt": 1},
        "standard": {"runs": 1, "images_per_prompt": 1},
        "full": {"prompts": 18},
    }
    licences = "what comes back from the weights when the model's own predictions are amplified or reversed"
    not_licensed = "that nothing is left: other ways back need pictures, words or more steps"
    reference = "after Gandikota et al., ICCV 2023, arXiv 2303.07345, eq. 6; reversal: arXiv 2505.16174, 2025"

    amplify: float | None = 3.0
    reverse: float | None = -1.0
    steps: tuple[int, ...] = (0, 5, 10, 20, 40)
    lr: float = 1e-4
    trajectories: int = 12

    def __post_init__(self) -> None:
        check_steps(self.steps, example=(0, 5, 10), least=2)
        if not self.ways or (self.amplify or 2) <= 1 or (self.reverse or -1) >= 0:
            raise ValueError(
                f"amplifying takes g above 1 and reversing one below 0; got {self.amplify} and {self.reverse}; "
                "3 and -1 are the defaults"
            )

    @property
    def ways(self) -> dict[str, float]:
        """What is done, and its g."""
        both = {"amplified": self.amplify, "reversed": self.reverse}
        return {way: g for way, g in both.items() if g is not None}

    def run(self, model: Model, context: Context) -> list[Observation]:
        prompts, found = target_prompts(context, self.prompts), []
        marks = self.steps[:1] if model.role == "base" else self.steps
        with context.open(model):
            backbone = denoiser_for(context.pipe)
            with runtime.autocast(backbone.device, context.autocast):
                bank, text = self.bank(backbone, prompts, context)
            for way, g in self.ways.items():

                def look(step: int, *, facts: dict[str, Any], way: str = way, **given: Any) -> list[Observation]:
                    told = {**facts, "way": way}
                    return context.ask(model, prompts, family=f"{way} {step}", facts=told, pipe=context.pipe, **given)

                lesson = Reversal(backbone, bank, text, g, self.batch_size)
                found += self.trained(context, lesson, marks, look)
        return found

    def bank(self, backbone: Backbone, prompts: Sequence[str], context: Context) -> tuple[TrajectoryBank, Text]:
        """Steps of the model's own trajectories for the target's prompts, and the prompts' text."""
        text, suite = backbone.encode(list(prompts)).text, context.suite
        bank = TrajectoryBank.sample(
            backbone, text, backbone.encode([""]).text, trajectories=self.trajectories, keep=None, seed=0,
            num_inference_steps=suite.num_inference_steps, guidance_scale=suite.guidance_scale,
            guidance=backbone.plain_guidance, batch_size=context.batch_size, progress=False,
        )  # fmt: skip
        return bank, text

    def weigh(self, rows: Rows, models: Roles) -> list[Evidence]:
        found = []
        for way in self.ways:
            own = {name: [row for row in each if row.facts["way"] == way] for name, each in rows.items()}
            found += points(self.key, own)
            found += [dataclasses.replace(e, family=way) for e in advantages(self.key, own, models)]
        return found


@dataclasses.dataclass(frozen=True)
class Reversal(Teaches):
    """A model's own predictions to learn from, their difference from the empty prompt's multiplied by ``g``."""

    backbone: Backbone
    bank: TrajectoryBank
    text: Text
    g: float
    batch_size: int

    def loss(self, generator: torch.Generator, rows: int | None = None) -> Tensor:
        chosen = self.bank.pick(rows or self.batch_size, generator)
        x, t, text = self.bank.inputs(self.backbone, self.text, chosen)
        predicted = self.backbone.predict(x, t, text, guidance=self.backbone.plain_guidance).float()
        conditional, empty = self.bank.conditional[chosen], self.bank.unconditional[chosen]
        target = empty + self.g * (conditional - empty)
        return (predicted - target.to(predicted.device)).square().mean()
