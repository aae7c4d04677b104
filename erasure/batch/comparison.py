"""Several methods on one page: what each keeps out, what it keeps, what it cost. Made from a recipe's results."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from erasure.batch.recipe import Cell, Recipe
from erasure.batch.stages import LOCK, result_of
from erasure.io import remove_partial, write_atomically, write_json, writing
from erasure.methods import method_class

GROUPS = ("target", "neighbours", "unrelated")


@dataclasses.dataclass(frozen=True)
class Rate:
    """A share of pictures with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.value:.0f} % ({100 * self.low:.0f} to {100 * self.high:.0f})"


@dataclasses.dataclass(frozen=True)
class Line:
    """One method on one suite.

    Attributes:
        method, suite: names.
        rates: group ("target", "neighbours", "unrelated") to the share of its pictures that show what was asked for.
            Of several detectors the less flattering one: the highest rate of the target, the lowest of what is kept.
        passes: forward passes that making the erasure took; see :class:`~erasure.batch.cost.Cost`.
        seconds: it took, on the machine of this run.
        size: bytes of the erasure's file.
        error: why there is none, otherwise None.
    """

    method: str
    suite: str
    rates: dict[str, Rate] = dataclasses.field(default_factory=dict)
    passes: int = 0
    seconds: float = 0.0
    size: int = 0
    error: str | None = None


def lines_of(recipe: Recipe) -> list[Line]:
    """The results of a recipe that has been run, in its order; cells without one are left out."""
    found = ((cell, result_of(recipe, cell)) for cell in recipe.cells())
    return [_line(cell, result, recipe.out / cell.key) for cell, result in found if result is not None]


def _line(cell: Cell, result: dict[str, Any], folder: Path) -> Line:
    if result["status"] != "done":
        return Line(cell.method.name, cell.target, error=result["error"])
    rates = rates_of(result.get("figures", ()))
    size = sum(file.stat().st_size for file in (folder / "erasure").glob("*.safetensors"))
    cost = result["cost"]
    return Line(cell.method.name, cell.target, rates, cost["passes"], cost["seconds"], size)


def rates_of(figures: Sequence[dict[str, Any]]) -> dict[str, Rate]:
    """Group to its rate by the less flattering detector: the highest of the target, the lowest of what is kept."""
    rates = {}
    for group in GROUPS:
        own = [row["rate"] for row in figures if row["group"] == group]
        own = [Rate(rate["value"], rate["low"], rate["high"]) for rate in own if rate["value"] is not None]
        if own:
            worst = max if group == "target" else min
            rates[group] = worst(own, key=lambda rate: rate.value)
    return rates


def table(lines: Sequence[Line]) -> str:
    """A Markdown table, those that keep the target out best first; failed ones last, with their reason."""
    rows = [
        "| method | on | target shown | neighbours right | unrelated right | forward passes | seconds | file |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for line in sorted(lines, key=_order):
        if line.error is not None:
            rows.append(f"| `{line.method}` | {line.suite} | failed: {line.error.replace('|', '/')} | | | | | |")
            continue
        shown = [str(line.rates[group]) if group in line.rates else "" for group in GROUPS]
        cost = [f"{line.passes:,}", f"{line.seconds:.0f}", f"{line.size / 1e6:.2f} MB"]
        rows.append(f"| `{line.method}` | {line.suite} | {' | '.join([*shown, *cost])} |")
    return "\n".join(rows)


def _order(line: Line) -> tuple[bool, str, float, str]:
    target = line.rates.get("target")
    return line.error is not None, line.suite, target.value if target else 1.0, line.method


def picture(lines: Sequence[Line], file: Path) -> None:
    """How far each method keeps the target out, against how many neighbours it keeps; larger points cost more.

    A point is the mean over suites. Up and to the right is better. Methods on the dashed line are beaten by none on
    both counts.
    """
    from matplotlib.figure import Figure

    points = {}
    for method in dict.fromkeys(line.method for line in lines):
        own = [line for line in lines if line.method == method and {"target", "neighbours"} <= line.rates.keys()]
        if own:
            out = statistics.mean(1 - line.rates["target"].value for line in own)
            kept = statistics.mean(line.rates["neighbours"].value for line in own)
            points[method] = (kept, out, statistics.mean(line.passes for line in own), own)
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes, named = figure.subplots(), dict[tuple[float, float], list[str]]()
    for method, (kept, out, passes, own) in points.items():
        if len(own) == 1:
            near, far = own[0].rates["neighbours"], own[0].rates["target"]
            bars = [[[kept - near.low], [near.high - kept]], [[far.high - far.value], [far.value - far.low]]]
            axes.errorbar(100 * kept, 100 * out, xerr=[[100 * v[0]] for v in bars[0]],
                          yerr=[[100 * v[0]] for v in bars[1]], color="#bbb", linewidth=0.8, zorder=1)  # fmt: skip
        colour = "#d1495b" if method_trains(method) else "#30638e"
        axes.scatter(100 * kept, 100 * out, s=25 + passes**0.5, color=colour, alpha=0.8, zorder=2)
        named.setdefault((100 * kept, 100 * out), []).append(method)
    for at, names in named.items():  # methods at one place share a label; slanted ones stand closer
        label = ", ".join(names)
        axes.annotate(
            label, at, xytext=(3, 6), textcoords="offset points", fontsize=8, rotation=40, rotation_mode="anchor"
        )
    front = best({method: (kept, out) for method, (kept, out, *_) in points.items()})
    ends = sorted((100 * points[m][0], 100 * points[m][1]) for m in front)
    axes.plot(*zip(*ends, strict=True), "--", color="#888", linewidth=1, zorder=0)
    axes.margins(x=0.12, y=0.14)  # room for the labels
    axes.set_xlabel("neighbours drawn right, %")
    axes.set_ylabel("pictures of the target without it, %")
    axes.set_title("Kept out when asked by name, against neighbours kept\nred: trained, blue: not; larger: more passes")
    figure.savefig(file, dpi=110)


def method_trains(name: str) -> bool:
    """Whether a method fine-tunes."""
    from erasure.methods.finetune import FineTune

    return issubclass(method_class(name), FineTune)


def best(points: dict[str, tuple[float, float]]) -> list[str]:
    """The names that no other point beats on both counts."""
    return [
        name
        for name, (x, y) in points.items()
        if not any((a >= x and b >= y) and (a > x or b > y) for other, (a, b) in points.items() if other != name)
    ]


def write_comparison(recipe: Recipe) -> list[Path]:
    """``comparison.json``, ``comparison.md`` and, where something was measured, ``comparison.png`` beside the cells.

    Raises:
        ValueError: no cell of the recipe has been run.
    """
    lines = lines_of(recipe)
    if not lines:
        raise ValueError(f"no cell of the recipe has a result in {recipe.out}; run it first")
    files = [recipe.out / f"comparison.{kind}" for kind in ("json", "md", "png")]
    note = (
        "Shown and right: shares of pictures with 95 % intervals, by the less flattering detector. This says what is "
        "drawn when the target is asked for by name; it says nothing about attacks or about the weights. Seconds "
        "compare within this run only."
    )
    with replacing(*files):
        write_json(files[0], [dataclasses.asdict(line) for line in lines])
        write_atomically(files[1], f"{table(lines)}\n\n{note}\n".encode())
        if not any(line.rates for line in lines):
            return files[:2]
        with writing(files[2]) as partial:
            picture(lines, partial)
    return files


@contextlib.contextmanager
def replacing(*files: Path) -> Iterator[None]:
    """Files of a recipe's folder that one process at a time writes anew; what killed ones left of them is deleted."""
    files[0].parent.mkdir(parents=True, exist_ok=True)
    with FileLock(str(files[0].parent / LOCK)):
        for file in files:
            remove_partial(file)
        yield


__all__ = ["Line", "Rate", "best", "lines_of", "picture", "replacing", "table", "write_comparison"]
