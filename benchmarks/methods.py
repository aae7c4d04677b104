"""What the shared engines save, as ratios measured in one run. Prints JSON.

    python benchmarks/methods.py                 # Emoji World; about two minutes on two cores
    python benchmarks/methods.py --base FOLDER   # any Stable Diffusion 1.x / 2.x pipeline

Closed form: one solve for all layers, against one explicit inverse for every layer, as the published scripts do it.
Fine-tune: a bank of trajectories sampled once, against a fresh trajectory for every training step.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch

from erasure.backbone import Backbone, backbone_of
from erasure.bases import load_base
from erasure.concept import Concept
from erasure.methods.closed_form import rows, solve
from erasure.methods.esd import ESD
from erasure.methods.uce import UCE


def seconds(work: Callable[[], object], *, repeat: int = 3) -> float:
    """The shortest of a few runs."""
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


def closed_form(backbone: Backbone, concepts: list[Concept], keep: list[str]) -> dict[str, float]:
    method = UCE()
    problem = method.problem(backbone, concepts, keep, "hidden")
    targets, anchors = problem.targets, problem.anchors
    kept = torch.cat(rows(backbone, keep, "last_subject"))
    weights = [site.weight.detach() for site in backbone.text_sites().values()]

    def shared() -> list[torch.Tensor]:
        solution = solve(problem)
        u, v = (factor.to(weights[0]) for factor in (solution.u, solution.v))
        return [w + (w @ u) @ v.T for w in weights]

    def per_layer() -> list[torch.Tensor]:
        edited = []
        for w in weights:
            left, right = method.lamb * w, method.lamb * torch.eye(w.shape[1], device=w.device)
            for c, g in zip(targets, anchors, strict=True):
                left, right = left + torch.outer(w @ g, c), right + torch.outer(c, c)
            for k in kept:
                left, right = left + torch.outer(w @ k, k), right + torch.outer(k, k)
            edited.append(left @ torch.linalg.inv(right))
        return edited

    error = max(((a - b).norm() / b.norm()).item() for a, b in zip(shared(), per_layer(), strict=True))
    ours, theirs = seconds(shared), seconds(per_layer)
    return {
        "layers": len(weights),
        "concepts": len(concepts),
        "kept": len(keep),
        "ratio": theirs / ours,
        "relative_difference": error,
    }


def bank(backbone: Backbone, concept: Concept, *, iterations: int) -> dict[str, float]:
    common = {"iterations": iterations, "batch_size": 1, "num_inference_steps": 50, "lr": 1e-5}

    def run(**settings: int | None) -> Callable[[], object]:
        method = ESD(variant="x-strict", **common, **settings)  # type: ignore[arg-type]
        return lambda: method.erase(backbone, [concept], progress=False)

    ours = seconds(run(trajectories=max(iterations // 10, 1), keep_steps=10), repeat=1)
    fresh = seconds(run(trajectories=iterations, keep_steps=1), repeat=1)
    return {"iterations": iterations, "ratio": fresh / ours}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="emoji-world")
    parser.add_argument("--iterations", type=int, default=20)
    arguments = parser.parse_args()
    backbone = backbone_of(load_base(arguments.base))
    words = [f"thing {i}" for i in range(200)]
    result = {
        "base": arguments.base,
        "device": str(backbone.device),
        "threads": torch.get_num_threads(),
        "closed_form": [closed_form(backbone, [Concept(w) for w in words[:n]], words[100:]) for n in (1, 10, 100)],
        "trajectory_bank": bank(backbone, Concept("superhero"), iterations=arguments.iterations),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
