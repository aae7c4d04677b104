"""The ridge regression of the closed forms as pure mathematics: tensors in, tensors out.

Erasing asks that each layer W send the target embeddings X_e where it used to send the anchors Y_e, keep what it does
to the embeddings X_p, and otherwise stay as it is:

    min_W'  a_e |W' X_e - W Y_e|^2 + a_p |W' X_p - W X_p|^2 + lambda |W' - W|^2

The solution is W' = W T with one matrix for every layer (UCE, arXiv 2308.14761, eq. 7, less its common factor W):

    T = I + U V^T,   U = Y_e - X_e,   V^T = a_e X_e^T D^-1,   D = lambda I + a_e X_e X_e^T + K,   K = a_p X_p X_p^T

because the preserve terms cancel in T - I. So the edit has at most as many dimensions as there are erased embeddings.
Two systems give the same V. The *primal* is D, ``(d, d)``, and needs K as a matrix. The *dual* is ``(n, n)`` for n rows
of everything, erased and kept; with Z the rows scaled by the roots of their weights,

    V^T = a_e^(1/2) * first n_e rows of (lambda I + Z Z^T)^-1 Z

and costs n^2 d. Embeddings are 7,680 to 20,480 wide in current models, where a ``(d, d)`` matrix is gigabytes and K is
kept as rows (:mod:`erasure.methods.kept`).

Embeddings are rows in code, ``(n, d)``, and columns in formulas. Everything is computed in float64 on the CPU.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from erasure.methods.kept import Kept

APART = 2**29  # bytes of targets and anchors up to which each concept's rows stay apart
SINGULAR = 1e13  # condition number from which a system counts as singular


@dataclasses.dataclass(frozen=True)
class Problem:
    """What one ridge regression is asked.

    Attributes:
        targets, anchors: ``(n, d)`` embeddings to move and where to move them, row by row.
        kept: what must not change, weighted; a tensor is its matrix ``(d, d)``.
        lamb: ridge towards the original weights. Larger is gentler on everything, the target included.
        erase_scale: weight of one erased embedding.
        concept_rows: how many of the rows each concept has, in order; empty where they were condensed.
        scales: the weight of each concept where one is less than ``erase_scale``; the rows have it in their length.
            Empty where all have ``erase_scale``.
    """

    targets: Tensor
    anchors: Tensor
    kept: Kept | Tensor
    lamb: float
    erase_scale: float = 1.0
    concept_rows: tuple[int, ...] = ()
    scales: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class Solution:
    """``T = I + U V^T``: ``u, v`` of shape ``(d, n)`` in float64, and the condition number of the system solved.

    ``site_v`` holds the right factors of methods that solve for each layer on its own, ``notes`` what a method has to
    add to the quick report.
    """

    u: Tensor
    v: Tensor
    condition: float
    site_v: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def matrix(self) -> Tensor:
        """``T (d, d)``."""
        return torch.eye(len(self.u), dtype=self.u.dtype, device=self.u.device) + self.u @ self.v.T

    @property
    def norm(self) -> float:
        """``|T - I|`` in Frobenius norm; no ``(d, d)`` matrix is formed."""
        return float((self.u @ gram_root(self.v)).norm())

    def smallest(self) -> Solution:
        """With as few columns as ``T`` needs; itself, a column still a pair, where it has no more than that."""
        u, v = compressed(self.u, self.v)
        return dataclasses.replace(self, u=u, v=v) if u.shape[1] < self.u.shape[1] else self

    def then(self, second: Solution) -> Solution:
        """``T_1 T_2``: the second edit made on the weights this one left. The worse condition number stands."""
        u = torch.cat([self.u, second.u + self.u @ (self.v.T @ second.u)], dim=1)
        v = torch.cat([self.v, second.v], dim=1)
        return Solution(*compressed(u, v), max(self.condition, second.condition))

    def tensors(self, space: str) -> dict[str, Tensor]:
        """The factors as an operator erasure stores them, in float32."""
        right = {f"{site}.v": v for site, v in self.site_v.items()} or {f"{space}.v": self.v}
        return {name: t.float().cpu().contiguous() for name, t in {f"{space}.u": self.u, **right}.items()}


def solve(problem: Problem) -> Solution:
    """Solve for the one matrix that edits every layer, by Cholesky.

    The dual system is solved where what is kept is given as rows and there are fewer rows in all than dimensions:
    it is then the smaller of the two. A system too ill-conditioned (lambda 0 and fewer embeddings than dimensions)
    gets a ridge of 1e-8 of the mean eigenvalue of ``D``, with a warning, in either form.

    Raises:
        ValueError: the rows do not pair up, a number is not finite, lambda is negative, or every row is zero.
    """
    x, y, kept = _checked(problem)
    if kept.low_rank and len(x) + len(kept.data) < kept.width:
        v, condition = _dual(x, kept.data, problem.lamb, problem.erase_scale)
    else:
        factor, condition = cholesky(normal_matrix(x, kept, problem.lamb, problem.erase_scale))
        v = problem.erase_scale * torch.cholesky_solve(x.T, factor)
    return Solution((y - x).T, v, condition)


def _checked(problem: Problem) -> tuple[Tensor, Tensor, Kept]:
    """Targets, anchors and what is kept, in float64 on the CPU, once they can be solved for."""
    x, y, kept = problem.targets.cpu().double(), problem.anchors.cpu().double(), Kept.of(problem.kept)
    if x.shape != y.shape or x.ndim != 2 or x.shape[1] != kept.width:
        raise ValueError(
            f"every target needs one anchor of the width of what is kept; got {tuple(x.shape)} and {tuple(y.shape)}, "
            f"kept {kept.width} wide; pair the rows"
        )
    if not 0 <= problem.lamb < math.inf:
        raise ValueError(
            f"lambda is a finite number and never negative; got {problem.lamb}; 0.5 is usual, more is gentler"
        )
    if bad := [name for name, t in (("targets", x), ("anchors", y), ("kept", kept.data)) if not t.isfinite().all()]:
        raise ValueError(f"{bad[0]} hold NaN or infinity; the text encoder overflowed; load it in float32")
    return x, y, kept


def _dual(x: Tensor, kept: Tensor, lamb: float, erase_scale: float) -> tuple[Tensor, float]:
    """``V (d, n_e)`` and the condition number of ``D``, from the system of all rows ``(n, n)`` with n below d."""
    z = torch.cat([erase_scale**0.5 * x, kept])
    m = z @ z.T
    mean = lamb + float(m.diagonal().sum()) / z.shape[1]  # mean eigenvalue of D, whose other eigenvalues are lambda
    largest = lamb + float(largest_eigenvalue(m))
    if lamb == 0 or largest / lamb >= SINGULAR:
        lamb += _ridge(mean)
        largest += lamb
    m.diagonal().add_(lamb)
    solved = torch.cholesky_solve(z, torch.linalg.cholesky(m))
    return erase_scale**0.5 * solved[: len(x)].T, largest / lamb


def normal_matrix(x: Tensor, kept: Kept, lamb: float, erase_scale: float) -> Tensor:
    """``D = lambda I + a_e X^T X + K (d, d)`` for targets ``x (n, d)`` and what is kept."""
    d = erase_scale * x.T @ x + kept.matrix()
    d.diagonal().add_(lamb)
    return d


def cholesky(d: Tensor) -> tuple[Tensor, float]:
    """Cholesky factor of a symmetric positive semi-definite matrix, with a ridge if it needs one; condition number."""
    factor, failed = torch.linalg.cholesky_ex(d)
    condition = math.inf if failed else condition_number(d, factor)
    if condition >= SINGULAR:
        d = d + _ridge(float(d.diagonal().mean())) * torch.eye(len(d), dtype=d.dtype, device=d.device)
        factor = torch.linalg.cholesky(d)
        condition = condition_number(d, factor)
    return factor, condition


def _ridge(mean: float) -> float:
    """What is added to a singular system of this mean eigenvalue."""
    if not mean > 0:
        raise ValueError("every embedding is zero, and so is lambda; the system has no solution; use a lambda above 0")
    ridge = 1e-8 * mean
    warnings.warn(f"the system is singular; a ridge of {ridge:.1e} was added; use a lambda above 0", stacklevel=4)
    return ridge


def condition_number(d: Tensor, factor: Tensor, *, steps: int = 20) -> float:
    """Largest by smallest eigenvalue, by power iteration on ``D`` and on its inverse.

    All eigenvalues would take several times as long as the solution they judge.
    """
    y = _start(d)
    for _ in range(steps):
        y = torch.linalg.qr(torch.cholesky_solve(y, factor)).Q
    inverse = torch.linalg.eigvalsh(y.T @ torch.cholesky_solve(y, factor))[-1]
    return float(largest_eigenvalue(d, steps=steps) * inverse)


def largest_eigenvalue(d: Tensor, *, steps: int = 20) -> Tensor:
    """The largest eigenvalue of a symmetric positive semi-definite matrix, by power iteration."""
    x = _start(d)
    for _ in range(steps):
        x = torch.linalg.qr(d @ x).Q
    return torch.linalg.eigvalsh(x.T @ d @ x)[-1]


def _start(d: Tensor) -> Tensor:
    return torch.randn(len(d), min(4, len(d)), dtype=d.dtype, generator=torch.Generator().manual_seed(0))


# --- rows and factors ------------------------------------------------------------------------------------------------


def compressed(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The same ``U V^T`` in as few columns as it needs, so that the file is no larger than the edit.

    Both factors ``(d, n)`` go through a thin QR, the small product of what is left through an SVD; singular values
    below 1e-7 of the largest, the precision of the float32 in which factors are stored, are dropped.
    """
    (q_u, r_u), (q_v, r_v) = torch.linalg.qr(u), torch.linalg.qr(v)
    left, values, right = torch.linalg.svd(r_u @ r_v.T)
    n = max(int((values > 1e-7 * values[0]).sum()), 1)
    root = values[:n].sqrt()
    return q_u @ (left[:, :n] * root), q_v @ (right[:n].T * root)


def gram_root(v: Tensor) -> Tensor:
    """``R (n, n)`` with ``R R^T = V^T V``, so that ``|A V^T| = |A R|`` without forming ``A V^T``."""
    values, vectors = torch.linalg.eigh((v.T @ v).cpu().double())
    return (vectors * values.clamp(min=0).sqrt()).to(v)


def condensed(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """At most ``d`` rows that ask the same as the ``n``: with ``X = Q R``, the pairs ``R`` and ``Q^T Y``.

    Only ``X^T X`` and ``Y^T X`` enter the solution, and ``R^T R = X^T X``, ``(Q^T Y)^T R = Y^T X``.
    """
    if len(x) <= x.shape[1]:
        return x, y
    q, r = torch.linalg.qr(x.cpu().double())
    return r, q.T @ y.cpu().double()


def gathered(pairs: Iterable[tuple[Tensor, Tensor]], *, limit: int = APART) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """The targets and anchors ``(n, d)`` of all concepts, and how many rows each concept had.

    Rows of up to ``limit`` bytes stay as they are, so that a concept can be dropped from the regression later. Beyond
    that they are condensed to ``d`` rows as they come, whatever the number of concepts; there are then fewer rows than
    the counts add up to, and none is any one concept's.

    Args:
        pairs: targets and anchors of each concept, one after the other.
        limit: bytes, as float64.
    """
    xs, ys, counts, whole = list[Tensor](), list[Tensor](), list[int](), True
    for x, y in pairs:
        xs.append(x)
        ys.append(y)
        counts.append(len(x))
        d = x.shape[1]
        if sum(map(len, xs)) > max(limit // (16 * d), 2 * d):
            (x, y), whole = condensed(torch.cat(xs), torch.cat(ys)), False
            xs, ys = [x], [y]
    x, y = torch.cat(xs), torch.cat(ys)
    return (x, y, tuple(counts)) if whole else (*condensed(x, y), tuple(counts))
