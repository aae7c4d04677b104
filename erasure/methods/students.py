"""What a fine-tune trains: weights of the model, or a low-rank adapter beside them."""

from __future__ import annotations

import abc
import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from erasure.artifact import DeltaErasure, Erasure, LoraErasure
from erasure.artifact.config import Config
from erasure.artifact.hooks import Factors, Gate, factor_shapes, low_rank
from erasure.backbone import Backbone
from erasure.backbone.base import layer_at
from erasure.methods.base import check_moved


class Student(abc.ABC):
    """The trained part of a model.

    Attributes:
        backbone: around the pipeline. Its own modules are the student; no second denoiser is ever loaded.
        parameters: what is trained, by name.
        modules: everything a prediction runs through; frozen but for ``parameters``.
    """

    backbone: Backbone
    parameters: dict[str, nn.Parameter]

    @property
    def modules(self) -> list[nn.Module]:
        return list(self.backbone.denoiser_parts.values())

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """The pipeline predicts as the student inside the block, and as the base outside of it."""
        yield

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """The pipeline predicts as the base inside the block, whatever has been trained, and without gradients."""
        with torch.no_grad():
            yield

    @abc.abstractmethod
    def erasure(
        self, name: str, config: Config, result: Mapping[str, Tensor], originals: Mapping[str, Tensor]
    ) -> Erasure:
        """The erasure of a finished training.

        Args:
            result: the trained tensors, float32.
            originals: the tensors they began as.

        Raises:
            ValueError: the weights did not move.
        """


class Weights(Student):
    """Weights of the model itself; the erasure is their difference, as large as what is trained.

    Args:
        selector: see :meth:`Backbone.select`.
    """

    def __init__(self, backbone: Backbone, selector: str) -> None:
        self.backbone, self.parameters = backbone, backbone.select(selector)
        self.text = selector == "text_encoder"
        self.originals = {name: parameter.data for name, parameter in self.parameters.items()}

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        with swapped(self.parameters, self.originals), torch.no_grad():
            yield

    @property
    def modules(self) -> list[nn.Module]:
        if not self.text:
            return super().modules
        return [module for module in self.backbone.components.values()]

    def erasure(
        self, name: str, config: Config, result: Mapping[str, Tensor], originals: Mapping[str, Tensor]
    ) -> Erasure:
        deltas = {key: (weight - originals[key].to(weight.dtype)).cpu() for key, weight in result.items()}
        deltas = {key: delta for key, delta in deltas.items() if delta.any()} or deltas  # no gradient reached others
        moved = {"relative_change": check_moved(deltas, dict(originals))}
        return DeltaErasure(name, config.with_facts(sites=list(deltas), report={**config.report, **moved}), deltas)


class LowRank(Student):
    """A low-rank adapter on every selected layer (LoRA, Hu et al. 2022): ``W x + alpha / r B A x``.

    Args:
        selector: see :meth:`Backbone.select`.
        rank: r. 4 to 16; more learns more and costs more.
        alpha: what the adapter is scaled by, times r; the rank itself by default.
        seed: of the start of A; B starts at zero.
    """

    def __init__(
        self, backbone: Backbone, selector: str, *, rank: int = 8, alpha: float | None = None, seed: int = 0
    ) -> None:
        self.backbone = backbone
        self.factor = (alpha if alpha is not None else rank) / rank
        self.layers = layers_of(backbone, selector)
        shapes = {name: factor_shapes(layer, rank) for name, layer in self.layers.items()}
        self.parameters = started(shapes, seed=seed, device=backbone.device)

    @contextlib.contextmanager
    def active(self, gate: Gate | None = None) -> Iterator[None]:
        handles = low_rank(self.layers, Scaled(self.parameters, list(self.layers), self.factor), gate)
        try:
            yield
        finally:
            handles.remove()

    def tensors(self, result: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The factors as an erasure stores them, their scale in B."""
        scale = {"A": 1.0, "B": self.factor}
        return {name: (scale[name[-1]] * tensor).detach().float().cpu().contiguous() for name, tensor in result.items()}

    def erasure(
        self, name: str, config: Config, result: Mapping[str, Tensor], originals: Mapping[str, Tensor]
    ) -> Erasure:
        tensors = self.tensors(result)
        reached = [site for site in self.layers if tensors[f"{site}.lora_B"].any()] or list(self.layers)
        tensors = {name: t for name, t in tensors.items() if name.rpartition(".")[0] in reached}
        config = config.with_facts(sites=reached)
        edit = LoraErasure(name, config, tensors)
        weights = {f"{site}.weight": self.layers[site].weight.detach() for site in reached}
        changes = {key: edit.edit(key, torch.zeros_like(w, dtype=torch.float32), 1.0) for key, w in weights.items()}
        moved = {"relative_change": check_moved(changes, weights)}
        return LoraErasure(name, config.with_facts(report={**config.report, **moved}), tensors)


def started(
    shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]], *, seed: int, device: torch.device
) -> dict[str, nn.Parameter]:
    """``<name>.lora_A`` and ``<name>.lora_B`` to train, for the shapes of B and A: A random, B zero."""
    parameters = {}
    generator = torch.Generator().manual_seed(seed)
    for name, (up, down) in shapes.items():
        bound = 1 / math.sqrt(math.prod(down[1:]))  # as torch starts linear layers
        start = (2 * torch.rand(down, generator=generator) - 1) * bound
        parameters[f"{name}.lora_A"] = nn.Parameter(start.to(device))
        parameters[f"{name}.lora_B"] = nn.Parameter(torch.zeros(up, device=device))
    return parameters


@contextlib.contextmanager
def swapped(parameters: Mapping[str, nn.Parameter], data: Mapping[str, Tensor]) -> Iterator[None]:
    """Parameters have other data inside the block, and their own again after it."""
    before = {name: parameter.data for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.data = data[name]
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = before[name]


class Scaled(Mapping[str, Factors]):
    """``B`` and ``A`` of each layer from the trained tensors, as they are at the moment, ``B`` scaled."""

    def __init__(self, parameters: Mapping[str, Tensor], layers: list[str], factor: float) -> None:
        self.parameters, self.layers, self.factor = parameters, layers, factor

    def __getitem__(self, name: str) -> Factors:
        return self.factor * self.parameters[f"{name}.lora_B"], self.parameters[f"{name}.lora_A"]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)


def layers_of(backbone: Backbone, selector: str) -> dict[str, Any]:
    """The layers a selector chooses, by qualified name; only those that take a low-rank addition."""
    names = dict.fromkeys(name.rpartition(".")[0] for name in backbone.select(selector))
    found = {}
    for name in names:
        layer = layer_at(backbone, name)
        if isinstance(layer, nn.Linear | nn.Conv2d) and (isinstance(layer, nn.Linear) or layer.groups == 1):
            found[name] = layer
    return found


__all__ = ["LowRank", "Scaled", "Student", "Weights", "layers_of", "started", "swapped"]
