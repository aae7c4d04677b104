"""The closed forms' mathematics as their equations read: explicit sums, explicit inverses, ``(d, d)`` throughout."""

from __future__ import annotations

import torch
from torch import Tensor


def matrix(
    targets: Tensor, anchors: Tensor, kept: list[tuple[Tensor, float]], *, lamb: float, erase_scale: float = 1.0
) -> Tensor:
    """The one T of [lamb I + e sum y x^T + sum a k k^T] [lamb I + e sum x x^T + sum a k k^T]^-1."""
    eye = torch.eye(targets.shape[1], dtype=torch.float64)
    left, right = lamb * eye, lamb * eye
    for x, y in zip(targets, anchors, strict=True):
        left, right = left + erase_scale * torch.outer(y, x), right + erase_scale * torch.outer(x, x)
    for k, weight in kept:
        left, right = left + weight * torch.outer(k, k), right + weight * torch.outer(k, k)
    return left @ torch.linalg.inv(right)


def projector(rows: Tensor) -> Tensor:
    """On the span of rows."""
    return torch.linalg.pinv(rows) @ rows


def double_projection(targets: Tensor, anchors: Tensor, p: Tensor) -> Tensor:
    """T = I + (C* - C)(R^T R)^-1 R^T with R = (I - P) C, embeddings as columns (arXiv 2604.10032)."""
    c, new = targets.T, anchors.T
    r = c - p @ c
    return torch.eye(len(p), dtype=p.dtype) + (new - c) @ torch.linalg.inv(r.T @ r) @ r.T


def energy_projector(rows: Tensor, alpha: float) -> Tensor:
    """U diag(f) U^T with f = a r / ((a - 1) r + 1) of r_i = s_i^2 / sum s^2 (CURE, arXiv 2505.12677)."""
    values, vectors = torch.linalg.eigh(rows.T @ rows)
    r = values.clamp(min=0) / values.clamp(min=0).sum()
    return vectors @ torch.diag(alpha * r / ((alpha - 1) * r + 1)) @ vectors.T


def cure(forget: Tensor, retain: Tensor, *, forget_alpha: float, retain_alpha: float) -> Tensor:
    """I - (P_f - P_f P_r)."""
    f, r = energy_projector(forget, forget_alpha), energy_projector(retain, retain_alpha)
    return torch.eye(len(f), dtype=f.dtype) - (f - f @ r)
