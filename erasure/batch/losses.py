"""A cell that kills its process: noticed by what the dead process left, and given up after some tries."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from erasure.batch.stages import JUDGED, MADE, WRITTEN, record
from erasure.io import write_json

STARTED = ".started"
DEATHS = 3  # processes that may die at a cell one after the other, without progress


class Deadly(RuntimeError):
    """Processes died at a cell again and again."""


@contextlib.contextmanager
def started(folder: Path, *, cache: Path) -> Iterator[None]:
    """Leave a note in a cell's folder while a process is at it; only a process that dies leaves it there.

    A process that is killed for its memory cannot say so. The next one would take the same cell and die as well, and
    the one after it.

    Args:
        cache: the folder of pictures that cells share; one that grows is progress too.

    Raises:
        Deadly: three processes died here, and neither a stage nor a checkpoint was finished in between.
    """
    file, mark = folder / STARTED, _progress(folder, cache)
    before = record(file) or {}
    deaths = before.get("deaths") if before.get("progress") == mark else 0
    deaths = deaths if isinstance(deaths, int) else 0
    if deaths >= DEATHS:
        file.unlink(missing_ok=True)  # whoever asks for another try gets all of them
        raise Deadly(
            f"{deaths} processes died at this cell, one after the other, and left no error; were they killed for their "
            "memory? --retry-failed tries it again"
        )
    write_json(file, {"deaths": deaths + 1, "progress": mark}, durable=False)
    try:
        yield
    finally:
        file.unlink(missing_ok=True)


def _progress(folder: Path, cache: Path) -> int:
    """The time at which something was last finished in a cell, as the file system counts it; 0 before the first."""
    found = [*(folder / name for name in (MADE, WRITTEN, JUDGED)), cache]
    found += [*(folder / "training").glob("*.safetensors"), *(folder / "probes").glob("*/*.jsonl")]
    return max((path.stat().st_mtime_ns for path in found if path.exists()), default=0)


__all__ = ["DEATHS", "STARTED", "Deadly", "started"]
