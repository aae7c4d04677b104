"""RECE as its paper and code describe it: every layer on its own, every sum a loop, one explicit inverse for each."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.reference import uce_2023


def tokens(pipe, prompt: str) -> Tensor:
    """Every token of a prompt ``(77, d)``, padding included."""
    return pipe.encode_prompt(prompt, pipe.device, 1, False)[0][0].double()


def originals(pipe) -> dict[str, Tensor]:
    """Key and value weights of cross-attention."""
    names = ("attn2.to_k", "attn2.to_v")
    return {n: p.detach().double() for n, p in pipe.unet.named_parameters() if any(name in n for name in names)}


def revive(
    edited: dict[str, Tensor], original: dict[str, Tensor], c: Tensor, guide: Tensor, reg: float, closure: str
) -> Tensor:
    """The row vectors c' that make the edited layers say what the original ones said of c."""
    identity = torch.eye(c.shape[1], dtype=torch.float64)
    m1, m2 = torch.zeros_like(identity), torch.zeros_like(identity)
    for name, new in edited.items():
        if closure == "surrogatereg":
            m1 = m1 + (1 + reg) * new.T @ new
            m2 = m2 + new.T @ original[name] + reg * new.T @ new
        else:
            m1 = m1 + new.T @ new
            m2 = m2 + new.T @ original[name]
    if closure != "surrogatereg":
        m1 = m1 + reg * identity
    right = c @ m2.T + (reg * guide if closure == "standardreg" else 0)
    return right @ torch.linalg.inv(m1).T


def defend(
    weights: dict[str, Tensor], adversarial: list[Tensor], guides: list[Tensor], kept: list[Tensor], lamb: float = 0.1
) -> dict[str, Tensor]:
    """[lamb W + sum (W guide) a^T + 0.1 sum (W k) k^T] [lamb I + sum a a^T + 0.1 sum k k^T]^-1 for the current W."""
    result = {}
    for name, w in weights.items():
        left, right = lamb * w, lamb * torch.eye(w.shape[1], dtype=torch.float64)
        for a, guide in zip(adversarial, guides, strict=True):
            left, right = left + (guide @ w.T).T @ a, right + a.T @ a
        for k in kept:
            left, right = left + 0.1 * (k @ w.T).T @ k, right + 0.1 * k.T @ k
        result[name] = left @ torch.linalg.inv(right)
    return result


def edit(
    pipe,
    erased: list[str],
    guides: list[str],
    kept: list[str],
    *,
    epochs: int,
    reg: float,
    closure: str = "regzero",
    empties: int = 1,
) -> dict[str, Tensor]:
    """New key and value weights: UCE's 2023 edit, then rounds on all tokens, all concepts defended at once.

    ``empties``: how often a round retains the empty prompt; the script for nudity does so once for every concept.
    """
    original = originals(pipe)
    edited = uce_2023.edit(pipe, erased, guides, kept)
    retained = [tokens(pipe, prompt) for prompt in [*[""] * empties, *kept]]
    for _ in range(epochs):
        adversarial = [
            revive(edited, original, tokens(pipe, concept), tokens(pipe, guide), reg, closure)
            for concept, guide in zip(erased, guides, strict=True)
        ]
        edited = defend(edited, adversarial, [tokens(pipe, guide) for guide in guides], retained)
    return edited
