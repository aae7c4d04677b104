"""Run the cells of a recipe one after the other. What is done stays done; what fails is recorded and passed over."""

from __future__ import annotations

import dataclasses
import errno
import shutil
import time
import traceback
from pathlib import Path
from typing import Any

from rich.console import Console

from erasure.api import erase
from erasure.artifact import Erasure
from erasure.backbone import backbone_of
from erasure.batch.cost import counted
from erasure.batch.recipe import Cell, Recipe
from erasure.io import parse_json, printable, read_bytes, write_json
from erasure.methods import method_class
from erasure.opening import load_base
from erasure.terminal import PlainTable, say

RESULT = "result.json"


def run(recipe: Recipe, *, device: str | None = None, console: Console | None = None) -> int:
    """Run every unfinished cell; returns the number of cells that failed.

    Each cell gets a folder with the erasure, its evaluation and ``result.json``. That file is written last and whole:
    a cell either has one or is run again. A failed cell's file holds the error, and the cell is tried again next time.
    """
    console = console or Console()
    pipe, loaded = None, None
    results: dict[str, dict[str, Any]] = {}
    cells = recipe.cells()
    for number, cell in enumerate(cells, 1):
        folder = recipe.out / cell.key
        finished = result_of(recipe, cell)
        if finished is None or finished.get("status") != "done":
            say(f"[{number}/{len(cells)}] {cell.key}", on=console)
            began = time.perf_counter()
            try:
                if loaded != cell.base:
                    pipe = None  # let the last base go before the next one comes
                    pipe, loaded = load_base(cell.base, device=device, dtype=recipe.dtype), cell.base
                finished = {"status": "done", **_cell(pipe, cell, recipe, folder)}
            except Exception as error:
                if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                    raise  # a full disk fails every cell
                finished = {
                    "status": "failed",
                    "error": printable(error, limit=2000),
                    "traceback": traceback.format_exc(),
                }
            finished |= {"cell": cell.key, "seconds": time.perf_counter() - began, "recipe": _facts(cell)}
            write_json(folder / RESULT, finished, default=str)
        else:
            finished["skipped"] = True
        results[cell.key] = finished
    console.print(_table(results))
    return sum(result["status"] == "failed" for result in results.values())


def _cell(pipe: Any, cell: Cell, recipe: Recipe, folder: Path) -> dict[str, Any]:
    known = {field.name for field in dataclasses.fields(method_class(cell.method.name))}
    settings = {**cell.method.settings, **({"seed": cell.seed} if "seed" in known else {})}
    with counted(backbone_of(pipe)) as cost:
        edit = erase(
            pipe,
            cell.concepts,
            cell.method.name,
            keep=cell.suite.kept if cell.suite else None,
            preset=cell.method.preset,
            name=cell.key,
            checkpoint=folder / "training",
            apply=False,
            progress=False,
            **settings,
        )
    edit.save_pretrained(folder / "erasure")
    shutil.rmtree(folder / "training", ignore_errors=True)
    outcome: dict[str, Any] = {
        "erasure": str(folder / "erasure"),
        "report": edit.config["report"],
        "cost": {**dataclasses.asdict(cost), "passes": cost.passes},
    }
    if recipe.evaluate and cell.suite is not None:
        outcome["figures"] = _evaluate(pipe, edit, cell, recipe, folder)
    return outcome


def _evaluate(pipe: Any, edit: Erasure, cell: Cell, recipe: Recipe, folder: Path) -> list[dict[str, Any]]:
    from erasure.eval import evaluate, write_report
    from erasure.eval.detectors.choice import detectors_for

    assert cell.suite is not None  # the caller looked
    detectors, clip = detectors_for(cell.suite, device=str(pipe.device))
    found = evaluate(
        pipe,
        {cell.method.name.upper(): edit},
        cell.suite,
        detectors=detectors,
        clip=clip,
        limit=recipe.limit,
        cache_dir=recipe.out / "cache",
        progress=False,
    )
    found.save(folder)
    write_report(found, folder / "report.html", records=folder)
    return [dataclasses.asdict(row) for row in found.evaluation.rows() if row.arm != "base"]


def _facts(cell: Cell) -> dict[str, Any]:
    return {
        "base": cell.base,
        "concept": cell.target,
        "method": dataclasses.asdict(cell.method),
        "seed": cell.seed,
    }  # type: ignore[call-overload]


def result_of(recipe: Recipe, cell: Cell) -> dict[str, Any] | None:
    """What a cell came to, failed ones included; None where it has not been run, or the file is damaged."""
    try:
        return parse_json(read_bytes(recipe.out / cell.key / RESULT))
    except (FileNotFoundError, ValueError):
        return None


def _table(results: dict[str, dict[str, Any]]) -> PlainTable:
    table = PlainTable("cell", "status", "seconds", "note")
    for key, result in results.items():
        state = "skipped (done before)" if result.get("skipped") else result["status"]
        table.add_row(key, state, f"{result['seconds']:.0f}", _note(result))
    return table


def _note(result: dict[str, Any]) -> str:
    """What went wrong, or the first detector's rates, or, unevaluated, how far the weights moved."""
    if "error" in result:
        return result["error"]
    if not result.get("figures"):
        return f"weights moved by {result['report']['relative_change']:.2e}"
    detector = result["figures"][0]["detector"]
    rates = {row["group"]: row["rate"]["value"] for row in result["figures"] if row["detector"] == detector}
    return (
        ", ".join(f"{group} {100 * rate:.0f} %" for group, rate in rates.items() if rate is not None) + f" ({detector})"
    )
