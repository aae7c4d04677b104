"""What a closed form must not change, as one matrix or as rows, however many embeddings it stands for.

Embeddings are rows in code, ``(n, d)``, and columns in formulas. Everything is float64 on the CPU.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

WIDE = 4096  # above this width no (d, d) matrix is formed: two of them in float64 are 268 MB here, 6.7 GB at 20,480
SKETCH = 2048  # rows that stand for any number of kept embeddings where d is wide


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
