"""What fine-tunes cost, against the loops of their official scripts. Prints JSON.

    python -m benchmarks.fine_tuning              # latents of 16 x 16: minutes on two cores
    python -m benchmarks.fine_tuning --side 64    # as published, for a GPU

Cost is counted in forward passes of one row through the denoiser: guidance makes two rows, a training step of a row
counts as three. The official counts follow from the published settings (`OFFICIAL`). Ours are counted while the method
runs, on a small pipeline, since they depend on the settings alone. `same updates` is our method with as many optimiser
steps, of as many rows, as the official script. The preset `recommended` has other numbers of both; how well it erases
stands in docs/methods.md.

Seconds and memory are those of a Stable Diffusion 1.4 U-Net with random weights, each in a process of its own: a
forward pass of two rows, a training step of one, the highest memory of a draw, and of every method for two steps of one
row. Times are of one run and good for their ratio alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import resource
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.closed_form import random_pipeline
from erasure import Concept, erase
from erasure.backbone import backbone_of
from erasure.batch.cost import Cost, counted
from erasure.methods import method_class
from tests.tiny import tiny

CONCEPT = Concept("superhero", anchor="ninja")
KEEP = ("wizard", "fairy", "rose", "castle")


@dataclasses.dataclass(frozen=True)
class Official:
    """The loop of an official script, in rows, and our method set to as many updates.

    Attributes:
        forward: rows without a gradient. trained: rows with one.
        updates: settings of our method for as many optimiser steps of as many rows, on a bank.
    """

    forward: int
    trained: int
    updates: dict[str, Any]

    @property
    def passes(self) -> int:
        return self.forward + 3 * self.trained


BANK = {"trajectories": 12, "num_inference_steps": 25, "keep_steps": None}
OFFICIAL = {
    # 200 steps; each samples half of 50 steps on average, with guidance, and asks the base three times.
    "esd": Official(200 * (25 * 2 + 3), 200, {"iterations": 200, "batch_size": 1, **BANK}),
    # 1,000 pictures of 25 steps with guidance, then 100 steps of 8 rows with a teacher each.
    "concept-ablation": Official(
        1000 * 25 * 2 + 100 * 8, 100 * 8, {"iterations": 100, "batch_size": 8, "trajectories": 50, "keep_steps": 16}
    ),
    # 3,000 steps; each samples half of 30 steps with guidance, asks the base twice, and anchors 4 random texts.
    "spm": Official(3000 * (15 * 2 + 2 + 4), 3000 * (1 + 4), {"iterations": 3000, "batch_size": 1, **BANK}),
    # 200 steps of ESD, then 800 in which each of 30 steps of an attack samples a trajectory anew; 5 prompts are kept.
    "adv-unlearn": Official(
        1000 * (25 * 2 + 3 + 5) + 800 * 30 * 25 * 2,
        1000 * (1 + 5) + 800 * 30,
        {"iterations": 1000, "batch_size": 1, "attack_steps": 30, "warmup_steps": 200, **BANK},
    ),
    # 20 epochs; each samples 50 steps with guidance, and trains on 20 of them, with guidance.
    "eraseflow": Official(20 * 50 * 2, 20 * 20 * 2, {"preset": "official-2025-object", "iterations": 20}),
}
LENGTHS, PARTS = ("iterations", "warmup_steps"), 50
SHORT = {"iterations": 2, "batch_size": 1, "trajectories": 2, "keep_steps": 1, "num_inference_steps": 4}
SHORTER = {"eraseflow": {"early": 1, "late": 1, "retain": 0.0}}


def rows_of(method: str, keep: tuple[str, ...], **settings: Any) -> Cost:
    """What a method sends through the denoiser."""
    pipe = tiny("sd1")
    with counted(backbone_of(pipe)) as cost:
        erase(pipe, CONCEPT, method, keep=keep or None, apply=False, progress=False, **settings)
    return cost


def rows_of_long(method: str, keep: tuple[str, ...], settings: dict[str, Any]) -> Cost:
    """The same for as many steps as an official script takes: measured at a 25th and a 50th, and the rest is equal."""
    if settings["iterations"] < PARTS:
        return rows_of(method, keep, **settings)
    short, longer = (
        rows_of(method, keep, **settings | {k: settings[k] * n // PARTS for k in LENGTHS if k in settings})
        for n in (1, 2)
    )
    more = PARTS - 1
    return Cost(
        forward=short.forward + more * (longer.forward - short.forward),
        trained=short.trained + more * (longer.trained - short.trained),
        again=short.again + more * (longer.again - short.again),
    )


def full_size(side: int) -> Any:
    pipe = random_pipeline("sd14", torch.float32)
    pipe.unet.register_to_config(sample_size=side)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def least_seconds(work: Callable[[], Any]) -> float:
    times = []
    for _ in range(3):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


def drawing(side: int) -> dict[str, float]:
    """Peak memory of a guided prediction without a gradient, then seconds of it and of a training step of one row."""
    unet = full_size(side).unet.requires_grad_(False)
    texts = [(name, p) for name, p in unet.named_parameters() if "attn2.to_k" in name or "attn2.to_v" in name]

    def predict(rows: int) -> Any:
        return unet(torch.randn(rows, 4, side, side), torch.full((rows,), 500), torch.randn(rows, 77, 768)).sample

    with torch.no_grad():
        forward = least_seconds(lambda: predict(2))
    found = {"peak": peak(), "forward of two rows": forward}
    for _, parameter in texts:
        parameter.requires_grad_()
    found["training step of one row"] = least_seconds(lambda: predict(1).square().mean().backward())
    return found


def training(method: str, side: int) -> dict[str, float]:
    """Peak memory of two steps of a method, and bytes of what it trains in float32."""
    pipe, settings = full_size(side), SHORT | SHORTER.get(method, {})
    if method == "eraseflow":
        settings = {k: v for k, v in settings.items() if k not in ("trajectories", "keep_steps")}
    erase(pipe, CONCEPT, method, keep=KEEP[:1], apply=False, progress=False, **settings)
    highest = peak()
    made, backbone = method_class(method)(**settings), backbone_of(pipe)
    student = made.student(backbone)  # type: ignore[attr-defined]
    return {"peak": highest, "trained": sum(p.numel() for p in student.parameters.values()) * 4}


def alone(work: Callable[..., dict[str, float]], *arguments: Any) -> dict[str, float]:
    """What a function returns in a process of its own, so that its peak is its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, arguments)


def compared(method: str, side: int, drawn: dict[str, float]) -> dict[str, Any]:
    """One method beside its official loop."""
    official = OFFICIAL[method]
    needs = KEEP if method == "adv-unlearn" else ()
    same = rows_of_long(method, needs, official.updates)
    recommended = rows_of(method, KEEP, preset="recommended")
    row, step = drawn["forward of two rows"] / 2, drawn["training step of one row"]
    theirs = official.forward * row + official.trained * step
    ours = (same.forward + same.again) * row + same.trained * step
    used = alone(training, method, side)
    floor = drawn["peak"] + 4 * used["trained"]  # float32 copies, gradients, two moments of Adam
    return {
        "passes": {"official": official.passes, "same updates": same.passes, "recommended": recommended.passes},
        "fewer passes": {
            "same updates": official.passes / same.passes,
            "recommended": official.passes / recommended.passes,
        },
        "times shorter at the same updates": theirs / ours,
        "peak bytes": used["peak"],
        "trained bytes": used["trained"],
        "peak to a draw, what is trained, its gradients and its optimiser": used["peak"] / floor,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=16, help="side of the latents")
    parser.add_argument("--method", action="append", choices=list(OFFICIAL), help="only these")
    arguments = parser.parse_args()
    drawn = alone(drawing, arguments.side)
    found = {name: compared(name, arguments.side, drawn) for name in arguments.method or OFFICIAL}
    print(json.dumps({"side": arguments.side, "threads": torch.get_num_threads(), "draw": drawn, **found}, indent=2))


if __name__ == "__main__":
    main()
