"""Run the cells of a recipe. What is done stays done, what fails is recorded, and several processes share the work."""

from __future__ import annotations

import collections
import dataclasses
import errno
import os
import time
import traceback
from collections.abc import Callable
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console

from erasure.batch.recipe import Cell, Recipe
from erasure.batch.stages import LOCK, RESULT, finish, result_of, so_far, state_of, wishes
from erasure.batch.worker import Worker, alone
from erasure.io import printable, write_json
from erasure.opening import load_base
from erasure.terminal import say

POLL = 5.0  # seconds between looks at cells that other processes are at


def run(
    recipe: Recipe,
    *,
    device: str | None = None,
    console: Console | None = None,
    retry_failed: bool = False,
    worker: Worker | None = None,
    poll: float = POLL,
) -> int:
    """Run every unfinished cell; returns the number of cells that have failed.

    Each cell gets a folder with the erasure (and ``made.json``), its evaluation and, written last, ``result.json``. A
    process that is killed loses the stage it was at: the next run goes on behind the last one that was finished, a
    training at its last checkpoint. Every process that runs the same recipe takes cells that nobody else is at, so
    more can join or leave at any time, on every machine that sees the folder.

    Args:
        retry_failed: run cells again that failed before; otherwise they stay as they are.
        worker: which of several processes this one is; from the environment by default.
        poll: seconds between looks at cells that other processes are at.

    Raises:
        OSError: the disk is full, which would fail every cell.
    """
    worker = worker or Worker.of(os.environ)
    cells, job = recipe.cells(), _Job(recipe, worker.device(device))
    before = {cell.key: attempts_of(recipe, cell) for cell in cells} if retry_failed else {}
    left, states, total = collections.deque(worker.order(cells)), collections.Counter[str](), len(cells)

    def finished(cell: Cell) -> bool:
        state, result = state_of(recipe, cell)
        again = state == "failed" and result.get("attempts", 1) == before.get(cell.key)
        if state in ("waiting", "damaged") or again:
            return False
        states[state] += 1
        return True

    with alone():
        while left:
            others = 0
            for _ in range(len(left)):
                cell = left.popleft()
                if finished(cell):
                    continue
                try:
                    with FileLock(_lock(recipe, cell), timeout=0):
                        if not finished(cell):  # nobody did it while the lock was waited for
                            say(f"[{total - len(left)}/{total}] {cell.key}", on=console or Console())
                            job.run(cell, attempts_of(recipe, cell) + 1)
                            states[state_of(recipe, cell)[0]] += 1
                except Timeout:
                    others += 1
                    left.append(cell)
            if others:
                time.sleep(poll)
    return states["failed"]


class _Job:
    """What is kept from one cell to the next: the base that is open, and the judges' networks."""

    def __init__(self, recipe: Recipe, device: str | None) -> None:
        self._recipe, self._device = recipe, device
        self._pipe: Any = None
        self._base: str | None = None
        self._judges: Callable[..., Any] | None = None

    def run(self, cell: Cell, attempt: int) -> None:
        """Do the stages of a cell that are not done, and write its result."""
        folder, began = self._recipe.out / cell.key, time.perf_counter()
        try:
            outcome = {"status": "done", **self._stages(cell)}
        except Exception as error:
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise  # a full disk fails every cell
            outcome = {
                **so_far(self._recipe, cell),
                "status": "failed",
                "error": printable(error, limit=2000),
                "traceback": traceback.format_exc(),
            }
        facts = {"cell": cell.key, "attempts": attempt, "recipe": _facts(cell), "asked": wishes(self._recipe, cell)}
        write_json(folder / RESULT, {**outcome, **facts, "seconds": time.perf_counter() - began}, default=str)

    def _stages(self, cell: Cell) -> dict[str, Any]:
        return finish(self._opened(cell), cell, self._recipe, self._judge)

    def _opened(self, cell: Cell) -> Any:
        if self._base != cell.base:
            self._pipe = self._base = None  # let the last base go before the next one comes
            self._pipe = load_base(cell.base, device=self._device, dtype=self._recipe.dtype)
            self._base = cell.base
        return self._pipe

    def _judge(self, suite: Any) -> Any:
        if self._judges is None:
            from erasure.eval.detectors.choice import Judges

            self._judges = Judges(device=str(self._pipe.device))
        return self._judges(suite)


def attempts_of(recipe: Recipe, cell: Cell) -> int:
    """How often a cell was tried; 0 before the first time."""
    result = result_of(recipe, cell) or {}
    return int(result.get("attempts", 1)) if result else 0


def _lock(recipe: Recipe, cell: Cell) -> str:
    folder = recipe.out / cell.key
    folder.mkdir(parents=True, exist_ok=True)
    return str(folder / LOCK)


def _facts(cell: Cell) -> dict[str, Any]:
    method = dataclasses.asdict(cell.method)  # type: ignore[call-overload]
    return {"base": cell.base, "concept": cell.target, "method": method, "seed": cell.seed}


__all__ = ["attempts_of", "run"]
