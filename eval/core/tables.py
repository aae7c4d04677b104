"""The numbers of an evaluation's pictures: rates, changes, what is seen instead.

Intervals resample templates and phrases for the target, and templates for kept things.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence

from erasure.eval.core.records import BASE, GROUPS, Evaluation, Record
from erasure.eval.stats import Asked, Estimate, Kept, difference, holm, mean, rate, sign_flip
from erasure.wording import folded

DESTRUCTION = 0.20  # "nothing" on target prompts above the base by this much: pictures may have been destroyed
MARGINS = {"neighbours": 0.05, "unrelated": 0.03}  # tolerated losses


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        rate: share of pictures in which the asked-for label is seen.
        change: paired change against the base, as a fraction; None for the base.
        p_value: of that change, by sign flips of prompts; :func:`rows` adjusts it by Holm over the whole table.
    """

    arm: str
    detector: str
    group: str
    rate: Estimate
    change: Estimate | None
    p_value: float | None = None


@dataclasses.dataclass(frozen=True)
class LabelRow:
    """How one kept label fared under one arm."""

    arm: str
    detector: str
    group: str
    label: str
    before: Estimate
    after: Estimate
    change: Estimate


def rows(evaluation: Evaluation) -> list[Row]:
    """The table, in the order arms, detectors, groups. Groups the suite does not have are left out."""
    found = [
        row(evaluation, arm.name, detector, group)
        for arm in evaluation.arms
        for detector in evaluation.detectors
        for group in GROUPS
        if evaluation.select(BASE, group)
    ]
    adjusted = holm([_p_value(evaluation, line) for line in found])
    return [dataclasses.replace(line, p_value=p) for line, p in zip(found, adjusted, strict=True)]


def _p_value(evaluation: Evaluation, line: Row) -> float | None:
    if line.change is None:
        return None
    after = evaluation.select(line.arm, line.group)
    before = hits_of(evaluation.select(BASE, line.group), line.detector)
    return sign_flip(before, hits_of(after, line.detector), [r.prompt for r in after])


def row(evaluation: Evaluation, arm: str, detector: str, group: str) -> Row:
    after = evaluation.select(arm, group)
    hits, drawn = hits_of(after, detector), _drawn(after)
    level, reasons = rate(hits, drawn), dict.fromkeys(r.verdicts[detector].reason for r in after)
    if excluded := [reason for reason in reasons if reason]:
        level = dataclasses.replace(level, reason="; ".join(excluded))
    if arm == BASE:
        return Row(arm, detector, group, level, None)
    base = evaluation.select(BASE, group)
    seen = [[(r.image_hash, hit) for r, hit in zip(own, hits_of(own, detector), strict=True)] for own in (base, after)]
    if after and seen[0] == seen[1] and all(r.image_hash for r in after):  # nothing to be unsure about on these prompts
        same = Estimate(0.0, 0.0, 0.0, "identical pictures", len(after), len(set(drawn)))
        return Row(arm, detector, group, level, same)
    return Row(arm, detector, group, level, difference(hits_of(base, detector), hits, drawn))


def _drawn(records: Sequence[Record]) -> list[Hashable]:
    """What intervals resample: templates and phrases of the target, templates of kept things; else prompts."""
    if not all(r.template for r in records):
        return [r.prompt for r in records]
    return [(Asked if r.group == "target" else Kept)(r.template, r.phrase) for r in records]


def labels(evaluation: Evaluation, arm: str, detector: str, group: str = "neighbours") -> list[LabelRow]:
    """Every label of a group under an arm, the one that lost most first. Labels without a verdict come last."""
    base, after = evaluation.select(BASE, group), evaluation.select(arm, group)
    found = []
    for label in dict.fromkeys(r.label for r in after):
        ours, theirs = [r for r in after if r.label == label], [r for r in base if r.label == label]
        prompts = [r.prompt for r in ours]
        before, now = hits_of(theirs, detector), hits_of(ours, detector)
        change = difference(before, now, prompts)
        found.append(LabelRow(arm, detector, group, label, rate(before, prompts), rate(now, prompts), change))
    return sorted(found, key=lambda r: (r.change.value is None, r.change.value or 0.0))


def kept_labels(evaluation: Evaluation, arm: str, detector: str) -> list[LabelRow]:
    """Every label of what must stay, neighbours and then unrelated, under an arm."""
    return [row for group in ("neighbours", "unrelated") for row in labels(evaluation, arm, detector, group)]


def lost(rows: Sequence[LabelRow]) -> list[LabelRow]:
    """Labels that are seen less often than in the base; the one that lost most first."""
    known = sorted((row for row in rows if row.change.value is not None), key=lambda row: row.change.value or 0.0)
    return [row for row in known if (row.change.value or 0.0) < 0]


def replacement(evaluation: Evaluation, arm: str, detector: str) -> list[tuple[str, float, int]]:
    """What is seen on target prompts: (label, share, pictures), most frequent first."""
    seen = Counter(top for r in evaluation.select(arm, "target") if (top := r.verdicts[detector].top) is not None)
    total = sum(seen.values())
    return [
        (label, count / total, count) for label, count in sorted(seen.items(), key=lambda item: (-item[1], item[0]))
    ]


def degenerate(evaluation: Evaluation, arm: str, detector: str) -> Estimate:
    """Share of pictures for target prompts in which the detector recognises nothing."""
    records = evaluation.select(arm, "target")
    estimate = rate([r.verdicts[detector].nothing for r in records], _drawn(records))
    return (
        estimate if estimate.n else Estimate.missing(f"{detector} has no label for nothing", excluded=estimate.excluded)
    )


def score(evaluation: Evaluation, arm: str, detector: str) -> Estimate:
    """Mean probability of the target on target prompts."""
    records = evaluation.select(arm, "target")
    return mean([r.verdicts[detector].score for r in records], _drawn(records))


def label_count(evaluation: Evaluation, detector: str) -> int:
    """How many labels the detector can choose from, by its card; 0 when the card does not say."""
    return len(evaluation.detectors[detector].labels.get(evaluation.suite.attribute, ()))


def named_in(keep: Iterable[object], names: Sequence[str]) -> int:
    """How many of ``names`` are in a method's keep list: surviving is easier for those."""
    kept = {folded(str(prompt)) for prompt in keep}
    return sum(folded(name) in kept for name in names)


def hits_of(records: list[Record], detector: str) -> list[bool | None]:
    return [r.verdicts[detector].hit for r in records]
