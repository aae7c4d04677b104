"""The training loop."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from erasure.io import remove_partial, write_atomically
from erasure.train.checkpoint import Checkpoint, launched
from erasure.train.modules import casting, check_trainable, checkpointed, compute_dtype, seeded, trainable
from erasure.train.settings import Draw, Training

LEAST_SCALE = 1.0  # of a float16 loss: gradients that overflow below it are no matter of scale


class Diverged(FloatingPointError):
    """The loss stopped being a number. The message says at which step and what was kept."""


class Run:
    """A training, step by step: iterating does the steps and gives the number done.

    Args:
        parameters: what is trained, by name; float32 leaves that require gradients (see :func:`trainable`).
        loss: mean over the rows of one part, a scalar. One that carries something from step to step has ``state_dict``
            and ``load_state_dict``, as optimisers have; checkpoints hold it. In float16 a step whose gradient overflows
            is done again with a smaller scale, and asks for the same draw again.
        training: the settings.
        modules: what the loss runs through, for ``precision``.
        around: what stands on the modules while the loss runs and is off behind it, such as adapters in hooks. With
            gradient checkpointing it is put on for the backward pass, which runs parts of them again.
        checkpoint: where the state is kept; an opened one with a state is taken up. A run killed at any moment and
            called again ends with the same bits.
        marks: stop for the caller only after these numbers of steps; 0 is before the first. All by default.
        progress: show a progress bar.

    Attributes:
        step: steps done.
        loss: of the last step, over all parts and processes; NaN before the first.
        rate: learning rate of the last step.
        average: averaged weights by name where there is ``ema``, otherwise None.

    Raises:
        ValueError: nothing to train, inside ``torch.inference_mode``, or the checkpoint does not fit.
        Diverged: while iterating; the loss or its gradient is not finite. The last good state is in the checkpoint.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        loss: Callable[[Draw], Tensor],
        *,
        training: Training,
        modules: Iterable[nn.Module] = (),
        around: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
        checkpoint: Checkpoint | None = None,
        marks: Iterable[int] | None = None,
        progress: bool = True,
        title: str = "train",
    ) -> None:
        if not parameters:
            raise ValueError("no parameters to train; the selector matched none on this model; choose another")
        check_trainable(parameters)
        self.parameters, self.training, self.checkpoint = dict(parameters), training, checkpoint
        self._loss, self._tensors = loss, list(dict.fromkeys(parameters.values()))
        self._marks = None if marks is None else frozenset(marks)
        self._device, self._modules = self._tensors[0].device, list(modules)
        self._dtype = compute_dtype(training.precision, self._device, self._modules)
        self._around = around if training.gradient_checkpointing else contextlib.nullcontext
        self._processes = launched()
        if self._processes is not None and self._processes.device.type != self._device.type:
            raise ValueError(
                f"the processes compute on {self._processes.device.type}, but what is trained is on {self._device}; "
                f"move the model to {self._processes.device}, or set ACCELERATE_USE_CPU=1"
            )
        self._progress, self._title = progress and self.main, title
        self._optimizer = training.build(self._tensors)
        for group in self._optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        self._scaler = torch.amp.GradScaler(self._device.type) if self._dtype == torch.float16 else None
        self.step, self.loss, self.rate = 0, math.nan, 0.0
        self._resume()

    def __iter__(self) -> Iterator[int]:
        if self._marks is not None and self.step in self._marks:
            yield self.step
        last, first = self.training.iterations, self.step
        bar = tqdm(
            range(first, last),
            initial=first,
            total=last,
            desc=self._title,
            unit="step",
            disable=not self._progress,
        )
        recomputing = checkpointed(self._modules) if self.training.gradient_checkpointing else contextlib.nullcontext()
        with recomputing, bar:
            for step in bar:
                self.rate = self._set_rate(step)
                self.loss = self._gradients(step)
                while not self._update(step):  # the same step again, at half the scale
                    self.loss = self._gradients(step)
                self.step = step + 1
                bar.set_postfix(loss=f"{self.loss:.4f}", refresh=False)
                if self.step == last or self.step % self.training.checkpoint_every == 0:
                    if not all(bool(torch.isfinite(p).all()) for p in self._tensors):
                        raise self._diverged("weights", step)
                    if self.checkpoint:
                        self._save(self.checkpoint)
                if self._marks is None or self.step in self._marks:
                    yield self.step

    @property
    def main(self) -> bool:
        """Whether this is the first of the processes, which writes what is written."""
        return self._processes is None or self._processes.is_main_process

    def result(self) -> dict[str, Tensor]:
        """The weights that were trained, or their averages where there is ``ema``."""
        return dict(self.average) if self.average is not None else {n: p.detach() for n, p in self.parameters.items()}

    def _set_rate(self, step: int) -> float:
        factor = self.training.factor(step)
        for group in self._optimizer.param_groups:  # a factory may have given its groups rates of their own
            group["lr"] = group["initial_lr"] * factor
        return self.training.lr * factor

    def _gradients(self, step: int) -> float:
        """Leave the mean gradient of all parts in ``.grad``; returns the mean loss."""
        self._optimizer.zero_grad()
        own, total = self.training.accumulation, torch.zeros((), device=self._device)
        rank, processes = (p.process_index, p.num_processes) if (p := self._processes) else (0, 1)
        for part in range(rank * own, (rank + 1) * own):
            draw = Draw(self.training.seed, step, part, own * processes)
            seed = int(draw.rng(1).integers(2**31))
            with torch.enable_grad():
                with seeded(seed, self._device), casting(self._device, self._dtype):
                    value = self._loss(draw)
                if not value.requires_grad:
                    raise ValueError("the loss does not depend on what is trained; choose other parameters")
                share = value / own
                with self._around():
                    (share if self._scaler is None else self._scaler.scale(share.float())).backward()
            total += share.detach()
        return self._share(total)

    def _share(self, loss: Tensor) -> float:
        """Average gradients and loss over the processes."""
        if self._processes is None:
            return loss.item()
        from accelerate.utils import reduce

        used = torch.tensor([p.grad is not None for p in self._tensors], device=self._device, dtype=torch.float32)
        trained = [p for p, anywhere in zip(self._tensors, reduce(used, "sum").tolist(), strict=True) if anywhere]
        for dtype in dict.fromkeys(p.dtype for p in trained):  # one message for all: hundreds of small ones take longer
            own = [p for p in trained if p.dtype == dtype]
            flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in own])
            for p, mean in zip(own, reduce(flat, "mean").split([p.numel() for p in own]), strict=True):
                p.grad = mean.view_as(p)
        return reduce(loss, "mean").item()

    def _update(self, step: int) -> bool:
        """One step of the optimiser; False if the gradient overflowed in float16, and the scale was lowered instead."""
        if self._scaler is not None:
            self._scaler.unscale_(self._optimizer)
        gradients = [parameter.grad for parameter in self._tensors if parameter.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        finite = bool(torch.isfinite(norm))
        overflow = self._scaler is not None and self._scaler.get_scale() > LEAST_SCALE
        if not math.isfinite(self.loss) or not (finite or overflow):
            raise self._diverged("loss or gradient", step)
        if finite:
            if self.training.clip is not None:
                nn.utils.clip_grads_with_norm_(self._tensors, self.training.clip, norm)
            self._optimizer.step()
        if self._scaler is not None:
            self._scaler.update()
        self._optimizer.zero_grad()  # a caller that looks at the model now has the memory
        if finite and self.average is not None and self.training.ema is not None:
            with torch.no_grad():  # the average warms up with the run: early on it follows closely
                weight = 1 - min(self.training.ema, (step + 1) / (step + 10))
                torch._foreach_lerp_(list(self.average.values()), list(self.parameters.values()), weight)
        return finite

    def _diverged(self, what: str, step: int) -> Diverged:
        """The error, with what is left to go on from."""
        kept = "no checkpoint had been written"
        if self.checkpoint is not None and self.checkpoint.step:
            kept = f"the state after step {self.checkpoint.step} is kept in {self.checkpoint.folder}"
            kept += ", and it is the one whose loss is not finite" if self.checkpoint.step == step else ""
        return Diverged(
            f"{what} stopped being finite at step {step} (loss {self.loss:.3g}); {kept}; lower the learning rate "
            f"({self.training.lr})"
        )

    # --- its state on disk ---

    def _facts(self) -> dict[str, Any]:
        return {
            "training": self.training.describe(),
            "optimizer": type(self._optimizer).__qualname__,
            "processes": self._processes.num_processes if self._processes else 1,
            "shapes": [[name, list(parameter.shape)] for name, parameter in self.parameters.items()],
        }

    def _save(self, checkpoint: Checkpoint) -> None:
        if self.main:
            checkpoint.write(
                {
                    "step": self.step,
                    "facts": self._facts(),
                    "parameters": self.parameters,
                    "average": self.average,
                    "optimizer": self._optimizer.state_dict(),
                    "scaler": self._scaler.state_dict() if self._scaler else None,
                    "loss": carried() if (carried := getattr(self._loss, "state_dict", None)) else None,
                }
            )
        checkpoint.step = self.step
        if self._processes is not None:
            self._processes.wait_for_everyone()

    def _resume(self) -> None:
        """Take up the checkpoint, if it has a state, and begin every process with the same weights."""
        state = self.checkpoint.read() if self.checkpoint else None
        self.average: dict[str, Tensor] | None = None
        if state is not None and state["facts"] != self._facts():
            raise ValueError(
                f"{self.checkpoint.folder if self.checkpoint else ''} holds the checkpoint of another run (its "
                "training settings, parameters or number of processes differ); give an empty folder, or delete it"
            )
        with torch.no_grad():
            if state is not None:
                for name, parameter in self.parameters.items():
                    parameter.copy_(state["parameters"][name])
                self._optimizer.load_state_dict(state["optimizer"])
                if self._scaler is not None:
                    self._scaler.load_state_dict(state["scaler"])
                if state.get("loss") is not None:
                    self._loss.load_state_dict(state["loss"])  # type: ignore[attr-defined]
                self.step = state["step"]
            self._agree()
            if self.training.ema is not None:
                source = self.parameters if state is None else state["average"]
                self.average = {n: source[n].detach().to(p.device, copy=True) for n, p in self.parameters.items()}

    def _agree(self) -> None:
        if self._processes is None:
            return
        from accelerate.utils import broadcast, gather

        steps = gather(torch.tensor([self.step], device=self._device)).tolist()
        if len(set(steps)) > 1:
            raise ValueError(f"the processes found checkpoints of steps {steps}; give a folder that all of them see")
        for parameter in self._tensors:
            parameter.copy_(broadcast(parameter.detach().clone()))


def train(
    parameters: Mapping[str, nn.Parameter],
    loss: Callable[[Draw], Tensor],
    *,
    training: Training,
    modules: Iterable[nn.Module] = (),
    checkpoint: Checkpoint | None = None,
    progress: bool = True,
) -> dict[str, Tensor]:
    """Train some parameters of frozen modules and return the differences, on the CPU; the modules are put back.

    Args, Raises: as :class:`Run`.
    """
    modules = list(modules)
    with trainable(parameters, modules) as originals:
        run = Run(parameters, loss, training=training, modules=modules, checkpoint=checkpoint, progress=progress)
        for _ in run:
            pass
        return {name: (weight - originals[name].to(weight.dtype)).cpu() for name, weight in run.result().items()}


def train_modules(
    modules: Mapping[str, nn.Module],
    loss: Callable[[Draw], Tensor],
    *,
    training: Training,
    folder: str | os.PathLike[str],
    key: str = "",
) -> dict[str, nn.Module]:
    """Train whole modules, in place, and return copies with the averaged weights.

    A checkpoint is written every ``checkpoint_every`` steps, and ``log.jsonl`` in the same folder gets a line with
    step, mean loss since the last one, rate and seconds. Called again on the folder, the run goes on from there.

    Args:
        key: describes data and modules, where the folder may be used for others; the settings are in the key anyway.

    Raises:
        Diverged: the loss is not finite. The last checkpoint is kept.
        ValueError: the folder holds the checkpoint of another run.
    """
    folder = Path(folder)
    parameters = {f"{part}.{name}": p for part, module in modules.items() for name, p in module.named_parameters()}
    checkpoint = Checkpoint.open(folder, key + training.describe())
    run = Run(
        parameters, loss, training=training, modules=modules.values(), checkpoint=checkpoint, title=folder.name
    )  # fmt: skip
    recent, began = list[float](), time.perf_counter()
    for step in run:
        recent.append(run.loss)
        if checkpoint.step == step and run.main:
            record = {"step": step, "loss": float(np.mean(recent)), "lr": run.rate}
            log = folder / "log.jsonl"
            text = log.read_text("utf-8") if log.exists() else ""
            line = json.dumps({**record, "seconds": time.perf_counter() - began})
            remove_partial(log)
            write_atomically(log, f"{text}{line}\n")
            recent.clear()
    found = {part: copy.deepcopy(module).eval().requires_grad_(False) for part, module in modules.items()}
    for name, weight in run.result().items():
        part, _, own = name.partition(".")
        found[part].get_parameter(own).data.copy_(weight)
    return found
