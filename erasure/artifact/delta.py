"""Fine-tunes: a named difference for every trained tensor."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from erasure.artifact.base import Erasure, WeightErasure, exact
from erasure.artifact.config import Config


class DeltaErasure(WeightErasure):
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
        w = exact(weight)
        return (w + scale * delta.to(w.device, w.dtype)).to(weight.device, weight.dtype)

    def fits(self, name: str, shape: tuple[int, ...]) -> bool:
        return tuple(self.tensors[name].shape) == shape

    def compose(self, other: Erasure) -> DeltaErasure:
        """The sum of both differences."""
        self.check_same_base(other)
        names = dict.fromkeys([*self.tensors, *other.tensors])
        tensors = {
            name: torch.stack([e.tensors[name] for e in (self, other) if name in e.tensors]).sum(dim=0)
            for name in names
        }
        config = Config.of({**self._composed_config(other), "sites": list(tensors)})
        return DeltaErasure(f"{self.name}+{other.name}", config, tensors)

    def check_tensors(self) -> None:
        sites = self.config.sites
        if sites and len(set(sites)) == len(sites) and set(sites) == set(self.tensors) and not self.system:
            return
        raise ValueError(
            "a delta erasure holds one tensor for each of its sites; names in file and config differ; get it again"
        )
