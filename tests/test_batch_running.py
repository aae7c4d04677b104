"""A batch while it runs: what is shown, processes that die, and ray."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock
from rich.console import Console
from typer.testing import CliRunner

import erasure.batch.outputs
import erasure.batch.stages
from erasure.batch import Recipe, run
from erasure.batch.losses import DEATHS
from erasure.batch.on_ray import run_on_ray
from erasure.batch.overview import Row, busy, rows
from erasure.batch.progress import Progress
from erasure.cli import app
from tests.test_batch import PROCESSES, QUIET, erasures, process, recipe_fixture  # noqa: F401

# --- what is shown while it runs --------------------------------------------------------------------------------------


def test_each_erasure_is_hashed_once_in_a_run(recipe, tmp_path, monkeypatch):
    recipe()
    hashed, real = [], erasure.batch.outputs.sha256_file
    monkeypatch.setattr("erasure.batch.outputs.sha256_file", lambda file: (hashed.append(file), real(file))[1])
    for _ in ("made", "found"):
        ran = CliRunner().invoke(app, ["batch", str(tmp_path / "recipe.yaml")])
        assert ran.exit_code == 0 and "4 done" in ran.output
        assert len(hashed) == 4 == len(set(hashed))
        hashed.clear()


def test_a_terminal_has_a_table_and_everything_else_gets_lines(recipe):
    plan, shown = recipe(), {True: io.StringIO(), False: io.StringIO()}
    for terminal, file in shown.items():
        run(plan, console=Console(file=file, force_terminal=terminal, width=100))
        for cell in plan.cells()[:2]:
            (plan.out / cell.key / "result.json").unlink()
    assert "cells an hour" in shown[True].getvalue() and "\x1b[" in shown[True].getvalue()
    lines = shown[False].getvalue().splitlines()
    first = plan.cells()[0].key
    assert lines[0] == f"[3/4] {first}" and lines[1].startswith(f"[3/4] {first}: done, ") and "none left" in lines[3]


def ended(cell, state="done"):
    return Row(cell, state, {}, 0, 0.0, 0, "")


def test_progress_counts_cells_of_every_process_and_says_how_long_the_rest_will_take(recipe):
    plan, now = recipe(), [0.0]
    one, two, three, four = plan.cells()
    console = Console(file=io.StringIO(), width=120)
    with Progress(plan, plan.cells(), console, clock=lambda: now[0]) as progress:
        assert progress.counts() == {"waiting": 4}
        progress.began(one)
        assert progress.counts() == {"waiting": 3, "running": 1}
        now[0] = 60.0
        progress.ended(ended(one))
        assert "3 left, about 3 min at 60 cells an hour" in console.file.getvalue()
        for cell, content in ((two, '{"status": "done"}'), (three, '{"status": "failed"}'), (four, "half")):
            (plan.out / cell.key).mkdir(parents=True)
            (plan.out / cell.key / "result.json").write_text(content)
        now[0] = 120.0
        progress.look()
        assert progress.counts() == {"done": 2, "failed": 1, "waiting": 1} and progress.finished == 3
        lock = FileLock(str(plan.out / four.key / ".lock"))
        (plan.out / four.key / "result.json").unlink()
        (plan.out / four.key / ".started").touch()
        with lock:
            progress.look(at_once=True)
            assert progress.counts()["running"] == 1
        console.print(progress.table())
        assert "90" in console.file.getvalue()  # three cells in two minutes


def test_a_rate_that_nothing_is_known_of_is_not_made_up(recipe):
    plan, console = recipe(), Console(file=io.StringIO(), width=120)
    with Progress(plan, plan.cells(), console, clock=lambda: 0.0) as progress:
        console.print(progress.table())
    assert "cells an hour" in console.file.getvalue() and "inf" not in console.file.getvalue()


# --- processes that die -----------------------------------------------------------------------------------------------


def dies(path):
    """A process that is killed while it makes an erasure, as one without memory is."""
    erasure.batch.stages.erase = lambda *args, **kwargs: os._exit(9)
    process(path)


def test_a_cell_at_which_processes_die_is_given_up_and_stops_nothing(recipe, tmp_path):
    plan = recipe()
    for _ in range(DEATHS):
        worker = PROCESSES.Process(target=dies, args=(tmp_path / "recipe.yaml",))
        worker.start()
        worker.join(120)
        assert worker.exitcode == 9
    assert run(plan, console=QUIET) == 1
    first, *others = rows(plan)
    assert first.state == "failed" and "3 processes died at this cell" in first.note
    assert {row.state for row in others} == {"done"}
    assert run(plan, console=QUIET, retry_failed=True) == 0


def test_deaths_with_progress_in_between_do_not_count_together(recipe, tmp_path):
    plan = recipe()
    folder = plan.out / plan.cells()[0].key
    folder.mkdir(parents=True)
    (folder / ".started").write_text(json.dumps({"deaths": DEATHS, "progress": 123}))
    assert run(plan, console=QUIET) == 0
    assert not list(plan.out.glob("*/.started"))


def test_whether_somebody_is_at_a_cell_is_not_known_where_nothing_may_be_written(tmp_path, monkeypatch):
    (tmp_path / ".lock").touch()

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("erasure.batch.overview.FileLock.acquire", refuse)
    assert not busy(tmp_path)


# --- ray --------------------------------------------------------------------------------------------------------------


def descendants(pid):
    """The processes below one, with their command lines."""
    parents = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(status.parent.name)] = int(status.read_text().rpartition(")")[2].split()[1])
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    for child in found - {pid}:
        with contextlib.suppress(OSError):
            yield child, Path(f"/proc/{child}/cmdline").read_bytes().decode(errors="replace")


@pytest.mark.slow
def test_a_lost_worker_of_ray_is_replaced_and_the_bytes_are_the_same(recipe, tmp_path):
    run(recipe(), console=QUIET)
    expected = erasures(recipe())
    path = tmp_path / "recipe.yaml"
    path.write_text(path.read_text().replace("out: results", "out: shared"))
    shared = Recipe.load(path)
    command = [sys.executable, "-m", "erasure.cli", "batch", "recipe.yaml", "--engine", "ray", "--workers", "2"]
    driver = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env=os.environ | {"RAY_worker_niceness": "0"},  # 15 by default: on a busy machine they would never start
    )  # fmt: skip
    try:
        while not list(shared.out.glob("*/.started")) and driver.poll() is None:
            time.sleep(0.05)
        workers = [pid for pid, command in descendants(driver.pid) if command.startswith("ray::_worker")]
        assert workers, driver.communicate()[0]
        os.kill(workers[0], signal.SIGKILL)
        output, _ = driver.communicate(timeout=900)
    finally:
        driver.kill()
    assert driver.returncode == 0, output
    assert "2 workers on ray" in output and "was lost (WorkerCrashedError); another takes its place" in output
    assert "4 done" in output and erasures(shared) == expected


@contextlib.contextmanager
def cluster_of_ray(nodes):
    """A head without processors, and nodes of one processor each, all on this machine."""
    from ray.cluster_utils import Cluster

    handler = signal.getsignal(signal.SIGTERM)  # a head sets its own
    alone = {"include_dashboard": False, "include_log_monitor": False, "no_monitor": True}
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **alone})
    try:
        yield made, [made.add_node(num_cpus=1) for _ in range(nodes)]
    finally:
        made.shutdown()
        signal.signal(signal.SIGTERM, handler)


@pytest.mark.slow
def test_a_lost_node_of_a_ray_cluster_is_made_up_for_and_the_bytes_are_the_same(recipe, tmp_path, monkeypatch):
    run(recipe(), console=QUIET)
    expected = erasures(recipe())
    path = tmp_path / "recipe.yaml"
    path.write_text(path.read_text().replace("out: results", "out: shared"))
    shared = Recipe.load(path)
    monkeypatch.setenv("RAY_worker_niceness", "0")  # as above
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    with cluster_of_ray(2) as (cluster, nodes):
        driver = subprocess.Popen(
            [sys.executable, "-m", "erasure.cli", "batch", "recipe.yaml", "--engine", "ray"],
            cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
            env=os.environ | {"RAY_ADDRESS": cluster.address},
        )  # fmt: skip
        try:
            while len(list(shared.out.glob("*/.started"))) < 2 and driver.poll() is None:
                time.sleep(0.05)  # until the worker of each node is at a cell
            assert driver.poll() is None, driver.communicate()[0]
            cluster.remove_node(nodes[1], allow_graceful=False)
            output, _ = driver.communicate(timeout=900)
        finally:
            driver.kill()
    assert driver.returncode == 0, output
    assert "2 workers on ray" in output and "was lost (" in output and "another takes its place" in output
    assert "4 done" in output and erasures(shared) == expected


class Pretended:
    """Ray as far as a run needs it, whose every worker ends as it is told."""

    def __init__(self, ending):
        self.ending, self.started, self.options = ending, 0, None

    def cluster_resources(self):
        return {"CPU": 2.0}

    def is_initialized(self):
        return True

    def remote(self, **options):
        self.options = options
        return lambda work: self.Remote(self)

    class Remote:
        def __init__(self, ray):
            self.ray = ray

        def remote(self, *arguments):
            self.ray.started += 1
            return self.ray.started

    def wait(self, tasks, **_):
        return tasks[:1], tasks[1:]

    def get(self, task):
        if self.ending is not None:
            raise self.ending

    def cancel(self, task):
        pass


def test_workers_that_are_always_lost_are_given_up(recipe, monkeypatch):
    from ray.exceptions import WorkerCrashedError

    lossy = Pretended(WorkerCrashedError())
    monkeypatch.setitem(sys.modules, "ray", lossy)
    with pytest.raises(RuntimeError, match="7 workers were lost one after the other"):
        run_on_ray(recipe(), console=QUIET)
    assert lossy.started == 2 + 2 * DEATHS and lossy.options["num_gpus"] == 0


def test_what_stops_a_worker_of_ray_stops_the_run(recipe, monkeypatch):
    from ray.exceptions import RayTaskError

    full = OSError(28, "No space left on device")
    monkeypatch.setitem(sys.modules, "ray", Pretended(RayTaskError("_worker", "", full)))
    with pytest.raises(OSError, match="No space left"):
        run_on_ray(recipe(), console=QUIET, device="cpu")


def test_ray_says_what_it_needs(recipe, tmp_path, monkeypatch):
    plan, path = recipe(), str(tmp_path / "recipe.yaml")
    refused = CliRunner().invoke(app, ["batch", path, "--workers", "2"])
    assert refused.exit_code == 2 and "--engine ray" in refused.output
    with pytest.raises(ValueError, match="at least one worker; got 0"):
        run_on_ray(plan, workers=0)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install 'diffusion-erasure\[ray\]'"):
        run_on_ray(plan, console=QUIET)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="ray starts the workers itself"):
        run_on_ray(plan)
