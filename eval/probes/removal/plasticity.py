"""R19: whether a model still learns something new as fast as the base does."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from erasure.eval.core.emblem import FOUND, WORD, Emblem, prompts
from erasure.eval.core.models import Model, Role
from erasure.eval.core.pictures import image_hash
from erasure.eval.probes.base import Context, Evidence, Gate, Observation, Probe
from erasure.eval.probes.denoising import backbone_for
from erasure.eval.probes.removal.relearning import (
    advantage,
    check_steps,
    curve,
    first,
    points,
    resampled,
)
from erasure.eval.probes.tuning import captioned, repeated, seeds_of
from erasure.eval.probes.weigh import of_one_run, units
from erasure.eval.stats import Estimate

SHARE = 0.5  # of the pictures show it: there it counts as learnt


@dataclasses.dataclass(frozen=True)
class Plasticity(Probe):
    """Fine-tune on M pictures of a drawing that no model knows, as relearning does, and ask for it every few steps.

        slowed = log2(T_e / T_b),    T = first step in ``steps`` at which half of the pictures show it

    0 is as fast as the base, 1 half as fast. A model that learns everything slowly is damaged, or was made hard to
    train; then slow relearning of the target says nothing about the target. The drawing is an
    :class:`~erasure.eval.core.emblem.Emblem`, called by a made-up word; it is found by matching, and no detector has to
    know it.

    Attributes:
        pictures, parameters, lr, batch_size, runs: as in :class:`Relearning`, so that the two compare.
        steps: where to look, from 0. Something new takes longer than something erased.
        prompts, images_per_prompt: at most eight prompts, per look and run.
        emblem: which drawing; another number where somebody may have trained on this one.

    The comparison is ours; that a damaged model relearns slowly is why it is needed.
    """

    key: ClassVar = "plasticity"
    code: ClassVar = "R19"
    title: ClassVar = "learning something new"
    section: ClassVar = "removal"
    level: ClassVar = "weights"
    access: ClassVar = "fine_tune"
    controls: ClassVar = 1
    presets: ClassVar = {
        "smoke": {"steps": (0, 2), "pictures": 2, "batch_size": 2, "runs": 1, "prompts": 2, "images_per_prompt": 1},
        "standard": {"images_per_prompt": 1},
        "full": {},
    }
    measures: ClassVar = {"slowed": "slower than the base to learn something new"}
    licences: ClassVar = "whether slow relearning is about the target, or the model learns everything more slowly"
    not_licensed: ClassVar = "that the target is gone; other things to learn, other data or optimisers"

    pictures: int = 4
    steps: tuple[int, ...] = (0, 14, 20, 28, 40, 57, 80, 113, 160)
    parameters: str = "all"
    lr: float = 3e-4
    batch_size: int = 8
    runs: int = 3
    prompts: int = 8
    emblem: int = 3
    images_per_prompt: int = 2

    def __post_init__(self) -> None:
        check_steps(self.steps, example=(0, 40, 80), least=2)

    def run(self, model: Model, context: Context) -> list[Observation]:
        emblem, asked = Emblem(self.emblem), prompts(self.prompts)

        def seen(facts: dict[str, Any]) -> list[Observation]:
            return self.look(context, model, emblem, asked, seeds_of(facts["run"], self.images_per_prompt), facts)

        with context.open(model):
            lesson = captioned(backbone_for(context.pipe), emblem.examples(self.pictures, seed=0), self.batch_size)
            return repeated(
                context, lesson, seen, parameters=self.parameters, marks=self.steps, lr=self.lr, runs=self.runs
            )

    def look(
        self,
        context: Context,
        model: Model,
        emblem: Emblem,
        asked: Sequence[str],
        seeds: Sequence[int],
        facts: Mapping[str, float],
    ) -> list[Observation]:
        """Draw the made-up word from the pipeline as it now is, and look for the drawing."""
        description = f"{model.name}, {WORD}, step {facts['step']}"
        drawn = context.draw(context.pipe, model, asked, seeds=seeds, description=description)
        flat = [
            (prompt, seed, image)
            for prompt, row in zip(asked, drawn, strict=True)
            for seed, image in zip(seeds, row, strict=True)
        ]
        likeness = emblem.likeness([image for _, _, image in flat])
        return [
            Observation(
                model.name, f"step {facts['step']}", prompt, seed, float(score >= FOUND), None,
                {"prompt": prompt, "score": score, "image_hash": image_hash(image), **facts},
            )
            for (prompt, seed, image), score in zip(flat, likeness, strict=True)
        ]  # fmt: skip

    def weigh(self, rows: Mapping[str, Sequence[Observation]], models: Mapping[str, Role]) -> list[Evidence]:
        base = next((name for name, role in models.items() if role == "base" and rows.get(name)), None)
        erased = [name for name, role in models.items() if role == "erased" and rows.get(name)]
        return points(self.key, rows) + [self.slowed(name, rows, base) for name in erased]

    def slowed(self, name: str, rows: Mapping[str, Sequence[Observation]], base: str | None) -> Evidence:
        """How much slower a model learns the drawing than the base."""
        if base is None:
            none = Estimate.missing("there is no base to compare with")
            return Evidence(self.key, name, "slowed", none, unit="log2")
        drawn = list(dict.fromkeys(units(rows[base])))
        counts, runs = resampled(drawn)
        steps = sorted({row.facts["step"] for row in rows[base]})
        half = np.full(len(counts), SHARE)
        mine, theirs = (first(curve(rows[one], drawn, steps, counts), half, steps) for one in (name, base))
        gates: dict[str, Gate] = {"known": "pass" if 0 < theirs[0] < np.inf else "fail"}
        estimate, note = advantage(
            theirs, mine[None], steps, n=len(rows[name]), clusters=len(drawn), runs=runs
        )  # log2 of the model's time over the base's
        note = "; ".join(filter(None, (note, of_one_run(drawn))))
        return Evidence(self.key, name, "slowed", estimate, "", None, gates, "log2", note)
