"""Cells an hour of `erasure batch` with 1 and with 2 workers on one machine. JSON.

    python benchmarks/batch.py                                  # Emoji World, a short ESD a cell; some minutes
    python benchmarks/batch.py --workers 1 2 4 --cells 32       # where there are more cores
    python benchmarks/batch.py --base org/name --device cuda    # one process for each worker, all on this GPU

Every cell is one ESD with another seed, so all cost the same. The numbers of workers take turns, each time on a fresh
folder, so that what else the machine does falls on all of them. The clock runs from when every worker has its libraries
loaded and has made one erasure, to when every cell is done and every worker knows; opening the base counts.

A ratio of cells an hour says what two workers gained on this machine, as busy as it was. `cpu_seconds_a_cell` does not
depend on who else is there: where it is the same, sharing costs nothing and two idle cores do twice as much. The bytes
of all erasures are compared as well.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RECIPE = """version: 1
out: {out}
bases: ["{base}"]
concepts: [{{name: superhero}}]
methods:
  - name: esd
    settings: {{iterations: {iterations}, trajectories: {trajectories}, num_inference_steps: 10}}
seeds: {seeds}
evaluate: false
"""


def recipe(folder: Path, out: str, given: argparse.Namespace, seeds: list[int]) -> Any:
    """A recipe of as many cells as seeds."""
    from erasure.batch import Recipe

    path = folder / f"{out}.yaml"
    facts = {"base": given.base, "iterations": given.iterations, "trajectories": given.trajectories}
    path.write_text(RECIPE.format(out=out, seeds=seeds, **facts))
    return Recipe.load(path)


def worker(rank: int, size: int, folder: Path, out: str, given: argparse.Namespace, gates: Any, spent: Any) -> None:
    """One of the processes: warm up, wait for the others, run, wait again."""
    import torch
    from rich.console import Console

    from erasure.batch import run
    from erasure.batch.worker import Worker

    torch.set_num_threads(given.threads)
    quiet = {"console": Console(quiet=True), "device": given.device}
    run(recipe(folder, f"warm-{out}-{rank}", given, [10**6]), worker=Worker(), **quiet)
    plan = recipe(folder, out, given, list(range(given.cells)))
    gates[0].wait()
    began = time.process_time()
    failed = run(plan, worker=Worker(rank, size), poll=0.05, **quiet)
    spent.put(time.process_time() - began)
    gates[1].wait()
    sys.exit(failed)


def measured(size: int, folder: Path, out: str, given: argparse.Namespace) -> tuple[float, float]:
    """Seconds of the clock and of the processors that all cells took."""
    context = multiprocessing.get_context("spawn")
    gates, spent = [context.Barrier(size + 1) for _ in range(2)], context.Queue()
    workers = [
        context.Process(target=worker, args=(rank, size, folder, out, given, gates, spent)) for rank in range(size)
    ]
    for process in workers:
        process.start()
    gates[0].wait(given.timeout)
    began = time.perf_counter()
    gates[1].wait(given.timeout)
    seconds = time.perf_counter() - began
    processor = sum(spent.get() for _ in workers)
    for process in workers:
        process.join()
    if any(process.exitcode for process in workers):
        raise RuntimeError(f"cells have failed; look at {folder}")
    return seconds, processor


def erasures(folder: Path) -> dict[str, bytes]:
    """The files of all erasures of a run."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.glob("*/erasure/*"))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="emoji-world")
    parser.add_argument("--device")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--cells", type=int, default=8)
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--trajectories", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of each worker")
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds after which workers are given up")
    given = parser.parse_args()
    found: dict[int, list[tuple[float, float]]] = {size: [] for size in given.workers}
    with tempfile.TemporaryDirectory() as name:
        folder, bytes_of = Path(name), []
        for i in range(given.rounds):
            for size in given.workers:
                found[size].append(measured(size, folder, f"{size}-{i}", given))
                bytes_of.append(erasures(folder / f"{size}-{i}"))
    rows = {
        size: {
            "cells_an_hour": round(3600 * given.cells / statistics.median(clock for clock, _ in times), 1),
            "cpu_seconds_a_cell": round(statistics.median(cpu for _, cpu in times) / given.cells, 3),
            "rounds": [round(3600 * given.cells / clock, 1) for clock, _ in times],
        }
        for size, times in found.items()
    }
    first = given.workers[0]
    ratios = {
        str(size): {
            "cells_an_hour": round(row["cells_an_hour"] / rows[first]["cells_an_hour"], 3),
            "cpu_seconds_a_cell": round(row["cpu_seconds_a_cell"] / rows[first]["cpu_seconds_a_cell"], 3),
        }
        for size, row in rows.items()
    }
    load = {"cores": os.cpu_count(), "load_at_the_end": [round(one, 1) for one in os.getloadavg()]}
    facts = {"base": given.base, "cells": given.cells, "iterations": given.iterations, **load}
    same = all(bytes == bytes_of[0] for bytes in bytes_of)
    print(json.dumps({**facts, "workers": rows, f"of_{first}": ratios, "same_bytes": same}, indent=2))


if __name__ == "__main__":
    main()
