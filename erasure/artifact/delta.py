"""Fine-tunes: a named difference for every trained tensor."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from erasure.artifact.base import Erasure


class DeltaErasure(Erasure):
    """``W' = W + s D`` for every trained parameter, with ``D`` of the shape of ``W``."""

    kind: ClassVar[str] = "delta"

    @property
    def parameter_names(self) -> tuple[str, ...]:
        return tuple(self.tensors)

    def edit(self, name: str, weight: Tensor, scale: float) -> Tensor:
        delta = self.tensors[name]
        if delta.shape != weight.shape:
            raise ValueError(
                f"{name}: the erasure has shape {tuple(delta.shape)}, the model {tuple(weight.shape)}; wrong base model"
            )
        return (weight.double() + scale * delta.to(weight.device, torch.float64)).to(weight.dtype)

    def check_tensors(self) -> None:
        if list(self.tensors) and set(self.tensors) == set(self.config["sites"]):
            return
        raise ValueError(
            "a delta erasure holds one tensor for each of its sites; names in file and config differ; get it again"
        )
