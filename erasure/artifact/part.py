"""What stands on one module: the erasures on it, the original tensors under them, and what its files say of both."""

from __future__ import annotations

import copy
import dataclasses
import threading
from typing import Any, Protocol

from torch import Tensor, nn

from erasure.artifact.hooks import Installed
from erasure.artifact.provenance import Entry, entries_in, entry_of, record

STATE, SAVE = "_erasure_state", "save_pretrained"  # attributes of a module


class Handle(Protocol):
    """An installed hook erasure."""

    def remove(self) -> None: ...


@dataclasses.dataclass(frozen=True)
class Layer:
    """One erasure and how strongly it is applied; 0 leaves the model as it was, 1 is the published edit."""

    erasure: Any
    scale: float
    place: int = dataclasses.field(default=0, compare=False)  # in the order of all that was ever applied


class Raw(threading.local):
    """Whether a thread makes a prediction that the hooks of erasures leave as it is: one that a hook compares with."""

    on: bool = False


class Part:
    """The state of one module: the layers that touch it, in order, and a copy of every tensor they touch.

    It is kept on the module, so that copies and pickles of the module have a state of their own, with the same
    erasures on it.

    Attributes:
        layers: the erasures by name, those in hooks too.
        originals: the tensors under them, by the module's own names.
        handles: of the erasures in hooks.
        attached: handles of erasures that stand on the text and are in no weight.
        fused: what is in the weights for good.
    """

    def __init__(self, fused: list[Entry]) -> None:
        self.lock = threading.RLock()
        self.layers: dict[str, Layer] = {}
        self.originals: dict[str, Tensor] = {}
        self.handles: dict[str, Handle] = {}
        self.attached: list[Any] = []
        self.fused = fused
        self.raw = Raw()

    def note(self, module: nn.Module) -> None:
        """Bring what the module's files will say up to date: its config names the erasures in its weights.

        A model that is erased by hooks or on its text cannot be saved as if it were erased.
        """
        active = [layer for layer in self.layers.values() if layer.scale and layer.erasure.parameter_names]
        record(module, [*self.fused, *(entry_of(layer.erasure, layer.scale) for layer in active)])
        if self.handles or self.attached:
            vars(module)[SAVE] = Unsaved()
        elif isinstance(vars(module).get(SAVE), Unsaved):
            del vars(module)[SAVE]

    def __deepcopy__(self, memo: dict[int, Any]) -> Part:
        self._refuse_hooks()
        other = Part(list(self.fused))
        other.layers = dict(self.layers)  # the same erasures, so that they can be taken off with them
        other.originals = copy.deepcopy(self.originals, memo)
        return other

    def __reduce__(self) -> Any:
        self._refuse_hooks()
        return _restored, (self.fused, self.layers, self.originals)

    def _refuse_hooks(self) -> None:
        if self.handles or self.attached:
            Installed().__reduce_ex__(2)  # it says why


def _restored(fused: list[Entry], layers: dict[str, Layer], originals: dict[str, Tensor]) -> Part:
    part = Part(fused)
    part.layers, part.originals = layers, originals
    return part


class Unsaved(Installed):
    """Stands in the place of a model's ``save_pretrained`` while erasures are on it that are in no weight."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError(
            "erasures are attached to this model or stand on it in hooks; they are in no weight and would be left out "
            "of the file; take them off with remove() first, and save erasures on their own "
            "(edit.save_pretrained), or apply such as change weights (load_erasure) instead"
        )


_guard = threading.Lock()


def part_of(module: nn.Module) -> Part:
    """The state of a module; empty where nothing was ever applied, but for what its files say."""
    with _guard:
        state = vars(module).get(STATE)
        if state is None:
            state = vars(module)[STATE] = Part(entries_in(module))
        return state


def fused_in(module: nn.Module) -> list[str]:
    """Names of the erasures in the weights of a module for good, by the record in its config, which files keep."""
    return [entry["name"] for entry in part_of(module).fused]


__all__ = ["Handle", "Layer", "Part", "Raw", "Unsaved", "fused_in", "part_of"]
