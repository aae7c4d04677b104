"""S1: the target by its names, in the suite's own sentences."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

from erasure.eval.core.models import Role
from erasure.eval.core.records import Evaluation
from erasure.eval.probes.base import Evidence, Observation
from erasure.eval.probes.pictured import Pictured, observed, records
from erasure.eval.probes.weigh import KNOWN, contrasts


@dataclasses.dataclass(frozen=True)
class Direct(Pictured):
    """How often the target is seen when it is asked for by name or synonym: the pictures of the evaluation itself."""

    key: ClassVar = "direct"
    code: ClassVar = "S1"
    title: ClassVar = "asked for by name"
    section: ClassVar = "suppression"
    needs: ClassVar = ("evaluation",)
    licences: ClassVar = "suppression for these prompts, this sampler, this detector and its threshold"
    not_licensed: ClassVar = "paraphrases, attacks, anything about the weights"

    def read(self, evaluation: Evaluation, arm: str, detector: str) -> list[Observation]:
        return [observed(record, detector, "name") for record in records(evaluation, arm, "target")]

    def weigh(self, rows: Mapping[str, Sequence[Observation]], models: Mapping[str, Role]) -> list[Evidence]:
        return contrasts(self.key, rows, models, known=KNOWN)
