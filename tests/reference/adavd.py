"""AdaVD as its equations read: token by token, in numpy."""

from __future__ import annotations

import numpy as np


def shift(x: float, a: float, b: float, c: float) -> float:
    return c / (1 + np.exp(-a * (x - b)))


def cosine(x: np.ndarray, y: np.ndarray) -> float:
    return float(x @ y / np.linalg.norm(x) / np.linalg.norm(y))


def erased(v: np.ndarray, concepts: list[np.ndarray], a: float, b: float, c: float, scale: float = 1.0) -> np.ndarray:
    """Values ``(tokens, d)`` without the concepts; the first token, which starts every prompt, stays.

    Args:
        concepts: ``(rows, d)`` values of each concept; the row nearest to a token counts.
    """
    out = v.copy()
    for t in range(1, len(v)):
        rows = [max(values, key=lambda row: cosine(v[t], row)) for values in concepts]
        weights, *_ = np.linalg.lstsq(np.stack(rows).T, v[t], rcond=None)  # of the projection on the span of the rows
        for weight, row in zip(weights, rows, strict=True):
            out[t] -= scale * shift(cosine(v[t], row), a, b, c) * weight * row
    return out
