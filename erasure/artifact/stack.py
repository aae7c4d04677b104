"""The erasures that stand on a pipeline, and the original weights under them."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from erasure.artifact.kinds import weightless
from erasure.artifact.part import Handle, Layer, Part, Raw, fused_in, part_of
from erasure.artifact.provenance import entry_of
from erasure.backbone import Backbone, parts_of
from erasure.backbone.checks import parameters_of, refuse_unreachable, refuse_wrapper
from erasure.backbone.names import qualified, split
from erasure.io import shown

if TYPE_CHECKING:
    from erasure.artifact.base import Erasure

LARGEST_SCALE = 100  # published ones reach 15


class Applied(Protocol):
    """What a stack needs of an erasure."""

    kind: ClassVar[str]

    @property
    def name(self) -> str: ...

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """Qualified names of the parameters it changes; none for a hook erasure."""
        ...

    def edit(self, name: str, weight: Tensor, scale: float) -> Tensor: ...

    def install(self, pipe: Any, scale: float) -> Handle | None:
        """Hook it into a pipeline; None where it is all in the weights."""
        ...


_places = itertools.count(1)


class Stack:
    """Erasures applied to the parts of a pipeline in order, over a copy of every tensor they touch.

    Any change starts again from the originals, so that removing everything restores every bit and the order of calls
    leaves no trace. What stands on a module stands there for every pipeline that holds it. All changes of a module go
    through its lock, one thread at a time.

    Parameters go by qualified names: bare for the first denoiser, ``part:name`` for any other part.
    """

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.modules = parts_of(pipe)
        if not self.modules:
            raise ValueError(f"{type(pipe).__name__} has neither unet nor transformer; give a text-to-image pipeline")
        self.parts = {name: part_of(module) for name, module in self.modules.items()}
        self.first = next(iter(self.parts))

    # --- what stands there ------------------------------------------------------------------------------------------

    @property
    def layers(self) -> dict[str, Layer]:
        """Every erasure on the pipeline by name, in the order in which they were applied."""
        found = {name: layer for part in self.parts.values() for name, layer in part.layers.items()}
        return dict(sorted(found.items(), key=lambda entry: entry[1].place))

    @property
    def originals(self) -> dict[str, Tensor]:
        """The tensors under the erasures, by qualified name."""
        return {
            qualified(part, name, first=self.first): tensor
            for part, state in self.parts.items()
            for name, tensor in state.originals.items()
        }

    def originals_of(self, part: str) -> dict[str, Tensor]:
        """The tensors under the erasures on one part, by its own names."""
        return self.parts[part].originals

    @property
    def attached(self) -> list[Any]:
        """Handles of erasures attached to the text."""
        return self.parts[self.first].attached

    def attach(self, handle: Any) -> None:
        """Note erasures that stand on the text, and are in no weight."""
        with self.locked():
            self.attached.append(handle)
            self._note()

    def detach(self, handle: Any) -> None:
        """Forget them; nothing happens where they are not there."""
        with self.locked():
            if handle in self.attached:
                self.attached.remove(handle)
                self._note()

    @property
    def fused(self) -> dict[str, list[dict[str, Any]]]:
        """What is in the weights for good, by part; parts with nothing are left out."""
        return {name: part.fused for name, part in self.parts.items() if part.fused}

    @property
    def raw(self) -> Raw:
        """Whether a prediction of the denoiser is one that hooks leave as it is."""
        return self.parts[self.first].raw

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other threads from changing the pipeline's parts for the time of a block."""
        with contextlib.ExitStack() as stack:
            for part in sorted(self.parts.values(), key=id):  # one order for everybody: no two can wait for each other
                stack.enter_context(part.lock)
            yield

    # --- changes ----------------------------------------------------------------------------------------------------

    def set(self, layers: Mapping[str, Layer]) -> None:
        """Make exactly ``layers`` stand on the pipeline. If that fails, or is interrupted, nothing changes.

        Raises:
            ValueError: a scale is not finite; an edit is not finite in the weight's precision; the weights were changed
                by something else since the erasures were applied, and putting the originals back would undo that change
                too; or they are no longer there or no longer read (quantised, offloaded, fused projections).
        """
        for layer in layers.values():
            check_scale(layer.scale)
        layers = {name: dataclasses.replace(layer, place=next(_places)) for name, layer in layers.items()}
        with self.locked():
            for layer in layers.values():
                if absent := {part for part, _ in self._names(layer)} - set(self.parts):
                    raise ValueError(
                        f"the pipeline has no {sorted(absent)}, which the erasure changes; wrong base model"
                    )
            plan = [self._plan(part, layers) for part in self.parts]
            before = {name: (part.layers, part.originals) for name, part in self.parts.items()}
            done: list[_Plan] = []
            try:
                for one in plan:
                    done.append(one)
                    one.write()
                self._install(layers)
            except BaseException:
                for one in done:
                    one.undo()
                for name, (theirs, originals) in before.items():
                    self.parts[name].layers, self.parts[name].originals = theirs, originals
                self._install({n: layer for theirs, _ in before.values() for n, layer in theirs.items()})
                self._note()
                raise
            for one in plan:
                one.part.layers, one.part.originals = one.layers, one.kept
            self._note()

    def change(self, name: str, layer: Layer | None) -> None:
        """Set or take off one erasure, whatever other threads do to the others."""
        with self.locked():
            layers = self.layers
            layers.pop(name, None) if layer is None else layers.update({name: layer})
            self.set(layers)

    def burn(self, layer: Layer) -> None:
        """Write an erasure into the weights for good, one tensor at a time and with no copy of the originals.

        Raises:
            ValueError: other erasures are applied; fuse them first.
        """
        check_scale(layer.scale)
        with self.locked():
            if self.layers:
                raise ValueError(f"{list(self.layers)} are applied already, over copies; fuse or remove them first")
            if not layer.erasure.parameter_names:
                raise ValueError(f"{layer.erasure.name!r} changes no weight, so it cannot be fused; apply it instead")
            names = zip(layer.erasure.parameter_names, self._names(layer), strict=True)
            parameters = {name: self._parameters(part, [own])[own] for name, (part, own) in names}
            for write in (False, True):  # refuse what overflows before a weight is written
                for name, parameter in parameters.items():
                    now = parameter.detach()
                    edited = check_finite(name, now, layer.erasure.edit(name, now, layer.scale))
                    if write:
                        _write(parameter, edited)
            self._record({layer.erasure.name: layer})
            self._note()

    def forget(self) -> None:
        """Keep the weights as they are now and drop the originals: nothing can be removed any more.

        Raises:
            ValueError: a hook erasure is applied, which is in no weight.
        """
        with self.locked():
            if hooked := [name for name, layer in self.layers.items() if not layer.erasure.parameter_names]:
                raise ValueError(
                    f"{hooked} change no weight, so they cannot be fused; remove them, or keep them applied"
                )
            self._record(self.layers)
            for part in self.parts.values():
                part.layers, part.originals = {}, {}
            self._note()

    # --- inside -----------------------------------------------------------------------------------------------------

    def _record(self, layers: Mapping[str, Layer]) -> None:
        """Remember erasures as fused into the parts whose weights they become."""
        for name, part in self.parts.items():
            mine = [layer for layer in layers.values() if layer.scale and self._own_names(name, layer)]
            part.fused = [*part.fused, *(entry_of(layer.erasure, layer.scale) for layer in mine)]

    def _note(self) -> None:
        for name, part in self.parts.items():
            part.note(self.modules[name])

    def _plan(self, part: str, layers: Mapping[str, Layer]) -> _Plan:
        state = self.parts[part]
        touched = {name: self._own_names(part, layer) for name, layer in layers.items()}
        names = dict.fromkeys(own for owned in touched.values() for own in owned)
        mine = {  # hook erasures stand on the first part, for want of a better place
            name: layer
            for name, layer in layers.items()
            if touched[name] or (part == self.first and not layer.erasure.parameter_names)
        }
        parameters = self._parameters(part, [*names, *state.originals])
        across = {own: qualified(part, own, first=self.first) for own in parameters}
        for own, original in state.originals.items():
            now = parameters[own].detach()
            expected = stacked(across[own], original, state.layers).to(now.device, now.dtype)
            if not torch.allclose(now, expected, rtol=1e-2, atol=1e-5, equal_nan=True):
                raise ValueError(
                    f"{across[own]} was changed since the erasures were applied, which removing them would undo; "
                    "unload what changed it (a LoRA, training) first, or fuse the erasures to keep everything"
                )
        kept = {own: state.originals.get(own, parameters[own].detach().clone()) for own in names}
        return _Plan(state, mine, kept, {own: parameters[own] for own in {**state.originals, **kept}}, across)

    def _own_names(self, part: str, layer: Layer) -> list[str]:
        """The parameters of a part that a layer changes, by the part's own names."""
        return [own for where, own in self._names(layer) if where == part]

    def _names(self, layer: Layer) -> list[tuple[str, str]]:
        """Part and own name of every parameter that a layer changes."""
        return [split(name, first=self.first) for name in layer.erasure.parameter_names]

    def _parameters(self, part: str, touched: Iterable[str]) -> dict[str, nn.Parameter]:
        wanted = list(touched)
        if not wanted:
            return {}
        refuse_unreachable(self.modules[part], wanted)
        everything = parameters_of(self.modules[part])
        return {name: everything[name] for name in wanted}

    def _install(self, layers: Mapping[str, Layer]) -> None:
        handles = self.parts[self.first].handles
        for handle in handles.values():
            handle.remove()
        handles.clear()
        for name, layer in layers.items():
            if layer.scale and (handle := layer.erasure.install(self.pipe, layer.scale)) is not None:
                handles[name] = handle


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What one part becomes.

    Attributes:
        layers: the erasures that will stand on it.
        kept: originals under them.
        parameters: everything that is written, with what stands under an erasure now.
        qualified: own to qualified names.
    """

    part: Part
    layers: dict[str, Layer]
    kept: dict[str, Tensor]
    parameters: dict[str, nn.Parameter]
    qualified: dict[str, str]

    def write(self) -> None:
        for own, parameter in self.parameters.items():
            original = {**self.part.originals, **self.kept}[own]
            name = self.qualified[own]
            _write(parameter, check_finite(name, original, stacked(name, original, self.layers)))

    def undo(self) -> None:
        for own, parameter in self.parameters.items():
            original = {**self.kept, **self.part.originals}[own]
            _write(parameter, stacked(self.qualified[own], original, self.part.layers))


def stacked(name: str, original: Tensor, layers: Mapping[str, Layer]) -> Tensor:
    """A parameter under a stack of erasures, applied in order."""
    weight = original
    for layer in layers.values():
        if layer.scale and name in layer.erasure.parameter_names:
            weight = layer.erasure.edit(name, weight, layer.scale)
    return weight


def check_scale(scale: Any) -> float:
    """A scale as a number.

    Raises:
        ValueError: it is none, not finite, below 0, which would draw the concept out, or above 100.
    """
    try:
        value = math.nan if isinstance(scale, str | bytes) else float(scale)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        value = math.nan
    if not 0 <= value <= LARGEST_SCALE:
        raise ValueError(
            f"a scale is a number from 0 to {LARGEST_SCALE}; got {shown(scale)}; 0 is the unmodified model, 1 the edit"
        )
    return value


def check_scales(scales: Any, count: int, *, of: str = "erasures") -> list[float]:
    """One scale each, from one for all or a sequence of them; see :func:`check_scale`."""
    if isinstance(scales, str | bytes) or not hasattr(scales, "__len__") or getattr(scales, "ndim", 1) == 0:
        return [check_scale(scales)] * count
    if len(scales) != count:
        raise ValueError(f"{count} {of} but {len(scales)} scales; give one scale for all, or one each")
    return [check_scale(scale) for scale in scales]


def check_finite(name: str, weight: Tensor, edited: Tensor) -> Tensor:
    """An edited weight, unless it holds NaN or infinity where the weight had numbers: it could not be taken off again.

    Raises:
        ValueError: it does.
    """
    if not torch.isfinite(edited).all() and (torch.isfinite(weight) & ~torch.isfinite(edited)).any():
        raise ValueError(
            f"{name}: the edited weight overflows {str(weight.dtype).removeprefix('torch.')}; got values beyond "
            f"{torch.finfo(weight.dtype).max:.3g}; use a smaller scale, or a pipeline in float32 or bfloat16"
        )
    return edited


@torch.no_grad()
def _write(parameter: nn.Parameter, tensor: Tensor) -> None:
    parameter.copy_(tensor)


def stack_of(pipe: Any) -> Stack:
    """The stack of a pipeline or backbone, compiled or not; empty if nothing was ever applied."""
    return Stack(pipe.pipe if isinstance(pipe, Backbone) else pipe)


def refuse_attached(pipe: Any) -> None:
    """Refuse to write weights as "erased" while erasures stand on the text or in hooks, or what holds no such file."""
    stack = stack_of(pipe)
    for part in stack.modules:
        refuse_wrapper(part, getattr(pipe, part))
    for name, layer in stack.layers.items():
        if not layer.erasure.parameter_names:
            raise ValueError(
                f"{name!r} cannot be in this file: {weightless(layer.erasure.kind)}; remove it to write the model "
                "without it"
            )
    if stack.attached:
        raise ValueError(
            "erasures are attached to this pipeline, which are in no weight and would be left out of the file; take "
            "them off with their handle's remove() and apply them (load_erasure) instead"
        )


@contextlib.contextmanager
def applied(edit: Erasure, pipe: Any, scale: float = 1.0) -> Iterator[None]:
    """An erasure on a pipeline for the time of a block; the pipeline is left as it was, whatever happens inside."""
    edit.apply(pipe, scale)
    try:
        yield
    finally:
        edit.remove(pipe)


__all__ = [
    "Handle",
    "Layer",
    "Stack",
    "applied",
    "check_finite",
    "check_scale",
    "check_scales",
    "fused_in",
    "refuse_attached",
    "stack_of",
    "stacked",
]
