"""Safe Latent Diffusion as its equations read: a loop over a scheduler, three calls of the denoiser a step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Predict = Callable[[str, Tensor, Tensor], Tensor]  # "prompt", "empty" or "concept", x, t -> prediction


@torch.no_grad()
def latents(
    predict: Predict,
    scheduler,
    x: Tensor,
    *,
    steps: int,
    guidance: float,
    warmup: int,
    strength: float,
    threshold: float,
    momentum_scale: float,
    momentum: float,
    scale: float = 1.0,
) -> tuple[Tensor, list[Tensor]]:
    """Final latents, and the guided prediction of every step.

    Args:
        x: ``(n, ...)`` initial latents, at the scale of the scheduler's first step.
    """
    scheduler.set_timesteps(steps)
    nu = torch.zeros_like(x)
    guided = []
    for i, t in enumerate(scheduler.timesteps):
        inputs = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        p, u, s = (predict(which, inputs, t) for which in ("prompt", "empty", "concept"))
        phi = strength * (p - s)
        mu = torch.where(p - s < threshold, phi.abs().clamp(max=1), torch.zeros_like(phi))  # equation 4
        gamma = mu * (s - u) + momentum_scale * nu  # equations 5 and 7
        nu = momentum * nu + (1 - momentum) * gamma  # equation 8
        safe = scale * gamma if i >= warmup else torch.zeros_like(gamma)
        guided.append(u + guidance * (p - u - safe))  # equation 6
        x = scheduler.step(guided[-1], t, x).prev_sample
    return x, guided
