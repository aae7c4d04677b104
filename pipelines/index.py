"""The embeddings of a store in memory, and what is nearest in them."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np

from erasure.pipelines.embedders import By

IndexKind = Literal["exact", "faiss"]

MANY = 100_000  # entries from which comparing with all of them takes a tenth of a second on one core
FEW = 10_000  # entries below which faiss compares with all of them too
PROBES = 16  # lists that faiss looks into

Rows = Callable[[Sequence[int]], Mapping[By, np.ndarray]]  # ids -> vectors (n, d) of captions and of pictures


@dataclasses.dataclass(frozen=True)
class Index:
    """Unit vectors of captions and pictures, by entry. It never changes; a store that changed gets another.

    Attributes:
        version: of the store; the number of its last log row.
        ids: ``(n,)`` entries, rising.
        vectors: of captions and of pictures, ``(n, d)`` float32 each.
        kind: "exact" compares with every entry. "faiss" looks into a part of them: faster beyond 100,000 entries, but
            it is built anew after every change (about 10 s for 100,000 on one core) and may miss the nearest.
    """

    version: int
    ids: np.ndarray
    vectors: Mapping[By, np.ndarray]
    kind: IndexKind = "exact"

    @classmethod
    def empty(cls, width: int, kind: IndexKind) -> Index:
        """An index of nothing."""
        return cls(-1, np.zeros(0, np.int64), {by: np.zeros((0, width), np.float32) for by in get_args(By)}, kind)

    def updated(self, version: int, present: Sequence[int], rows: Rows) -> Index:
        """The index of a later state; only the vectors of entries it does not have yet are read."""
        ids = np.asarray(present, np.int64)
        stay, new = np.isin(self.ids, ids), np.setdiff1d(ids, self.ids)
        more = rows(new.tolist())
        vectors = {by: np.concatenate([own[stay], more[by]]) for by, own in self.vectors.items()}
        if self.kind == "exact" and len(ids) >= MANY > len(self.ids):
            warnings.warn(
                f"the store has {len(ids)} entries, and every request is compared with all of them; give the store "
                "index='faiss' (pip install faiss-cpu) if that is too slow",
                stacklevel=2,
            )
        return Index(version, np.concatenate([self.ids[stay], new]), vectors, self.kind)

    def nearest(self, queries: np.ndarray, by: By, count: int) -> list[list[tuple[int, float]]]:
        """For each of ``queries (m, d)`` up to ``count`` entries with their cosine, the nearest first."""
        count = min(count, len(self.ids))
        if not count:
            return [[] for _ in queries]
        cosines, at = self._searches[by](queries, count)
        return [
            [(int(self.ids[i]), float(c)) for c, i in zip(*row, strict=True) if i >= 0]
            for row in zip(cosines, at, strict=True)
        ]

    @functools.cached_property
    def _searches(self) -> dict[By, Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]]:
        make = _exact if self.kind == "exact" else _faiss
        return {by: make(vectors) for by, vectors in self.vectors.items()}


def _exact(vectors: np.ndarray) -> Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]:
    def search(queries: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        cosines = queries @ vectors.T
        at = np.argsort(-cosines, axis=1, kind="stable")[:, :count]
        return np.take_along_axis(cosines, at, axis=1), at

    return search


def _faiss(vectors: np.ndarray) -> Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]:
    faiss = faiss_module()
    n, d = vectors.shape
    index = faiss.IndexFlatIP(d)
    if n >= FEW:
        lists = round(n**0.5)
        index = faiss.IndexIVFFlat(index, d, lists, faiss.METRIC_INNER_PRODUCT)
        index.train(vectors)
        index.nprobe = min(PROBES, lists)
    index.add(vectors)
    return index.search


def faiss_module() -> Any:
    """The package faiss.

    Raises:
        ImportError: it is not installed.
    """
    try:
        return importlib.import_module("faiss")
    except ImportError as error:
        raise ImportError(
            "index='faiss' needs the package faiss, which is not installed; pip install faiss-cpu, or leave "
            "index='exact', which is quick enough up to 100,000 entries"
        ) from error


__all__ = ["Index", "IndexKind", "faiss_module"]
