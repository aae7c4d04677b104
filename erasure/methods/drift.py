"""A weight for each concept at which its ridge regression moves what must stay no further than a limit."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from erasure.methods.kept import Kept
from erasure.methods.ridge import Problem, checked, cholesky, normal_matrix


def weighted(problem: Problem, scales: Sequence[float]) -> Problem:
    """The problem with a weight of its own for each concept."""
    roots = torch.tensor([(scale / problem.erase_scale) ** 0.5 for scale in scales], dtype=torch.float64)
    weight = roots.repeat_interleave(torch.tensor(problem.concept_rows))[:, None]
    x, y = (weight * rows.cpu().double() for rows in (problem.targets, problem.anchors))
    return dataclasses.replace(problem, targets=x, anchors=y, scales=tuple(scales))


def scales_within(problem: Problem, probes: Tensor, limit: float) -> list[float]:
    """For each concept alone, the erase_scale, the problem's at most, at which its edit moves probes no further.

    The drift of probes P ``(m, d)`` is ``|P (T - I)^T| / |P - mean P|``: how far an edit moves them, in units of how
    far they are apart. With ``S = lambda I + K``, ``X S^-1 X^T = Q L Q^T`` and ``f = a_e / (1 + a_e L)`` the edit is

        T - I = (Y - X)^T Q f Q^T X S^-1,   so   |P (T - I)^T|^2 = f^T H f

    with ``H = Q^T (Y - X) (Y - X)^T Q * Q^T X S^-1 P^T P S^-1 X^T Q``, entry by entry. One factor of S serves all.

    Args:
        problem: its ``concept_rows`` say which rows are whose.
        probes: embeddings ``(m, d)`` of things that must stay apart.
        limit: of the drift.

    Raises:
        ValueError: as :func:`solve`.
    """
    (x, y, kept), p = checked(problem), probes.cpu().double()
    spread = float((p - p.mean(dim=0)).norm())
    solved = _kept_inverse(kept, problem.lamb, x)
    parts = (rows.split(list(problem.concept_rows)) for rows in (x, y, solved.T))
    most = problem.erase_scale
    return [_scale_within(x, y, own, p, most, limit * spread) for x, y, own in zip(*parts, strict=True)]


def _scale_within(x: Tensor, y: Tensor, solved: Tensor, p: Tensor, most: float, limit: float) -> float:
    """The weight of one concept's rows, ``most`` or less, at which its edit moves ``p (m, d)`` by ``limit`` at most.

    Args:
        x, y: targets and anchors ``(n, d)``. solved: ``X S^-1 (n, d)``.
    """
    values, q = torch.linalg.eigh(x @ solved.T)
    u, b = q.T @ (y - x), q.T @ solved @ p.T
    h = (u @ u.T) * (b @ b.T)

    def moved(scale: float) -> float:
        f = scale / (1 + scale * values.clamp(min=0))
        return float((f @ h @ f).clamp(min=0).sqrt())

    if moved(most) <= limit:
        return most
    low, high = -40.0, 0.0  # powers of two
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if moved(most * 2**middle) > limit else (middle, high)
    return most * 2**low


def _kept_inverse(kept: Kept, lamb: float, x: Tensor) -> Tensor:
    """``(lambda I + K)^-1 X^T (d, n)``; by Woodbury's identity where what is kept has fewer rows than dimensions."""
    if kept.low_rank and len(kept.data) < kept.width and lamb > 0:
        r = kept.data
        inner = r @ r.T
        inner.diagonal().add_(lamb)
        return (x.T - r.T @ torch.cholesky_solve(r @ x.T, torch.linalg.cholesky(inner))) / lamb
    factor, _ = cholesky(normal_matrix(x[:0], kept, lamb, 1.0))
    return torch.cholesky_solve(x.T, factor)
