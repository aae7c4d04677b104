"""The denoiser itself, for probes that put the latents of real pictures through it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from erasure.backbone import Backbone, backbone_of
from erasure.backbone.noise import NoiseModel
from erasure.backbone.text import Text
from erasure.eval.probes.base import Missing


def supported(pipe: Any) -> Backbone:
    """The backbone of an opened pipeline, whatever its latents and scheduler; ``Missing`` where there is none."""
    try:
        backbone: Backbone = backbone_of(pipe)
    except ValueError as reason:
        raise Missing(str(reason)) from None
    return backbone


def denoiser_for(pipe: Any) -> Backbone:
    """The backbone of an opened pipeline, whose denoiser is asked from inside; its scheduler has a noise model."""
    backbone = supported(pipe)
    try:
        _ = backbone.noise
    except ValueError as reason:
        raise Missing(str(reason)) from None
    return backbone


def backbone_for(pipe: Any) -> Backbone:
    """The backbone of an opened pipeline, if real pictures have latents that its denoiser reads."""
    backbone = denoiser_for(pipe)
    try:
        _ = backbone.autoencoder
    except ValueError as reason:
        raise Missing(str(reason)) from None
    return backbone


def noise_like(x: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal noise from a CPU generator, where ``x`` is."""
    return torch.randn(x.shape, generator=generator).to(x.device)


def thousandth(noise: NoiseModel, t: int, x: Tensor) -> Tensor:
    """The middle of the ``t``-th of 1,000 equal parts of the schedule, a time ``(n,)`` for each row of ``x``.

    For models of diffusion in 1,000 steps that is step ``t``.
    """
    return noise.times(torch.full((len(x),), (t + 0.5) / 1000)).to(x.device)


@torch.no_grad()
def predictions(backbone: Backbone, text: Text, x: Tensor, times: int) -> Tensor:
    """What the denoiser predicts for ``x (n, ...)`` in the middle of equal parts of the schedule.

    Returns ``(times, n, ...)``, float32 on the CPU.
    """
    parts = (torch.full((len(x),), (i + 0.5) / times) for i in range(times))
    return torch.stack([backbone.predict_float(x, backbone.noise.times(t).to(x.device), text).cpu() for t in parts])
