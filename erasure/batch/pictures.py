"""The pictures of a comparison: a row for each method, a panel for each number, with its intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from erasure.batch.lines import GROUPS, INSIDE, Line, Rate, ranked
from erasure.methods import method_class

TRAINED, NOT_TRAINED = "#d1495b", "#30638e"
SHARES = {  # of the pictures of a group, in per cent
    "target": "target shown, %\n(lower is better)",
    "neighbours": "neighbours right, %\n(higher is better)",
    "unrelated": "unrelated right, %\n(higher is better)",
}
LEFT = {measure: f"{title}\n(0: never saw the target)".replace(", ", ",\n") for measure, title in INSIDE.items()}
REST = "kept pictures right,\npoints against the base"
Panel = tuple[str, Mapping[str, Rate], float | None]  # a title, the number of each label, a dotted line; None: shares


def kept_out(lines: Sequence[Line], file: Path) -> None:
    """How often each method lets the target through when it is asked for by name, and how often the rest is right.

    Args:
        lines: one for each method. Those without rates are left out.
    """
    shown = [line for line in ranked(lines) if line.rates]
    panels: list[Panel] = [
        (SHARES[group], {line.label: _scaled(line.rates[group]) for line in shown if group in line.rates}, None)
        for group in GROUPS
    ]
    _draw(f"Asked for by name{_on(lines)}", shown, [panel for panel in panels if panel[1]], file)


def still_inside(lines: Sequence[Line], file: Path) -> None:
    """What each method leaves in the weights, and what it does to the rest of the model; a panel for each measure.

    The dotted line is a model that never saw the target; in the last panel it is the base.
    """
    shown = [line for line in ranked(lines) if line.inside and line.rest]
    panels: list[Panel] = [
        (LEFT[name], {line.label: line.inside[name] for line in shown if name in line.inside}, 0.0) for name in INSIDE
    ]
    panels.append((REST, {line.label: _scaled(line.rest) for line in shown if line.rest}, 0.0))
    _draw(f"Still in the weights{_on(lines)}", shown, [panel for panel in panels if panel[1]], file)


def _trains(name: str) -> bool:
    """Whether a method fine-tunes."""
    from erasure.methods.finetune import FineTune

    return issubclass(method_class(name), FineTune)


def _draw(title: str, lines: Sequence[Line], panels: Sequence[Panel], file: Path) -> None:
    """Dots with their intervals: a row for each line, the first at the top, and a panel for each number."""
    from matplotlib.figure import Figure

    names = [line.label for line in lines]
    figure = Figure(figsize=(2 + 2.1 * len(panels), 1.9 + 0.27 * len(lines)), layout="constrained")
    for axes, (heading, rates, at) in zip(
        figure.subplots(1, len(panels), squeeze=False, sharey=True)[0], panels, strict=True
    ):
        if at is None:
            axes.set_xlim(-4, 104)  # per cent
        else:
            axes.axvline(at, color="#555", linestyle=":", linewidth=1, zorder=0)
        for y, line in enumerate(lines):
            if rate := rates.get(line.label):
                colour = TRAINED if _trains(line.method) else NOT_TRAINED
                axes.errorbar(rate.value, y, xerr=_arms(rate), color="#999", linewidth=1.2, zorder=1)
                axes.scatter(rate.value, y, s=36, color=colour, marker="D" if colour == TRAINED else "o", zorder=2)
        axes.set_title(heading, fontsize=10)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        axes.grid(color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
    figure.suptitle(title, fontsize=12)
    figure.supxlabel("red diamonds: fine-tunes; blue dots: no training; lines: 95 % intervals", fontsize=9)
    figure.savefig(file, dpi=140)


def _scaled(rate: Rate) -> Rate:
    """In per cent, or in points."""
    low, high = (None if end is None else 100 * end for end in (rate.low, rate.high))
    return Rate(100 * rate.value, low, high)


def _arms(rate: Rate) -> list[list[float]]:
    """The interval as matplotlib has it; an open end has no arm."""
    low, high = (rate.value if end is None else end for end in (rate.low, rate.high))
    return [[max(rate.value - low, 0.0)], [max(high - rate.value, 0.0)]]


def _on(lines: Sequence[Line]) -> str:
    suites = list(dict.fromkeys(line.suite for line in lines if line.error is None))
    if len(suites) != 1:
        return ": means over targets"
    return f": means over {suites[0]}" if suites[0].endswith(" targets") else f": {suites[0]}"


__all__ = ["kept_out", "still_inside"]
