"""What ESD costs on a full-size Stable Diffusion 1.4 U-Net, against the loop of the official script. Prints JSON.

    python benchmarks/fine_tuning.py              # latents of 16 x 16: minutes on two cores
    python benchmarks/fine_tuning.py --side 64    # as published, for a GPU

Random weights: time and memory do not depend on them. The official loop holds two U-Nets, samples a fresh trajectory to
a random step before every optimiser step (half of 50 on average, each with guidance) and makes three predictions of the
base. Here a bank is sampled once; a step is one forward and one backward pass. Rows are counted, not calls: guidance
makes two. Times are of one run and good for their ratio alone.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import time
from typing import Any

import torch
from diffusers import UNet2DConditionModel

ITERATIONS, STEPS = 200, 50  # of the official preset
BANK = {"trajectories": 12, "steps": 25, "iterations": 150, "batch_size": 8}  # `recommended` without its keep list


def unet(side: int) -> Any:
    """Stable Diffusion 1.4's U-Net with random weights."""
    return UNet2DConditionModel(sample_size=side, cross_attention_dim=768).eval().requires_grad_(False)


def inputs(side: int, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(rows, 4, side, side), torch.full((rows,), 500), torch.randn(rows, 77, 768)


def trained(model: Any) -> list[torch.nn.Parameter]:
    """Keys and values of cross-attention, as `x-strict` trains them."""
    return [p.requires_grad_() for n, p in model.named_parameters() if "attn2.to_k" in n or "attn2.to_v" in n]


def step(model: Any, optimiser: torch.optim.Optimizer, side: int, rows: int) -> None:
    x, t, text = inputs(side, rows)
    model(x, t, text).sample.square().mean().backward()
    optimiser.step()
    optimiser.zero_grad()


def measure(which: str, side: int, out: Any) -> None:
    """Seconds of a forward pass of two rows and of a training step of one, and peak memory, in a process of its own."""
    torch.manual_seed(0)
    models = [unet(side) for _ in range(2 if which == "official" else 1)]
    optimiser = torch.optim.Adam(trained(models[-1]), lr=1e-5)
    seconds: dict[str, float] = {}
    for name, work in {
        "forward": lambda: models[0](*inputs(side, 2)),
        "step": lambda: step(models[-1], optimiser, side, 1),
    }.items():
        times = []
        for _ in range(3):
            began = time.perf_counter()
            with torch.set_grad_enabled(name == "step"):
                work()
            times.append(time.perf_counter() - began)
        seconds[name] = min(times)
    size = sum(p.numel() for p in trained(models[-1])) * 4
    out.put({"seconds": seconds, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "trained": size})


def in_process(which: str, side: int) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=measure, args=(which, side, queue))
    process.start()
    found = queue.get()
    process.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=16, help="side of the latents")
    side = parser.parse_args().side
    ours, theirs = in_process("bank", side), in_process("official", side)
    official_rows = ITERATIONS * (STEPS // 2 * 2 + 3 + 1)
    bank_rows = BANK["trajectories"] * BANK["steps"] * 2
    same_rows = bank_rows + ITERATIONS  # the official batch of one, on a bank
    our_rows = bank_rows + BANK["iterations"] * BANK["batch_size"]
    row = ours["seconds"]["forward"] / 2
    official_seconds = theirs["seconds"]["forward"] / 2 * ITERATIONS * (STEPS // 2 * 2 + 3)
    official_seconds += ITERATIONS * theirs["seconds"]["step"]
    bank_seconds = bank_rows * row + ITERATIONS * ours["seconds"]["step"]
    print(
        json.dumps(
            {
                "side": side,
                "rows": {"official": official_rows, "bank, same steps": same_rows, "recommended": our_rows},
                "fewer rows": official_rows / same_rows,
                "seconds": {"official": official_seconds, "bank, same steps": bank_seconds},
                "ratio of times": official_seconds / bank_seconds,
                "peak bytes": {"official": theirs["peak"], "bank": ours["peak"]},
                "trained bytes": ours["trained"],
                "measured": {"official": theirs["seconds"], "bank": ours["seconds"]},
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
