"""What an evaluation found, on a terminal: the answers, what else broke, the rates behind both."""

from __future__ import annotations

from typing import Any

from erasure.terminal import PlainTable, console, lines, say

LISTED = 5  # names in a line
SHORT = 20  # characters of a name that is not broken


def say_answers(found: Any) -> None:
    """The first table: five answers about each checkpoint, then in plain sentences, and what must be read first."""
    from erasure.eval.judge import QUESTIONS, plainly

    table = PlainTable("checkpoint", *(question.heading for question in QUESTIONS.values()))
    reports, facts = found.claims(), found.facts()
    for claim in reports:
        table.add_row(claim.model, *(f"{a.word} {a.number}".strip() for a in claim.answers.values()))
    table.columns[0].no_wrap = all(len(claim.model) <= SHORT for claim in reports)
    console.print(table)
    for claim in reports:
        say(f"- {claim.model}: {plainly(claim.answers, facts)}")
        for banner in claim.banners:
            say(f"! {claim.model}: {banner}")


def say_rates(found: Any) -> None:
    """How often each detector sees what was asked for, by group, and how far that is from the base."""
    cells: dict[tuple[str, str], dict[str, Any]] = {}
    for row in found.rows():
        change = [str(row.change).replace(" %", "")] if row.change and row.change.value is not None else []
        cells.setdefault((row.arm, row.detector), {})[row.group] = lines(str(row.rate), *change)
    groups = list(dict.fromkeys(group for row in cells.values() for group in row))
    table = PlainTable("model", "seen by", *groups)
    for names, row in cells.items():
        table.add_row(*names, *(row.get(group, "") for group in groups))
    console.print(table)
    say(
        "Share of pictures in which the detector sees what was asked for, with its 95 % interval; below it, the change "
        "in points. The report has more: agreement with the prompts, and distances of kept pictures."
    )


def say_lost(found: Any) -> None:
    """What else broke, by name, and what is drawn in the target's place: as the first detector sees it."""
    from erasure.eval.core import tables
    from erasure.eval.core.models import IN_WEIGHTS

    detector, base = next(iter(found.detectors)), found.arms[0]
    for arm in found.erased:
        if arm.kind in IN_WEIGHTS and arm.weights == base.weights:
            say(f"- {arm.name}: its weights are the base's, so this compares the base with itself")
        lost = [
            f"{row.label} {row.before.value:.0%} -> {row.after.value:.0%}"
            for row in tables.lost(tables.kept_labels(found, arm.name, detector))[:LISTED]
        ]
        seen = [f"{label} {share:.0%}" for label, share, _ in tables.replacement(found, arm.name, detector)[:LISTED]]
        worse = f"lost most: {', '.join(lost)}" if lost else "nothing that should stay got worse"
        say(f"- {arm.name}, by {detector}: {worse}")
        say(f"- {arm.name}, by {detector}: drawn where {found.suite.target} was asked for: {', '.join(seen) or '?'}")
