"""A weight for each concept at which its ridge regression moves what must stay no further than a limit."""

from __future__ import annotations

import torch
from torch import Tensor

from erasure.methods.kept import Kept
from erasure.methods.ridge import SINGULAR, largest_eigenvalue

TOGETHER = 1e-6  # probes this close to their mean, as a share of their length, are not apart


class Drift:
    """How far the edit of one concept alone moves probes, in units of how far they are apart.

    The drift of probes P ``(m, d)`` is ``|P (T - I)^T| / |P - mean P|``. With ``S = lambda I + K`` and
    ``M = X S^-1 X^T = Q L Q^T`` the edit of targets X and anchors Y ``(n, d)`` of weight a is

        T - I = (Y - X)^T a (I + a M)^-1 X S^-1

    so with ``f = a / (1 + a L)`` it moves P by ``|P (T - I)^T|^2 = f^T H f``, where
    ``H = Q^T (Y - X) (Y - X)^T Q * Q^T X S^-1 P^T P S^-1 X^T Q``, entry by entry. One factor of S serves any number of
    concepts.

    Args:
        kept: K. lamb: lambda; where S is singular without one, 1e-8 of its mean eigenvalue is added.
        probes: embeddings ``(m, d)`` of things that must stay apart.

    Raises:
        ValueError: nothing is kept and lambda is 0.
    """

    def __init__(self, kept: Kept | Tensor, lamb: float, probes: Tensor) -> None:
        kept = Kept.of(kept)
        self.probes = probes.cpu().double()
        self.spread = float((self.probes - self.probes.mean(dim=0)).norm())
        self._rows = kept.data if kept.low_rank and len(kept.data) < kept.width else None
        system = kept.matrix() if self._rows is None else self._rows @ self._rows.T
        mean = float(system.diagonal().sum()) / kept.width
        largest = float(largest_eigenvalue(system)) if len(system) else 0.0
        if lamb * SINGULAR <= largest:
            lamb += 1e-8 * mean
        if not lamb > 0:
            raise ValueError(
                "nothing is kept and lambda is 0, so any drift is possible; use a lambda above 0, or max_drift=0"
            )
        system = system.clone()
        system.diagonal().add_(lamb)
        self._lamb, self._factor = lamb, torch.linalg.cholesky(system)

    @property
    def defined(self) -> bool:
        """Whether the probes are apart at all."""
        return self.spread > TOGETHER * float(self.probes.norm())

    def scale_within(self, x: Tensor, y: Tensor, limit: float, most: float) -> float:
        """The weight of a concept, ``most`` or less, at which its edit has no more drift than ``limit``.

        Args:
            x, y: its targets and anchors ``(n, d)``, in float64 on the CPU.
        """
        limit *= self.spread
        solved = self._solved(x)
        m, u, b = x @ solved.T, y - x, solved @ self.probes.T
        inner = most * m
        inner.diagonal().add_(1)
        whole = most * torch.cholesky_solve(b, torch.linalg.cholesky(inner))
        if float((u.T @ whole).norm()) <= limit:
            return most
        values, q = torch.linalg.eigh(m)
        u, b = q.T @ u, q.T @ b
        h = (u @ u.T) * (b @ b.T)

        def moved(scale: float) -> float:
            f = scale / (1 + scale * values.clamp(min=0))
            return float((f @ h @ f).clamp(min=0).sqrt())

        low, high = -40.0, 0.0  # powers of two
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (low, middle) if moved(most * 2**middle) > limit else (middle, high)
        return most * 2**low

    def _solved(self, x: Tensor) -> Tensor:
        """``X S^-1 (n, d)``; by Woodbury's identity where what is kept has fewer rows than dimensions."""
        if (r := self._rows) is None:
            return torch.cholesky_solve(x.T, self._factor).T
        return (x - torch.cholesky_solve(r @ x.T, self._factor).T @ r) / self._lamb
