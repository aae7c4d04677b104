"""The pictures of a comparison: a point for each method, with its intervals."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from erasure.batch.comparison import INSIDE, Line, Rate
from erasure.methods import method_class

TRAINED, NOT_TRAINED = "#d1495b", "#30638e"
Point = tuple[Line, Rate, Rate]  # a line, and where it stands: x and y


def kept_out(lines: Sequence[Line], file: Path) -> None:
    """How far each method keeps the target out, against how many neighbours it keeps; larger points cost more.

    Up and to the right is better. Methods on the dashed line are beaten by none on both counts.

    Args:
        lines: one for each method.
    """
    points = [
        (line, _scaled(line.rates["neighbours"]), _scaled(line.rates["target"], -100, 100))
        for line in lines
        if {"target", "neighbours"} <= line.rates.keys()
    ]
    figure = _figure(1)
    axes = figure.subplots()
    _draw(axes, points, up=1)
    axes.set_xlabel("neighbours drawn right, %")
    axes.set_ylabel("pictures of the target without it, %")
    axes.set_title(
        f"Kept out when asked by name, against neighbours kept{_on(lines)}\n"
        "red: trained, blue: not; larger: more passes"
    )
    figure.savefig(file, dpi=110)


def still_inside(lines: Sequence[Line], file: Path) -> None:
    """What each method leaves in the weights, against what it does to the rest of the model; a panel for each measure.

    Up and to the right is better: nothing left, nothing else changed. The dotted line is a model that never saw the
    target.
    """
    measured = [name for name in INSIDE if any(name in line.inside and line.rest for line in lines)]
    figure = _figure(len(measured))
    for axes, name in zip(figure.subplots(1, len(measured), squeeze=False)[0], measured, strict=True):
        points = [
            (line, _scaled(line.rest), line.inside[name])
            for line in lines
            if line.rest is not None and name in line.inside
        ]
        axes.axhline(0, color="#888", linestyle=":", linewidth=1, zorder=0)
        _draw(axes, points, up=-1)
        axes.invert_yaxis()
        axes.set_xlabel("kept pictures drawn right, points against the base")
        axes.set_ylabel(INSIDE[name])
    figure.suptitle(
        f"Still in the weights, against the rest of the model{_on(lines)}\n"
        "red: trained, blue: not; larger: more passes; dotted: a model that never saw the target"
    )
    figure.savefig(file, dpi=110)


def best(points: dict[Any, tuple[float, float]]) -> list[Any]:
    """The names that no other point beats on both counts."""
    return [
        name
        for name, (x, y) in points.items()
        if not any((a >= x and b >= y) and (a > x or b > y) for other, (a, b) in points.items() if other != name)
    ]


def method_trains(name: str) -> bool:
    """Whether a method fine-tunes."""
    from erasure.methods.finetune import FineTune

    return issubclass(method_class(name), FineTune)


def _figure(panels: int) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(9 if panels == 1 else 7 * panels, 6), layout="constrained")


def _draw(axes: Any, points: Sequence[Point], *, up: int) -> None:
    """Points, their intervals, labels, and the front. ``up`` is -1 where lower is better."""
    named = dict[tuple[float, float], list[str]]()
    for line, x, y in points:
        bars = {"xerr": _arms(x), "yerr": _arms(y)}
        axes.errorbar(x.value, y.value, **bars, color="#bbb", linewidth=0.8, zorder=1)
        colour = TRAINED if method_trains(line.method) else NOT_TRAINED
        axes.scatter(x.value, y.value, s=25 + line.passes**0.5, color=colour, alpha=0.8, zorder=2)
        named.setdefault((x.value, y.value), []).append(line.label)
    for at, names in named.items():  # methods at one place share a label; slanted ones stand closer
        label = ", ".join(names)
        axes.annotate(
            label, at, xytext=(3, 6), textcoords="offset points", fontsize=8, rotation=40, rotation_mode="anchor"
        )
    front = best({i: (x.value, up * y.value) for i, (_, x, y) in enumerate(points)})
    ends = sorted((points[i][1].value, points[i][2].value) for i in front)
    axes.plot(*zip(*ends, strict=True), "--", color="#888", linewidth=1, zorder=0)
    axes.margins(x=0.12, y=0.14)  # room for the labels


def _scaled(rate: Rate, factor: float = 100, shift: float = 0) -> Rate:
    """``shift + factor x`` with the interval; its ends change places where the factor is negative."""
    low, high = (None if end is None else shift + factor * end for end in (rate.low, rate.high))
    return Rate(shift + factor * rate.value, *((low, high) if factor > 0 else (high, low)))


def _arms(rate: Rate) -> list[list[float]]:
    """The interval as matplotlib has it; an open end has no arm."""
    low, high = (rate.value if end is None else end for end in (rate.low, rate.high))
    return [[max(rate.value - low, 0.0)], [max(high - rate.value, 0.0)]]


def _on(lines: Sequence[Line]) -> str:
    suites = list(dict.fromkeys(line.suite for line in lines if line.error is None))
    if len(suites) != 1:
        return "; means over targets"
    return f"; means over {suites[0]}" if suites[0].endswith(" targets") else f"; {suites[0]}"


__all__ = ["best", "kept_out", "method_trains", "still_inside"]
