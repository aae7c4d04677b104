"""How far apart two erasures are, or two models on disk."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from erasure.artifact.base import Erasure
from erasure.artifact.operator import OperatorErasure
from erasure.backbone.fingerprint import matches

Factors = tuple[Tensor, Tensor]


def compare_erasures(a: Erasure, b: Erasure) -> dict[str, Any]:
    """Base, concepts and distance of two erasures of one kind.

    Returns:
        ``same_base``, ``same_concepts``, ``only_a`` and ``only_b`` (concepts); ``distance`` ``|A - B|``, ``relative``,
        that over the larger of ``|A|`` and ``|B|``, and ``cosine``, over all sites together and for each of ``sites``.
        For operators ``A = U V^T`` is ``T - I``, what the edit does to an embedding, whatever the layer's weights; for
        weight differences it is the difference. Sites only one of them edits are compared with zero.

    Raises:
        ValueError: one is an operator and one is not: without the base model they have nothing in common.
    """
    if a.kind != b.kind:
        raise ValueError(
            f"{a.name!r} is of kind {a.kind} and {b.name!r} of kind {b.kind}, which cannot be compared without their "
            "base; compare what they draw: erasure evaluate --erasure A --erasure B"
        )
    parts = _products(a), _products(b)
    sites = {site: _apart(*(_three(*(p.get(site) for p in parts)))) for site in {**parts[0], **parts[1]}}
    bases = [edit.config["base"]["components"] for edit in (a, b)]
    names = [[concept["name"] for concept in edit.config["concepts"]] for edit in (a, b)]
    return {
        "a": a.name,
        "b": b.name,
        "same_base": bases[0].keys() == bases[1].keys() and all(matches(bases[0][p], bases[1][p]) for p in bases[0]),
        "same_concepts": sorted(names[0]) == sorted(names[1]),
        "only_a": [name for name in names[0] if name not in names[1]],
        "only_b": [name for name in names[1] if name not in names[0]],
        **_apart(*(sum(_three(*(p.get(site) for p in parts))[i] for site in sites) for i in range(3))),
        "sites": sites,
    }


def compare_models(a: str | os.PathLike[str], b: str | os.PathLike[str]) -> dict[str, Any]:
    """Which tensors of two UNet folders, pipeline folders or safetensors files differ, and by how much.

    One tensor of each is in memory at a time.

    Returns:
        ``same``, the number of equal tensors; ``only_a``, ``only_b``: names; ``reshaped``: names with both shapes;
        ``different``: name to ``relative`` ``|A - B| / |A|`` and ``largest`` single difference.

    Raises:
        FileNotFoundError, ValueError: no safetensors there, or damaged.
    """
    places = _tensors(Path(a)), _tensors(Path(b))
    both = [name for name in places[0] if name in places[1]]
    different: dict[str, dict[str, float]] = {}
    reshaped: dict[str, list[list[int]]] = {}
    for name in both:
        x, y = (_load(places[i][name], name) for i in range(2))
        if x.shape != y.shape:
            reshaped[name] = [list(x.shape), list(y.shape)]
        elif not torch.equal(x, y):
            x, gap = x.double(), (x.double() - y.double())
            relative = float(gap.norm() / x.norm().clamp(min=1e-300))
            different[name] = {"relative": relative, "largest": float(gap.abs().max())}
    return {
        "same": len(both) - len(different) - len(reshaped),
        "different": different,
        "reshaped": reshaped,
        "only_a": [name for name in places[0] if name not in places[1]],
        "only_b": [name for name in places[1] if name not in places[0]],
    }


def _products(edit: Erasure) -> dict[str, Factors]:
    """Site to two factors whose product is the edit; a difference is its own."""
    if isinstance(edit, OperatorErasure):
        return {site: tuple(f.double() for f in edit.factors(site)) for site in edit.site_spaces}  # type: ignore[misc]
    flat = {name: (t.double().flatten(1) if t.dim() > 1 else t.double()[:, None]) for name, t in edit.tensors.items()}
    return {name: (t, torch.empty(0)) for name, t in flat.items()}


def _three(a: Factors | None, b: Factors | None) -> tuple[float, float, float]:
    """``<A, A>``, ``<B, B>`` and ``<A, B>`` of ``A = U V^T``, none of which is ever formed."""
    return tuple(_inner(x, y) if x and y else 0.0 for x, y in ((a, a), (b, b), (a, b)))  # type: ignore[return-value]


def _inner(a: Factors, b: Factors) -> float:
    """``<U1 V1^T, U2 V2^T> = tr((U2^T U1) (V1^T V2))``."""
    if a[1].numel() == 0:
        return float((a[0] * b[0]).sum()) if a[0].shape == b[0].shape else math.nan
    if len(a[0]) != len(b[0]):
        return math.nan
    return float(((b[0].T @ a[0]) * (b[1].T @ a[1])).sum())


def _apart(aa: float, bb: float, ab: float) -> dict[str, float | None]:
    """Distance, relative distance and cosine; None where they mean nothing (two widths, or nothing at all)."""
    if math.isnan(ab):
        return {"distance": None, "relative": None, "cosine": None}
    distance = math.sqrt(max(aa + bb - 2 * ab, 0.0))
    larger, product = math.sqrt(max(aa, bb)), math.sqrt(aa * bb)
    return {
        "distance": distance,
        "relative": distance / larger if larger else 0.0,
        "cosine": ab / product if product else None,
    }


def _tensors(path: Path) -> dict[str, Path]:
    """Name of each tensor, with its component's before it in a pipeline, to the file it lies in."""
    found: dict[str, Path] = {}
    for file, prefix in _files(path):
        try:
            with safe_open(file, "pt") as opened:
                found |= {f"{prefix}{name}": file for name in opened.keys()}
        except SafetensorError:
            raise ValueError(f"{file}: not a safetensors file, or damaged; get it again") from None
    if not found:
        raise FileNotFoundError(f"no safetensors at {path}; give a UNet's or pipeline's folder, or a file")
    return found


def _files(path: Path) -> Iterator[tuple[Path, str]]:
    if path.is_file():
        yield path, ""
        return
    for file in sorted(path.glob("*.safetensors")):
        yield file, ""
    if (path / "model_index.json").exists():
        for file in sorted(path.glob("*/*.safetensors")):
            yield file, f"{file.parent.name}."


def _load(file: Path, name: str) -> Tensor:
    with safe_open(file, "pt") as opened:
        keys = set(opened.keys())
        return opened.get_tensor(name if name in keys else name.removeprefix(f"{file.parent.name}."))


def is_model(path: Mapping[str, Any] | str | os.PathLike[str]) -> bool:
    """Whether a path is a model's: a pipeline, one component, or a single file."""
    place = Path(str(path))
    return place.is_file() or (place / "model_index.json").exists() or (place / "config.json").exists()


__all__ = ["compare_erasures", "compare_models", "is_model"]
