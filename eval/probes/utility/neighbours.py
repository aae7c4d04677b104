"""U1: what is close to the target and must survive."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar

from erasure.concept import Group
from erasure.eval.core.records import Evaluation
from erasure.eval.probes.base import Estimate, Evidence, Observation, Roles, Rows
from erasure.eval.probes.pictured import Pictured, observed, records
from erasure.eval.probes.weigh import KNOWN, base_rows, contrasts, families, identical, key_of, unchanged, values
from erasure.eval.stats import lost_most

TENTH, FEWEST = 0.1, 3  # share of the labels, and how many at least: those that lost most


@dataclasses.dataclass(frozen=True)
class Neighbours(Pictured):
    """How often a neighbour is seen when it is asked for by name: the pictures of the evaluation itself.

    One family per label and "" for all together: share, change against the base, and against retrained models (which
    may draw neighbours differently too). ``worst`` is about the tenth of the labels, three at least, that lost most
    ("pinpoint-ness"): their mean change minus that of the lowest labels of two equal models. That of retrained models
    says what a retraining costs by itself. The neighbours are those of the suite.
    """

    key, code, title = "neighbours", "U1", "neighbours survive"
    section = "utility"
    needs = ("evaluation", "base")
    measures = {"rate": "seen as asked", "worst": "those that lost most, beyond chance"}
    licences = "what these named neighbours lost, for these prompts and this detector"
    not_licensed = "other neighbours, quality beyond the label, no side effects elsewhere"
    reference = "HUB, ICCV 2025, arXiv 2410.05664 (pinpoint-ness)"

    group: ClassVar[Group] = "neighbours"

    def read(self, evaluation: Evaluation, arm: str, detector: str) -> list[Observation]:
        return [observed(record, detector, record.label) for record in records(evaluation, arm, self.group)]

    def weigh(self, rows: Rows, models: Roles) -> list[Evidence]:
        base = base_rows(rows, models)
        found = side_effects(self.key, rows, models)
        gates = {e.model: e.gates for e in found if e.measure == "change"}
        for label in families(base):
            found += side_effects(self.key, rows, models, label)
        for name, own in rows.items():
            if own and base and models[name] in ("erased", "gold"):
                estimate, note = worst(base, own)
                found.append(Evidence(self.key, name, "worst", estimate, gates=gates.get(name, {}), note=note))
        return found


def side_effects(
    probe: str, rows: Rows, models: Roles, family: str = "", *, known: float | None = KNOWN, shares: bool = True
) -> list[Evidence]:
    """The contrasts that have a meaning where nothing should be suppressed.

    No residual, because the base and a retrained model should agree; and no null, which never learnt the rest either.

    Args:
        known: None for no gate on the base.
    """
    found = contrasts(probe, rows, models, family, known=known or 0.0, shares=shares, kept=True)
    kept = [e for e in found if e.measure in ("rate", "change") or (e.measure, e.control) == ("above_control", "gold")]
    return kept if known is not None else [dataclasses.replace(e, gates={}) for e in kept]


def worst(base: Sequence[Observation], own: Sequence[Observation]) -> tuple[Estimate, str]:
    """How much the tenth of the labels that lost most lost beyond chance, and their names: see :func:`lost_most`.

    Three labels at least: a single one has too few pictures. Observations have the label as family.
    """
    if identical(base, own):
        return unchanged(own), ""
    keys = list(dict.fromkeys(map(key_of, base)))
    count = max(FEWEST, math.ceil(TENTH * len({row.family for row in base})))
    prompts, labels = [prompt for _, prompt, _ in keys], [label for label, _, _ in keys]
    estimate, names, p = lost_most(values(base, keys), values(own, keys), prompts, labels, count=count)
    if p is None or not names:
        return estimate, ""
    return estimate, f"worst: {', '.join(names)}; by chance they would lose as much with p = {p:.2g}"
