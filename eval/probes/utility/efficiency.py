"""U13: what a change costs: time and memory to draw, and bytes to store beside the base."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from erasure.artifact.card import size
from erasure.backbone import denoiser_of
from erasure.eval.core.models import modules_of
from erasure.eval.probes.base import Context, Estimate, Evidence, Missing, Model, Observation, Probe, Roles, Rows
from erasure.eval.probes.weigh import families, of_family

TIME, MEMORY, STORAGE = "time to draw", "peak memory", "megabytes"
ONE_RUN = "rounds of one run on one machine, no interval"


@dataclasses.dataclass(frozen=True)
class Efficiency(Probe):
    """Time to draw and peak memory as multiples of the base's, and what has to be stored beside the base.

    - "overhead", families "time to draw" and "peak memory": base and model draw the same kept prompts in turn, without
      a cache; each round gives one ratio, and the median is reported. It is 1 for weights that were edited in place;
      the base's own, against itself, shows the noise of this machine. Memory is measured on CUDA alone.
    - "storage": megabytes (10^6 bytes) of an erasure's tensors, or of the modules of a retrained model. A filter has
      none.

    Descriptive, and not reproducible from run to run. How long a method takes to *make* an erasure is measured in
    ``benchmarks/``.

    Attributes:
        prompts: drawn in one batch. More where one picture does not fill the device.
        rounds: of base and model.
    """

    key, code, title = "efficiency", "U13", "cost of drawing and keeping"
    section, level, access = "utility", "system", "black_box"
    needs = ("base",)
    presets = {
        "smoke": {"prompts": 1, "rounds": 1},
        "quick": {"prompts": 2, "rounds": 3},
        "standard": {},
        "full": {"prompts": 8, "rounds": 9},
    }
    descriptive = True
    controls = 0
    measures = {"overhead": "times the base's", "storage": "beside the base"}
    licences = "what drawing with it and keeping it costs, against the base on the same machine"
    not_licensed = "times on another machine; how long the erasure takes to make"
    reference = "UnlearnCanvas, 2024 (efficiency beside effectiveness)"

    prompts: int = 4
    rounds: int = 5

    def __post_init__(self) -> None:
        if self.prompts < 1 or self.rounds < 1:
            raise ValueError(f"nothing to time; got prompts={self.prompts}, rounds={self.rounds}; give 1 or more")

    def run(self, model: Model, context: Context) -> list[Observation]:
        kept = [p.text for p in context.suite.prompts() if p.group != "target"][: self.prompts]
        if not kept:
            raise Missing("the suite keeps nothing to draw")
        self._cost(context.base, context, kept)  # a warm-up
        found = []
        for i in range(self.rounds):
            (before, base_peak), (seconds, peak) = (self._cost(m, context, kept) for m in (context.base, model))
            found += [
                self._row(model, TIME, i, seconds / before, seconds=seconds, base=before),
                self._row(model, MEMORY, i, None, reason="peak memory is measured on CUDA alone")
                if base_peak is None or peak is None
                else self._row(model, MEMORY, i, peak / base_peak, bytes=peak, base=base_peak),
            ]
        if model.change is not None:
            found.append(self._row(model, STORAGE, 0, *stored(model.change)))
        return found

    def _cost(self, model: Model, context: Context, prompts: Sequence[str]) -> tuple[float, int | None]:
        """Seconds to draw the prompts, and the peak of bytes: its parameters and what drawing takes."""
        device = denoiser_of(context.pipe).device
        cuda = device.type == "cuda"
        with context.open(model) as pipe:
            if cuda:
                torch.cuda.reset_peak_memory_stats(device)
                held = torch.cuda.memory_allocated(device)  # other models of the assessment, originals kept aside
                own = sum(map(_bytes, modules_of(context.pipe).values()))
            started = time.perf_counter()
            context.draw(pipe, model, prompts, cache_dir=None)  # ends in pictures
            seconds = time.perf_counter() - started
        return seconds, torch.cuda.max_memory_allocated(device) - held + own if cuda else None

    @staticmethod
    def _row(
        model: Model, family: str, i: int, value: float | None, reason: str | None = None, **facts: Any
    ) -> Observation:
        return Observation(model.name, family, f"round {i}", i, value, reason, facts)

    def weigh(self, rows: Rows, models: Roles) -> list[Evidence]:
        found = []
        for name, own in rows.items():
            for family in families(own):
                measure = "storage" if family == STORAGE else "overhead"
                note = "null: the base against itself" if models[name] == "base" else ""
                how = ("counted", "counted, no interval") if family == STORAGE else ("median of rounds", ONE_RUN)
                number = middle(of_family(own, family), *how)
                found.append(Evidence(self.key, name, measure, number, family, unit="number", note=note))
        return found


def middle(rows: Sequence[Observation], method: str, reason: str) -> Estimate:
    """The median of the values; ``reason`` says why it has no interval."""
    values = [row.value for row in rows if row.value is not None]
    if not values:
        return Estimate.missing(rows[0].reason or "no value", excluded=len(rows))
    return Estimate(statistics.median(values), None, None, method, len(values), 1, len(rows) - len(values), reason)


def stored(change: Any) -> tuple[float | None, str | None]:
    """Megabytes that a change needs beside the base, or why there are none."""
    if getattr(change, "intervention", None) == "filter":
        return None, "a filter is not stored with weights"
    if hasattr(change, "modules"):
        return sum(map(_bytes, change.modules.values())) / 1e6, None
    if hasattr(change, "tensors"):
        return size(change) / 1e6, None
    return None, "the change does not say what it stores"


def _bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in module.state_dict().values())
