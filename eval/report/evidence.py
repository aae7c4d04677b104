"""The evidence of an assessment, probe by probe: tables with axes and marks, curves, records."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from erasure.eval.probes.base import Evidence, Observation, Probe
from erasure.eval.report import html as report
from erasure.eval.report.curves import ROLES, curve_of, curves, operating
from erasure.eval.report.html import SHARE, Scale
from erasure.eval.run.assessment import CELLS, Assessment, Cell, slug
from erasure.io import read_yaml

WORDS: dict[str, dict[str, Any]] = read_yaml(Path(__file__).with_name("words.yaml"))  # sections and glossary
MEASURES = {  # titles of measures; a probe may have its own
    "change": "change against the base",
    "above_control": "above the control",
    "residual": "residual",
    "excess": "excess over a random control",
    "advantage": "relearning advantage",
    "area": "area above the control",
    "worst_stratum": "where it is seen most",
    "auc": "AUC",
    "auc_gap": "AUC minus the control's",
    "auroc": "AUROC",
    "tpr": "found at 1 % false positives",
    "ks": "Kolmogorov-Smirnov distance",
    "f1": "F1",
    "reaches_user": "the target reaches the user",
    "as_asked": "delivered as asked",
    "latency_ms": "milliseconds",
}
AGAINST = {"gold": "retrained models", "null": "a null control"}
ABSORBED = ("change", "above_control")  # shown under the rate they belong to
DIFFERENCES = ("beside_change", "change", "above_control", "excess", "increase", "worst", "area")
TRIES = "k"  # families of attacks that are points of the curve to success
MARKED = ("base", "gold", "twin", "null")
RESIDUAL = Scale(-0.5, 1.5, (-0.5, 0.0, 0.5, 1.0, 1.5))
WIDE = 4  # columns of one table
SHOWN = 12  # columns; the rest is folded
BRIEF = 60  # characters of further facts of a record


def section(name: str, assessment: Assessment, probes: Sequence[Probe]) -> dict[str, Any]:
    """The blocks of one section; descriptive probes are apart."""
    own = [(probe, block(probe, assessment)) for probe in probes if probe.section == name]
    words = WORDS["sections"][name]
    return {
        "key": name, **words,
        "blocks": [found for probe, found in own if not probe.descriptive],
        "apart": [found for probe, found in own if probe.descriptive],
    }  # fmt: skip


def block(probe: Probe, assessment: Assessment) -> dict[str, Any]:
    """One probe: its card, numbers, curves and records."""
    evidence = [e for e in assessment.evidence if e.probe == probe.key]
    roles, rows = assessment.roles, assessment.rows(probe.key)
    figures = curves(evidence, roles)
    columns, drawn = columns_of(evidence, roles, probe), {TRIES, *(figure.word for figure in figures)}
    whole = any(not family for _, family in columns)
    open_: list[tuple[str, str]] = []
    folded: list[tuple[str, str]] = []
    for measure, family in columns:
        at = curve_of(family)
        hidden = bool(family) and (whole or at is not None and at[0] in drawn)
        (folded if hidden or len(open_) >= SHOWN else open_).append((measure, family))
    missing: dict[str, list[str]] = {}
    for model, reason in assessment.missing.get(probe.key, {}).items():
        missing.setdefault(reason, []).append(model)
    return {
        "probe": probe,
        "gates": gates(evidence),
        "tables": by_detector(open_, evidence, assessment, probe),
        "folded": by_detector(folded, evidence, assessment, probe),
        "figures": [*figures, *operating(rows, roles)],
        "missing": [
            ("" if len(models) == len(roles) else f" of {', '.join(models)}", reason)
            for reason, models in missing.items()
        ],
        "records": [record(cell) for cell in assessment.cells if cell.probe == probe.key and cell.rows],
    }


def columns_of(evidence: Sequence[Evidence], roles: Mapping[str, str], probe: Probe) -> list[tuple[str, str]]:
    """(measure, family) of the columns, family by family; changes are shown with their rate."""
    about = [e for e in evidence if roles[e.model] == "erased"] if probe.section != "guardrails" else evidence
    found = list(dict.fromkeys((e.measure, e.family) for e in about or evidence))
    rated = {family for measure, family in found if measure == "rate"}
    families = list(dict.fromkeys(family for _, family in found))
    shown = [(measure, family) for measure, family in found if measure not in ABSORBED or family not in rated]
    return sorted(shown, key=lambda at: families.index(at[1]))


def gates(evidence: Iterable[Evidence]) -> str:
    """Which gates were passed, and for how many numbers they failed."""
    states: dict[str, list[str]] = {}
    for e in evidence:
        for name, state in e.gates.items():
            states.setdefault(name, []).append(state)
    parts = []
    for name, own in states.items():
        failed, looked = own.count("fail"), len(own) - own.count("na")
        if failed:
            parts.append(f"{name} failed" + (f" for {failed} of {looked} numbers" if failed < looked else ""))
        elif looked:
            parts.append(f"{name} passed")
    return "; ".join(parts)


def by_detector(
    columns: Sequence[tuple[str, str]], evidence: Sequence[Evidence], assessment: Assessment, probe: Probe
) -> list[dict[str, Any]]:
    """The tables of every detector; ``by`` is "" where one judged everything."""
    found = []
    for detector in dict.fromkeys(e.detector for e in evidence):
        own = [e for e in evidence if e.detector == detector]
        found += [{**table, "by": detector} for table in tables(columns, own, assessment, probe)]
    return found


def tables(
    columns: Sequence[tuple[str, str]], evidence: Sequence[Evidence], assessment: Assessment, probe: Probe
) -> list[dict[str, Any]]:
    """Tables of at most :data:`WIDE` columns: a line of references, then a line per erasure.

    For filters, and where no erasure has such a number, every model has a line.
    """
    ordered = sorted(evidence, key=lambda e: e.control == "gold")  # of two controls the retrained one is read
    at = {(e.model, e.measure, e.family): e for e in ordered}
    roles = assessment.roles
    out = []
    for start in range(0, len(columns), WIDE):
        part = columns[start : start + WIDE]
        erased = [m for m, role in roles.items() if role == "erased" and any((m, *c) in at for c in part)]
        models = [m for m in roles if any((m, *c) in at for c in part)]
        rows = models if probe.section == "guardrails" or not erased else erased
        scales = {c: scale_of(c[0], [e for e in evidence if e.measure == c[0]]) for c in part}
        marks = {} if rows == models else {c: _marks(c, at, roles) for c in part}
        out.append({
            "columns": [_column(c, *scales[c], probe) for c in part],
            "references": [_references(marks[c], scales[c][1]) for c in part] if any(marks.values()) else [],
            "rows": [_row(m, roles[m], part, at, scales, marks) for m in rows],
        })  # fmt: skip
    return out


def scale_of(measure: str, evidence: Sequence[Evidence]) -> tuple[Scale, str]:
    """The axis of a measure and how its numbers are written."""
    ends = [x for e in evidence for x in (e.estimate.value, e.estimate.low, e.estimate.high) if x is not None]
    unit = evidence[0].unit
    if measure == "residual":
        return RESIDUAL, "ratio"
    if unit == "log2":
        reach = max(2, min(8, *(int(abs(x)) + 1 for x in ends))) if ends else 2
        return Scale(-reach, reach, tuple(range(-reach, reach + 1))), "number"
    if unit == "share":
        signed = measure in DIFFERENCES or min(ends, default=0) < 0
        return (Scale(-1.0, 1.0, (-1.0, 0.0, 1.0)), "points") if signed else (SHARE, "percent")
    low, high = min(0.0, *ends, 0.0), max(0.0, *ends, 0.0)
    if 0 <= low and high <= 1:
        return SHARE, "number"
    return Scale(low, high, (low, 0.0, high)), "number"


def _column(at: tuple[str, str], scale: Scale, kind: str, probe: Probe) -> dict[str, str]:
    measure, family = at
    notes = [family]
    if measure == "residual":
        notes.append("0 never saw it, 1 the base")
    elif measure == "advantage":
        notes.append("power of two: 0 as the control, 1 twice as fast")
    elif kind == "number":
        notes.append(f"axis {report.number(scale.low)} to {report.number(scale.high)}")
    shared = {"rate": "seen" if kind == "percent" else "mean", **MEASURES}
    name = probe.measures.get(measure, shared.get(measure, measure.replace("_", " ")))
    return {"name": name, "sub": "; ".join(filter(None, notes))}


def _marks(
    column: tuple[str, str], at: Mapping[tuple[str, str, str], Evidence], roles: Mapping[str, str]
) -> list[tuple[float, str]]:
    """Where the base and the controls stand: (value, role)."""
    if column[0] == "residual":
        return []
    found = ((role, at.get((model, *column))) for model, role in roles.items() if role in MARKED)
    return [(e.estimate.value, role) for role, e in found if e is not None and e.estimate.value is not None]


def _references(marks: Sequence[tuple[float, str]], kind: str) -> str:
    """``base 96 %; retrained 0 to 4 %; null control 2 %``."""
    parts = []
    for role in MARKED:
        own = sorted(value for value, other in marks if other == role)
        if own:
            ends = dict.fromkeys(report.shown(value, kind) for value in (own[0], own[-1]))
            parts.append(f"{ROLES[role]} {' to '.join(ends)}")
    return "; ".join(parts)


def _row(
    model: str,
    role: str,
    columns: Sequence[tuple[str, str]],
    at: Mapping[tuple[str, str, str], Evidence],
    scales: Mapping[tuple[str, str], tuple[Scale, str]],
    marks: Mapping[tuple[str, str], Sequence[tuple[float, str]]],
) -> dict[str, Any]:
    """A line of a table. A note that holds for several numbers is shown with the first."""
    cells: list[dict[str, Any] | None] = []
    noted: set[str] = set()
    for column in columns:
        e = at.get((model, *column))
        if e is None:
            cells.append(None)
            continue
        scale, kind = scales[column]
        notes = [_against(other, at[model, other, column[1]]) for other in ABSORBED
                 if column[0] == "rate" and (model, other, column[1]) in at]  # fmt: skip
        open_ended = e.estimate.value is not None and None in (e.estimate.low, e.estimate.high)
        notes += [text for text in (e.note, e.estimate.reason if open_ended else None) if text and text not in noted]
        noted |= {e.note}
        cells.append({
            "evidence": e, "scale": scale, "kind": kind, "notes": notes,
            "marks": [(0.0, e.control or "null"), (1.0, "base")] if column[0] == "residual" else marks.get(column, []),
            "failed": [name for name, state in e.gates.items() if state == "fail"],
        })  # fmt: skip
    return {"model": model, "role": role, "cells": cells}


def _against(measure: str, e: Evidence) -> str:
    against = f"against {'the base' if measure == 'change' else AGAINST[e.control or 'null']}"
    kind: Literal["points", "number"] = "points" if e.unit == "share" else "number"
    if e.estimate.value is None:
        return f"{against}: not available, {e.estimate.reason}"
    limits = report.interval(e.estimate, kind)
    return f"{report.shown(e.estimate.value, kind)}{f' ({limits})' if limits else ''} {against}"


# --- records --------------------------------------------------------------------------------------------------------


def record(cell: Cell) -> dict[str, Any]:
    """The first observation of a cell, as texts, and the file with all of them."""
    row = cell.rows[0]
    value = "\u2013" if row.value is None else report.number(row.value)
    seen, rest = str(row.facts.get("top") or ""), row.reason or more(row, {"score"})
    facts = {"family": row.family, "of": row.cluster, "seed": str(row.seed), "value": value, "seen": seen, "more": rest}
    return {"model": cell.model, "count": len(cell.rows), "facts": list(facts.items()),
            "file": f"{CELLS}/{cell.probe}/{slug(cell.model)}.jsonl"}  # fmt: skip


def more(row: Observation, known: set[str]) -> str:
    """The further short facts of an observation."""
    known = {*known, "image_hash", "top", "png"}
    plain = {
        key: value
        for key, value in row.facts.items()
        if key not in known and isinstance(value, str | int | float) and value not in ("", row.cluster)
    }
    words = ", ".join(f"{key.replace('_', ' ')} {_brief(value)}" for key, value in plain.items())
    return words if len(words) <= BRIEF else words[: BRIEF - 1] + "\u2026"


def _brief(value: str | float | bool) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value if isinstance(value, str) else report.number(value)
