"""The erasures that stand on one UNet, and the original weights under them."""

from __future__ import annotations

import dataclasses
import weakref
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from erasure.artifact.base import Erasure
    from erasure.backbone import Backbone


@dataclasses.dataclass
class Layer:
    """One erasure and how strongly it is applied; 0 leaves the model as it was, 1 is the published edit."""

    erasure: Erasure
    scale: float


class Stack:
    """Erasures applied to one UNet in order, over a copy of every tensor they touch.

    Any change puts the originals back first and applies what remains again, so that removing everything restores every
    bit and the order of calls leaves no trace.
    """

    def __init__(self, unet: nn.Module) -> None:
        self._unet = weakref.ref(unet)
        self.layers: dict[str, Layer] = {}
        self.originals: dict[str, Tensor] = {}

    def set(self, layers: dict[str, Layer]) -> None:
        """Make exactly ``layers`` stand on the UNet. If one of them cannot be applied, nothing changes."""
        parameters = dict(_present(self._unet).named_parameters())
        names = dict.fromkeys(name for layer in layers.values() for name in layer.erasure.parameter_names)
        originals = {name: self.originals.get(name, parameters[name].detach()) for name in names}
        edited = {name: tensor.clone() for name, tensor in originals.items()}
        for layer in layers.values():
            for name in layer.erasure.parameter_names if layer.scale else ():
                edited[name] = layer.erasure.edit(name, edited[name], layer.scale)
        with torch.no_grad():
            for name, tensor in self.originals.items():
                if name not in originals:
                    parameters[name].copy_(tensor)
            for name, tensor in edited.items():
                originals[name] = self.originals.get(name, parameters[name].detach().clone())
                parameters[name].copy_(tensor)
        self.layers, self.originals = layers, originals

    def forget(self) -> None:
        """Keep the weights as they are now and drop the originals: nothing can be removed any more."""
        self.layers, self.originals = {}, {}


_stacks: weakref.WeakKeyDictionary[nn.Module, Stack] = weakref.WeakKeyDictionary()


def stack_of(backbone: Backbone) -> Stack:
    """The stack of a backbone's UNet; an empty one if nothing was ever applied."""
    return _stacks.setdefault(backbone.unet, Stack(backbone.unet))


def _present(reference: weakref.ref[nn.Module]) -> nn.Module:
    module = reference()
    if module is None:
        raise RuntimeError("the pipeline of these erasures no longer exists")
    return module
