"""SAFREE as its equations read: whole projection matrices and loops, in numpy."""

from __future__ import annotations

import numpy as np


def projection(rows: np.ndarray) -> np.ndarray:
    """``E (E^T E)^+ E^T`` of the columns E that ``rows (n, d)`` are, ``(d, d)``."""
    e = rows.T
    return e @ np.linalg.pinv(e.T @ e) @ e.T


def trigger_words(without: np.ndarray, concept: np.ndarray, alpha: float) -> list[int]:
    """Words whose absence moves a prompt away from the concept.

    Args:
        without: ``(n, d)`` embeddings of the prompt without each word.
        concept: ``(k, d)`` embeddings of the concept's names.
    """
    away = np.eye(without.shape[1]) - projection(concept)
    distances = [float(np.linalg.norm(away @ e)) for e in without]
    found = []
    for i, distance in enumerate(distances):
        others = [d for j, d in enumerate(distances) if j != i]
        if not others or distance >= (1 + alpha) * sum(others) / len(others):
            found.append(i)
    return found


def safe(tokens: np.ndarray, without: np.ndarray, concept: np.ndarray) -> np.ndarray:
    """``(I - P_C) P_M h`` of every token ``(tokens, d)``."""
    matrix = (np.eye(tokens.shape[1]) - projection(concept)) @ projection(without)
    return np.stack([matrix @ h for h in tokens])


def change(tokens: np.ndarray, safe_tokens: np.ndarray) -> float:
    """beta: one less the mean cosine."""
    cosines = [h @ s / np.linalg.norm(h) / np.linalg.norm(s) for h, s in zip(tokens, safe_tokens, strict=True)]
    return 1 - float(np.mean(cosines))


def steps(beta: float, most: int, midpoint: float, steepness: float) -> int:
    return round(most / (1 + np.exp(-2 * steepness * (10 * beta - midpoint))))


def attenuated(safe_features: np.ndarray, original: np.ndarray, factor: float, radius: int) -> np.ndarray:
    """Features ``(c, h, w)`` whose low frequencies are multiplied by a factor where they exceed the original's."""
    out = np.empty_like(safe_features)
    for channel in range(len(out)):
        f, g = np.fft.fft2(safe_features[channel]), np.fft.fft2(original[channel])
        h, w = f.shape
        for i in range(h):
            for j in range(w):
                near = min(i, h - i) <= radius and min(j, w - j) <= radius
                if near and abs(f[i, j]) > abs(g[i, j]):
                    f[i, j] *= factor
        out[channel] = np.fft.ifft2(f).real
    return out
