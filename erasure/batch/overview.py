"""How far a recipe is, what it will take, and one page of what came out."""

from __future__ import annotations

import collections
import csv
import dataclasses
import html
import io
import shutil
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from filelock import FileLock, Timeout

from erasure.batch.comparison import write_comparison
from erasure.batch.lines import GROUPS, answers_of, rates_of
from erasure.batch.recipe import Cell, Recipe
from erasure.batch.stages import LOCK, MADE, RESULT, replacing, state_of
from erasure.eval.judge import QUESTIONS
from erasure.io import write_atomically

VERDICTS = {key: question.heading for key, question in QUESTIONS.items()}
COLUMNS = (
    "cell", "state", "base", "concept", "method", "seed", *GROUPS, *VERDICTS.values(), "passes", "seconds", "note",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Row:
    """One cell for people.

    Attributes:
        state: done, failed, waiting, running (a process is at it) or damaged (its erasure is not what was written).
        rates: of the less flattering detector, for target, neighbours and unrelated; empty without an evaluation.
        passes: forward passes that making it took; 0 before it is done.
        seconds: the cell took, on the machine that did it.
        size: bytes of its folder.
        note: why it failed, or where it was pushed to.
        answers: the five verdicts of its evaluation, each with its number; empty without one.
    """

    cell: Cell
    state: str
    rates: dict[str, float]
    passes: int
    seconds: float
    size: int
    note: str
    answers: dict[str, str] = dataclasses.field(default_factory=dict)

    def values(self) -> list[Any]:
        """In the order of :data:`COLUMNS`."""
        rates = [round(self.rates[group], 4) if group in self.rates else "" for group in GROUPS]
        named = [self.cell.key, self.state, self.cell.base, self.cell.target, self.cell.method.name, self.cell.seed]
        rates += [self.answers.get(key, "") for key in VERDICTS]
        return [*named, *rates, self.passes or "", round(self.seconds, 1) or "", self.note]


def rows(recipe: Recipe) -> Iterator[Row]:
    """The cells of a recipe one by one, in its order. Every finished erasure is read and hashed."""
    for cell in recipe.cells():
        state, result = state_of(recipe, cell)
        at = state != "done" and busy(recipe.out / cell.key)
        yield row_of(recipe, cell, "running" if at else state, result)


def row_of(recipe: Recipe, cell: Cell, state: str, result: dict[str, Any]) -> Row:
    """A cell for people, from a state and a result that are known."""
    folder = recipe.out / cell.key
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) if state == "done" else 0
    return Row(
        cell,
        state,
        {group: rate.value for group, rate in rates_of(result.get("figures", ())).items()},
        result.get("cost", {}).get("passes", 0),
        result.get("seconds", 0.0),
        size,
        result.get("error") or (result.get("pushed") or {}).get("repository", ""),
        answers_of(result),
    )


def busy(folder: Path) -> bool:
    """Whether a process is at a cell; False where that cannot be seen, in a folder that may only be read."""
    if not (folder / LOCK).exists():
        return False
    try:
        with FileLock(str(folder / LOCK), timeout=0):
            return False
    except Timeout:
        return True
    except OSError:
        return False


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is left of a recipe.

    Attributes:
        states: how many cells are in each.
        passes, seconds, bytes: of what is left, by the medians of finished cells of the same method.
        unknown: methods of which no cell is finished, so that nothing can be said of theirs.
    """

    states: dict[str, int]
    passes: int
    seconds: float
    bytes: int
    unknown: tuple[str, ...]


def plan(recipe: Recipe) -> Plan:
    """How much of a recipe is left."""
    return plan_of(rows(recipe))


def plan_of(found: Iterable[Row]) -> Plan:
    """How much is left. A method's first finished cell says what the others will take, on the same machine."""
    done: dict[str, list[tuple[int, float, int]]] = collections.defaultdict(list)
    left, states = collections.Counter[str](), collections.Counter[str]()
    for row in found:
        states[row.state] += 1
        if row.state == "done":
            done[row.cell.method.name].append((row.passes, row.seconds, row.size))
        elif row.state != "failed":
            left[row.cell.method.name] += 1
    totals = [0.0, 0.0, 0.0]
    for method, count in left.items():
        for i, values in enumerate(zip(*done.get(method, ()), strict=True)):
            totals[i] += count * statistics.median(values)
    unknown = tuple(sorted(left.keys() - done.keys()))
    return Plan(dict(states), round(totals[0]), totals[1], round(totals[2]), unknown)


def collect(recipe: Recipe) -> list[Path]:
    """``cells.csv`` and ``index.html``, a table that sorts by a click, with links to every report; and the comparison.

    Raises:
        ValueError: no cell has been run.
    """
    found = list(rows(recipe))
    if not any(row.state in ("done", "failed") for row in found):
        raise ValueError(f"no cell of the recipe has a result in {recipe.out}; run it first")
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerows([COLUMNS, *([_plain(value) for value in row.values()] for row in found)])
    files = [recipe.out / "cells.csv", recipe.out / "index.html"]
    with replacing(*files):
        write_atomically(files[0], text.getvalue())
        write_atomically(files[1], page(found))
    return [*files, *write_comparison(recipe)]


def _plain(value: Any) -> Any:
    """Text that a spreadsheet does not take for a formula."""
    return f"'{value}" if isinstance(value, str) and value[:1] in tuple("=+-@\t\r\n＝＋－＠") else value


def page(found: Sequence[Row]) -> str:
    """A page of one table, without anything from elsewhere."""
    head = "".join(f"<th>{name}</th>" for name in COLUMNS)
    body = "".join(f"<tr>{''.join(_cells(row))}</tr>" for row in found)
    count = collections.Counter(row.state for row in found)
    states = ", ".join(f"{number} {state}" for state, number in count.items())
    return PAGE.format(states=html.escape(states), head=head, body=body)


def _cells(row: Row) -> Iterator[str]:
    for column, value in zip(COLUMNS, row.values(), strict=True):
        shown = f"{100 * value:.1f} %" if column in GROUPS and value != "" else html.escape(str(value))
        if column == "cell" and row.state == "done" and row.rates:
            shown = f'<a href="{html.escape(quote(row.cell.key))}/report.html">{shown}</a>'
        yield f"<td>{shown}</td>"


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Cells of the recipe</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem; color-scheme: light dark }}
table {{ border-collapse: collapse }}
th, td {{ padding: .3rem .6rem; border-bottom: 1px solid #8884; text-align: left; vertical-align: top }}
th {{ cursor: pointer; position: sticky; top: 0; background: Canvas }}
</style>
<h1>Cells of the recipe</h1>
<p>{states}. Target: pictures that still show it. Neighbours, unrelated: pictures drawn right. All by the less
flattering detector. The five verdicts are those of each report. Click a heading to sort.</p>
<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>
<script>
for (const [i, th] of document.querySelectorAll("th").entries()) th.onclick = () => {{
  const rows = [...document.querySelector("tbody").rows], key = r => r.cells[i].textContent, down = th.dataset.up;
  rows.sort((a, b) => key(a).localeCompare(key(b), "en", {{numeric: true}}) * (down ? -1 : 1));
  th.dataset.up = down ? "" : "1";
  document.querySelector("tbody").append(...rows);
}};
</script>
</html>
"""


def prunable(recipe: Recipe) -> list[Path]:
    """Folders in the recipe's that are cells of another recipe or of an earlier one, and that nobody is at."""
    own = {cell.key for cell in recipe.cells()}
    found = [f for f in sorted(recipe.out.glob("*")) if f.is_dir() and f.name not in own]
    return [f for f in found if any((f / name).exists() for name in (RESULT, MADE, LOCK)) and not busy(f)]


def prune(folders: Sequence[Path]) -> None:
    """Delete what :func:`prunable` found."""
    for folder in folders:
        shutil.rmtree(folder)


__all__ = [
    "COLUMNS",
    "Plan",
    "Row",
    "busy",
    "collect",
    "page",
    "plan",
    "plan_of",
    "prunable",
    "prune",
    "row_of",
    "rows",
]
