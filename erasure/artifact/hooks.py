"""Low-rank additions to layers by forward hooks: while adapters are trained, and where an erasure stays in hooks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

Factors = tuple[Tensor, Tensor]  # B (out, r, ...) and A (r, in, ...)
Gate = Callable[[Tensor], Tensor | float]  # output of a layer -> what the addition is multiplied by


@dataclasses.dataclass
class Handles:
    """Several hooks that are removed together."""

    hooks: list[Any] = dataclasses.field(default_factory=list)

    def remove(self) -> None:
        while self.hooks:
            self.hooks.pop().remove()


def low_rank(layers: Mapping[str, nn.Module], factors: Mapping[str, Factors], gate: Gate | None = None) -> Handles:
    """Add ``gate * B A x`` to the output of every layer that has factors.

    Args:
        layers: linear and convolution layers by name.
        factors: name to ``B`` and ``A``; read at every call, so that they can be trained.
        gate: 1 everywhere by default.
    """

    def hook(name: str) -> Callable[..., Tensor]:
        def add(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            x = args[0] if args else kwargs["input"]
            up, down = factors[name]
            more = product(layer, x, up, down).to(output.dtype)
            return output + (more if gate is None else gate(output) * more)

        return add

    return Handles([layers[name].register_forward_hook(hook(name), with_kwargs=True) for name in factors])


def product(layer: nn.Module, x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """``B A x`` for the input of a linear layer or a 2-d convolution."""
    if isinstance(layer, nn.Linear):
        return F.linear(F.linear(x.to(down.dtype), down), up)
    if isinstance(layer, nn.Conv2d):
        inner = F.conv2d(x.to(down.dtype), down, None, layer.stride, layer.padding, layer.dilation)  # type: ignore[arg-type]
        return F.conv2d(inner, up)
    raise ValueError(f"a low-rank addition is for linear layers and 2-d convolutions; got a {type(layer).__name__}")


def factor_shapes(layer: nn.Module, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of ``B`` and ``A`` for a layer."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    out, width, *kernel = weight.shape
    ones = [1] * len(kernel)
    return (out, rank, *ones), (rank, width, *kernel)


__all__ = ["Factors", "Gate", "Handles", "factor_shapes", "low_rank", "product"]
