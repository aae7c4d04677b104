"""How a training is run, and what its random numbers are drawn from."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from erasure.train.modules import Precision

Schedule = Literal["constant", "linear", "cosine", "cosine_with_restarts"]
OPTIMIZERS = {
    "adam": "torch.optim:Adam",
    "adamw": "torch.optim:AdamW",
    "sgd": "torch.optim:SGD",
    "adamw8bit": "bitsandbytes.optim:AdamW8bit",
}
PARTS = 2**31  # beyond every other key that random numbers are drawn by


@dataclasses.dataclass(frozen=True)
class Training:
    """How a model is trained; what it learns is the loss.

    Attributes:
        iterations: optimiser steps.
        lr: peak learning rate.
        seed: of every random draw; see :class:`Draw`.
        batch_size: rows of one part of a step, for the loss to draw. The loop does not read it.
        optimizer: "adam" | "adamw" | "sgd" | "adamw8bit" (needs bitsandbytes; a quarter of AdamW's memory), or a
            callable that takes parameters and ``lr`` and returns a ``torch.optim.Optimizer``.
        options: further arguments of the optimiser: ``{"momentum": 0.9}``.
        schedule: "constant", "linear" (falls to zero over the last ``decay`` of the steps), "cosine" (falls to zero
            from the end of the warm-up), "cosine_with_restarts" (``restarts`` times). A falling rate ends in a quieter
            minimum; a constant one can be continued.
        warmup: steps over which the rate rises from zero. Use some where the first steps diverge.
        decay: share of the steps, for "linear".
        restarts: cycles, for "cosine_with_restarts".
        clip: largest norm of the gradient; None does not clip.
        accumulation: parts of a step in each process; their gradients are averaged. Raise it, and lower
            ``batch_size``, where memory is short.
        precision: what the forward pass computes in. "auto" is bfloat16 where that is fast, or the dtype of a module in
            half precision. A module in half precision never runs in float32: its frozen weights are not copied.
            "float16" scales the loss so that small gradients survive.
        gradient_checkpointing: compute activations again in the backward pass: less memory, a third more time.
        ema: decay of an average of the trained weights, which is then the result; 0.99 to 0.9999 for long runs.
        checkpoint_every: steps between checkpoints, when there is a folder for them.

    Raises:
        ValueError: a setting out of range, or an unknown name.
    """

    iterations: int
    lr: float
    _: dataclasses.KW_ONLY
    seed: int = 0
    batch_size: int = 1
    optimizer: str | Callable[..., torch.optim.Optimizer] = "adam"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    schedule: Schedule = "constant"
    warmup: int = 0
    decay: float = 1.0
    restarts: int = 1
    clip: float | None = None
    accumulation: int = 1
    precision: Precision = "float32"
    gradient_checkpointing: bool = False
    ema: float | None = None
    checkpoint_every: int = 25

    def __post_init__(self) -> None:
        known = {"schedule": Schedule.__args__, "precision": Precision.__args__}  # type: ignore[attr-defined]
        for name, choices in {**known, "optimizer": tuple(OPTIMIZERS)}.items():
            value = getattr(self, name)
            if value not in choices and not (name == "optimizer" and callable(value)):
                raise ValueError(f"unknown {name}; got {value!r}; choose one of {list(choices)}")
        least_of = {"iterations": 0, "warmup": 0, "restarts": 1, "accumulation": 1, "checkpoint_every": 1}
        for name, least in least_of.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} is at least {least}; got {getattr(self, name)}; raise it")
        if not 0 <= self.decay <= 1:
            raise ValueError(f"decay is a share of the steps; got {self.decay}; give 0 to 1")
        if self.ema is not None and not 0 <= self.ema < 1:
            raise ValueError(f"ema is a decay below 1; got {self.ema}; give 0.99, say, or None")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip is a norm above 0; got {self.clip}; give 1.0, say, or None")
        if abs(self.seed) > 2**40:
            raise ValueError(f"seed is at most 2**40; got {self.seed}; give a smaller one")

    @classmethod
    def from_scratch(
        cls, *, steps: int, batch: int, lr: float, warmup: int, decay: float, ema: float, weight_decay: float,
        save_every: int, seed: int = 0,
    ) -> Training:  # fmt: skip
        """Whole models from nothing, as Emoji World and its detectors are trained; the names are ``training.yaml``'s.

        AdamW (beta 0.9 and 0.99), gradients clipped at 1, and the averaged weights as the result.
        """
        return cls(
            steps, lr, seed=seed, batch_size=batch, optimizer="adamw",
            options={"betas": (0.9, 0.99), "weight_decay": weight_decay, "fused": True}, schedule="linear",
            warmup=warmup, decay=decay, clip=1.0, precision="auto", ema=ema, checkpoint_every=save_every,
        )  # fmt: skip

    def factor(self, step: int) -> float:
        """The share of the peak learning rate at a step, counted from 0."""
        rise = min(1.0, (step + 1) / max(self.warmup, 1))
        if self.schedule == "constant":
            return rise
        if self.schedule == "linear":
            return min(rise, min(1.0, (self.iterations - step) / max(self.decay * self.iterations, 1)))
        done = max(0, step - self.warmup) / max(self.iterations - self.warmup, 1)
        cycles = self.restarts if self.schedule == "cosine_with_restarts" else 1
        return min(rise, (1 + math.cos(math.pi * (done * cycles % 1.0))) / 2)

    def describe(self) -> str:
        """All that bears on the result, as JSON: for the key of a :class:`Checkpoint`."""
        facts = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if callable(self.optimizer):
            facts["optimizer"] = getattr(self.optimizer, "__qualname__", type(self.optimizer).__qualname__)
        return json.dumps({**facts, "options": dict(self.options), "checkpoint_every": None}, default=str)

    def build(self, parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
        """The optimiser.

        Raises:
            ValueError: its package is not installed, or it does not take an option.
        """
        factory = self.optimizer
        if isinstance(factory, str):
            package, name = OPTIMIZERS[factory].split(":")
            try:
                factory = getattr(importlib.import_module(package), name)
            except ImportError:
                raise ValueError(
                    f"{self.optimizer} needs {package.split('.')[0]}, which is not installed; install it, or choose "
                    "adamw"
                ) from None
        try:
            return factory(parameters, lr=self.lr, **self.options)
        except TypeError as error:
            raise ValueError(
                f"the optimiser {self.optimizer!r} does not take {dict(self.options)} ({error}); change options"
            ) from None


@dataclasses.dataclass(frozen=True)
class Draw:
    """One part of one step. A loss draws everything random from it, so that a resumed run repeats it.

    PyTorch's global generators are seeded for the part as well, and put back after it.

    Attributes:
        seed: of the run.
        step: from 0.
        part, parts: which of how many parts; each process has ``accumulation`` of them.
    """

    seed: int
    step: int
    part: int = 0
    parts: int = 1

    @functools.cached_property
    def generator(self) -> torch.Generator:
        """A CPU generator of the part's own."""
        own = self.seed * 1_000_003 + self.step
        if self.part:
            own = int(self.rng().integers(2**63))
        return torch.Generator().manual_seed(own)

    def rng(self, *key: int) -> np.random.Generator:
        """NumPy's random numbers of the part; other keys give other numbers."""
        return step_rng(self.seed, self.step, *key, *([PARTS + self.part] if self.part else []))


def step_rng(*key: int) -> np.random.Generator:
    """The random numbers of one step: a function of seed and step alone, so a resumed run repeats them."""
    return np.random.default_rng([value % 2**63 for value in key])
