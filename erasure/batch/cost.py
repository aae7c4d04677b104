"""What making an erasure costs, counted in what does not depend on the machine."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator

import torch

from erasure.backbone import Backbone
from erasure.backbone.listen import Call, listening


@dataclasses.dataclass
class Cost:
    """What happened inside a block.

    Attributes:
        forward: rows (pictures, and one more each under guidance) that went through the denoiser without a gradient.
        trained: rows that went through it forward and backward.
        again: rows that went through it once more in a backward pass, which computed them again to save memory. Where
            only its blocks do so (``gradient_checkpointing``) that is not seen.
        seconds: of the clock; they compare within one run on one idle machine only.
    """

    forward: int = 0
    trained: int = 0
    again: int = 0
    seconds: float = 0.0

    @property
    def passes(self) -> int:
        """Everything in forward passes of one row; a backward pass counts as two."""
        return self.forward + self.again + 3 * self.trained


@contextlib.contextmanager
def counted(backbone: Backbone) -> Iterator[Cost]:
    """The cost of what is done with a pipeline inside the block."""
    cost, began = Cost(), time.perf_counter()

    def rows_of(call: Call) -> int:
        return len(backbone.unpacked(call.inputs[backbone.latent_argument]))

    def before(call: Call) -> None:
        cost.again += rows_of(call) * torch.is_grad_enabled()

    def after(call: Call) -> None:
        rows = rows_of(call)
        cost.again -= rows * torch.is_grad_enabled()  # computed again, it is stopped before its end
        if call.output is not None and backbone.output(call.output).requires_grad:
            cost.trained += rows
        else:
            cost.forward += rows

    try:
        with listening(backbone.denoiser_parts, before=before, after=after):
            yield cost
    finally:
        cost.seconds = time.perf_counter() - began


__all__ = ["Cost", "counted"]
