"""Localized erasures: places of cross-attention outputs that look like the concept are replaced. No weight changes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from erasure.artifact.base import HookErasure
from erasure.artifact.hooks import Handles, Listener
from erasure.artifact.residual import attention_misfits
from erasure.backbone import Backbone, backbone_of
from erasure.backbone.base import layer_at

START = "start"


class LocalizedErasure(HookErasure):
    """On the output x of every cross-attention, at each place of the picture (GLoCE, Lee et al. 2025):

        x' = x + s g(x) [ b + B A (x - m) - x ],     g(x) = sigmoid( k ( |G r|^2 - c ) ),     r = (x - n) / |x - n|

    with s the erasure's scale. Of several concepts the one whose gate g opens furthest acts. It begins where the
    denoiser's time has fallen to ``start``: before that places do not look like anything yet.

    Tensors, for each module in ``config["sites"]`` and each concept i, called ``<site>.<i>.<part>``: ``gate`` G
    ``(g, d)``, ``reference`` n ``(d,)``, ``logistic`` c and k ``(2,)``, ``mean`` m ``(d,)``, ``down`` A ``(r, d)``,
    ``up`` B ``(d, r)`` and ``bias`` b ``(d,)``; and ``start (1,)``.
    """

    kind: ClassVar[str] = "localized"
    parts: ClassVar[tuple[str, ...]] = ("gate", "reference", "logistic", "mean", "down", "up", "bias")

    @functools.cached_property
    def sites(self) -> tuple[str, ...]:
        """The attentions it acts on, by qualified name."""
        return tuple(self.config.sites or ())

    def concepts_of(self, site: str) -> list[dict[str, Tensor]]:
        """The parts of each concept at one site."""
        count = len(self.config.concepts)
        return [{part: self.tensors[f"{site}.{i}.{part}"] for part in self.parts} for i in range(count)]

    def install(self, pipe: Any, scale: float) -> Handles:
        backbone = backbone_of(pipe)
        clock = Clock(backbone.time_argument, float(self.tensors[START]))
        handles = Handles(clock.listen(backbone.denoiser_parts.values()))
        for site in self.sites:
            own = [{k: part.to(backbone.device) for k, part in one.items()} for one in self.concepts_of(site)]
            handles.hooks.append(layer_at(backbone, site).register_forward_hook(hook(own, scale, clock)))
        return handles

    def misfits(self, backbone: Backbone) -> list[str]:
        widths = {site: len(self.concepts_of(site)[0]["mean"]) for site in self.sites}
        return attention_misfits(backbone, widths)

    def check_tensors(self) -> None:
        count = len(self.config.concepts)
        names = {f"{site}.{i}.{part}" for site in self.sites for i in range(count) for part in self.parts} | {START}
        whole = bool(self.sites) and count and len(set(self.sites)) == len(self.sites) and set(self.tensors) == names
        if not whole or self.system or self.tensors[START].shape != (1,) or not all(map(self.fit, self.sites)):
            raise ValueError(
                "a localized erasure holds the gate and the matrices of each concept for each of its sites; names or "
                "shapes in file and config differ; get it again"
            )

    def fit(self, site: str) -> bool:
        """Whether the tensors of a site have shapes that belong together."""
        widths = {tuple(one["mean"].shape) for one in self.concepts_of(site)}
        if len(widths) != 1 or len(width := widths.pop()) != 1:
            return False
        for one in self.concepts_of(site):
            down, gate = tuple(one["down"].shape), tuple(one["gate"].shape)
            vectors = {tuple(one[part].shape) for part in ("reference", "mean", "bias")} == {width}
            matrices = (
                down[1:] == gate[1:] == width and 0 not in (*down, *gate) and tuple(one["up"].shape) == down[::-1]
            )
            if not vectors or not matrices or tuple(one["logistic"].shape) != (2,):
                return False
        return True


class Clock(Listener):
    """Whether the current call of the denoiser is late enough."""

    def __init__(self, time_argument: str, start: float) -> None:
        super().__init__()
        self.time_argument, self.start = time_argument, start

    def hear(self, call: Mapping[str, Any]) -> None:
        t = torch.as_tensor(call[self.time_argument])
        self.current.late = float(t.reshape(-1)[0]) <= self.start

    def late(self) -> bool:
        return getattr(self.current, "late", False)


def hook(concepts: Sequence[Mapping[str, Tensor]], scale: float, clock: Clock) -> Callable[..., Tensor]:
    """The forward hook of one attention."""

    def replace(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if not clock.late():
            return output
        x = output.float()
        return (x + scale * correction(x, concepts)).to(output.dtype)

    return replace


def response(x: Tensor, gate: Tensor, reference: Tensor) -> Tensor:
    """``|G r|^2`` between 0 and 1 at each place ``(n, places)`` of an output ``(n, places, d)``."""
    away = x - reference
    return ((away / away.norm(dim=-1, keepdim=True).clamp(min=1e-12)) @ gate.T).square().sum(-1)


def correction(x: Tensor, concepts: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """``g(x) [ b + B A (x - m) - x ]`` of the concept whose gate opens furthest at each place."""
    opened = x.new_full(x.shape[:-1], -1.0)
    change = torch.zeros_like(x)
    for one in concepts:
        centre, slope = one["logistic"]
        g = torch.sigmoid(slope * (response(x, one["gate"], one["reference"]) - centre))
        other = one["bias"] + (x - one["mean"]) @ one["down"].T @ one["up"].T
        change = torch.where((g > opened)[..., None], g[..., None] * (other - x), change)
        opened = torch.maximum(g, opened)
    return change


__all__ = ["LocalizedErasure", "correction", "response"]
