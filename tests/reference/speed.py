"""SPEED as its paper reads: for every layer an SVD of W, a loop over copies, an SVD of R and explicit inverses."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.reference.uce import last_subject


def empty_tokens(pipe) -> Tensor:
    """The tokens of the empty prompt."""
    return pipe.encode_prompt("", pipe.device, 1, False)[0][0].detach().double()


def null_space(r: Tensor, threshold: float) -> Tensor:
    """The projector on the singular vectors of R whose singular values are below the threshold."""
    u, s, _ = torch.linalg.svd(r)
    return u[:, s < threshold] @ u[:, s < threshold].T


def retained(w: Tensor, e: Tensor, rows: list[Tensor], noise: Tensor | None, prior_filter: bool) -> list[Tensor]:
    """The embeddings that are hit by the plain edit, and those of their noisy copies that are."""
    hits = torch.stack([(e @ c).norm() for c in rows])
    chosen = [i for i in range(len(rows)) if not prior_filter or hits[i] > hits.mean()]
    kept = [rows[i] for i in chosen]
    if noise is None:
        return kept
    v = torch.linalg.svd(w, full_matrices=False).Vh[-1]
    v = v if v[v.abs().argmax()] > 0 else -v
    p0 = torch.outer(v, v)
    generator = torch.Generator().manual_seed(123)
    copies = []
    for i in chosen:
        for s in noise[i]:
            z = torch.randn(len(v), generator=generator, dtype=torch.float64)
            z = z - p0 @ z + s * v  # standard normal noise whose part along v is s
            copies.append(rows[i] + p0 @ z)
    hits = torch.stack([(e @ c).norm() for c in copies])
    return kept + [c for c, hit in zip(copies, hits, strict=True) if hit > hits.mean()]


@torch.no_grad()
def edit(
    pipe,
    erased: list[str],
    guides: list[str],
    kept: list[str],
    k2: Tensor,
    *,
    layers: tuple[str, ...] = ("to_v",),
    noise: Tensor | None = None,
    prior_filter: bool = False,
    threshold: float = 0.1,
    rho: float = 1.0,
    lamb: float = 0.0,
    all_tokens: bool = False,
) -> dict[str, Tensor]:
    """W + W (S_at - S_tt) P [I - M K2 (K2^T P M K2 + lamb I)^-1 K2^T P] M,  M = (S_tt P + rho I)^-1.

    Args:
        k2: ``(d, 4)`` invariants.
        noise: ``(kept, copies)`` the part of each copy's noise along the layer's least singular vector; None for none.
        all_tokens: a concept is every token after the start, not its last word.
    """

    def concept(prompt: str) -> Tensor:
        every = pipe.encode_prompt(prompt, pipe.device, 1, False)[0][0].detach().double()
        return every[1:] if all_tokens else last_subject(pipe, prompt)[None]

    targets, anchors = [concept(prompt) for prompt in erased], [concept(prompt) for prompt in guides]
    rows = [last_subject(pipe, prompt) for prompt in kept] or list(empty_tokens(pipe)[1:])
    s_tt = sum(t.T @ t for t in targets) / len(targets)
    s_at = sum(a.T @ t for a, t in zip(anchors, targets, strict=True)) / len(targets)
    eye, small = torch.eye(len(s_tt), dtype=torch.float64), torch.eye(k2.shape[1], dtype=torch.float64)
    edited = {}
    for name, parameter in pipe.unet.named_parameters():
        if "attn2" not in name or name.split(".")[-2] not in layers:
            continue
        w = parameter.detach().double()
        e = w @ (s_at - s_tt) @ torch.linalg.inv(eye + s_tt)
        here = retained(w, e, rows, noise, prior_filter)
        p = null_space(sum(torch.outer(c, c) for c in here) / len(here), threshold)
        m = torch.linalg.inv(s_tt @ p + rho * eye)
        inner = torch.linalg.inv(k2.T @ p @ m @ k2 + lamb * small)
        edited[name] = w + w @ (s_at - s_tt) @ p @ (eye - m @ k2 @ inner @ k2.T @ p) @ m
    return edited
