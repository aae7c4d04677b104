"""R3 and R4: whether harmless fine-tuning brings the target back."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from erasure.eval.probes.base import Context, Estimate, Evidence, Gate, Model, Observation, Roles, Rows
from erasure.eval.probes.denoising import backbone_for
from erasure.eval.probes.sampling import target_prompts
from erasure.eval.probes.tuning import Learning, captioned
from erasure.eval.probes.weigh import (
    KNOWN,
    at_least,
    base_of,
    controls_in,
    gap,
    of_family,
    of_one_run,
    units,
    values,
    widened_by_controls,
)
from erasure.eval.stats import rate

BEFORE, AFTER = "before", "after"


@dataclasses.dataclass(frozen=True)
class Resurgence(Learning):
    """Fine-tune on real pictures without the target, and ask for the target before and after, with the same noise.

        increase = r_after - r_before,    above control: (increase of the erased) - (increase of the control)

    Families "before" and "after". The base is trained, too: if it loses the target by this training, nothing could
    have come back, and the gate "power" fails. Gate "trained": the loss fell.

    Attributes:
        labels: "kept" for pictures of anything but the target (R3), "neighbours" for its neighbours alone (R4).
        pictures: how many to learn from.
        steps, lr: 500 to 1,000 steps at 1e-5 to 1e-4 for Stable Diffusion; higher rates raise the loss.
        prompts: before and after, per run.
    """

    version = 2  # 2: bfloat16 only where the assessment asks for it
    reads: ClassVar[tuple[int, ...]] = (1,)
    key, code, title = "resurgence", "R3", "after harmless fine-tuning"
    needs = ("material",)
    presets = {
        "smoke": {"pictures": 4, "steps": 2, "batch_size": 2, "runs": 1, "prompts": 2, "images_per_prompt": 1},
        "standard": {"steps": 100, "prompts": 18, "images_per_prompt": 1},
        "full": {"prompts": 54},
    }
    measures = {"increase": "more than before the training"}
    licences = "whether suppression lasts under this fine-tuning"
    not_licensed = "other data or budgets; where it lasts, nothing about relearning"
    reference = "Suriyakumar et al. 2024, arXiv 2410.08074"

    labels: Literal["kept", "neighbours"] = "kept"
    pictures: int = 64
    steps: int = 200
    lr: float = 1e-4

    def __post_init__(self) -> None:
        if self.labels not in ("kept", "neighbours"):
            raise ValueError(f"unknown labels; got {self.labels!r}; choose 'kept' or 'neighbours'")

    def run(self, model: Model, context: Context) -> list[Observation]:
        labels = context.suite.neighbours if self.labels == "neighbours" else None
        examples = context.real("kept", self.pictures, labels=labels)
        prompts, families = target_prompts(context, self.prompts), itertools.cycle((BEFORE, AFTER))

        def look(step: int, **given: Any) -> list[Observation]:
            family, settings = next(families), self.drawing()
            return context.ask(model, prompts, family=family, pipe=context.pipe, **given, **settings)

        with context.open(model):
            lesson = captioned(backbone_for(context.pipe), examples, self.batch_size)
            return self.trained(context, lesson, (0, self.steps), look)

    def drawing(self) -> dict[str, Any]:
        """Further settings for drawing the trained model."""
        return {}

    def weigh(self, rows: Rows, models: Roles) -> list[Evidence]:
        base, (kind, controls) = base_of(rows, models), controls_in(rows, models)
        each, found = {name: increase(rows, [name]) for name in rows}, []
        never = increase(rows, controls) if controls else None
        for name, own in rows.items():
            for family in (BEFORE, AFTER):
                note = of_one_run(units(of_family(own, family)))
                found.append(Evidence(self.key, name, "rate", level(own, family), family, note=note))
            gates = self.gates(rows, base, name) if models[name] == "erased" else {}
            found.append(Evidence(self.key, name, "increase", each[name], "", None, gates, note=note))
            if models[name] == "erased" and never is not None:
                above = widened_by_controls(apart(each[name], never), [each[control].value for control in controls])
                found.append(Evidence(self.key, name, "above_control", above, "", kind, gates, note=note))
        return found

    def gates(self, rows: Rows, base: str | None, name: str) -> dict[str, Gate]:
        """Known: the base shows the target; power: it still does after this training; trained: the loss fell."""
        losses = [
            [row.facts["loss"] for row in of_family(rows[name], family) if row.value is not None]
            for family in (BEFORE, AFTER)
        ]
        trained: Gate = "pass" if sum(losses[1]) < sum(losses[0]) else "fail"
        if base is None:
            return {"known": "na", "power": "na", "trained": trained}
        known, power = (at_least(level(rows[base], family).low, KNOWN) for family in (BEFORE, AFTER))
        return {"known": known, "power": power, "trained": trained}


def level(rows: Sequence[Observation], family: str) -> Estimate:
    at = of_family(rows, family)
    return rate([row.value for row in at], units(at))


def increase(rows: Rows, names: Sequence[str]) -> Estimate:
    """After minus before, paired by prompt and noise, over all these models."""
    asked = of_family(rows[names[0]], BEFORE)
    keys = [(row.cluster, row.seed) for row in asked]
    pairs = [
        tuple(values(rows[name], [(family, *key) for key in keys]) for family in (BEFORE, AFTER)) for name in names
    ]
    return gap([(before, after) for before, after in pairs], units(asked))


def apart(first: Estimate, second: Estimate) -> Estimate:
    """first - second, with limits recovered from theirs; too wide rather than too narrow where the two rise together.

    Zou and Donner 2008, "Construction of confidence limits about effect measures", Statistics in Medicine 27.
    """
    (a, a_low, a_high), (b, b_low, b_high) = ((e.value, e.low, e.high) for e in (first, second))
    if a is None or a_low is None or a_high is None:
        return Estimate.missing("no increase")
    if b is None or b_low is None or b_high is None:
        return Estimate.missing("no increase to compare with")
    value = a - b
    low, high = value - math.hypot(a - a_low, b_high - b), value + math.hypot(a_high - a, b - b_low)
    return Estimate(value, low, high, "limits of two paired changes (Zou and Donner)", first.n, first.clusters)
