"""Low-rank additions to layers by forward hooks: while adapters are trained, and where an erasure stays in hooks."""

from __future__ import annotations

import abc
import dataclasses
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from erasure.backbone.listen import named_arguments

Factors = tuple[Tensor, Tensor]  # B (out, r, ...) and A (r, in, ...)
Gate = Callable[[Tensor], Tensor | float]  # output of a layer -> what the addition is multiplied by


class Installed:
    """Base of what stands on a model while it draws, and belongs to that one model.

    Copies of the model would draw with the same object, or without it, and nothing would say so.
    """

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ValueError(
            "erasures stand on this model in hooks, and a copy would not have them as its own; take them off first "
            "(their handle's remove(), or remove(pipe)), copy or pickle the model, and put them on both"
        )


class Listener(Installed, abc.ABC):
    """What hooks must know of the denoiser's current call. ``current`` is of one thread: each has its own call."""

    def __init__(self) -> None:
        self.current = threading.local()

    def listen(self, denoisers: Iterable[nn.Module]) -> list[Any]:
        """Hooks that :meth:`hear` every call of some denoisers."""
        return [denoiser.register_forward_pre_hook(self._hear, with_kwargs=True) for denoiser in denoisers]

    def _hear(self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.hear(named_arguments(denoiser, args, kwargs))

    @abc.abstractmethod
    def hear(self, call: Mapping[str, Any]) -> None:
        """Keep what is needed of one call's arguments, by name."""


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

    hooks = {name: _Addition(name, factors, gate) for name in factors}
    return Handles([layers[name].register_forward_hook(hook, with_kwargs=True) for name, hook in hooks.items()])


@dataclasses.dataclass(frozen=True)
class _Addition(Installed):
    name: str
    factors: Mapping[str, Factors]
    gate: Gate | None

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        x = args[0] if args else kwargs["input"]
        up, down = self.factors[self.name]
        more = product(layer, x, up, down).to(output.dtype)
        return output + (more if self.gate is None else self.gate(output) * more)


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


__all__ = ["Factors", "Gate", "Handles", "Installed", "Listener", "factor_shapes", "low_rank", "product"]
