"""The models of a comparison: the base, its erasures, models that never saw the target, filtered pipelines.

Every one of them is a change of one pipeline in memory: it is put on, looked at, and taken off again.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import nn

from erasure.backbone import parts_of
from erasure.eval.hashes import modules_of, weights_hash
from erasure.eval.records import BASE

Role = Literal["base", "erased", "gold", "null"]
Kind = Literal["none", "weights", "adapter", "filter", "retrained"]


class Applied(Protocol):
    """What an evaluation needs of a change: an :class:`erasure.Erasure`, or anything with the same four names.

    A change may also have ``wrap(pipe)``, the pipeline to draw with instead (a filter around it), and
    ``intervention``, what it does to the parameters (a :data:`Kind`; "weights" without one).
    """

    @property
    def name(self) -> str: ...

    @property
    def config(self) -> Any:
        """What made it, as a mapping or an :class:`erasure.artifact.config.Config`; never written into."""
        ...

    def apply(self, pipe: Any) -> Any:
        """Edit the pipeline in place."""
        ...

    def remove(self, pipe: Any) -> Any:
        """Give back every bit."""
        ...


@runtime_checkable
class Wraps(Protocol):
    """A change that stands around a pipeline."""

    def wrap(self, pipe: Any) -> Any:
        """The pipeline to draw with."""
        ...


class Swapped:
    """Other weights in the place of the base's: a retrained model, or a null control.

    Args:
        name: what tables call it.
        modules: part of the pipeline ("unet", "text_encoder" ...) to the module that stands in; lent, not copied.
        config: where they come from: ``scope``, ``seed``, ``manifest`` ...
    """

    intervention: Kind = "retrained"

    def __init__(self, name: str, modules: Mapping[str, nn.Module], *, config: Mapping[str, Any] | None = None) -> None:
        self.name, self.config = name, dict(config or {})
        self.modules, self._ours = dict(modules), dict[str, nn.Module]()

    def apply(self, pipe: Any) -> None:
        """Lend the modules to ``pipe``.

        Raises:
            ValueError: the pipeline has no such part.
        """
        ours = modules_of(pipe)
        if absent := sorted(self.modules.keys() - ours.keys()):
            raise ValueError(
                f"{self.name} has {absent}, the base only {sorted(ours)}; compare pipelines of one architecture"
            )
        self._ours = {part: ours[part] for part in self.modules}
        for part, module in self.modules.items():
            setattr(pipe, part, module)

    def remove(self, pipe: Any) -> None:
        """Put the pipeline's own modules back."""
        for part, module in self._ours.items():
            setattr(pipe, part, module)
        self._ours = {}


@contextlib.contextmanager
def opened(pipe: Any, change: Applied | None) -> Iterator[Any]:
    """The pipeline with a change on it, for the time of a block; what comes out is what to draw with."""
    if change is None:
        yield pipe
        return
    change.apply(pipe)
    try:
        yield change.wrap(pipe) if isinstance(change, Wraps) else pipe
    finally:
        change.remove(pipe)


@dataclasses.dataclass(frozen=True)
class Model:
    """One model of an assessment.

    Attributes:
        name: unique; tables and files use it.
        role: "base" | "erased" | "gold" (retrained without the target) | "null" (another model that never saw it).
        change: what makes it of the base pipeline; None for the base.
    """

    name: str
    role: Role
    change: Applied | None = None

    def __post_init__(self) -> None:
        if (self.role == "base") != (self.change is None):
            raise ValueError(f"the base has no change and every other model has one; got {self.name!r}, {self.role}")

    @property
    def kind(self) -> Kind:
        """What the change does to the parameters."""
        return "none" if self.change is None else getattr(self.change, "intervention", "weights")

    @property
    def config(self) -> dict[str, Any]:
        return {} if self.change is None else {"name": self.change.name, **self.change.config}

    @contextlib.contextmanager
    def on(self, pipe: Any) -> Iterator[Any]:
        """The base pipeline as this model, for the time of the block."""
        with opened(pipe, self.change) as drawn:
            yield drawn


def models_of(erasures: Mapping[str, Applied], controls: Sequence[Model] = ()) -> list[Model]:
    """Every model of a comparison: the base, its erasures by name, then the controls."""
    return [Model(BASE, "base"), *(Model(name, "erased", change) for name, change in erasures.items()), *controls]


def check_restored(pipe: Any, before: str, name: str, *, hash_weights: Callable[[Any], str] = weights_hash) -> None:
    """Raise unless the weights have the hash they had."""
    after = hash_weights(pipe)
    if after != before:
        raise RuntimeError(
            f"{name} did not give the weights back: their hash was {before[:12]} and is {after[:12]} after remove(); "
            "pass a pipeline without that erasure on it; if it had none, load it afresh and report a bug of the erasure"
        )


def denoisers_of(pipe: Any) -> dict[str, Any]:
    """The denoisers of a pipeline by name; some have two.

    Raises:
        ValueError: there is none.
    """
    found = {part: module for part, module in parts_of(pipe).items() if not part.startswith("text_encoder")}
    if not found:
        raise ValueError(f"{type(pipe).__name__} has neither unet nor transformer; give a text-to-image pipeline")
    return found


def randomised(pipe: Any, *, seed: int = 0) -> Swapped:
    """A null control: the same architecture with a freshly initialised denoiser; text encoder and autoencoder stay.

    What a probe finds in it, the probe put there.
    """
    fresh: dict[str, nn.Module] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for part, denoiser in denoisers_of(pipe).items():
            made = type(denoiser).from_config(denoiser.config).eval().to(denoiser.device)
            fresh[part] = made if denoiser.dtype == torch.float32 else made.to(denoiser.dtype)
    return Swapped("random", fresh, config={"scope": "denoiser with random weights", "seed": seed})
