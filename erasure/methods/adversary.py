"""An attack on a text embedding during training: the small change of it that brings a concept back best."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from erasure.backbone.text import Text


def worst_text(
    text: Text,
    error: Callable[[Text], Tensor],
    *,
    steps: int,
    epsilon: float,
    generator: torch.Generator,
) -> Text:
    """The text plus the perturbation that makes an error smallest:

        d = argmin_{|d|_inf <= epsilon} error(text + d),    d <- clamp(d - epsilon / 4 sign(grad), -epsilon, epsilon)

    from a uniform random start: projected gradient descent (Kim et al. 2024, "R.A.C.E.", algorithm 1, whose error is
    the distance to the sampler's noise). Gradients of the text itself, where it has any, go through the result.

    Args:
        text: ``n`` rows.
        error: mean error of the student for a text; smaller means that more of the concept is back.
        steps: gradient steps; each costs a forward and a backward pass.
        epsilon: how far each number of the embedding may move.
        generator: of the start.
    """
    clean = text.hidden.detach()
    pooled = None if text.pooled is None else text.pooled.detach()
    d = (epsilon * (2 * torch.rand(clean.shape, generator=generator) - 1)).to(clean)
    for _ in range(steps):
        d.requires_grad_(True)
        (gradient,) = torch.autograd.grad(error(dataclasses.replace(text, hidden=clean + d, pooled=pooled)), d)
        with torch.no_grad():
            d = (d - epsilon / 4 * gradient.sign()).clamp(-epsilon, epsilon)
    return dataclasses.replace(text, hidden=text.hidden + d.detach())


__all__ = ["worst_text"]
