"""The files the published codes write: whole edited tensors by parameter name, nothing else.

UCE and SPEED write ``<module>.weight`` of the layers they edit, ESD every parameter it trained, both as safetensors and
both with diffusers' own names. A file says neither which model it is of nor what it erases, so that has to be told.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from erasure.artifact.base import Erasure, check_scale, exact, new_config
from erasure.artifact.delta import DeltaErasure
from erasure.artifact.export import base_weights
from erasure.artifact.operator import OperatorErasure, space_config
from erasure.backbone import Backbone, backbone_of
from erasure.concept import Concept
from erasure.io import write_atomically

ROUNDING = 2**-23  # of float32, relative: what an edited weight and its base may be off by


def export_official(edit: Erasure, pipe: Any, path: str | os.PathLike[str], *, scale: float = 1.0) -> Path:
    """Write the tensors an erasure edits, edited, as UCE, SPEED and ESD do.

    Their scripts load it with ``pipe.unet.load_state_dict(load_file(path), strict=False)``.

    Args:
        pipe: its base model. Erasures on it are looked through.
        scale: how strongly, as in ``apply``.
    """
    backbone = backbone_of(pipe)
    edit.check_base(backbone)
    weights = base_weights(backbone)
    scale = check_scale(scale)
    tensors = {name: edit.edit(name, weights[name], scale).cpu().contiguous() for name in edit.parameter_names}
    write_atomically(Path(path), save(tensors, metadata={"format": "pt"}))
    return Path(path)


def import_official(
    path: str | os.PathLike[str],
    pipe: Any,
    *,
    concept: str | Concept | Sequence[str | Concept],
    method: str,
    keep: Sequence[str] = (),
    name: str | None = None,
) -> Erasure:
    """Read such a file as an erasure.

    Where the edited tensors are exactly ``W T`` with one matrix ``T`` for all layers that read the text, as UCE's are
    in float32, the result is an operator of that rank; otherwise it is the differences to the base.

    Args:
        path: a safetensors file. Pickles (.pt, .ckpt) are refused: reading one runs its code.
        pipe: the model the file was made from, nothing applied.
        concept: what it erases; the file does not say.
        method: how it was made: "uce", "esd", "speed" ...
        keep: prompts it was told to keep, if that is known.
        name: its name; from concept and method by default.

    Raises:
        ValueError: not such a file, or its names or shapes are not the model's.
    """
    backbone = backbone_of(pipe)
    weights = base_weights(backbone)
    tensors = _read(Path(path), backbone.denoiser_name)
    if unknown := sorted(set(tensors) - set(weights)):
        raise ValueError(
            f"{path}: not this model's; it has no {unknown[0]} ({len(unknown)} such names); "
            "give the model it was made of"
        )
    if bad := next((n for n, t in tensors.items() if t.shape != weights[n].shape), None):
        raise ValueError(
            f"{path}: {bad} has shape {tuple(tensors[bad].shape)}, the model's {tuple(weights[bad].shape)}; "
            "give the model it was made of"
        )
    several = [concept] if isinstance(concept, str | Concept) else concept
    concepts = [Concept.of(c) for c in several]
    deltas = {n: (exact(t).cpu() - exact(weights[n]).cpu()).float() for n, t in tensors.items()}
    if not any(delta.any() for delta in deltas.values()):
        raise ValueError(f"{path}: equals the model; nothing is erased in it, or it is already in the model's weights")
    settings = {"imported_from": Path(path).name}
    config = new_config(backbone, method=method, settings=settings, concepts=concepts, keep=keep)
    made = name or "+".join(c.name for c in concepts) + f"-{method}"
    moved = sum(float(d.double().square().sum()) for d in deltas.values())
    size = sum(float(exact(weights[n]).square().sum()) for n in deltas)
    config["report"] = {"relative_change": (moved / size) ** 0.5}
    single = all(tensor.dtype.itemsize >= 4 for tensor in tensors.values())
    factors = _as_operator(backbone, deltas) if single else None
    if factors is None:
        return DeltaErasure(made, {**config, "sites": list(deltas)}, deltas)
    config["spaces"] = {"hidden": space_config(backbone, "hidden")}
    config["report"]["rank"] = factors[0].shape[1]
    return OperatorErasure(made, config, {"hidden.u": factors[0], "hidden.v": factors[1]})


def _as_operator(backbone: Backbone, deltas: dict[str, Tensor]) -> tuple[Tensor, Tensor] | None:
    """``U, V`` with ``D_l = W_l U V^T`` up to rounding for every layer that reads the text, if there are any.

    ``M = U V^T`` is the least-squares solution of ``W_l M = D_l`` over all layers, ``G M = sum_l W_l^T D_l`` with
    ``G = sum_l W_l^T W_l``, both ``(d, d)``.
    """
    sites, weights = backbone.text_sites("hidden"), base_weights(backbone)
    if set(deltas) != {f"{site}.weight" for site in sites}:
        return None
    pairs = [(exact(weights[name]).cpu(), delta.double()) for name, delta in deltas.items()]
    g = torch.stack([w.T @ w for w, _ in pairs]).sum(dim=0)
    right = torch.stack([w.T @ delta for w, delta in pairs]).sum(dim=0)
    whole = sum(float(delta.square().sum()) for _, delta in pairs)
    noise = ROUNDING**2 * sum(float(w.square().sum()) for w, _ in pairs)
    if noise > 1e-6 * whole:
        return None  # so small an edit that rounding hides its rank
    left, values, turned = torch.linalg.svd(torch.linalg.lstsq(g, right).solution)
    for rank in range(1, len(values) // 2 + 1):
        root = values[:rank].sqrt()
        u, v = left[:, :rank] * root, turned[:rank].T * root
        # sum_l |D_l - W_l U V^T|^2, multiplied out so that no layer is visited
        missed = whole - 2 * float((u * (right @ v)).sum()) + float(((u.T @ g @ u) * (v.T @ v)).sum())
        if missed <= noise:
            return u.float(), v.float()
    return None


def _read(path: Path, denoiser: str) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path}; give the safetensors file an official code wrote")
    try:
        tensors = load(path.read_bytes())
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"{path}: not a safetensors file; pickles (.pt, .ckpt) are not read, as that runs their code; convert it "
            "first, in a place you trust it in"
        ) from None
    tensors = {name.removeprefix(f"{denoiser}."): tensor for name, tensor in tensors.items()}
    if not tensors:
        raise ValueError(f"{path}: holds no tensors; give the file an official code wrote")
    if bad := next((n for n, t in tensors.items() if not t.is_floating_point() or not torch.isfinite(t).all()), None):
        raise ValueError(f"{path}: {bad} holds NaN, infinity or no floats; the file is broken; make it again")
    return tensors


__all__ = ["export_official", "import_official"]
