"""Probes that read the paired pictures alone, and so work on a stored evaluation."""

from __future__ import annotations

import abc

from erasure.eval.core.records import Evaluation, Record
from erasure.eval.probes.base import Context, Missing, Model, Observation, Probe

PICTURED = ("direct", "neighbours", "unrelated", "degeneracy")  # those of a plain evaluation; they have no settings


class Pictured(Probe):
    """A probe of the paired pictures: the verdicts of one detector on those of one model."""

    access = "black_box"
    level = "outputs"
    presets = {"smoke": {}, "quick": {}, "standard": {}, "full": {}}

    def run(self, model: Model, context: Context) -> list[Observation]:
        return self.read(context.paired, model.name, context.judge.name)

    @abc.abstractmethod
    def read(self, evaluation: Evaluation, arm: str, detector: str) -> list[Observation]:
        """What a detector saw in the pictures of one arm; ``Missing`` without such prompts, or without such a label."""


def records(evaluation: Evaluation, arm: str, group: str) -> list[Record]:
    found = evaluation.select(arm, group)
    if not found:
        raise Missing(f"the suite has no prompts in the group {group}")
    return found


def observed(record: Record, detector: str, family: str) -> Observation:
    """A record of the evaluation as an observation, by one detector."""
    verdict = record.verdicts[detector]
    return Observation(
        record.arm,
        family,
        record.prompt,
        record.seed,
        None if verdict.hit is None else float(verdict.hit),
        verdict.reason,
        {
            "prompt": record.prompt, "label": record.label, "top": verdict.top, "score": verdict.score,
            "nothing": verdict.nothing, "image_hash": record.image_hash,
            **({"template": record.template, "phrase": record.phrase} if record.template else {}),
        },
    )  # fmt: skip
