"""What a closed-form solve costs at the widths of current text encoders, dual system against (d, d). Prints JSON.

    python benchmarks/ridge.py                                  # every width, 2, 100 and 1,000 rows
    python benchmarks/ridge.py --widths 20480 --rows 1000       # the widest: FLUX.3
    python benchmarks/ridge.py --sketch 50000 --widths 7680     # and summing up that many kept embeddings in a sketch
    python benchmarks/ridge.py --linears                        # FLUX.2's and Qwen-Image's own layers; 10 GB of memory

With ``--linears`` one random layer of each model's size is edited by 1, 100 and 1,000 rows, as many kept; both forms.

Random embeddings, half of them kept, one process a case, so that memory is that case's alone: peak memory is the
process's highest resident size less that after importing torch. Seconds are of the processor, which other programs on
the machine do not change as much as those of the clock. The (d, d) form is left out above ``--primal``.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from typing import Any

import torch

from erasure.methods.kept import SKETCH, Accumulator, Kept
from erasure.methods.ridge import Problem, solve

# Qwen-Image, FLUX.1 and SD3, FLUX.2-klein, FLUX.2-dev, FLUX.3
WIDTHS = (3584, 4096, 7680, 15360, 20480)
LINEARS = {"qwen-image": (3584, 3072), "flux2-klein-4b": (7680, 3072), "flux2-dev": (15360, 6144)}  # width, outputs


def case(width: int, rows: int, form: str, outputs: int = 0) -> dict[str, Any]:
    """Seconds and MiB of one solve, with the factors made as small as they can be, and of editing one layer by them."""
    layer = torch.empty(outputs, width, dtype=torch.bfloat16).normal_()  # never as float32, whose memory would count
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    random = torch.Generator().manual_seed(0)
    x, y, k = (torch.randn(max(rows // 2, 1), width, generator=random) for _ in range(3))
    start = time.process_time()
    kept = Kept.rows_of(k) if form == "dual" else Kept(Kept.rows_of(k).matrix())
    solution = solve(Problem(x, y, kept, 0.5)).smallest()
    seconds = time.process_time() - start
    if outputs:
        start, u, v = time.process_time(), solution.u.float(), solution.v.float()
        for block in layer.split(max(outputs // 16, 1)):  # as an erasure is applied: a part of the layer at a time
            block += (block.float() @ u) @ v.T
    applied = time.process_time() - start
    moved = solution.v.T @ x[:1].double().T
    reached = x[:1].double().T + solution.u @ moved
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    error = float((reached.T - y[:1].double()).norm() / (y[:1] - x[:1]).double().norm())
    edited = {"outputs": outputs, "apply_seconds": applied} if outputs else {}
    return {"form": form, "width": width, "rows": rows, "seconds": seconds, **edited, "peak_mib": peak,
            "distance_to_anchor": error, "condition": solution.condition}  # fmt: skip


def sketch(width: int, embeddings: int) -> dict[str, Any]:
    """Seconds and MiB of summing up kept embeddings of falling energy, a thousand at a time."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    random, total = torch.Generator().manual_seed(0), Accumulator(width)
    energies = torch.logspace(0, -3, width)
    start, whole = time.process_time(), 0.0
    for _ in range(max(embeddings // 1000, 1)):
        x = torch.randn(1000, width, generator=random) * energies
        whole += float(x.square().sum())
        total.add(x)
    kept = total.kept()
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {"form": "sketch", "width": width, "embeddings": embeddings, "rows": min(SKETCH, len(kept.data)),
            "seconds": time.process_time() - start, "peak_mib": peak, "lost": kept.lost / whole}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--rows", type=int, nargs="+", default=[2, 100, 1000], help="erased and kept together")
    parser.add_argument("--primal", type=int, default=4096, help="widest (d, d) system to solve for comparison")
    parser.add_argument("--sketch", type=int, default=0, help="also sum up so many kept embeddings")
    parser.add_argument("--linears", action="store_true", help="layers of current models instead of the widths")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        given = json.loads(arguments.one)
        print(json.dumps(sketch(**given) if "embeddings" in given else case(**given)))
        return
    cases: list[dict[str, Any]] = [
        {"width": width, "rows": rows, "form": form}
        for width in arguments.widths
        for rows in arguments.rows
        for form in ("dual", "primal")
        if form == "dual" or width <= arguments.primal
    ]
    if arguments.linears:
        cases = [
            {"width": width, "rows": 2 * rows, "form": form, "outputs": outputs}
            for width, outputs in LINEARS.values()
            for rows in (1, 100, 1000)
            for form in ("dual", "primal")
        ]
    cases += [{"width": width, "embeddings": arguments.sketch} for width in arguments.widths if arguments.sketch]
    command = [sys.executable, __file__, "--one"]
    runs = [json.loads(subprocess.check_output([*command, json.dumps(each)])) for each in cases]
    print(json.dumps({"threads": torch.get_num_threads(), "runs": runs}, indent=2))


if __name__ == "__main__":
    main()
