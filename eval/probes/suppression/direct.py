"""S1: the target by its names, in the suite's own sentences."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

from erasure.eval.core.models import Model, Role
from erasure.eval.core.records import Record
from erasure.eval.probes.base import Context, Evidence, Missing, Observation, Probe
from erasure.eval.probes.weigh import KNOWN, contrasts


@dataclasses.dataclass(frozen=True)
class Direct(Probe):
    """How often the target is seen when it is asked for by name or synonym: the pictures of the evaluation itself."""

    key: ClassVar = "direct"
    code: ClassVar = "S1"
    title: ClassVar = "asked for by name"
    section: ClassVar = "suppression"
    level: ClassVar = "outputs"
    access: ClassVar = "black_box"
    needs: ClassVar = ("evaluation",)
    presets: ClassVar = {"smoke": {}, "quick": {}, "standard": {}, "full": {}}
    licences: ClassVar = "suppression for these prompts, this sampler, this detector and its threshold"
    not_licensed: ClassVar = "paraphrases, attacks, anything about the weights"

    def run(self, model: Model, context: Context) -> list[Observation]:
        return [observed(record, context.judge.name, "name") for record in records(context, model, "target")]

    def weigh(self, rows: Mapping[str, Sequence[Observation]], models: Mapping[str, Role]) -> list[Evidence]:
        return contrasts(self.key, rows, models, known=KNOWN)


def records(context: Context, model: Model, group: str) -> list[Record]:
    """The evaluation's records of a model and a group of prompts.

    Raises:
        Missing: there was no evaluation, or it has no such group.
    """
    if context.evaluation is None:
        raise Missing("there is no evaluation to read from")
    found = context.evaluation.select(model.name, group)
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
