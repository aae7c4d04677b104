"""The ridge regression every closed form of the cross-attention family solves, once for all layers.

Erasing asks that each layer W send the target embeddings X_e where it used to send the anchors Y_e, keep what it does
to the embeddings X_p, and otherwise stay as it is:

    min_W'  a_e |W' X_e - W Y_e|^2 + a_p |W' X_p - W X_p|^2 + lambda |W' - W|^2

Its solution is W' = W T with one matrix for every layer,

    T = I + U V^T,   U = Y_e - X_e,   V^T = a_e X_e^T D^-1,   D = lambda I + a_e X_e X_e^T + a_p X_p X_p^T

(the preserve terms cancel in T - I), so the edit has at most as many dimensions as there are erased embeddings.
"""

from __future__ import annotations

import dataclasses
import warnings

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Solution:
    """``T = I + U V^T``: ``u, v`` of shape ``(d, n)`` in float64, and the condition number of the system solved."""

    u: Tensor
    v: Tensor
    condition: float

    @property
    def matrix(self) -> Tensor:
        return torch.eye(len(self.u), dtype=self.u.dtype, device=self.u.device) + self.u @ self.v.T


def solve(
    targets: Tensor,
    anchors: Tensor,
    kept: Tensor,
    *,
    lamb: float,
    erase_scale: float = 1.0,
    preserve_scale: float = 1.0,
) -> Solution:
    """Solve for the one matrix that edits every layer.

    Args:
        targets, anchors: ``(n, d)`` embeddings to move and where to move them, row by row.
        kept: ``(m, d)`` embeddings whose image must not change; ``m`` may be 0.
        lamb: ridge towards the original weights. Larger is gentler on everything, the target included.
        erase_scale, preserve_scale: weight of one erased and one kept embedding.

    Returns:
        The factors on the CPU, solved by Cholesky in float64. A system too ill-conditioned for it (lambda 0 and fewer
        embeddings than dimensions) gets a ridge of 1e-8 of its mean eigenvalue, with a warning.

    Raises:
        ValueError: the rows do not pair up, or lambda is negative.
    """
    if targets.shape != anchors.shape:
        raise ValueError(
            f"every target needs one anchor; got {tuple(targets.shape)} and {tuple(anchors.shape)}; pair the rows"
        )
    if lamb < 0:
        raise ValueError(f"lambda must not be negative; got {lamb}; use 0.5, or more for a gentler edit")
    x, y, p = (t.cpu().double() for t in (targets, anchors, kept))
    identity = torch.eye(x.shape[1], dtype=torch.float64, device=x.device)
    d = lamb * identity + erase_scale * x.T @ x + preserve_scale * p.T @ p
    factor, failed = torch.linalg.cholesky_ex(d)
    eigenvalues = torch.linalg.eigvalsh(d)
    if failed or eigenvalues[0] <= 1e-13 * eigenvalues[-1]:
        ridge = 1e-8 * float(eigenvalues.mean())
        warnings.warn(f"the system is singular; a ridge of {ridge:.1e} was added; use a lambda above 0", stacklevel=2)
        factor, eigenvalues = torch.linalg.cholesky(d + ridge * identity), eigenvalues + ridge
    v = erase_scale * torch.cholesky_solve(x.T, factor)
    return Solution((y - x).T, v, float(eigenvalues[-1] / eigenvalues[0]))
