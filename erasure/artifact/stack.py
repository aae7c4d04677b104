"""The erasures that stand on one denoiser, and the original weights under them."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from erasure.backbone import denoiser_of
from erasure.backbone.checks import parameters_of, refuse_unreachable

if TYPE_CHECKING:
    from erasure.artifact.base import Erasure


@dataclasses.dataclass
class Layer:
    """One erasure and how strongly it is applied; 0 leaves the model as it was, 1 is the published edit."""

    erasure: Erasure
    scale: float


class Stack:
    """Erasures applied to one denoiser in order, over a copy of every tensor they touch.

    Any change starts again from the originals, so that removing everything restores every bit and the order of calls
    leaves no trace.
    """

    def __init__(self, denoiser: nn.Module) -> None:
        self._denoiser = weakref.ref(denoiser)
        self.layers: dict[str, Layer] = {}
        self.originals: dict[str, Tensor] = {}
        self.attached: list[Any] = []  # handles of erasures that stand on the text and are in no weight

    def set(self, layers: dict[str, Layer]) -> None:
        """Make exactly ``layers`` stand on the denoiser. If that fails, or is interrupted, nothing changes.

        Raises:
            ValueError: the weights were changed by something else since the erasures were applied, and putting the
                originals back would undo that change too; or they are no longer there or no longer read (quantised,
                offloaded, fused projections).
        """
        names = dict.fromkeys(name for layer in layers.values() for name in layer.erasure.parameter_names)
        parameters = self._parameters([*names, *self.originals])
        self._check_untouched(parameters)
        kept = {name: self.originals.get(name, parameters[name].detach().clone()) for name in names}
        try:
            for name, original in {**self.originals, **kept}.items():
                _write(parameters[name], stacked(name, original, layers))
        except BaseException:
            for name, original in {**kept, **self.originals}.items():
                _write(parameters[name], stacked(name, original, self.layers))
            raise
        self.layers, self.originals = layers, kept

    def burn(self, layer: Layer) -> None:
        """Write an erasure into the weights for good, one tensor at a time and with no copy of the originals.

        Raises:
            ValueError: other erasures are applied; fuse them first.
        """
        if self.layers:
            raise ValueError(f"{list(self.layers)} are applied already, over copies; fuse or remove them first")
        parameters = self._parameters(layer.erasure.parameter_names)
        for name in layer.erasure.parameter_names:
            _write(parameters[name], layer.erasure.edit(name, parameters[name].detach(), layer.scale))

    def forget(self) -> None:
        """Keep the weights as they are now and drop the originals: nothing can be removed any more."""
        self.layers, self.originals = {}, {}

    def _parameters(self, touched: Iterable[str]) -> dict[str, nn.Parameter]:
        denoiser = self._denoiser()
        if denoiser is None:
            raise RuntimeError("the pipeline of these erasures no longer exists")
        refuse_unreachable(denoiser, touched)
        return parameters_of(denoiser)

    def _check_untouched(self, parameters: dict[str, nn.Parameter]) -> None:
        for name, original in self.originals.items():
            now = parameters[name].detach()
            expected = stacked(name, original, self.layers).to(now.device, now.dtype)
            if not torch.allclose(now, expected, rtol=1e-2, atol=1e-5):
                raise ValueError(
                    f"{name} was changed since the erasures were applied, which removing them would undo; "
                    "unload what changed it (a LoRA, training) first, or fuse the erasures to keep everything"
                )


def stacked(name: str, original: Tensor, layers: dict[str, Layer]) -> Tensor:
    """A parameter under a stack of erasures, applied in order."""
    weight = original
    for layer in layers.values():
        if layer.scale and name in layer.erasure.parameter_names:
            weight = layer.erasure.edit(name, weight, layer.scale)
    return weight


@torch.no_grad()
def _write(parameter: nn.Parameter, tensor: Tensor) -> None:
    parameter.copy_(tensor)


_stacks: weakref.WeakKeyDictionary[nn.Module, Stack] = weakref.WeakKeyDictionary()


def stack_of(pipe: Any) -> Stack:
    """The stack of a pipeline's (or backbone's) denoiser, compiled or not; empty if nothing was ever applied."""
    denoiser = denoiser_of(pipe)
    return _stacks.setdefault(denoiser, Stack(denoiser))


def refuse_attached(pipe: Any) -> None:
    """Refuse to write weights as "erased" while erasures stand on the text instead."""
    if stack_of(pipe).attached:
        raise ValueError(
            "erasures are attached to this pipeline, which are in no weight and would be left out of the file; take "
            "them off with their handle's remove() and apply them (load_erasure) instead"
        )
