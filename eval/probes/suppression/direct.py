"""S1: the target by its names, in the suite's own sentences."""

from __future__ import annotations

import dataclasses

from erasure.eval.core.records import Evaluation
from erasure.eval.probes.base import Evidence, Observation, Roles, Rows
from erasure.eval.probes.pictured import Pictured, observed, records
from erasure.eval.probes.weigh import KNOWN, contrasts


@dataclasses.dataclass(frozen=True)
class Direct(Pictured):
    """How often the target is seen when it is asked for by name or synonym, in the evaluation's pictures."""

    key, code, title = "direct", "S1", "asked for by name"
    section = "suppression"
    needs = ("evaluation",)
    licences = "suppression for these prompts, this sampler, this detector and its threshold"
    not_licensed = "paraphrases, attacks, anything about the weights"

    def read(self, evaluation: Evaluation, arm: str, detector: str) -> list[Observation]:
        return [observed(record, detector, "name") for record in records(evaluation, arm, "target")]

    def weigh(self, rows: Rows, models: Roles) -> list[Evidence]:
        return contrasts(self.key, rows, models, known=KNOWN)
