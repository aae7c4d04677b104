"""Curves of a report: rates along a setting, and recall of filters against their false positives.

Only geometry is made here, in the units of a small picture that a template draws.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

from erasure.eval.core.models import Role
from erasure.eval.probes.base import Evidence, Observation

POINTS = 3  # fewer are no curve
AXES = {
    "step": "training steps",
    "psi": "ψ, share of the steps that the base takes",
    "k": "tries",
    "guidance": "guidance scale",
    "steps": "sampling steps",
    "strength": "strength",
    "requests": "requests met",
    "scale": "scale",
}
DOUBLING = ("step", "k")  # drawn along log2(1 + x), which keeps 0
ROLES = {"base": "base", "gold": "retrained", "twin": "retrained on everything", "null": "null control"}
LOOKS = 6  # erasures with a colour and a dash of their own; a seventh starts again


@dataclasses.dataclass(frozen=True)
class Line:
    """One model's curve: ``points`` and ``band`` as an SVG polygon has them, ``dots`` where it was measured."""

    model: str
    role: str
    look: str
    points: str
    band: str = ""
    dots: tuple[tuple[float, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Figure:
    """One chart, along ``word``; ``words`` describe it for those who do not see it."""

    word: str
    title: str
    x_name: str
    lines: tuple[Line, ...]
    x_ticks: tuple[tuple[float, str], ...]
    words: str
    left: ClassVar = 40
    right: ClassVar = 350
    top: ClassVar = 8
    bottom: ClassVar = 150
    height: ClassVar = 186

    @property
    def y_ticks(self) -> list[tuple[float, str]]:
        return [(up(y), f"{100 * y:.0f}\u202f%") for y in (0.0, 0.5, 1.0)]


def up(y: float) -> float:
    """The height of a share."""
    return round(Figure.bottom - (Figure.bottom - Figure.top) * min(1.0, max(0.0, y)), 1)


def curve_of(family: str) -> tuple[str, float] | None:
    """ "step 10" -> ("step", 10.0); None for a family that is no point of a curve."""
    match = re.fullmatch(r"([a-z]+)[ =](\d+(?:\.\d+)?)", family)
    return None if match is None else (match[1], float(match[2]))


def looks(models: Mapping[str, Role]) -> dict[str, str]:
    """The style of each model's line: controls by their role, every erasure in its own colour."""
    erased = [name for name, role in models.items() if role == "erased"]
    return {name: f"e{erased.index(name) % LOOKS}" if role == "erased" else role for name, role in models.items()}


def curves(evidence: Sequence[Evidence], models: Mapping[str, Role]) -> list[Figure]:
    """One figure for every setting along which a probe has rates at :data:`POINTS` values or more."""
    along: dict[str, dict[str, dict[float, Evidence]]] = {}
    for e in evidence:
        at = curve_of(e.family)
        if at is not None and e.measure == "rate" and e.unit == "share" and e.estimate.value is not None:
            along.setdefault(at[0], {}).setdefault(e.model, {})[at[1]] = e
    return [
        _figure(word, own, models)
        for word, own in along.items()
        if len({x for at in own.values() for x in at}) >= POINTS
    ]


def _figure(word: str, own: Mapping[str, Mapping[float, Evidence]], models: Mapping[str, Role]) -> Figure:
    xs = sorted({x for at in own.values() for x in at})
    across = _across(xs, doubling=word in DOUBLING)
    lines = tuple(_line(name, own[name], models, across, xs) for name in _order(models) if name in own)
    last = {name: max(at) for name, at in own.items()}
    ends = (f"{name} {100 * (own[name][x].estimate.value or 0.0):.0f} % at {x:g}" for name, x in last.items())
    name = AXES.get(word, word)
    return Figure(
        word, "Share of pictures with the target", name, lines, _ticks(xs, across), f"along {name}; {', '.join(ends)}"
    )


def _order(models: Mapping[str, Role]) -> list[str]:
    """Controls first, so that erasures are drawn over them."""
    return sorted(models, key=lambda name: ("null", "twin", "gold", "base", "erased").index(models[name]))


def _across(xs: Sequence[float], *, doubling: bool) -> Callable[[float], float]:
    scale: Callable[[float], float] = (lambda x: math.log2(1 + x)) if doubling else (lambda x: x)
    low, high = scale(xs[0]), scale(xs[-1])

    def across(x: float) -> float:
        return round(Figure.left + (Figure.right - Figure.left) * (scale(x) - low) / (high - low), 1)

    return across


def _ticks(xs: Sequence[float], across: Callable[[float], float]) -> tuple[tuple[float, str], ...]:
    """Labels of the measured places, without those that would touch the one before."""
    out: list[tuple[float, str]] = []
    for x in xs:
        if not out or across(x) - out[-1][0] >= 7 + 6 * len(f"{x:g}"):
            out.append((across(x), f"{x:g}"))
    return tuple(out)


def _line(
    name: str,
    at: Mapping[float, Evidence],
    models: Mapping[str, Role],
    across: Callable[[float], float],
    xs: Sequence[float],
) -> Line:
    """The line of one model; one with a single point, as an untrained base, is drawn level."""
    places = [(across(x), at[x].estimate) for x in sorted(at)]
    dots = tuple((x, up(e.value or 0.0)) for x, e in places)
    if len(places) == 1:
        places = [(across(x), places[0][1]) for x in (xs[0], xs[-1])]
    points = " ".join(f"{x},{up(e.value or 0.0)}" for x, e in places)
    known = [(x, e.low, e.high) for x, e in places if e.low is not None and e.high is not None]
    edge = [(x, up(high)) for x, _, high in known] + [(x, up(low)) for x, low, _ in reversed(known)]
    band = " ".join(f"{x},{y}" for x, y in edge) if len(known) > 1 else ""
    role = models[name]
    return Line(name, ROLES.get(role, ""), looks(models)[name], points, band, dots)


def operating(rows: Mapping[str, Sequence[Observation]], models: Mapping[str, Role]) -> list[Figure]:
    """Recall of filters against what else they stop, at every threshold; where rows have ``wanted`` and ``margin``."""
    lines, words = [], []
    for name, own in rows.items():
        cases = [r.facts for r in own if "margin" in r.facts]
        margins = {side: [float(f["margin"]) for f in cases if f.get("wanted") is side] for side in (True, False)}
        if not margins[True] or not margins[False]:
            continue
        cuts = [math.inf, *sorted({*margins[True], *margins[False]}, reverse=True)]
        path = [_stopped(margins, cut) for cut in cuts]
        now = tuple(sum(m > 0 for m in margins[side]) / len(margins[side]) for side in (False, True))
        across = _across((0.0, 1.0), doubling=False)
        points = " ".join(f"{across(false)},{up(recall)}" for false, recall in path)
        role = models[name]
        lines.append(Line(name, ROLES.get(role, ""), looks(models)[name], points, dots=((across(now[0]), up(now[1])),)))
        words.append(f"{name} stops {100 * now[1]:.0f} % at {100 * now[0]:.0f} % false positives")
    if not lines:
        return []
    ticks = tuple((_across((0.0, 1.0), doubling=False)(x), f"{100 * x:.0f}\u202f%") for x in (0.0, 0.5, 1.0))
    return [
        Figure(
            "", "Recall; the dot is the threshold in use", "false positive rate", tuple(lines), ticks, "; ".join(words)
        )
    ]


def _stopped(margins: Mapping[bool, Sequence[float]], cut: float) -> tuple[float, float]:
    """False positive rate and recall when everything from ``cut`` on is stopped."""
    shares = [sum(m >= cut for m in margins[side]) / len(margins[side]) for side in (False, True)]
    return shares[0], shares[1]
