"""U13: what a change costs whoever draws with it: time, memory, and bytes to keep beside the base."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from erasure.artifact.card import size
from erasure.backbone import denoiser_of
from erasure.eval.core.models import Model, Role, modules_of
from erasure.eval.probes.base import Context, Evidence, Missing, Observation, Probe
from erasure.eval.probes.weigh import families
from erasure.eval.stats import Estimate

TIME, MEMORY, STORAGE = "time to draw", "peak memory", "megabytes"
ONE_RUN = "rounds of one run on one machine, no interval"


@dataclasses.dataclass(frozen=True)
class Efficiency(Probe):
    """Time to draw and peak memory as multiples of the base's, and what has to be stored beside the base.

    - "overhead", families "time to draw" and "peak memory": base and model draw the same kept prompts in turn, nothing
      cached, and each round gives one ratio; the median is told. 1 where weights were edited in place, which costs
      nothing to draw with; a filter that looks at pictures costs more. The base's own, against itself, says how much
      such a ratio means on this machine. Memory is measured on CUDA.
    - "storage": megabytes (10^6 bytes) of an erasure's numbers, or of the modules of a retrained model. A filter is not
      stored with weights and has none.

    Descriptive, and the one probe whose numbers a second run does not repeat. How long a method takes to *make* an
    erasure is measured in ``benchmarks/``; how many pictures of the target it looks at is not counted: none does here.

    Attributes:
        prompts: drawn at once, in one batch. More where one picture does not fill the device.
        rounds: of base and model.
    """

    key: ClassVar = "efficiency"
    code: ClassVar = "U13"
    title: ClassVar = "cost of drawing and keeping"
    section: ClassVar = "utility"
    level: ClassVar = "system"
    access: ClassVar = "black_box"
    needs: ClassVar = ("base",)
    presets: ClassVar = {
        "smoke": {"prompts": 1, "rounds": 1},
        "quick": {"prompts": 2, "rounds": 3},
        "standard": {},
        "full": {"prompts": 8, "rounds": 9},
    }
    descriptive: ClassVar = True
    controls: ClassVar = 0
    measures: ClassVar = {"overhead": "times the base's", "storage": "beside the base"}
    licences: ClassVar = "what drawing with it and keeping it costs, against the base on the same machine"
    not_licensed: ClassVar = "times on another machine; how long the erasure takes to make"
    reference: ClassVar = "UnlearnCanvas, 2024 (efficiency beside effectiveness)"

    prompts: int = 4
    rounds: int = 5

    def __post_init__(self) -> None:
        if self.prompts < 1 or self.rounds < 1:
            raise ValueError(f"nothing to time; got prompts={self.prompts}, rounds={self.rounds}; give 1 or more")

    def run(self, model: Model, context: Context) -> list[Observation]:
        kept = [p.text for p in context.suite.prompts() if p.group != "target"][: self.prompts]
        if not kept:
            raise Missing("the suite keeps nothing to draw")
        self._cost(context.base, context, kept)  # whatever the first pictures of a process wait for
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
        """Seconds to draw the prompts, and the most bytes it needs: its parameters and what drawing takes."""
        device = denoiser_of(context.pipe).device
        cuda = device.type == "cuda"
        with context.open(model) as pipe:
            if cuda:
                torch.cuda.reset_peak_memory_stats(device)
                held = torch.cuda.memory_allocated(device)  # other models of the assessment, originals kept aside
                own = sum(map(_bytes, modules_of(context.pipe).values()))
            started = time.perf_counter()
            context.draw(pipe, model, prompts, cache_dir=None, description=f"U13 {model.name}")  # ends in pictures
            seconds = time.perf_counter() - started
        return seconds, torch.cuda.max_memory_allocated(device) - held + own if cuda else None

    @staticmethod
    def _row(
        model: Model, family: str, i: int, value: float | None, reason: str | None = None, **facts: Any
    ) -> Observation:
        return Observation(model.name, family, f"round {i}", i, value, reason, facts)

    def weigh(self, rows: Mapping[str, Sequence[Observation]], models: Mapping[str, Role]) -> list[Evidence]:
        found = []
        for name, own in rows.items():
            for family in families(own):
                measure = "storage" if family == STORAGE else "overhead"
                note = "null: the base against itself" if models[name] == "base" else ""
                told = ("counted", "counted, no interval") if family == STORAGE else ("median of rounds", ONE_RUN)
                number = middle([row for row in own if row.family == family], *told)
                found.append(Evidence(self.key, name, measure, number, family, unit="number", note=note))
        return found


def middle(rows: Sequence[Observation], method: str, reason: str) -> Estimate:
    """The median of the values there are; ``reason`` says why it has no interval."""
    values = [row.value for row in rows if row.value is not None]
    if not values:
        return Estimate.missing(rows[0].reason or "no value", excluded=len(rows))
    return Estimate(statistics.median(values), None, None, method, len(values), 1, len(rows) - len(values), reason)


def stored(change: Any) -> tuple[float | None, str | None]:
    """Megabytes that a change keeps beside the base, or why there are none."""
    if getattr(change, "intervention", None) == "filter":
        return None, "a filter is not stored with weights"
    if hasattr(change, "modules"):
        return sum(map(_bytes, change.modules.values())) / 1e6, None
    if hasattr(change, "tensors"):
        return size(change) / 1e6, None
    return None, "the change does not say what it stores"


def _bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in module.state_dict().values())
