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
kept as rows.

Embeddings are rows in code, ``(n, d)``, and columns in formulas. Everything is computed in float64 on the CPU.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

WIDE = 4096  # above this width no (d, d) matrix is formed: two of them in float64 are 268 MB here, 6.7 GB at 20,480
SKETCH = 2048  # rows that stand for any number of kept embeddings where d is wide
APART = 2**29  # bytes of targets and anchors up to which each concept's rows stay apart
SINGULAR = 1e13  # condition number from which a system counts as singular


@dataclasses.dataclass(frozen=True)
class Kept:
    """What must not change: ``K = sum_j a_j x_j x_j^T``, weighted, as a matrix or as rows.

    Attributes:
        data: ``K (d, d)`` itself, or rows ``R (m, d)`` with ``K = R^T R``.
        low_rank: whether ``data`` are rows.
        lost: trace of what was dropped from rows when they were shrunk. What is left out of ``K`` is positive
            semi-definite, so no direction lost more than that.
    """

    data: Tensor
    low_rank: bool = False
    lost: float = 0.0

    @classmethod
    def of(cls, kept: Kept | Tensor) -> Kept:
        """A matrix ``(d, d)`` as what it stands for; on the CPU in float64."""
        if isinstance(kept, Kept):
            return dataclasses.replace(kept, data=kept.data.cpu().double())
        if kept.ndim != 2 or kept.shape[0] != kept.shape[1]:
            raise ValueError(f"kept is a matrix (d, d); got {tuple(kept.shape)}; use Kept.rows_of for embeddings")
        return cls(kept.cpu().double())

    @classmethod
    def rows_of(cls, rows: Tensor, weight: float = 1.0) -> Kept:
        """Embeddings ``(m, d)`` of one weight."""
        return weight * cls(rows.cpu().double(), low_rank=True)

    @classmethod
    def zero(cls, d: int) -> Kept:
        """Nothing kept, at width ``d``."""
        return cls(torch.zeros(0, d, dtype=torch.float64), low_rank=True)

    @property
    def width(self) -> int:
        return self.data.shape[1]

    @property
    def smallest(self) -> Kept:
        """As a matrix where there are at least as many rows as the matrix has."""
        return Kept(self.matrix(), lost=self.lost) if self.low_rank and len(self.data) >= self.width else self

    def matrix(self) -> Tensor:
        """``K (d, d)``."""
        return self.data.T @ self.data if self.low_rank else self.data

    def rows(self) -> Tensor:
        """``R (m, d)`` with ``K = R^T R`` and at most ``d`` rows if it was a matrix."""
        if self.low_rank:
            return self.data
        values, vectors = self.spectrum()
        return values.sqrt()[:, None] * vectors.T

    def spectrum(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues ``(k,)`` above zero, largest first, and their vectors ``(d, k)``, ``k`` at most the rank."""
        if self.low_rank:
            _, s, vectors = torch.linalg.svd(self.data, full_matrices=False)
            values, vectors = s.square(), vectors.T
        else:
            values, vectors = (part.flip(-1) for part in torch.linalg.eigh(self.data))
        # rows resolve the root of an eigenvalue to the precision of float64, the matrix the eigenvalue itself
        resolved = (1e-15 * self.width) ** (2 if self.low_rank else 1)
        present = values > resolved * values[:1]
        return values[present], vectors[:, present]

    def shrunk(self, size: int) -> Kept:
        """At most ``size`` rows: the directions of most energy. ``lost`` says what the others had."""
        if not self.low_rank or len(self.data) <= size:
            return self
        values, vectors = (part.flip(-1) for part in torch.linalg.eigh(self.data @ self.data.T))
        chosen = vectors[:, :size][:, values[:size] > 1e-15 * values[0]]
        lost = float(values[chosen.shape[1] :].clamp(min=0).sum())
        return Kept(chosen.T @ self.data, low_rank=True, lost=self.lost + lost)  # a rotation of rows: nothing rounds

    def __add__(self, other: Kept) -> Kept:
        if self.width != other.width:
            raise ValueError(f"widths differ; got {self.width} and {other.width}; keep what one text encoder says")
        lost = self.lost + other.lost
        if not (self.low_rank and other.low_rank):
            return Kept(self.matrix() + other.matrix(), lost=lost)
        return Kept(torch.cat([self.data, other.data]), low_rank=True, lost=lost)

    def __mul__(self, weight: float) -> Kept:
        """Everything weighed ``weight`` times as much."""
        if not weight >= 0:
            raise ValueError(f"a weight is not negative; got {weight}; use 0 to keep nothing")
        data = self.data * (weight**0.5 if self.low_rank else weight)
        return dataclasses.replace(self, data=data, lost=weight * self.lost)

    __rmul__ = __mul__


class Accumulator:
    """Any number of embeddings, a batch at a time, as :class:`Kept`, in bounded memory.

    Where they are narrow it is their matrix, and otherwise an incremental SVD: exact up to ``size`` embeddings; from
    then on, whenever twice as many rows are there, the ``size`` directions of most energy stay, and ``lost`` of the
    result bounds the error.

    Args:
        width: d, of the embeddings.
        wide: widths above this are wide; ``WIDE`` by default.
        size: rows of the sketch. Raise it when ``lost`` is a noticeable share of the whole.
    """

    def __init__(self, width: int, *, wide: int | None = None, size: int = SKETCH) -> None:
        self._low_rank, self._size = width > (WIDE if wide is None else wide), size
        self._total = Kept(torch.zeros(0 if self._low_rank else width, width, dtype=torch.float64), self._low_rank)
        self._waiting: list[Tensor] = []

    def add(self, rows: Tensor) -> None:
        """Add embeddings ``(m, d)``."""
        x = rows.cpu().double()
        if not self._low_rank:
            self._total.data.addmm_(x.T, x)
            return
        self._waiting.append(x)
        if len(self._total.data) + sum(map(len, self._waiting)) > 2 * self._size:
            self._total, self._waiting = self.kept(), []

    def kept(self) -> Kept:
        """What was added up to now."""
        if not self._low_rank:
            return self._total
        return Kept(torch.cat([self._total.data, *self._waiting]), True, self._total.lost).shrunk(self._size)


@dataclasses.dataclass(frozen=True)
class Problem:
    """What one ridge regression is asked.

    Attributes:
        targets, anchors: ``(n, d)`` embeddings to move and where to move them, row by row.
        kept: what must not change, weighted; a tensor is its matrix ``(d, d)``.
        lamb: ridge towards the original weights. Larger is gentler on everything, the target included.
        erase_scale: weight of one erased embedding.
        concept_rows: how many of the rows each concept has, in order; empty where they were condensed.
        scales: the weight of each concept's rows where it is less than ``erase_scale``
            (:func:`weighted`): the rows have it in their length. Empty where all have ``erase_scale``.
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
    (x, y, kept), p = _checked(problem), probes.cpu().double()
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
