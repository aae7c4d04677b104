"""Saliency masks: train only the weights to which a loss is most sensitive (SalUn)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from erasure.train import Draw
from erasure.train.modules import seeded

DRAWS = 16  # batches whose gradients are summed
BEFORE = 2**20  # steps of theirs, far from those of a training


def salient(
    parameters: Mapping[str, nn.Parameter], loss: Callable[[Draw], Tensor], *, share: float, seed: int
) -> dict[str, Tensor]:
    """Masks that are 1 at the weights with the largest gradient, 0 elsewhere (Fan et al. 2024, equation 3):

        m = 1[ |grad L(theta)| >= gamma ]

    with the gradient summed over 16 batches and gamma such that ``share`` of all weights pass.

    Args:
        parameters: float32 leaves that require gradients, by name.
        loss: of one draw, at the weights as they are.
        share: of the weights, over all parameters together.
        seed: of the draws.
    """
    tensors = list(parameters.values())
    total = [torch.zeros_like(p) for p in tensors]
    for i in range(DRAWS):
        draw = Draw(seed, BEFORE + i)
        with torch.enable_grad(), seeded(int(draw.rng(1).integers(2**31)), tensors[0].device):
            gradients = torch.autograd.grad(loss(draw), tensors, allow_unused=True)
        for sum_, gradient in zip(total, gradients, strict=True):
            if gradient is not None:
                sum_ += gradient
    sizes = torch.cat([gradient.abs().flatten().cpu() for gradient in total])
    gamma = sizes.kthvalue(max(1, len(sizes) - math.ceil(share * len(sizes)) + 1)).values
    return {n: (s.abs() >= gamma.to(s.device)).to(s.dtype) for n, s in zip(parameters, total, strict=True)}


@contextlib.contextmanager
def training_only(parameters: Mapping[str, nn.Parameter], masks: Mapping[str, Tensor]) -> Iterator[None]:
    """Gradients are zero where the masks are, for the time of a block. Adam and SGD leave those weights as they are."""
    handles = [p.register_hook(lambda gradient, m=masks[name]: gradient * m) for name, p in parameters.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


__all__ = ["salient", "training_only"]
