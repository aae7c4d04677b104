"""Trainings that tests start in processes of their own."""

from __future__ import annotations

import dataclasses
import os

import torch
import torch._dynamo  # the first step of an optimiser would import it, for seconds, in every process anew
from torch import nn

from erasure.train import Checkpoint, Training, train

KINDS = {
    "adam": Training(60, 0.01, seed=1, checkpoint_every=1),
    "adamw": Training(60, 0.01, seed=2, optimizer="adamw", schedule="cosine", warmup=5, checkpoint_every=1),
    "momentum": Training(60, 0.01, seed=3, optimizer="sgd", options={"momentum": 0.9}, clip=0.5, checkpoint_every=1),
    "ema": Training(60, 0.01, seed=4, ema=0.95, precision="float16", checkpoint_every=1),
}
SHARED = Training(6, 0.01, seed=7, optimizer="adamw", clip=1.0, ema=0.9, checkpoint_every=2)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 24), nn.Dropout(0.2), nn.Linear(24, 6))


def task(kind: str | Training, folder: str | None) -> dict[str, torch.Tensor]:
    """Train the model to give back what it gets, on a bank of inputs that its checkpoint holds."""
    training = KINDS[kind] if isinstance(kind, str) else kind
    module = model()
    checkpoint = None if folder is None else Checkpoint.open(folder, training.describe())

    def sample() -> dict[str, torch.Tensor]:
        return {"x": torch.randn(32, 6, generator=torch.Generator().manual_seed(5))}

    bank = sample() if checkpoint is None else checkpoint.keep("bank", sample)

    def loss(draw):
        x = bank["x"][torch.randint(32, (4,), generator=draw.generator)]
        return (module(x) - x).square().mean()

    trained = dict(module.named_parameters())
    return train(trained, loss, training=training, modules=[module], checkpoint=checkpoint, progress=False)


def save_task(kind: str, folder: str, result: str) -> None:
    torch.save(task(kind, folder), result)


def together(out: str, rank: int, port: int) -> None:
    """One of two processes, launched as torchrun and accelerate do it: trains with the other, twice on one folder."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "1"}
    first, again = (task(SHARED, f"{out}/checkpoint") for _ in range(2))
    torch.save({"first": first, "again": again}, f"{out}/{rank}.pt")
    torch.distributed.destroy_process_group()


def beside_accelerate(out: str) -> None:
    """Runs of three precisions around an Accelerator of a fourth; says what they left behind."""
    from accelerate import Accelerator
    from accelerate.state import is_initialized

    def run(precision):
        return task(dataclasses.replace(KINDS["adam"], iterations=3, precision=precision), None)

    run("bfloat16")
    untouched = not is_initialized()
    accelerator = Accelerator(mixed_precision="bf16", gradient_accumulation_steps=3)
    before, grad, state = torch.get_rng_state(), torch.is_grad_enabled(), vars(accelerator.state).copy()
    after = [run(precision) for precision in ("float16", "float32")]
    torch.save(
        {
            "untouched": untouched,
            "accelerate": vars(accelerator.state) == state and accelerator.gradient_accumulation_steps == 3,
            "torch": torch.equal(before, torch.get_rng_state()) and torch.is_grad_enabled() == grad,
            "autocast": torch.is_autocast_enabled("cpu"),
            "weights": after,
        },
        out,
    )
