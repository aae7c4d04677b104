"""What a bank of trajectories sampled once saves a fine-tune, against a fresh trajectory for every training step.

    python benchmarks/trajectory_bank.py                 # Emoji World; about two minutes on two cores
    python benchmarks/trajectory_bank.py --base FOLDER   # any Stable Diffusion 1.x / 2.x pipeline

Prints JSON with the ratio of the two times, measured in one run.
"""

from __future__ import annotations

import argparse
import json
import time

import torch

from erasure.backbone import Backbone, backbone_of
from erasure.concept import Concept
from erasure.methods.base import Request
from erasure.methods.esd import ESD
from erasure.opening import load_base


def bank(backbone: Backbone, concept: Concept, *, iterations: int) -> dict[str, float]:
    common = {"iterations": iterations, "batch_size": 1, "num_inference_steps": 50, "lr": 1e-5}

    def seconds(**settings: int | None) -> float:
        method = ESD(variant="x-strict", **common, **settings)  # type: ignore[arg-type]
        start = time.perf_counter()
        method.erase(backbone, Request((concept,), progress=False))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - start

    ours = seconds(trajectories=max(iterations // 10, 1), keep_steps=10)
    fresh = seconds(trajectories=iterations, keep_steps=1)
    return {"iterations": iterations, "ratio": fresh / ours}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="emoji-world")
    parser.add_argument("--iterations", type=int, default=20)
    arguments = parser.parse_args()
    backbone = backbone_of(load_base(arguments.base))
    result = {
        "base": arguments.base,
        "device": str(backbone.device),
        "threads": torch.get_num_threads(),
        **bank(backbone, Concept("superhero"), iterations=arguments.iterations),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
