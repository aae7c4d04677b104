"""The work of one cell in stages, each kept as soon as it is there: the erasure, then what an evaluation says of it."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from erasure.api import erase
from erasure.artifact import Erasure
from erasure.artifact.files import WEIGHTS
from erasure.backbone import backbone_of
from erasure.batch.cost import counted
from erasure.batch.recipe import Cell, Recipe
from erasure.io import parse_json, read_bytes, sha256_file, write_json

RESULT, MADE, LOCK = "result.json", "made.json", ".lock"
State = Literal["done", "failed", "waiting", "damaged"]


def record(file: Path) -> dict[str, Any] | None:
    """What a stage wrote; None where there is nothing, or something damaged."""
    try:
        found = parse_json(read_bytes(file))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def result_of(recipe: Recipe, cell: Cell) -> dict[str, Any] | None:
    """What a cell came to, failed ones included; None where it has not been run, or the file is damaged."""
    return record(recipe.out / cell.key / RESULT)


def state_of(recipe: Recipe, cell: Cell) -> tuple[State, dict[str, Any]]:
    """Where a cell stands, with its result. One whose erasure is gone, truncated or altered is *damaged*."""
    result = result_of(recipe, cell)
    if result is None:
        return "waiting", {}
    if result.get("status") == "failed":
        return "failed", result
    return ("done" if intact(recipe.out / cell.key, result) else "damaged"), result


def intact(folder: Path, made: dict[str, Any]) -> bool:
    """Whether the erasure of a cell is the one that was written."""
    file, kept = folder / "erasure" / WEIGHTS, made.get("weights")
    if not isinstance(kept, dict) or not file.is_file() or file.stat().st_size != kept.get("bytes"):
        return False
    return sha256_file(file) == kept.get("sha256")


def make(pipe: Any, cell: Cell, folder: Path) -> tuple[Erasure, dict[str, Any]]:
    """The erasure of a cell and its record: made and saved, or opened where an earlier run got as far as that."""
    made = record(folder / MADE)
    if made is not None and intact(folder, made):
        return Erasure.from_pretrained(folder / "erasure"), made
    settings = {**cell.method.settings, **({"seed": cell.seed} if cell.method.seeded else {})}
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
    file = folder / "erasure" / WEIGHTS
    made = {
        "erasure": "erasure",
        "weights": {"sha256": sha256_file(file), "bytes": file.stat().st_size},
        "report": edit.config.get("report") or {},  # not every kind has figures
        "cost": {**dataclasses.asdict(cost), "passes": cost.passes},
    }
    write_json(folder / MADE, made, default=str)
    shutil.rmtree(folder / "training", ignore_errors=True)
    return edit, made


def judge(pipe: Any, edit: Erasure, cell: Cell, recipe: Recipe, judges: Any) -> list[dict[str, Any]]:
    """The rates of an evaluation of a cell on its suite. Its pictures, scores and report lie in the cell's folder.

    Args:
        judges: detectors for a suite, see :class:`erasure.eval.detectors.choice.Judges`.
    """
    from erasure.eval import evaluate, write_report

    assert cell.suite is not None  # the caller looked
    suite, folder = cell.suite, recipe.out / cell.key
    detectors, clip = judges(suite)

    def run(batch_size: int) -> Any:
        return evaluate(
            pipe,
            {cell.method.name.upper(): edit},
            suite,
            detectors=detectors,
            clip=clip,
            limit=recipe.limit,
            batch_size=batch_size,
            cache_dir=recipe.out / "cache",
            progress=False,
        )

    found = within_memory(run)
    found.save(folder)
    write_report(found, folder / "report.html", records=folder)
    return [dataclasses.asdict(row) for row in found.evaluation.rows() if row.arm != "base"]


def within_memory(run: Callable[[int], Any], batch_size: int = 16) -> Any:
    """What ``run(batch_size)`` returns, with half as many at once each time the device has too little memory.

    Raises:
        torch.OutOfMemoryError: one at a time is too many.
    """
    import torch

    while True:
        try:
            return run(batch_size)
        except torch.OutOfMemoryError:
            if batch_size == 1:
                raise
            batch_size //= 2
        torch.cuda.empty_cache()  # outside of the handler, whose traceback holds tensors


__all__ = ["LOCK", "MADE", "RESULT", "State", "intact", "judge", "make", "record", "result_of", "state_of"]
