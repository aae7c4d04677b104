"""Fine-tunes of low rank: two thin matrices for every trained layer."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from erasure.artifact.base import Erasure, HookErasure, WeightErasure, exact
from erasure.artifact.config import Config
from erasure.artifact.hooks import Factors


class LoraErasure(WeightErasure):
    """``W' = W + s B A`` for every trained layer (Hu et al. 2022), ``A (r, in)`` and ``B (out, r)``.

    Tensors are called ``<layer>.lora_A`` and ``<layer>.lora_B``; what a training scales them by (alpha / r) is in ``B``
    already. Of a convolution ``A`` is ``(r, in, kh, kw)`` and ``B`` is ``(out, r, 1, 1)``. A layer of another part than
    the denoiser is ``part:name``. ``config["sites"]`` lists the layers.
    """

    kind: ClassVar[str] = "lora"

    @functools.cached_property
    def parameter_names(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(f"{site}.weight" for site in self.config.sites or ())

    def factors(self, site: str) -> tuple[Tensor, Tensor]:
        """``B (out, r)`` and ``A (r, in)`` of one layer, flattened to matrices."""
        return self.tensors[f"{site}.lora_B"].flatten(1), self.tensors[f"{site}.lora_A"].flatten(1)

    def edit(self, name: str, weight: Tensor, scale: float) -> Tensor:
        w = exact(weight)
        up, down = (factor.to(w.device, w.dtype) for factor in self.factors(name.removesuffix(".weight")))
        return (w + scale * (up @ down).reshape(w.shape)).to(weight.device, weight.dtype)

    def fits(self, name: str, shape: tuple[int, ...]) -> bool:
        up, down = self.factors(name.removesuffix(".weight"))
        width = functools.reduce(lambda a, b: a * b, shape[1:], 1)
        return len(shape) >= 2 and (len(up), down.shape[1]) == (shape[0], width)

    def compose(self, other: Erasure) -> LoraErasure:
        """The sum of both: ranks add up."""
        self.check_same_base(other)
        tensors = {**self.tensors}
        for site in other.config.sites or ():
            for key, dim in (("lora_A", 0), ("lora_B", 1)):
                name = f"{site}.{key}"
                parts = [edit.tensors[name] for edit in (self, other) if name in edit.tensors]
                tensors[name] = torch.cat(parts, dim=dim)
        sites = list(dict.fromkeys([*(self.config.sites or ()), *(other.config.sites or ())]))
        return LoraErasure(
            f"{self.name}+{other.name}", Config.of({**self._composed_config(other), "sites": sites}), tensors
        )

    def check_tensors(self) -> None:
        if not paired(self.tensors, self.config.sites or []) or self.system:
            raise ValueError(
                "a LoRA erasure holds lora_A and lora_B of one rank for each of its sites; names or shapes in file and "
                "config differ; get it again"
            )


class LowRankHooks(HookErasure):
    """An adapter in hooks whose factors are stored as those of a :class:`LoraErasure`."""

    @functools.cached_property
    def sites(self) -> tuple[str, ...]:
        """The layers with an addition, by qualified name."""
        return tuple(self.config.sites or ())

    def factors(self, site: str) -> Factors:
        """``B`` and ``A`` of one layer."""
        return self.tensors[f"{site}.lora_B"], self.tensors[f"{site}.lora_A"]


def paired(tensors: Mapping[str, Tensor], sites: Sequence[str]) -> bool:
    """Whether tensors are ``lora_A`` and ``lora_B`` of one rank for each of some sites, and nothing else."""
    pairs = [(tensors.get(f"{site}.lora_A"), tensors.get(f"{site}.lora_B")) for site in sites]
    if not sites or len(set(sites)) < len(sites) or len(tensors) != 2 * len(sites):
        return False
    return all(
        a is not None and b is not None and a.dim() == b.dim() >= 2 and len(a) == b.shape[1] and a.numel() and b.numel()
        for a, b in pairs
    )


__all__ = ["LoraErasure", "LowRankHooks", "paired"]
