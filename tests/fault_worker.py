"""The smallest runs of batch, register and training, each with a failure at one of its changes of the file system.

A process of its own forks for every run, since forks of a process that has trained cannot train.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # what an optimiser's first step would import in every fork anew
from rich.console import Console

import erasure.batch.runner
from erasure.batch import Recipe, run
from erasure.batch.overview import collect
from erasure.register import Register
from erasure.register.applying import apply, folder_of, hashes_of
from erasure.train import Checkpoint
from tests import train_worker
from tests.faults import DIED, Faults, ended, fork, forked, put
from tests.register_helpers import BASE, add, new_register, pipe

UCE = "{name: uce, preset: official-2025}"
ESD = "{name: esd, preset: official-2025-x, settings: {iterations: 1, trajectories: 1, num_inference_steps: 2}}"
KINDS = ("kill", "error", "full", "interrupt")


class Job:
    """One of the three: what is done, and what must be the same afterwards."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def prepare(self) -> None:
        """What is there before; without faults."""

    def do(self) -> None:
        """The work. Raises OSError where a fault stopped it."""
        raise NotImplementedError

    def look(self) -> None:
        """Raise unless what a fault left is whole."""

    def result(self) -> dict[str, Any]:
        """What must be the same in the end."""
        raise NotImplementedError


class Batch(Job):
    """A recipe of cells, and its page."""

    methods = (UCE, ESD)

    def prepare(self) -> None:
        self.folder.mkdir(parents=True)
        (self.folder / "recipe.yaml").write_text(
            f"version: 1\nout: results\nbases: [tiny]\nconcepts: [{{name: superhero}}]\nevaluate: false\n"
            f"methods: [{', '.join(self.methods)}]\n"
        )
        erasure.batch.runner.load_base = lambda *_, **__: pipe()  # type: ignore[attr-defined]

    def do(self) -> None:
        recipe = Recipe.load(self.folder / "recipe.yaml")
        failed = run(recipe, console=Console(quiet=True), retry_failed=True)
        collect(recipe)
        if failed:
            raise OSError(errno.EIO, "a cell has failed")

    def result(self) -> dict[str, Any]:
        out = self.folder / "results"
        left = [str(path) for path in out.rglob(".*") if path.name != ".lock" and "/." in str(path)]
        assert not left, f"half-written files stayed: {left}"
        assert not list(out.glob("*/training")), "a training's state stayed"
        assert all(json.loads(path.read_text())["status"] == "done" for path in out.glob("*/result.json"))
        return {str(path.relative_to(out)): path.read_bytes() for path in out.glob("*/erasure/*")}


class ClosedForms(Batch):
    """The same without a training, which is quick."""

    methods = (UCE,)


class Registers(Job):
    """A set put in force in the place of another one, and a page."""

    def prepare(self) -> None:
        self.folder.mkdir(parents=True)
        register = new_register(self.folder)
        add(register, "superhero", request="R1")
        apply(register, pipe(), BASE)
        add(register, "wizard", request="R2")
        self.before = register.applied(BASE).detail["hash"]

    def do(self) -> None:
        apply(Register(self.folder / "register.sqlite"), pipe(), BASE)

    def look(self) -> None:
        register = Register(self.folder / "register.sqlite")
        assert not register.check()
        detail, second = register.applied(BASE).detail, register.entry("R2")
        assert hashes_of(folder_of(register, detail)) == detail["files"], "what is in force is not what was written"
        assert (second.status == "in force") == (detail["hash"] != self.before), "half applied"

    def result(self) -> dict[str, Any]:
        self.look()
        register = Register(self.folder / "register.sqlite")
        assert [entry.status for entry in register.entries()] == ["in force"] * 2
        return {name: (folder_of(register, register.applied(BASE).detail) / name).read_bytes()
                for name in register.applied(BASE).detail["files"]}  # fmt: skip


class Trainings(Job):
    """A training of two steps, with a bank that is made once."""

    training = dataclasses.replace(train_worker.KINDS["ema"], iterations=2)

    def do(self) -> None:
        torch.save(train_worker.task(self.training, str(self.folder / "state")), self.folder.with_suffix(".pt"))

    def look(self) -> None:
        Checkpoint.open(self.folder / "state", self.training.describe())  # which checks all of it

    def result(self) -> dict[str, Any]:
        left = list((self.folder / "state").glob(".*"))
        assert not left, f"half-written files stayed: {left}"
        return {name: tensor.numpy().tobytes() for name, tensor in torch.load(self.folder.with_suffix(".pt")).items()}


JOBS: dict[str, type[Job]] = {
    "batch": Batch, "closed forms": ClosedForms, "register": Registers, "training": Trainings
}  # fmt: skip


def at_every_change(name: str, folder: Path, kinds: tuple[str, ...], every: int = 1) -> None:
    """Run a job with a fault at each change, or at each so many of them; then again; the result is that of a run
    without faults."""
    torch.set_num_threads(1)
    pipe()
    whole = JOBS[name](folder / "whole")
    whole.prepare()
    seen = folder / "seen.json"
    assert forked(lambda: seen.write_text(json.dumps(_with(whole, Faults(whole.folder, "count"))))) == 0
    expected, changes = whole.result(), json.loads(seen.read_text())
    assert len(changes) > 10 and expected, changes
    for kind in kinds:
        for at in range(0, len(changes), every):
            _check(JOBS[name](folder / f"{kind}-{at}"), Faults(folder / f"{kind}-{at}", kind, at), expected)
    print(f"{name}: {len(changes)} changes, each of {kinds} at every {every}: {collected(changes)}")


def _check(job: Job, faults: Faults, expected: dict[str, Any]) -> None:
    what = f"{type(job).__name__}, {faults.kind} at {faults.at}"
    job.prepare()
    status = forked(lambda: _with(job, faults, stops=True))
    assert status == (DIED if faults.kind == "kill" else 0), f"{what}: it ended with {status}"
    job.look()
    assert forked(job.do) == 0, f"{what}: the run after it failed"
    assert job.result() == expected, f"{what}: the run after it came to something else"
    shutil.rmtree(job.folder)


def interrupted_twice(name: str, folder: Path, times: int) -> None:
    """Press Ctrl-C twice, at so many moments of a job; then run it again; the result is that of a whole run."""
    torch.set_num_threads(1)
    pipe()
    whole = JOBS[name](folder / "whole")
    whole.prepare()
    began = time.monotonic()
    assert forked(whole.do) == 0
    took, expected, stopped = time.monotonic() - began, whole.result(), 0
    for i in range(times):
        job = JOBS[name](folder / f"stopped-{i}")
        job.prepare()
        child = fork(job.do)
        time.sleep(took * (i + 0.5) / times)
        for _ in range(2):
            os.kill(child, signal.SIGINT)
            time.sleep(0.001 * i)
        stopped += ended(child) != 0
        job.look()
        assert forked(job.do) == 0, f"Ctrl-C {i}: the run after it failed"
        assert job.result() == expected, f"Ctrl-C {i}: the run after it came to something else"
    assert stopped, "it was never interrupted"


def read_only(name: str, folder: Path) -> None:
    """Do a job where nothing may be written: a PermissionError, and everything stays as it is."""
    torch.set_num_threads(1)
    pipe()
    job = JOBS[name](folder / "job")
    job.prepare()
    before = {path: path.read_bytes() for path in job.folder.rglob("*") if path.is_file()}

    def work() -> None:
        try:
            with put(Faults(job.folder, "read-only")):
                job.do()
        except PermissionError:
            return
        raise AssertionError("nothing said that the folder may not be written to")

    assert forked(work) == 0
    assert before == {path: path.read_bytes() for path in job.folder.rglob("*") if path.is_file()}


def both_at_once(folder: Path) -> None:
    """Two trainings of one kind on one folder, at the same time."""
    torch.set_num_threads(1)
    training = dataclasses.replace(train_worker.KINDS["adam"], iterations=200)

    def work(number: int) -> None:
        try:
            torch.save(train_worker.task(training, str(folder / "shared")), folder / f"{number}.pt")
        except RuntimeError as error:
            assert "another process trains in" in str(error)

    children = [fork(lambda number=number: work(number)) for number in range(2)]  # type: ignore[misc]
    assert [ended(child) for child in children] == [0, 0]
    work(3)
    assert forked(lambda: torch.save(train_worker.task(training, str(folder / "alone")), folder / "alone.pt")) == 0
    expected = torch.load(folder / "alone.pt")
    found = [torch.load(folder / f"{number}.pt") for number in range(4) if (folder / f"{number}.pt").exists()]
    assert found and all(torch.equal(one[name], expected[name]) for one in found for name in expected)


def _with(job: Job, faults: Faults, *, stops: bool = False) -> list[str]:
    """Do a job with faults; only an OSError or Ctrl-C may stop it."""
    with put(faults):
        try:
            job.do()
        except (OSError, KeyboardInterrupt):
            if not stops:
                raise
    return faults.seen


def collected(changes: list[str]) -> dict[str, int]:
    return {what: changes.count(what) for what in sorted(set(changes))}


def call(work: Callable[..., None], log: str, *arguments: Any) -> None:
    """Do something in this process, with its output in a file."""
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            work(*arguments)
