"""Run the cells of a recipe. What is done stays done, what fails is recorded, and several processes share the work."""

from __future__ import annotations

import collections
import dataclasses
import errno
import os
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console

from erasure.batch.losses import started
from erasure.batch.overview import Row, row_of
from erasure.batch.progress import Progress
from erasure.batch.recipe import Cell, Recipe
from erasure.batch.stages import LOCK, RESULT, finish, result_of, so_far, state_of, wishes
from erasure.batch.worker import Worker, alone
from erasure.io import printable, remove_partials, write_json
from erasure.opening import load_base

POLL = 5.0  # seconds between looks at cells that other processes are at
FOR_ALL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # no room, or nothing may be written: it would fail every cell


def run(
    recipe: Recipe,
    *,
    device: str | None = None,
    console: Console | None = None,
    retry_failed: bool = False,
    worker: Worker | None = None,
    poll: float = POLL,
    each: Callable[[Row], Any] | None = None,
) -> int:
    """Run every unfinished cell; returns the number of cells that have failed.

    Each cell gets a folder with the erasure (and ``made.json``), its evaluation and, written last, ``result.json``. A
    process that is killed loses the stage it was at: the next run goes on behind the last one that was finished, a
    training at its last checkpoint. Every process that runs the same recipe takes cells that nobody else is at, so
    more can join or leave at any time, on every machine that sees the folder. A cell at which three processes died one
    after the other, without progress, has failed.

    Args:
        console: where progress is shown: a table on a terminal, lines elsewhere.
        retry_failed: run cells again that failed before; otherwise they stay as they are.
        worker: which of several processes this one is; from the environment by default.
        poll: seconds between looks at cells that other processes are at.
        each: called with every cell that is done or has failed, as soon as this process knows.

    Raises:
        OSError: the disk is full, which would fail every cell.
    """
    worker, cells = worker or Worker.of(os.environ), recipe.cells()
    retried, console = failures(recipe, cells) if retry_failed else {}, console or Console()
    if worker.rank and console.is_terminal:
        console = Console(quiet=True)  # the first of several has the table, which counts everybody's cells
    with Progress(recipe, cells, console, each=each) as progress:
        work(recipe, cells, worker=worker, device=device, retried=retried, poll=poll, progress=progress)
    return progress.failed


def work(
    recipe: Recipe,
    cells: Sequence[Cell],
    *,
    worker: Worker,
    device: str | None,
    retried: Mapping[str, int],
    poll: float,
    progress: Progress,
) -> None:
    """What every process does: take cells that nobody is at until all are done or have failed.

    Args:
        retried: cells to run again although they failed, with the attempts they had then; from :func:`failures`.
    """
    left, job = collections.deque(worker.order(cells)), _Job(recipe, worker.device(device))

    def finished(cell: Cell) -> bool:
        state, result = state_of(recipe, cell)
        again = state == "failed" and attempts_in(result) == retried.get(cell.key)
        if state in ("waiting", "damaged") or again:
            return False
        progress.ended(row_of(recipe, cell, state, result))
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
                            progress.began(cell)
                            result = job.run(cell)
                            progress.ended(row_of(recipe, cell, result["status"], result))
                except Timeout:
                    others += 1
                    left.append(cell)
            if others:
                time.sleep(poll)


def failures(recipe: Recipe, cells: Sequence[Cell]) -> dict[str, int]:
    """The cells that have failed, with how often each was tried."""
    found = ((cell.key, result_of(recipe, cell) or {}) for cell in cells)
    return {key: attempts_in(result) for key, result in found if result.get("status") == "failed"}


class _Job:
    """What is kept from one cell to the next: the base that is open, and the judges' networks."""

    def __init__(self, recipe: Recipe, device: str | None) -> None:
        self._recipe, self._device = recipe, device
        self._pipe: Any = None
        self._base: tuple[str, str | None] | None = None
        self._judges: Callable[..., Any] | None = None

    def run(self, cell: Cell) -> dict[str, Any]:
        """Do the stages of a cell that are not done, and write its result."""
        folder, began = self._recipe.out / cell.key, time.perf_counter()
        attempts = attempts_in(result_of(self._recipe, cell) or {}) + 1
        remove_partials(folder)
        try:
            with started(folder, cache=self._recipe.out / "cache"):
                outcome = {"status": "done", **self._stages(cell)}
        except Exception as error:
            if (stops := _for_all(error)) is not None:
                raise stops from error
            outcome = {
                **so_far(self._recipe, cell),
                "status": "failed",
                "error": printable(error, limit=2000),
                "traceback": traceback.format_exc(),
            }
        facts = {"cell": cell.key, "attempts": attempts, "recipe": _facts(cell), "asked": wishes(self._recipe, cell)}
        result = {**outcome, **facts, "seconds": time.perf_counter() - began}
        write_json(folder / RESULT, result, default=str)
        return result

    def _stages(self, cell: Cell) -> dict[str, Any]:
        return finish(self._opened(cell), cell, self._recipe, self._judge)

    def _opened(self, cell: Cell) -> Any:
        base = cell.base, cell.config
        if self._base != base:
            self._pipe = self._base = None  # let the last base go before the next one comes
            self._pipe = load_base(cell.base, device=self._device, dtype=self._recipe.dtype, config=cell.config)
            self._base = base
        return self._pipe

    def _judge(self, suite: Any) -> Any:
        if self._judges is None:
            from erasure.eval.detectors.choice import Judges

            self._judges = Judges(device=str(self._pipe.device))
        return self._judges(suite)


def _for_all(error: BaseException | None) -> OSError | None:
    """What would fail every cell, if that is what is behind an error."""
    seen = list[BaseException]()
    while error is not None and error not in seen:
        if isinstance(error, OSError) and error.errno in FOR_ALL:
            return error
        seen.append(error)
        error = error.__cause__ or error.__context__
    return None


def attempts_in(result: Mapping[str, Any]) -> int:
    """How often a cell was tried, by its result; 0 without one."""
    attempts = result.get("attempts", 1) if result else 0
    return attempts if isinstance(attempts, int) else 1


def _lock(recipe: Recipe, cell: Cell) -> str:
    folder = recipe.out / cell.key
    folder.mkdir(parents=True, exist_ok=True)
    return str(folder / LOCK)


def _facts(cell: Cell) -> dict[str, Any]:
    method = dataclasses.asdict(cell.method)  # type: ignore[call-overload]
    return {"base": cell.base, "concept": cell.target, "method": method, "seed": cell.seed}


__all__ = ["attempts_in", "failures", "run", "work"]
