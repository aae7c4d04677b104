"""U9: pictures in which nothing can be recognised, when the target is asked for."""

from __future__ import annotations

import dataclasses

from erasure.eval.core.records import Evaluation
from erasure.eval.core.tables import DESTRUCTION
from erasure.eval.probes.base import Evidence, Missing, Observation, Roles, Rows
from erasure.eval.probes.pictured import Pictured, observed, records
from erasure.eval.probes.weigh import contrasts


@dataclasses.dataclass(frozen=True)
class Degeneracy(Pictured):
    """Share of pictures for target prompts that the detector calls "nothing".

    A ``change`` against the base of 20 points or more gets a banner: a model that draws noise does not draw the target
    either. Things without a label count as nothing, too.

    The question is about the names of the suite and no others, so intervals resample sentences and not names. (Whether
    the target is *kept out* is a question about other names as well, and there both are resampled.)
    """

    key, code, title = "degeneracy", "U9", "nothing recognised on target prompts"
    section = "utility"
    needs = ("evaluation", "base")
    measures = {"rate": "nothing recognised"}
    licences = "whether target prompts still give pictures of something this detector can name"
    not_licensed = "quality; pictures of things without a label"
    reference = "Cooper et al. 2024, arXiv 2412.06966 (what an edited model should draw is open)"

    def read(self, evaluation: Evaluation, arm: str, detector: str) -> list[Observation]:
        found = []
        for record in records(evaluation, arm, "target"):
            seen = observed(record, detector, "name")
            nothing = seen.facts["nothing"]
            found.append(dataclasses.replace(seen, value=None if nothing is None else float(nothing)))
        if all(row.value is None for row in found):
            raise Missing(f"{detector} has no label for nothing")
        return found

    def weigh(self, rows: Rows, models: Roles) -> list[Evidence]:
        found = [e for e in contrasts(self.key, rows, models, known=0.0, kept=True) if e.measure != "residual"]
        return [dataclasses.replace(e, gates={}, note=_banner(e)) for e in found]


def _banner(evidence: Evidence) -> str:
    change = evidence.estimate.value
    if evidence.measure != "change" or change is None or change < DESTRUCTION:
        return ""
    return (
        f"suppression by destruction: nothing is recognised in {100 * change:.0f} points more of the pictures for "
        "target prompts than with the base; they are destroyed, or of something the detector has no name for"
    )
