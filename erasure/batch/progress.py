"""How far a run is: a table that is kept up to date on a terminal, plain lines elsewhere."""

from __future__ import annotations

import collections
import contextlib
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.live import Live
from rich.table import Table

from erasure.batch.losses import STARTED
from erasure.batch.overview import Row, busy
from erasure.batch.recipe import Cell, Recipe
from erasure.batch.stages import RESULT, result_of
from erasure.terminal import PlainTable, say

LOOK = 5.0  # seconds between looks at what other processes have done
AT_ONCE = 8  # cells that are listed while processes are at them
FINISHED = ("done", "failed")
STATES = (*FINISHED, "running", "waiting")


class Progress:
    """What has become of the cells of a recipe. A context: the table is there while it is open.

    Cells that other processes do are seen by what lies in the recipe's folder, every few seconds.

    Args:
        each: called with the row of every cell that is done or has failed, as soon as that is known.
        others: also print a line for each cell that another process finishes; the table counts them anyway.
        clock: seconds that never run backwards.
    """

    def __init__(
        self,
        recipe: Recipe,
        cells: Sequence[Cell],
        console: Console,
        *,
        each: Callable[[Row], Any] | None = None,
        others: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._recipe, self._cells, self._console = recipe, {cell.key: cell for cell in cells}, console
        self._each, self._tell, self._clock, self._began = each, others, clock, clock()
        self._states: dict[str, str] = {}  # of cells that are done or have failed
        self._others: dict[str, str] = {}  # what the folder says of those that this process has not come to
        self._running: dict[str, float] = {}  # this process's own, and when it began
        self._before: int | None = None  # cells that were finished before
        self._looked = -LOOK
        self._live = Live(get_renderable=self.table, console=console, refresh_per_second=2, transient=True)

    def __enter__(self) -> Self:
        self.look()
        if self._console.is_terminal:
            self._live.start(refresh=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._console.is_terminal:
            self._live.stop()

    @property
    def failed(self) -> int:
        """Cells that have failed."""
        return collections.Counter(self._states.values())["failed"]

    def began(self, cell: Cell) -> None:
        """This process takes a cell up."""
        self.look()
        self._running[cell.key] = self._clock()
        if not self._console.is_terminal:
            say(f"[{self.finished + 1}/{len(self._cells)}] {cell.key}", on=self._console)

    def ended(self, row: Row) -> None:
        """A cell is done or has failed."""
        key, number = row.cell.key, self.finished + 1
        self._states[key] = row.state
        self._others.pop(key, None)
        took = self._running.pop(key, None)
        if self._each is not None:
            self._each(row)
        if took is not None and not self._console.is_terminal:
            seconds = f"{row.state}, {self._clock() - took:.1f} s"
            say(f"[{number}/{len(self._cells)}] {key}: {seconds}; {self._left()}", on=self._console)

    def look(self, *, at_once: bool = False) -> None:
        """See what others have done meanwhile; at most every few seconds, unless it is to be at once."""
        if self._console.quiet and not at_once:
            return  # nobody reads it
        if self._clock() - self._looked < LOOK and not at_once:
            return
        self._looked = self._clock()
        with contextlib.suppress(OSError, RuntimeError):  # a folder that is just being written, or another thread
            before, self._others = self._others, self._found()
            if self._tell and self._before is not None and not self._console.is_terminal:
                self._say_what_is_new(before)
        if self._before is None:
            self._before = self.finished

    def say(self, text: str) -> None:
        """A line for people, above the table if there is one."""
        say(text, on=self._console)

    def table(self) -> Table:
        """How many cells are in which state, how fast it goes, and who is at what."""
        self.look()
        count = self.counts()
        table = PlainTable(*STATES, "cells an hour", "left", title=f"{len(self._cells)} cells in {self._recipe.out}")
        rate, left = self._rate(), count["running"] + count["waiting"]
        numbers = [str(count[state]) for state in STATES]
        table.add_row(*numbers, f"{rate:,.0f}" if rate else "", _duration(3600 * left / rate) if rate else "")
        table.caption = "\n".join(
            f"{key}, {self._clock() - began:.0f} s" for key, began in [*self._running.items()][:AT_ONCE]
        )
        return table

    def counts(self) -> collections.Counter[str]:
        """Cells by state."""
        states = {**self._others, **self._states, **dict.fromkeys(self._running, "running")}
        count = collections.Counter(states.values())
        count["waiting"] = len(self._cells) - sum(count[state] for state in STATES if state != "waiting")
        return count

    @property
    def finished(self) -> int:
        """Cells that are done or have failed, as far as this process knows."""
        count = self.counts()
        return count["done"] + count["failed"]

    def _rate(self) -> float:
        """Cells an hour since this began, those of other processes with them; 0 before the first."""
        done = self.finished - (self._before or 0)
        return 3600 * done / max(self._clock() - self._began, 1e-9) if done > 0 else 0.0

    def _left(self) -> str:
        left, rate = len(self._cells) - self.finished, self._rate()
        if not left:
            return "none left"
        return f"{left} left" + (
            f", about {_duration(3600 * left / rate)} at {rate:,.0f} cells an hour" if rate else ""
        )

    def _found(self) -> dict[str, str]:
        return {key: state for key in self._cells if (state := self._state_of(key)) is not None}

    def _say_what_is_new(self, before: dict[str, str]) -> None:
        new = [key for key, state in self._others.items() if state in FINISHED and before.get(key) not in FINISHED]
        for number, key in enumerate(new, self.finished - len(new) + 1):
            end = f"; {self._left()}" if key == new[-1] else ""
            say(f"[{number}/{len(self._cells)}] {key}: {self._others[key]}{end}", on=self._console)

    def _state_of(self, key: str) -> str | None:
        """What the folder says of a cell of others. Nothing is hashed: whoever comes to the cell does that."""
        if key in self._states or key in self._running:
            return None
        folder, cell, known = self._recipe.out / key, self._cells[key], self._others.get(key)
        if known in FINISHED:
            return known
        if (folder / RESULT).exists():
            status = (result_of(self._recipe, cell) or {}).get("status")
            return status if status in FINISHED else None
        return "running" if (folder / STARTED).exists() and busy(folder) else None


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


__all__ = ["Progress"]
