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


def with_soft_tokens(
    text: Text,
    places: Tensor,
    error: Callable[[Text], Tensor],
    *,
    count: int,
    steps: int,
    lr: float,
    generator: torch.Generator,
) -> Text:
    """The text with learnt vectors in place of the ``count`` tokens from a place on, that make an error smallest:

        p = argmin_p error(text with p at places, places + 1, ...)

    by Adam from random vectors with the text's own spread, each row with vectors of its own (Huang et al. 2024,
    "Receler"). Vectors that would stand behind the text's end are left out.

    Args:
        text: ``n`` rows.
        places: ``(n,)`` where the vectors begin in each row; behind the words.
        error: as in :func:`worst_text`.
        count: vectors in each row.
        steps, lr: of Adam, with a weight decay of 0.1; each step costs a forward and a backward pass.
        generator: of the start.
    """
    clean = text.hidden.detach()
    n, length, width = clean.shape
    start = torch.randn(n, count, width, generator=generator) * clean.float().std().cpu()
    p = start.to(clean.device).requires_grad_(True)
    at = torch.arange(length)[None] - places[:, None].cpu()
    inside = ((at >= 0) & (at < count)).to(clean.device)[..., None]
    index = at.clamp(0, count - 1).to(clean.device)[..., None].expand(-1, -1, width)

    def put(vectors: Tensor) -> Text:
        return dataclasses.replace(text, hidden=torch.where(inside, vectors.gather(1, index).to(clean), clean))

    optimizer = torch.optim.Adam([p], lr=lr, weight_decay=0.1)
    for _ in range(steps):
        (p.grad,) = torch.autograd.grad(error(put(p)), p)
        optimizer.step()
    return put(p.detach())


__all__ = ["with_soft_tokens", "worst_text"]
