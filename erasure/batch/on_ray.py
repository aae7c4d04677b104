"""A recipe on a ray cluster: workers that ray places, each doing what every process of a batch does.

Ray chooses where a worker runs and notices when one is lost. The cells are shared as they are without it, through lock
files in the recipe's folder, so that workers of ray and other processes may be at one recipe at the same time.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console

from erasure.batch.losses import DEATHS
from erasure.batch.overview import Row, row_of
from erasure.batch.progress import Progress
from erasure.batch.recipe import Cell, Recipe
from erasure.batch.runner import POLL, failures, work
from erasure.batch.stages import state_of
from erasure.batch.worker import Worker

PATIENCE = 30.0  # seconds that workers get to stop where the run is stopped


def run_on_ray(
    recipe: Recipe,
    *,
    workers: int | None = None,
    device: str | None = None,
    console: Console | None = None,
    retry_failed: bool = False,
    poll: float = POLL,
    each: Callable[[Row], Any] | None = None,
) -> int:
    """Run every unfinished cell on ray; returns the number of cells that have failed.

    Uses the cluster that this process is connected to, the one of ``RAY_ADDRESS`` or of this machine, or starts one
    here for the time of the run. Every node must see the recipe's folder and files under the same paths. A worker that
    is lost, with its node or alone, is replaced.

    Args:
        workers: how many; by default one for each GPU of the cluster, or for each CPU where it has none or ``device``
            is "cpu". Each opens the base for itself: give fewer where memory is short.
        device, console, retry_failed, poll, each: as for :func:`erasure.batch.run`.

    Raises:
        ImportError: ray is not installed.
        ValueError: the number of workers, or this process is one of several.
        RuntimeError: workers are lost again and again while no cell is finished.
        OSError: the disk is full, which would fail every cell.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"there is at least one worker; got {workers}; leave it out for one on each GPU or CPU")
    if Worker.of(os.environ).size > 1:
        raise ValueError("ray starts the workers itself; got a process of torchrun, accelerate or SLURM; run it alone")
    cells = recipe.cells()
    retried = failures(recipe, cells) if retry_failed else {}
    with connected(workers) as ray, Progress(recipe, cells, console or Console(), each=each, others=True) as progress:
        crew = _Crew(ray, recipe, workers, {"device": device, "retried": retried, "poll": poll})
        progress.say(f"{crew.size} workers on ray")
        try:
            crew.wait(progress)
        except BaseException:
            crew.stop()
            raise
        progress.look(at_once=True)
        for cell in cells:
            progress.ended(row_of(recipe, cell, *state_of(recipe, cell)))
    return progress.failed


@contextmanager
def connected(workers: int | None) -> Iterator[Any]:
    """Ray, connected to a cluster; one that was started for it ends with the block."""
    try:
        import ray
    except ImportError:
        raise ImportError("ray is not installed; pip install 'diffusion-erasure[ray]'") from None
    if ray.is_initialized():
        yield ray
        return
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it reports home otherwise
    try:
        ray.init(address="auto", **quiet)
    except ConnectionError:
        ray.init(num_cpus=workers, include_dashboard=False, **quiet)
    try:
        yield ray
    finally:
        ray.shutdown()


class _Crew:
    """The workers of a run.

    Attributes:
        size: how many there are.
    """

    def __init__(self, ray: Any, recipe: Recipe, workers: int | None, settings: dict[str, Any]) -> None:
        self._ray, self._recipe, self._settings = ray, recipe, settings
        have = ray.cluster_resources()
        kind = "CPU" if settings["device"] == "cpu" or not have.get("GPU") else "GPU"
        self.size = max(1, min(workers or int(have.get(kind, 1)), int(have.get(kind, 1))))
        # Zero retries of ray's own: a lost worker is seen here, told of, and replaced.
        options = {"num_cpus": 1, "num_gpus": int(kind == "GPU"), "max_retries": 0}
        self._remote = ray.remote(**options)(_worker)
        self._tasks = {self._start(rank): rank for rank in range(self.size)}

    def _start(self, rank: int) -> Any:
        return self._remote.remote(self._recipe, os.getcwd(), Worker(rank, self.size), self._settings)

    def wait(self, progress: Progress) -> None:
        """Until every worker has ended; those that are lost are replaced."""
        from ray.exceptions import RayError, RayTaskError

        lost, finished = 0, progress.finished
        while self._tasks:
            ended, _ = self._ray.wait([*self._tasks], timeout=1.0)
            progress.look()
            for task in ended:
                rank = self._tasks.pop(task)
                try:
                    self._ray.get(task)
                except RayTaskError as error:
                    raise error.cause from None
                except RayError as error:
                    progress.look(at_once=True)
                    lost = lost + 1 if progress.finished == finished else 1
                    finished = progress.finished
                    if lost > DEATHS * self.size:
                        raise RuntimeError(
                            f"{lost} workers were lost one after the other, and no cell was finished; the last one by "
                            f"{type(error).__name__}; look at ray's logs"
                        ) from None
                    progress.say(f"worker {rank} was lost ({type(error).__name__}); another takes its place")
                    self._tasks[self._start(rank)] = rank

    def stop(self) -> None:
        """Interrupt the workers, as Ctrl-C does, and give them time to put their cells down."""
        for task in self._tasks:
            self._ray.cancel(task)
        if self._tasks:
            self._ray.wait([*self._tasks], num_returns=len(self._tasks), timeout=PATIENCE)


def _worker(recipe: Recipe, folder: str, worker: Worker, settings: dict[str, Any]) -> None:
    """What ray runs: the same as any process of a batch."""
    os.chdir(folder)  # paths of a recipe may be relative to where the command was given
    cells: list[Cell] = recipe.cells()
    work(recipe, cells, worker=worker, progress=Progress(recipe, cells, Console(quiet=True)), **settings)


__all__ = ["connected", "run_on_ray"]
