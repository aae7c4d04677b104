"""Residual adapters: a small network that adds to what a cross-attention gives back. No weight changes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from erasure.artifact.base import HookErasure
from erasure.artifact.hooks import Handles, Installed
from erasure.backbone import Backbone, backbone_of
from erasure.backbone.base import layer_at

PARTS = ("down", "down_bias", "up", "up_bias")


class ResidualErasure(HookErasure):
    """``o' = o + s (B gelu(A o + a) + b)`` on the output ``o (n, places, d)`` of every cross-attention (Receler, Huang
    et al. 2024), s the erasure's scale.

    Tensors, for each module in ``config["sites"]``: ``<site>.down`` A ``(r, d)``, ``<site>.down_bias`` a ``(r,)``,
    ``<site>.up`` B ``(d, r)`` and ``<site>.up_bias`` b ``(d,)``. It acts on every prompt: what it leaves alone it has
    learnt to.
    """

    kind: ClassVar[str] = "residual"

    @functools.cached_property
    def sites(self) -> tuple[str, ...]:
        """The attentions with an adapter, by qualified name."""
        return tuple(self.config.sites or ())

    def install(self, pipe: Any, scale: float) -> Handles:
        backbone = backbone_of(pipe)
        modules = {site: layer_at(backbone, site) for site in self.sites}
        tensors = {name: tensor.to(backbone.device) for name, tensor in self.tensors.items()}
        return residual(modules, tensors, scale)

    def misfits(self, backbone: Backbone) -> list[str]:
        return attention_misfits(backbone, {site: len(self.tensors[f"{site}.up"]) for site in self.sites})

    def check_tensors(self) -> None:
        names = {f"{site}.{part}" for site in self.sites for part in PARTS}
        whole = bool(self.sites) and len(set(self.sites)) == len(self.sites) and set(self.tensors) == names
        if not whole or self.system or not all(self.fit_together(site) for site in self.sites):
            raise ValueError(
                "a residual erasure holds down, down_bias, up and up_bias of one rank for each of its sites; names or "
                "shapes in file and config differ; get it again"
            )

    def fit_together(self, site: str) -> bool:
        """Whether the four tensors of a site have shapes that belong together."""
        down, down_bias, up, up_bias = (tuple(self.tensors[f"{site}.{part}"].shape) for part in PARTS)
        return len(down) == 2 and 0 not in down and up == down[::-1] and (down_bias, up_bias) == (down[:1], down[1:])


def attention_misfits(backbone: Backbone, widths: Mapping[str, int]) -> list[str]:
    """What is missing, or gives back another width than an erasure's tensors have.

    Args:
        widths: name of an attention to the width that is needed.
    """
    found = []
    for site, needed in widths.items():
        try:
            width = layer_at(backbone, site).to_out[0].out_features
        except (AttributeError, KeyError):
            found.append(f"{site} is missing, or is no attention")
            continue
        if width != needed:
            found.append(f"{site} has width {width}")
    return found


def residual(
    modules: Mapping[str, nn.Module],
    tensors: Mapping[str, Tensor],
    scale: float = 1.0,
    heard: Callable[[str, Tensor], None] | None = None,
) -> Handles:
    """Add ``scale (B gelu(A o + a) + b)`` to the output of every module.

    Args:
        modules: by name; each returns one tensor.
        tensors: ``<name>.down`` and the others; read at every call, so that they can be trained.
        heard: is given the name and the addition, before the scale.
    """

    hooks = {name: _Addition(name, tensors, scale, heard) for name in modules}
    return Handles([module.register_forward_hook(hooks[name]) for name, module in modules.items()])


@dataclasses.dataclass(frozen=True)
class _Addition(Installed):
    name: str
    tensors: Mapping[str, Tensor]
    scale: float
    heard: Callable[[str, Tensor], None] | None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        down, down_bias, up, up_bias = (self.tensors[f"{self.name}.{part}"] for part in PARTS)
        more = F.linear(F.gelu(F.linear(output.to(down.dtype), down, down_bias)), up, up_bias)
        if self.heard is not None:
            self.heard(self.name, more)
        return output + (self.scale * more).to(output.dtype)


__all__ = ["PARTS", "ResidualErasure", "attention_misfits", "residual"]
