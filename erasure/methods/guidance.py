"""The trainer the fine-tuning methods share.

A frozen base samples trajectories once; :class:`TrajectoryBank` keeps some steps of each *with the predictions that
sampling computed anyway*, so a training step is one forward and backward pass of the student. The student is the
pipeline's own denoiser: only the originals of the trained tensors are kept beside it, and they are back in place when
training ends, however it ends.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from tqdm.auto import tqdm

from erasure.backbone import UNetBackbone
from erasure.backbone.text import Text
from erasure.io import sha256, write_atomically


@dataclasses.dataclass(frozen=True)
class TrajectoryBank:
    """Steps of trajectories the base model took.

    Attributes:
        x: ``(n, 4, h, w)`` inputs of the denoiser (already scaled as its scheduler wants them).
        t: ``(n,)`` timesteps.
        prompt: ``(n,)`` index into the prompts the bank was sampled with.
        conditional, unconditional: ``(n, 4, h, w)`` the base's predictions with the prompt and with the empty prompt.
    """

    x: Tensor
    t: Tensor
    prompt: Tensor
    conditional: Tensor
    unconditional: Tensor

    def __len__(self) -> int:
        return len(self.t)

    @classmethod
    def sample(
        cls,
        backbone: UNetBackbone,
        text: Text,
        empty: Text,
        *,
        trajectories: int,
        keep: int | None,
        num_inference_steps: int,
        guidance_scale: float,
        seed: int,
        batch_size: int = 16,
        progress: bool = True,
    ) -> TrajectoryBank:
        """Sample from the base model as it stands.

        Args:
            text: ``p`` rows, the prompts, taken in turn by the trajectories.
            empty: one row, the empty prompt.
            trajectories: how many to sample; never fewer than there are prompts.
            keep: steps kept of each, drawn at random without replacement; None keeps all. A trajectory is not sampled
                beyond its last kept step, so ``keep=1`` with many trajectories is the official (expensive) scheme.
            guidance_scale: of the sampling; 1 follows the conditional prediction alone.
        """
        generator = torch.Generator().manual_seed(seed)
        trajectories = max(trajectories, len(text))
        parts: list[tuple[Tensor, ...]] = []
        total = backbone.timesteps(num_inference_steps)
        steps = torch.stack([torch.randperm(total, generator=generator)[:keep] for _ in range(trajectories)])
        noise = torch.randn(trajectories, *backbone.latent_shape, generator=generator).to(
            backbone.device, backbone.dtype
        )
        prompts = torch.arange(trajectories) % len(text)
        batches = torch.arange(trajectories).split(batch_size)
        with (
            backbone.evaluating(),
            tqdm(total=trajectories, desc="sample", unit="trajectory", disable=not progress) as bar,
        ):
            for batch in batches:
                taken = backbone.trajectory(
                    text[prompts[batch]],
                    empty.repeat(len(batch)),
                    noise[batch],
                    generator=generator,
                    num_inference_steps=num_inference_steps,
                    guidance_scale=guidance_scale,
                    stop=int(steps[batch].max()) + 1,
                )
                for k, (x, t, conditional, unconditional) in enumerate(taken):
                    rows = (steps[batch] == k).any(dim=1)
                    if rows.any():
                        parts.append(
                            (
                                x[rows],
                                t.expand(int(rows.sum())),
                                prompts[batch][rows],
                                conditional[rows],
                                unconditional[rows],
                            )
                        )
                bar.update(len(batch))
        x, t, prompt, conditional, unconditional = (torch.cat([part[i].cpu() for part in parts]) for i in range(5))
        return cls(x, t, prompt, conditional, unconditional)


@dataclasses.dataclass(frozen=True)
class Training:
    """How a fine-tune is run; what it is run on is the loss.

    Attributes:
        iterations: optimiser steps.
        lr: learning rate of plain Adam.
        seed: of every random draw. Step k draws from a generator seeded by (seed, k), so a resumed run repeats it.
        checkpoint_every: steps between checkpoints, when there is a folder for them.
    """

    iterations: int
    lr: float
    seed: int
    checkpoint_every: int = 25


class Diverged(FloatingPointError):
    """The loss stopped being a number. The message says at which step and what was kept."""


def train(
    module: nn.Module,
    parameters: dict[str, nn.Parameter],
    loss: Callable[[torch.Generator], Tensor],
    training: Training,
    *,
    key: str,
    folder: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> dict[str, Tensor]:
    """Minimise ``loss`` over ``parameters`` of a module and return the differences; the module is put back in any case.

    A half-precision module is trained in float32: at usual learning rates single steps are smaller than its rounding.

    Args:
        loss: value of one step; draws what it needs from the generator it is given.
        key: describes the run. A checkpoint made with another key is refused.
        folder: where to keep a checkpoint. An interrupted run called again on it ends with the same weights.

    Raises:
        Diverged: the loss is not finite. The last good state is in the folder's checkpoint, if there is a folder.
        ValueError: the folder holds a checkpoint of another run.
    """
    if not parameters:
        raise ValueError("no parameters to train; the selector matched none on this model; choose another")
    checkpoint = _Checkpoint(Path(folder), key) if folder is not None else None
    with torch.enable_grad(), borrowed(module, parameters) as originals:
        optimiser = torch.optim.Adam(parameters.values(), lr=training.lr)
        start = checkpoint.load(parameters, optimiser) if checkpoint else 0
        bar = tqdm(
            range(start, training.iterations),
            initial=start,
            total=training.iterations,
            desc="train",
            unit="step",
            disable=not progress,
        )
        for step in bar:
            value = loss(torch.Generator().manual_seed(training.seed * 1_000_003 + step))
            optimiser.zero_grad()
            value.backward()
            gradients = [parameter.grad for parameter in parameters.values() if parameter.grad is not None]
            if not torch.isfinite(value) or not torch.isfinite(torch.nn.utils.get_total_norm(gradients)):
                kept = (
                    f"the state after step {checkpoint.step} is kept in {checkpoint.folder}"
                    if checkpoint and checkpoint.step
                    else "no checkpoint had been written"
                )
                raise Diverged(
                    f"loss or gradient stopped being finite at step {step} (loss {value.item():.3g}); {kept}; "
                    f"lower the learning rate ({training.lr})"
                )
            optimiser.step()
            bar.set_postfix(loss=f"{value.item():.4f}")
            if checkpoint and ((step + 1) % training.checkpoint_every == 0 or step + 1 == training.iterations):
                checkpoint.save(step + 1, parameters, optimiser)
        return {name: (parameter.detach() - originals[name].float()).cpu() for name, parameter in parameters.items()}


@contextlib.contextmanager
def borrowed(module: nn.Module, parameters: dict[str, nn.Parameter]) -> Iterator[dict[str, Tensor]]:
    """Make a module float32 and some of its parameters trainable for a while; yields the originals of those.

    Afterwards every parameter has its data, dtype and flag back.
    """
    before = {p: (p.data, p.requires_grad) for p in module.parameters()} | {
        p: (p.data, p.requires_grad) for p in parameters.values()
    }
    trained = set(parameters.values())
    try:
        for parameter in before:
            parameter.requires_grad_(parameter in trained)
            parameter.data = parameter.data.float().clone() if parameter in trained else parameter.data.float()
        yield {name: before[parameter][0] for name, parameter in parameters.items()}
    finally:
        for parameter, (data, flag) in before.items():
            parameter.data = data
            parameter.grad = None
            parameter.requires_grad_(flag)


class _Checkpoint:
    """State of a run on disk: trained tensors and Adam's moments in safetensors, written whole or not at all."""

    def __init__(self, folder: Path, key: str) -> None:
        self.folder, self.step = folder, 0
        self.digest = sha256(key)
        self.path = folder / "training.safetensors"

    def load(self, parameters: dict[str, nn.Parameter], optimiser: torch.optim.Adam) -> int:
        if not self.path.exists():
            return 0
        from safetensors import safe_open

        with safe_open(self.path, framework="pt") as file:
            meta = json.loads(file.metadata()["state"])
        if meta["key"] != self.digest:
            raise ValueError(
                f"{self.folder} holds the checkpoint of another run (concept, settings or model differ); "
                "give an empty folder, or delete it"
            )
        tensors = load_file(self.path)
        for name, student in parameters.items():
            student.data.copy_(tensors[name])
            state = {k: tensors[f"{name}//{k}"].to(student.device) for k in ("exp_avg", "exp_avg_sq")}
            optimiser.state[student] = {"step": torch.tensor(float(meta["step"])), **state}
        self.step = meta["step"]
        return self.step

    def save(self, step: int, parameters: dict[str, nn.Parameter], optimiser: torch.optim.Adam) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: student.detach().cpu().contiguous() for name, student in parameters.items()}
        for name, student in parameters.items():
            tensors |= {
                f"{name}//{k}": optimiser.state[student][k].cpu().contiguous() for k in ("exp_avg", "exp_avg_sq")
            }
        state = json.dumps({"step": step, "key": self.digest})
        write_atomically(self.path, save(tensors, metadata={"state": state}))
        self.step = step


def pick(bank: TrajectoryBank, batch_size: int, generator: torch.Generator) -> Tensor:
    """Indices of a random batch of a bank."""
    return torch.randint(len(bank), (batch_size,), generator=generator)


def batch_of(bank: TrajectoryBank, chosen: Tensor, backbone: UNetBackbone) -> tuple[Tensor, Tensor, Tensor]:
    """``x, t, prompt`` of some rows, where and in which dtype the backbone wants them."""
    x = bank.x[chosen].to(backbone.device, backbone.dtype)
    return x, bank.t[chosen].to(backbone.device), bank.prompt[chosen].to(backbone.device)
