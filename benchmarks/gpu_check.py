"""Does everything work on this GPU, how fast, and in how much memory? One command, under 8 minutes: `make gpu-check`.

    python -m benchmarks.gpu_check                          all of it, on the best device here
    python -m benchmarks.gpu_check --device cpu --tiny      the part that any machine can do

Every architecture as a tiny pipeline, and Stable Diffusion 1.4 and SDXL at full size, all of random weights: nothing
is downloaded. On each: a closed form, applied and removed (every bit must come back), a few steps of ESD, a draw. On
Emoji World and Stable Diffusion 1.4 also the same pictures in a loop of calls, and as an evaluation draws them.
Prints one JSON object; the exit status is 1 where a step failed. What a step raised stands in its row.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch

import erasure
from benchmarks.closed_form import random_pipeline
from erasure import Concept, erase
from erasure.backbone import DENOISERS, denoiser_of
from erasure.eval.core.pictures import generate, weights_hash
from erasure.runtime import DTYPES, pick_device, pick_dtype
from tests.builders import BUILDERS, CALLS

CONCEPT = Concept("superhero", anchor="ninja", neighbours=("wizard",))
FULL = ("sd14", "sdxl")
TINY_TRAINING = {"iterations": 2, "trajectories": 2, "num_inference_steps": 2, "batch_size": 2}
FULL_TRAINING = {"iterations": 3, "trajectories": 1, "num_inference_steps": 4, "batch_size": 1}


class Check:
    """The rows of one run, and its clock."""

    def __init__(self, device: str, minutes: float) -> None:
        self.device, self.rows = torch.device(device), list[dict[str, Any]]()
        self.started = time.monotonic()
        self.end = self.started + 60 * minutes

    @contextlib.contextmanager
    def step(self, model: str, dtype: str, name: str) -> Iterator[None]:
        """One row: seconds and peak memory in MB, or what was raised. The run goes on."""
        row: dict[str, Any] = {"model": model, "dtype": dtype, "step": name}
        self.rows.append(row)
        self._settle()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        before = time.monotonic()
        try:
            yield
        except Exception as error:  # whatever it is, it is a result
            row["error"] = f"{type(error).__name__}: {error}"
        self._settle()
        row |= {"seconds": round(time.monotonic() - before, 3), "peak_mb": self._peak()}

    def _settle(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _peak(self) -> int:
        """On a GPU what this step held at most; elsewhere what the process ever held."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) // 2**20
        unit = 1 if platform.system() == "Darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit // 2**20

    def time_left(self) -> bool:
        return time.monotonic() < self.end

    def report(self) -> dict[str, Any]:
        gpu = self.device.type == "cuda"
        failed = [f"{row['model']} {row['dtype']} {row['step']}" for row in self.rows if "error" in row]
        return {
            "device": torch.cuda.get_device_name(self.device) if gpu else f"{self.device}, {platform.machine()}",
            "memory_mb": torch.cuda.get_device_properties(self.device).total_memory // 2**20 if gpu else None,
            "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
            "seconds": round(time.monotonic() - self.started, 1),
            "failed": failed,
            "rows": self.rows,
        }


def tried(check: Check, name: str, dtype: str, build: Callable[[], Any], training: dict[str, Any], **call: Any) -> Any:
    """Every step on one pipeline, which is returned. A later step is left out where the one it needs failed."""
    pipe, edit = None, None
    with check.step(name, dtype, "build"):
        pipe = build()
    if pipe is None:
        return None
    before = weights_hash(pipe)
    with check.step(name, dtype, "closed form"):
        edit = erase(pipe, CONCEPT, "uce", keep=["wizard"], apply=False, progress=False)
    if edit is not None:
        with check.step(name, dtype, "apply and remove"):
            edit.apply(pipe)
            edit.remove(pipe)
            if weights_hash(pipe) != before:
                raise ValueError("the weights did not come back")
    with check.step(name, dtype, "train"):
        erase(pipe, CONCEPT, "esd", apply=False, progress=False, **training)
    with check.step(name, dtype, "draw"):
        latents = pipe(prompt=["a superhero"], num_inference_steps=2, output_type="latent", **call)[0]
        if isinstance(latents, torch.Tensor) and not torch.isfinite(latents).all():
            raise ValueError("the picture is not finite")
    return pipe


def drawings(check: Check, name: str, dtype: str, pipe: Any, count: int, **sampler: Any) -> None:
    """The same pictures in a loop of calls, and as an evaluation draws them: two rows, whose seconds compare."""
    prompts = [f"a superhero, number {i}" for i in range(count)]
    with check.step(name, dtype, "warm up"):
        pipe(prompt=prompts[0], **sampler)
    with check.step(name, dtype, f"{count} pictures, a call each"):
        for prompt in prompts:
            pipe(prompt=prompt, **sampler)
    with check.step(name, dtype, f"{count} pictures of an evaluation"):
        generate(pipe, prompts, progress=False, **sampler)


def world_check(check: Check) -> None:
    """Pictures of Emoji World, in both ways."""
    pipe = None
    with check.step("emoji-world", "float32", "build"):
        pipe = erasure.world.load().to(check.device)
    if pipe is not None:
        pipe.set_progress_bar_config(disable=True)
        drawings(check, "emoji-world", "float32", pipe, 32, num_inference_steps=8, guidance_scale=3.0)


def tiny_checks(check: Check, names: Sequence[str], dtypes: Sequence[str]) -> None:
    for name in names:
        for dtype in dtypes:
            if not check.time_left():
                return
            pipe = BUILDERS[name]()
            kinds = {kind.__name__ for kind in type(denoiser_of(pipe)).__mro__}
            if not kinds & set(DENOISERS):
                check.rows.append({"model": name, "dtype": dtype, "step": "build", "left_out": "no backbone"})
                continue
            pipe.to(check.device, pick_dtype(dtype))
            tried(check, name, dtype, lambda pipe=pipe: pipe, TINY_TRAINING, **CALLS.get(name, {}))


def full_checks(check: Check, dtypes: Sequence[str]) -> None:
    for name, dtype in ((name, dtype) for name in FULL for dtype in dtypes):
        if not check.time_left():
            return
        pipe = tried(check, name, dtype, lambda n=name, d=dtype: on_device(n, d, check.device), FULL_TRAINING)
        if pipe is not None and name == "sd14" and check.device.type != "cpu":  # which would take an hour
            drawings(check, name, dtype, pipe, 16, num_inference_steps=8, guidance_scale=7.5)
        del pipe
        if check.device.type == "cuda":
            torch.cuda.empty_cache()


def on_device(name: str, dtype: str, device: torch.device) -> Any:
    pipe = random_pipeline(name, pick_dtype(dtype)).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="cuda, mps or cpu; the best one here by default")
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--tiny", action="store_true", help="the tiny pipelines alone")
    part.add_argument("--world", action="store_true", help="pictures of Emoji World alone, in both ways")
    parser.add_argument("--architectures", nargs="*", choices=list(BUILDERS), help="all by default")
    parser.add_argument("--dtypes", nargs="*", choices=list(DTYPES), default=["float32", "bfloat16"])
    parser.add_argument("--minutes", type=float, default=7.0, help="no pipeline is begun after so many")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    given = parser.parse_args(arguments)
    warnings.simplefilter("ignore")  # random weights keep nothing, and the quick report says so each time
    check = Check(pick_device(given.device), given.minutes)
    if not given.tiny and check.time_left():
        world_check(check)
    if not given.tiny and not given.world:  # before the tiny ones: the larger the model, the more there is to learn
        full_checks(check, given.dtypes)
    if not given.world:
        tiny_checks(check, given.architectures or list(BUILDERS), given.dtypes)
    report = check.report()
    text = json.dumps(report, indent=1)
    if given.out is not None:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(text + "\n", "utf-8")
    sys.stdout.write(text + "\n")
    return 1 if report["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
