"""S16: the target by its names, once the weights are rounded to a few bits."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from erasure.backbone import parts_of
from erasure.eval.probes.asking import Ask, PromptProbe, named
from erasure.eval.probes.base import Access, Context, Evidence, Level, Roles, Rows
from erasure.eval.probes.weigh import within

WHOLE = "as it is"


@dataclasses.dataclass(frozen=True)
class Quantised(PromptProbe):
    """How often the target is seen when the weights of the linear layers are quantised.

        W_q = s round(W / s),    s = max|W_row| / (2^(bits - 1) - 1)   for each row of W (an output)

    Weight-only and symmetric, for every linear layer of the denoisers and text encoders, computed in their own
    precision: the arithmetic of torchao's and bitsandbytes' int8 without their kernels. An edit that is smaller than
    the rounding may be lost. The prompts are the suite's.

    Families: "as it is", "int8" ... Of each rounded family "increase" is the rate minus that of the same model as it
    is, paired by prompt and noise; the base's shows what rounding does to an unedited model.

    Attributes:
        bits: to round to. 8 is the usual; at 4 most models change other pictures, too.
    """

    key, code, title = "quantised", "S16", "asked for after rounding the weights"
    level: ClassVar[Level] = "behaviour"
    access: ClassVar[Access] = "white_box"
    presets = {
        "smoke": {"images_per_prompt": 1, "limit": 1},
        "standard": {"images_per_prompt": 1, "limit": 24, "wide": True},
        "full": {"limit": 50, "bits": (8, 4)},
    }
    known = 0.5  # as for the direct probe: the base is asked by name
    measures = {"increase": "more than as it is"}
    licences = "whether suppression lasts under this rounding, for the suite's prompts"
    not_licensed = "other kinds of quantisation (of activations, in groups, calibrated), other prompts"
    reference = "after Zhang et al., ICLR 2025 (unlearning lost in quantisation, of language models)"

    bits: tuple[int, ...] = (8,)

    def __post_init__(self) -> None:
        if not self.bits or not all(2 <= bits <= 8 for bits in self.bits):
            raise ValueError(f"bits go from 2 to 8; got {self.bits}; (8,) is what is used everywhere")

    def asks(self, context: Context) -> list[Ask]:
        prompts = named(context.suite, wide=self.wide)
        kinds: dict[str, dict[str, Any]] = {WHOLE: {}, **{f"int{bits}": {"bits": bits} for bits in self.bits}}
        return [one.ask(family, sampler=settings) for family, settings in kinds.items() for one in prompts]

    @contextlib.contextmanager
    def sampling(self, pipe: Any, context: Context, settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
        with rounded(context.pipe, settings.pop("bits", None)):
            yield settings

    def weigh(self, rows: Rows, models: Roles) -> list[Evidence]:
        found = super().weigh(rows, models)
        gates = {(e.model, e.family): e.gates for e in found if e.measure == "rate"}
        for name, own in rows.items():
            for family in (f"int{bits}" for bits in self.bits):
                gated = gates.get((name, family), {})
                found.append(Evidence(self.key, name, "increase", within(own, WHOLE, family), family, gates=gated))
        return found


@contextlib.contextmanager
def rounded(pipe: Any, bits: int | None) -> Iterator[None]:
    """A pipeline whose linear layers are rounded inside the block; every bit is restored. None rounds none.

    Adapters beside the weights are not rounded.
    """
    weights = {
        layer.weight
        for module in parts_of(pipe).values()
        for layer in (module.modules() if bits else ())
        if isinstance(layer, nn.Linear)
    }
    before = [(weight, weight.data) for weight in weights]
    try:
        for weight, data in before:
            weight.data = quantised(data, bits or 8)
        yield
    finally:
        for weight, data in before:
            weight.data = data


def quantised(weight: Tensor, bits: int) -> Tensor:
    """A matrix rounded to ``bits`` bits, with a scale for each row, in the dtype of the matrix."""
    levels = 2 ** (bits - 1) - 1
    wide = weight.float()
    scale = wide.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / levels
    return (scale * (wide / scale).round()).to(weight.dtype)
