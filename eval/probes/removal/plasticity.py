"""R19: whether a model still learns something new as fast as the base does."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from erasure.eval.core.emblem import FOUND, WORD, Emblem, prompts
from erasure.eval.core.pictures import image_hash
from erasure.eval.probes.base import Context, Estimate, Evidence, Gate, Model, Observation, Roles, Rows
from erasure.eval.probes.denoising import backbone_for
from erasure.eval.probes.removal.relearning import check_steps, curve, points, resampled
from erasure.eval.probes.tuning import Learning, captioned
from erasure.eval.probes.weigh import base_of, of_one_run, of_role, units
from erasure.eval.stats import reached, sooner, stacked

SHARE = 0.5  # of the pictures show it: there it counts as learnt


@dataclasses.dataclass(frozen=True)
class Plasticity(Learning):
    """Fine-tune on M pictures of a drawing that no model knows, as relearning does, and ask for it every few steps.

        slowed = log2(T_e / T_b),    T = where half of the pictures show it, read between two looks

    0 is as fast as the base, 1 half as fast. A model that learns everything slowly is damaged, or was made hard to
    train; then slow relearning of the target says nothing about the target. The drawing is an
    :class:`~erasure.eval.core.emblem.Emblem`, called by a made-up word; it is found by matching, and no detector has to
    know it.

    Attributes:
        pictures, parameters, lr, batch_size, runs: as in :class:`Relearning`, so that the two compare.
        steps: where to look, from 0. Something new takes longer than something erased.
        prompts: at most eight, all there are. They are fixed, so the interval is about runs.
        emblem: which drawing; another number where somebody may have trained on this one.

    The comparison is ours; that a damaged model relearns slowly is why it is needed.
    """

    key, code, title = "plasticity", "R19", "learning something new"
    controls = 1
    presets = {
        "smoke": {"steps": (0, 2), "pictures": 2, "batch_size": 2, "runs": 1, "prompts": 2, "images_per_prompt": 1},
        "standard": {"images_per_prompt": 1},
        "full": {},
    }
    measures = {"slowed": "slower than the base to learn something new"}
    licences = "whether slow relearning is about the target, or the model learns everything more slowly"
    not_licensed = "that the target is gone; other things to learn, other data or optimisers"

    pictures: int = 4
    steps: tuple[int, ...] = (0, 14, 20, 28, 40, 57, 80, 113, 160)
    prompts: int = 8
    emblem: int = 3

    def __post_init__(self) -> None:
        check_steps(self.steps, example=(0, 40, 80), least=2)

    def run(self, model: Model, context: Context) -> list[Observation]:
        emblem, asked = Emblem(self.emblem), prompts(self.prompts)

        def look(step: int, *, seeds: Sequence[int], facts: Mapping[str, Any]) -> list[Observation]:
            drawn = context.pictures(context.pipe, model, asked, seeds=seeds, description=f"{model.name}, {WORD}")
            likeness = emblem.likeness([image for _, _, image in drawn])
            return [
                Observation(
                    model.name, f"step {step}", prompt, seed, float(score >= FOUND), None,
                    {"prompt": prompt, "score": score, "image_hash": image_hash(image), **facts},
                )
                for (prompt, seed, image), score in zip(drawn, likeness, strict=True)
            ]  # fmt: skip

        with context.open(model):
            lesson = captioned(backbone_for(context.pipe), emblem.examples(self.pictures, seed=0), self.batch_size)
            return self.trained(context, lesson, self.steps, look)

    def weigh(self, rows: Rows, models: Roles) -> list[Evidence]:
        base = base_of(rows, models)
        return points(self.key, rows) + [self.slowed(name, rows, base) for name in of_role(rows, models, "erased")]

    def slowed(self, name: str, rows: Rows, base: str | None) -> Evidence:
        """How much slower a model learns the drawing than the base."""
        if base is None:
            return Evidence(self.key, name, "slowed", Estimate.missing("there is no base to compare with"), unit="log2")
        drawn = list(dict.fromkeys(units(rows[base])))
        counts, runs = resampled(drawn, fixed=True)
        steps = sorted({row.facts["step"] for row in rows[base]})
        half = np.full(len(counts), SHARE)
        mine, theirs = (reached(curve(rows[one], drawn, steps, counts), half, steps) for one in (name, base))
        gates: dict[str, Gate] = {"known": "pass" if np.isfinite(theirs.at[0]) else "fail"}
        estimate, note = sooner(
            theirs,
            stacked([mine]),
            runs=runs,
            by="runs" if runs else "prompts",
            n=len(rows[name]),
            clusters=len(drawn),
            last=steps[-1],
        )
        note = "; ".join(filter(None, (note, of_one_run(drawn))))
        return Evidence(self.key, name, "slowed", estimate, "", None, gates, "log2", note)
