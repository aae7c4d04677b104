"""The evaluation of the evaluation: does a metric separate models that know the target from models that do not?

For some arms this is known by construction: an unchanged copy and a filtered base know it, a retrained model does not.
A metric is *faithful* if those that know have higher values: AUC = P(knows > does not), ties counted half. This holds
for one base and its material. Claims do not use it: there the gates of the probes decide, and a probe that finds as
little in a model that knows the target as in one that does not carries nothing
(:func:`erasure.eval.judge.findings.untold`).

Source: the meta-evaluation of OpenUnlearning (Dorna et al. 2025, arXiv 2506.12618), for text models; here for pictures.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from erasure.eval.probes.base import Evidence
from erasure.io import markdown

if TYPE_CHECKING:
    from erasure.eval.run.assessment import Assessment

FAITHFUL_FROM = 0.8
UNCHANGED = "unchanged"  # the base under another name, judged as an erasure
# measures of how much is left, the most relative first; a higher value means more is left
SCORES = (
    "residual", "gap", "ratio", "auc_gap", "advantage", "excess", "area", "above_control", "increase", "distance",
    "rate", "auc",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Faithfulness:
    """How well one metric separates.

    Attributes:
        probe, measure, family: which metric.
        auc: P(a model that knows has the higher value); None when one side has no value.
        knows, asked, never: value by model, of those that know the target, erased ones, and those that never saw it.
        without: models that have no value by this metric.
    """

    probe: str
    measure: str
    family: str
    auc: float | None
    knows: Mapping[str, float]
    asked: Mapping[str, float]
    never: Mapping[str, float]
    without: tuple[str, ...] = ()

    @property
    def order(self) -> tuple[float | None, float | None]:
        """P(a model that knows is above an erased one) and P(an erased one is above one that never saw it).

        Neither need be 1: an erasure may leave all of it, or nothing. If the second is near 0.5, the erasures look like
        retrained models by this metric.
        """
        return separation(self.knows, self.asked), separation(self.asked, self.never)

    @property
    def demoted(self) -> bool:
        """Whether the metric does not separate the two sides here."""
        return self.auc is not None and self.auc < FAITHFUL_FROM


# Probes of removal whose number is not higher the more a model knows; plasticity asks for what none of them knows.
OTHERWISE = ("construction", "plasticity", "resurgence", "adapter_on_top", "gradient_reversal", "delta_side_channel")


def faithfulness(evidence: Iterable[Evidence], knows: Mapping[str, bool | None]) -> list[Faithfulness]:
    """One row per probe.

    Args:
        evidence: of an assessment whose arms are the models of ``knows``.
        knows: arm to whether it knows the target, by construction; None where that is unknown. Those do not enter the
            AUC.

    The metric of a probe is its most relative measure (residual before rate), over all families where it has that, else
    about the target, else in its last family. Gates are ignored, because the question is whether the number separates.
    """
    found: dict[str, list[Evidence]] = {}
    for e in evidence:
        if e.model in knows and e.measure in SCORES and e.estimate.value is not None:
            found.setdefault(e.probe, []).append(e)
    out = []
    for probe, own in found.items():
        measure, family = metric(own)
        values = {e.model: float(e.estimate.value or 0.0) for e in own if (e.measure, e.family) == (measure, family)}
        sides = {truth: {m: v for m, v in values.items() if knows[m] is truth} for truth in (True, None, False)}
        without = tuple(m for m in knows if m not in values)
        auc = separation(sides[True], sides[False])
        out.append(Faithfulness(probe, measure, family, auc, sides[True], sides[None], sides[False], without))
    return out


def metric(scores: Sequence[Evidence]) -> tuple[str, str]:
    """Measure and family of the number by which a probe is told, of its evidence with one of :data:`SCORES`."""
    measure = min((e.measure for e in scores), key=SCORES.index)
    families = list(dict.fromkeys(e.family for e in scores if e.measure == measure))
    return measure, next((name for name in ("", "target") if name in families), families[-1])


def trials(found: Assessment) -> tuple[list[Evidence], dict[str, bool | None]]:
    """Evidence about every model as if it were an erasure, and whether it knows the target.

    The base is judged as an erasure that changed nothing, every retrained model against the others, and a null control
    against all of them. The observations of the probes of removal are weighed again with other roles; those of
    :data:`OTHERWISE` are left out.
    """
    asked = [probe for probe in found.probes() if probe.section == "removal" and probe.key not in OTHERWISE]
    again: list[Evidence] = []
    knows: dict[str, bool | None] = {}
    for model in found.models:
        if model.name in found.same_as:
            continue
        unchanged, saw = model.role == "base", model.role in ("base", "twin") or model.kind in ("filter", "adapter")
        knows[model.name] = saw if saw or model.role in ("gold", "null") else None  # what a model declares is no truth
        for probe in asked:
            rows = {name: own for name, own in found.rows(probe.key).items() if name not in found.same_as}
            if model.name not in rows:
                continue
            arm = UNCHANGED if unchanged else model.name
            weighed = probe.weigh({**rows, arm: rows[model.name]}, {**found.roles, arm: "erased"})
            again += [dataclasses.replace(e, model=model.name) for e in weighed if e.model == arm]
    return again, knows


def separation(knows: Mapping[str, float], never: Mapping[str, float]) -> float | None:
    """The share of pairs in which the model that knows has the higher value; None without a pair."""
    pairs = [(a > b) + (a == b) / 2 for a in knows.values() for b in never.values()]
    return sum(pairs) / len(pairs) if pairs else None


def table(rows: Iterable[Faithfulness]) -> str:
    """The rows as a Markdown table, the worst metric first."""
    lines = [
        "| probe | metric | AUC | know it over erased | erased over never | know it | erased | never saw it | |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: 2.0 if row.auc is None else row.auc):
        groups = (row.knows, row.asked, row.never)
        sides = [", ".join(f"{markdown(m)} {v:.2f}" for m, v in side.items()) or "none" for side in groups]
        name = markdown(f"{row.measure}, {row.family}" if row.family else row.measure)
        cells = " | ".join("no pair" if auc is None else f"{auc:.2f}" for auc in (row.auc, *row.order))
        lines.append(f"| {row.probe} | {name} | {cells} | {' | '.join(sides)} | {'demoted' if row.demoted else ''} |")
    return "\n".join(lines)
