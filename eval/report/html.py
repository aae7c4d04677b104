"""The report: one HTML file with everything in it.

This module has the paired pictures: the grid, numbers with their intervals, what is drawn instead. Claims and evidence
are in :mod:`erasure.eval.report.assessment`.
"""

from __future__ import annotations

import base64
import functools
import io
import itertools
import os
import re
import struct
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote

import jinja2
from markupsafe import Markup
from PIL import Image

from erasure.eval.core import quality, tables
from erasure.eval.core.records import BASE, GROUPS, Evaluation, Picture
from erasure.eval.stats import ASSUMED_CORRELATION, Estimate, kappa
from erasure.io import visible, write_atomically

if TYPE_CHECKING:
    from erasure.eval.run.assessment import Assessment

TEMPLATES = Path(__file__).parent / "templates"
HEADINGS = {
    "target": ("Target", "Asked for the target by name. Another picture is what was wanted."),
    "neighbours": ("Neighbours", "Close to the target. These should stay as they are."),
    "unrelated": ("Unrelated", "Far from the target. These should stay as they are."),
}
# Roles of arms that are no erasures.
CONTROLS = {"gold": "control, retrained", "twin": "control, retrained on everything", "null": "null control"}
QUALITY = 70  # of WebP: no visible difference at these sizes
SMALL = 96  # pictures up to this wide are enlarged with crisp pixels
FAR = 10.0  # a larger ratio has a denominator of about 0
SHOWN = 6  # rows of a ranked list
TILES = 90  # pictures of the grid: some 130 kB
LONGEST = 16  # items of a setting that is a list


class Scale(NamedTuple):
    """The axis of a number: its ends and its ticks."""

    low: float
    high: float
    ticks: tuple[float, ...]


SHARE = Scale(0.0, 1.0, (0.0, 0.5, 1.0))
Marks = Sequence[tuple[float | None, str]]  # (value, role) of the base and the controls


class Axes:
    """The axes of a page, each with the uprights that stand on it: figures with the same refer to one drawing."""

    def __init__(self) -> None:
        self.drawn: dict[tuple[Scale, tuple[tuple[float, str], ...]], int] = {}

    def at(self, scale: Scale, marks: Marks) -> int:
        """The number of the drawing with these marks; those of unknown value are left out."""
        known = tuple((value, role) for value, role in marks if value is not None)
        return self.drawn.setdefault((scale, known), len(self.drawn))


def write_report(
    found: Assessment,
    path: str | os.PathLike[str],
    *,
    title: str | None = None,
    records: str | os.PathLike[str] | None = None,
) -> Path:
    """Write an assessment as one self-contained HTML file.

    Args:
        found: from :func:`erasure.eval.evaluate` or :func:`erasure.eval.assess`; of a stored evaluation, from
            :func:`erasure.eval.assessment_of`.
        path: file to write, completely or not at all. A folder gets ``report.html``.
        title: heading; by default the name of the target.
        records: the folder of the assessment, whose files are then linked, or the address of an archive of it. None
            links nothing.

    Returns:
        The path of the file. It needs no server, no network and no script.
    """
    path = Path(path)
    path = path / "report.html" if path.is_dir() else path
    page = render(found, title=title, linked=lambda file: _link(records, file, path.parent))
    write_atomically(path, smaller(page))
    return path


def smaller(page: str) -> str:
    """The same page in fewer bytes: without indentation and the blanks around cells."""
    return re.sub(r"\s+(?=</?(?:td|th|tr|table|tbody|thead)\b)", "", re.sub(r"\n\s+", "\n", page))


def _link(records: str | os.PathLike[str] | None, file: str, page: Path) -> str:
    """The link from the folder ``page`` to a file of records; "" if unknown."""
    if records is None or not Path(records).is_dir():
        return str(records or "")
    there = Path(records) / file
    return quote(os.path.relpath(there, page)) if there.exists() else ""


def render(found: Assessment, *, title: str | None = None, linked: Callable[[str], str] = lambda file: "") -> str:
    """The HTML of the report; ``linked`` gives the address of a file of records, or ""."""
    from erasure.eval.report.assessment import page_of  # which imports this module

    return environment().get_template("assessment.html.j2").render(page_of(found, title), linked=linked, axes=Axes())


def environment() -> jinja2.Environment:
    """Templates that escape their values, with filters for numbers."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        finalize=_visible,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters.update(
        percent=percent, interval=interval, points=points, pvalue=pvalue, number=number, together=together, text=_text,
        along=along, shown=shown, in_css=in_css, picture=functools.cache(picture),
    )  # fmt: skip
    made.globals["share_scale"] = SHARE
    return made


def _visible(value: Any) -> Any:
    """Bidirectional overrides and control characters in names, written out, which escaping leaves."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def pictures_page(evaluation: Evaluation) -> dict[str, Any]:
    """What the templates read of the paired pictures."""
    clip, first = quality.clip_rows(evaluation), next(iter(evaluation.detectors), None)
    reasons = Counter(v.reason for record in evaluation.records for v in record.verdicts.values() if v.reason)
    return {
        "suite": evaluation.suite,
        "targets": [concept.name.lower() for concept in evaluation.suite.concepts],
        "evaluation": evaluation,
        "base": BASE,
        "controls": CONTROLS,
        "blocks": _blocks(evaluation, first),
        "groups": [(g, HEADINGS[g][0]) for g in GROUPS if evaluation.select(BASE, g)],
        "table": _table(evaluation),
        "quality": quality.blocks(evaluation),
        "quality_notes": quality.notes(evaluation),
        "replacements": _replacements(evaluation, first) if first else [],
        "losses": _losses(evaluation, first) if first else [],
        "clip": clip,
        "zero_shot": any(row.accuracy.value is not None for row in clip),
        "correlation": ASSUMED_CORRELATION,
        "agreement": agreement(evaluation),
        "excluded": [f"{reason}: {count} pictures left out of its rates" for reason, count in reasons.items()],
    }


def agreement(evaluation: Evaluation) -> list[tuple[str, str, Estimate]]:
    """Cohen's kappa of every two detectors over all pictures that both gave a label."""
    out = []
    for first, second in itertools.combinations(evaluation.detectors, 2):
        pairs = [
            (a, b, r.prompt)
            for r in evaluation.records
            if (a := r.verdicts[first].top) is not None and (b := r.verdicts[second].top) is not None
        ]
        value = kappa([a for a, _, _ in pairs], [b for _, b, _ in pairs], [prompt for _, _, prompt in pairs])
        out.append((first, second, value))
    return out


def _blocks(evaluation: Evaluation, first: str | None) -> list[dict[str, Any]]:
    """The grid: a block per group, a column per prompt, a row per arm; fewer prompts where there are many arms.

    An arm that drew the same pictures as one above it has its name, as ``same``, in their place.
    """
    total = len({(p.group, p.prompt) for p in evaluation.pictures}) * len(evaluation.arms)
    share = min(1.0, TILES / total) if total else 1.0
    seen = {(r.arm, r.prompt, r.seed): r.verdicts[first].top for r in evaluation.records} if first else {}
    blocks = []
    for group, (heading, note) in HEADINGS.items():
        members = [p for p in evaluation.pictures if p.group == group]
        columns = list(dict.fromkeys((p.prompt, p.label) for p in members))
        if not columns:
            continue
        columns = columns[: max(2, round(share * len(columns)))]
        at = {(p.arm, p.prompt): p for p in members}
        rows, drawn = [], dict[tuple[str | None, ...], str]()
        for arm in evaluation.arms:
            cells = [_cell(at.get((arm.name, prompt)), seen) for prompt, _ in columns]
            pictures = tuple(cell["png"] if cell else None for cell in cells)
            same = drawn.setdefault(pictures, arm.name) if any(pictures) else arm.name
            rows.append({"arm": arm.name, "role": arm.role, "cells": cells, "same": same if same != arm.name else None})
        blocks.append({"group": group, "heading": heading, "note": note, "columns": columns, "rows": rows})
    return blocks


def _cell(picture: Picture | None, seen: Mapping[tuple[str, str, int], str | None]) -> dict[str, Any] | None:
    if picture is None:
        return None
    top = seen.get((picture.arm, picture.prompt, picture.seed))
    alt = f"{picture.arm}: {picture.prompt}" + (f"; seen as {top}" if top else "")
    return {
        "png": picture.png,
        "alt": alt,
        "seen": top,
        "hit": top is not None and top.casefold() == picture.label.casefold(),
        "crisp": struct.unpack(">I", base64.b64decode(picture.png[:32])[16:20])[0] <= SMALL,  # the width of a PNG
    }


def picture(png: str) -> str:
    """A stored picture, a PNG in base64, as the data address of a WebP, which is a fifth as large."""
    made = io.BytesIO()
    Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB").save(made, "WEBP", quality=QUALITY, method=6)
    return f"data:image/webp;base64,{base64.b64encode(made.getvalue()).decode()}"


def _table(evaluation: Evaluation) -> list[dict[str, Any]]:
    rows = {(row.detector, row.arm, row.group): row for row in evaluation.rows()}
    lines = []
    for detector in evaluation.detectors:
        for index, arm in enumerate(evaluation.arms):
            cells = {g: rows[detector, arm.name, g] for g in GROUPS if (detector, arm.name, g) in rows}
            marks = {g: rows[detector, BASE, g].rate.value for g in cells}
            nothing = tables.degenerate(evaluation, arm.name, detector)
            lines.append({
                "detector": detector, "arm": arm.name, "role": arm.role, "first": index == 0, "cells": cells,
                "marks": marks, "nothing": nothing, "score": tables.score(evaluation, arm.name, detector),
            })  # fmt: skip
    return lines


def _replacements(evaluation: Evaluation, detector: str) -> list[dict[str, Any]]:
    """What is seen on target prompts."""
    out = []
    for arm in evaluation.arms:
        seen = tables.replacement(evaluation, arm.name, detector)
        rest = sum(share for _, share, _ in seen[SHOWN:])
        out.append({
            "arm": arm.name, "seen": seen[:SHOWN], "rest": rest, "others": len(seen[SHOWN:]), "detector": detector,
            "choices": tables.label_count(evaluation, detector),
        })  # fmt: skip
    return out


def _losses(evaluation: Evaluation, detector: str) -> list[dict[str, Any]]:
    """Kept labels that lost most, per arm."""
    out = []
    for arm in evaluation.erased:
        found = tables.kept_labels(evaluation, arm.name, detector)
        known, lost = [r for r in found if r.change.value is not None], tables.lost(found)
        out.append({
            "arm": arm.name, "detector": detector, "rows": lost[:SHOWN], "lost": len(lost),
            "known": len(known), "unknown": len(found) - len(known),
        })  # fmt: skip
    return out


def settings_lines(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Settings as lines of text, in the order they were recorded."""
    return [(name.replace("_", " "), _text(value)) for name, value in settings.items() if value is not None]


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items() if item is not None)
    if isinstance(value, list | tuple):
        shown = ", ".join(map(_text, value[:LONGEST]))
        return shown if len(value) <= LONGEST else f"{shown}, \u2026 ({len(value)} in all; the JSON has them)"
    return {True: "yes", False: "no"}.get(value, str(value)) if isinstance(value, bool) else str(value)


def together(text: str) -> str:
    """Keep numbers with their units, and intervals in one piece, when lines break."""
    text = re.sub(r"\([^()]* to [^()]*\)", lambda match: match[0].replace(" ", "\u00a0"), text)
    return text.replace(" %", "\u00a0%").replace(" points", "\u00a0points")


def percent(value: float | None) -> str:
    """0.123 -> ``12.3 %``, with a narrow space that does not break."""
    return "\u2013" if value is None else f"{100 * value:.1f}".removesuffix(".0") + "\u202f%"


def interval(estimate: Estimate, kind: str = "percent") -> str:
    """``4.3 to 21.4``; empty when there is none."""
    if estimate.low is None or estimate.high is None:
        return ""
    if kind == "percent":
        return f"{100 * estimate.low:.1f} to {100 * estimate.high:.1f}".replace(".0 ", " ").removesuffix(".0")
    if kind == "points":
        return f"{points(estimate.low)} to {points(estimate.high)}"
    return f"{shown(estimate.low, kind)} to {shown(estimate.high, kind)}"


def points(value: float | None) -> str:
    """-0.031 -> ``−3.1``, with a true minus sign."""
    if value is None:
        return "\u2013"
    text = f"{100 * value:+.1f}".replace("-", "\u2212")
    return "0" if text[1:] == "0.0" else text.removesuffix(".0")


def number(value: float | None) -> str:
    """Three significant digits, with a true minus sign."""
    return "\u2013" if value is None else f"{value:.3g}".replace("-", "\u2212")


def pvalue(value: float | None) -> str:
    """``p < 0.001`` rather than a row of zeros."""
    if value is None:
        return ""
    return "p\u202f<\u202f0.001" if value < 0.001 else f"p\u202f=\u202f{value:.{3 if value < 0.1 else 2}f}"


def shown(value: float | None, kind: str = "percent") -> str:
    """A number with its unit: "percent", "points", "ratio" (two decimals, and no more than \u00b110), or "number"."""
    if kind == "points" and value is not None:
        return f"{points(value)}\u00a0points"
    if kind == "ratio" and value is not None:
        beyond = "" if abs(value) <= FAR else "> " if value > 0 else "< "
        return f"{beyond}{max(-FAR, min(FAR, value)):.2f}".replace("-0.00", "0.00").replace("-", "\u2212")
    return percent(value) if kind == "percent" else number(value)


def along(value: float, scale: Scale) -> str:
    """The place of a number on its axis in per cent, cut at the ends."""
    share = (value - scale.low) / (scale.high - scale.low)
    return f"{100 * min(1.0, max(0.0, share)):.1f}".removesuffix(".0")


def in_css(text: str) -> str:
    """A text as it stands between single quotes in a style; quotes and backslashes by their numbers."""
    return "".join(f"\\{ord(c):x} " if c in "'\"\\\n<>&;{}" else c for c in visible(text))
