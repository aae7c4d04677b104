"""The training loop every model of Emoji World goes through: seeded by step, averaged, resumable."""

from __future__ import annotations

import copy
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from erasure.io import writing
from erasure.precision import autocast


@dataclasses.dataclass(frozen=True)
class Fit:
    """Settings of one training run.

    Attributes:
        lr: peak learning rate of AdamW.
        warmup: steps over which the rate rises from zero.
        decay: share of the steps, at the end, over which the rate falls linearly to zero; 0 keeps it constant,
            which is right for a phase that another one continues.
        ema: decay of the weight average that is returned and shipped.
    """

    steps: int
    batch: int
    lr: float
    warmup: int
    decay: float
    ema: float
    weight_decay: float
    save_every: int

    def rate(self, step: int) -> float:
        rise = min(1.0, (step + 1) / max(self.warmup, 1))
        fall = min(1.0, (self.steps - step) / max(self.decay * self.steps, 1))
        return self.lr * min(rise, fall)


def step_rng(*key: int) -> np.random.Generator:
    """The random numbers of one step: a function of seed and step alone, so a resumed run repeats them."""
    return np.random.default_rng(key)


def fit(
    folder: Path,
    modules: dict[str, nn.Module],
    loss: Callable[[int], Tensor],
    settings: Fit,
    *,
    seed: int,
    device: torch.device,
) -> dict[str, nn.Module]:
    """Train ``modules`` on ``loss(step)`` and return their weight averages.

    A checkpoint is written every ``save_every`` steps; called again on the same folder, the run goes on from there
    and ends with the same weights. ``log.jsonl`` gets a line with step, loss, rate and seconds at each checkpoint.

    Raises:
        FloatingPointError: the loss is not finite. The last checkpoint is kept.
        ValueError: the folder holds the checkpoint of a run with other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "checkpoint.pt"
    average = {name: copy.deepcopy(module).eval().requires_grad_(False) for name, module in modules.items()}
    parameters: list[Tensor] = [p for module in modules.values() for p in module.parameters()]
    averaged: list[Tensor] = [p for module in average.values() for p in module.parameters()]
    optimizer = torch.optim.AdamW(
        parameters, lr=settings.lr, betas=(0.9, 0.99), weight_decay=settings.weight_decay, fused=True
    )
    facts = {**dataclasses.asdict(settings), "seed": seed}
    start = _load(path, modules, average, optimizer, facts, device)

    recent: list[float] = []
    began = time.perf_counter()
    bar = tqdm(
        range(start, settings.steps), initial=start, total=settings.steps, desc=folder.name, unit="step", mininterval=10
    )
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = settings.rate(step)
        torch.manual_seed(int(step_rng(seed, step, 1).integers(2**31)))
        with autocast(device):
            value = loss(step)
        if not torch.isfinite(value):
            raise FloatingPointError(
                f"the loss became {value.item()} at step {step}; lower the learning rate ({settings.lr})"
            )
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():  # the average warms up with the run: early on it follows closely
            torch._foreach_lerp_(averaged, parameters, 1 - min(settings.ema, (step + 1) / (step + 10)))
        recent.append(value.item())
        if (step + 1) % settings.save_every == 0 or step + 1 == settings.steps:
            mean = float(np.mean(recent))
            bar.set_postfix(loss=f"{mean:.4f}")
            _save(path, step + 1, modules, average, optimizer, facts)
            record = {"step": step + 1, "loss": mean, "lr": settings.rate(step), "seconds": time.perf_counter() - began}
            with (folder / "log.jsonl").open("a") as log:
                log.write(json.dumps(record) + "\n")
            recent.clear()
    return average


def _load(
    path: Path,
    modules: dict[str, Any],
    average: dict[str, Any],
    optimizer: torch.optim.Optimizer,
    facts: dict[str, float],
    device: torch.device,
) -> int:
    """Take up the run in ``path``, if there is one; returns the step it had reached."""
    if not path.exists():
        return 0
    state = torch.load(path, map_location=device, weights_only=True)
    if state["settings"] != facts:
        raise ValueError(f"{path.parent} holds a run with other settings; restore them, or delete it to start again")
    optimizer.load_state_dict(state["optimizer"])
    for name in modules:
        modules[name].load_state_dict(state["modules"][name])
        average[name].load_state_dict(state["average"][name])
    return state["step"]


def _save(
    path: Path, step: int, modules: dict, average: dict, optimizer: torch.optim.Optimizer, facts: dict[str, float]
) -> None:
    state = {
        "settings": facts,
        "step": step,
        "modules": {name: module.state_dict() for name, module in modules.items()},
        "average": {name: module.state_dict() for name, module in average.items()},
        "optimizer": optimizer.state_dict(),
    }
    with writing(path) as partial:
        torch.save(state, partial)
