"""The files the published codes write: whole edited tensors by parameter name, nothing else.

Names are diffusers' own. UCE writes ``<module>.weight`` of the layers it edits, ESD every parameter it trained, both as
safetensors; SPEED the layers it edits, and RECE and UCE's code of 2023 the whole UNet, as ``.pt``. A file says neither
which model it is of nor what it erases, so the caller does.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from erasure.artifact.base import Erasure, check_scale, exact
from erasure.artifact.delta import DeltaErasure
from erasure.artifact.denoiser import check_export
from erasure.artifact.factors import base_weights
from erasure.artifact.files import check_name
from erasure.artifact.operator import OperatorErasure, space_config
from erasure.artifact.record import new_config
from erasure.artifact.stack import check_finite
from erasure.backbone import Backbone, backbone_of
from erasure.concept import Concept, concepts_of
from erasure.io import shown, write_atomically
from erasure.wording import listed

ROUNDING = 2**-23  # of float32, relative: what an edited weight and its base may be off by
INVERSE = 1e-3  # relative error of the whole edit that the float32 inverse in the published codes may have left
BROKEN = (SafetensorError, LookupError, TypeError, ValueError, RuntimeError)  # what readers raise
WRAPPERS = ("state_dict", "model_state_dict", "unet")  # keys under which a checkpoint may hold the tensors


def export_official(edit: Erasure, pipe: Any, path: str | os.PathLike[str], *, scale: float = 1.0) -> Path:
    """Write the tensors an erasure edits, edited, as UCE, SPEED and ESD do.

    Their scripts load it with ``pipe.unet.load_state_dict(load_file(path), strict=False)``.

    Args:
        pipe: its base model. Erasures on it are looked through.
        scale: how strongly, as in ``apply``.
    """
    scale = check_scale(scale)
    check_export(pipe, path)
    backbone = backbone_of(pipe)
    edit.check_base(backbone)
    if not edit.parameter_names:
        raise ValueError(
            f"{edit.name!r} is of kind {edit.kind}: it acts while pictures are drawn, and no file of weights holds it"
        )
    weights = base_weights(backbone)
    tensors = {
        name: check_finite(name, weights[name], edit.edit(name, weights[name], scale)).cpu().contiguous()
        for name in edit.parameter_names
    }
    write_atomically(Path(path), save(tensors, metadata={"format": "pt"}))
    return Path(path)


def import_official(
    path: str | os.PathLike[str],
    pipe: Any,
    *,
    concept: str | Concept | Sequence[str | Concept],
    method: str,
    keep: str | Sequence[str] = (),
    name: str | None = None,
) -> Erasure:
    """Read such a file as an erasure.

    Where the edited tensors are ``W T`` with one matrix ``T`` for all layers that read the text, as UCE's and RECE's
    are, the result is an operator: of the rank that explains the edit to float32's precision or, because those codes
    invert a matrix in float32, to 1e-3. The report's ``relative_error`` says how much of it is not in the operator.
    Otherwise it is the differences to the base. Tensors that equal the base's are left out.

    Args:
        path: a safetensors file, or what ``torch.save`` wrote of a dictionary of tensors. Of a pickle only tensors are
            read: no code in it runs.
        pipe: the model the file was made from, nothing applied.
        concept: what it erases; the file does not say.
        method: how it was made: "uce", "esd", "speed" ...
        keep: prompts it was told to keep, if that is known.
        name: its name; from concept and method by default.

    Raises:
        ValueError: no concept, method or safe name; not such a file, or its names or shapes are not the model's.
    """
    concepts, keep = concepts_of(concept), listed(keep)
    if not concepts:
        raise ValueError("no concepts; name at least one that the file erases")
    if not isinstance(method, str) or not method.strip():
        raise ValueError(f"how was the file made? got method={shown(method)}; give a name, 'uce' say")
    if name:
        check_name(name)
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
    changed = {n: t for n, t in tensors.items() if not torch.equal(t, weights[n].cpu().to(t.dtype))}
    deltas = {n: (exact(t) - exact(weights[n]).cpu()).float() for n, t in changed.items()}
    if not deltas:
        raise ValueError(f"{path}: equals the model; nothing is erased in it, or it is already in the model's weights")
    settings = {"imported_from": Path(path).name}
    config = new_config(backbone, method=method, settings=settings, concepts=concepts, keep=keep)
    made = name or "+".join(c.name for c in concepts) + f"-{method}"
    moved = sum(float(d.double().square().sum()) for d in deltas.values())
    size = sum(float(exact(weights[n]).square().sum()) for n in deltas)
    report: dict[str, Any] = {"relative_change": (moved / size) ** 0.5}
    single = all(tensor.dtype.itemsize >= 4 for tensor in changed.values())
    found = _as_operator(backbone, deltas) if single else None
    if found is None:
        return DeltaErasure(made, config.with_facts(sites=list(deltas), report=report), deltas)
    u, v, error = found
    config = config.with_facts(
        spaces={"hidden": space_config(backbone, "hidden")},
        report={**report, "rank": u.shape[1], "relative_error": error},
    )
    return OperatorErasure(made, config, {"hidden.u": u, "hidden.v": v})


def _as_operator(backbone: Backbone, deltas: dict[str, Tensor]) -> tuple[Tensor, Tensor, float] | None:
    """``U, V`` with ``D_l = W_l U V^T`` for every layer that reads the text, if there are any, and the relative error.

    ``M = U V^T`` is the least-squares solution of ``W_l M = D_l`` over all layers, ``G M = sum_l W_l^T D_l`` with
    ``G = sum_l W_l^T W_l``, both ``(d, d)``. The rank is the least that leaves no more than rounding or, where none up
    to half the width does, no more than ``INVERSE``.
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
    us, vs = left * values.sqrt(), turned.T * values.sqrt()
    half = max(len(values) // 2, 1)
    # sum_l |D_l - W_l U V^T|^2 for every rank, multiplied out so that no layer is visited
    inner = (us * (right @ vs)).sum(dim=0).cumsum(0)
    outer = ((us.T @ g @ us) * (vs.T @ vs)).cumsum(0).cumsum(1).diagonal()
    missed = (whole - 2 * inner + outer)[:half].clamp(min=0)
    for allowed in (noise, INVERSE**2 * whole):
        if len(enough := (missed <= allowed).nonzero()):
            rank = int(enough[0]) + 1
            error = (float(missed[rank - 1]) / whole) ** 0.5
            return us[:, :rank].float(), vs[:, :rank].float(), error
    return None


def _read(path: Path, denoiser: str) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path}; give the file an official code wrote")
    try:
        tensors = load(path.read_bytes())
    except BROKEN:
        tensors = _unpickled(path)
    tensors = {name.removeprefix("module.").removeprefix(f"{denoiser}."): t for name, t in tensors.items()}
    if not tensors:
        raise ValueError(f"{path}: holds no tensors; give the file an official code wrote")
    if bad := next((n for n, t in tensors.items() if not t.is_floating_point() or not torch.isfinite(t).all()), None):
        raise ValueError(f"{path}: {bad} holds NaN, infinity or no floats; the file is broken; make it again")
    return tensors


def _unpickled(path: Path) -> dict[str, Tensor]:
    """The tensors ``torch.save`` wrote, by name; nothing else is unpickled."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, *BROKEN, AttributeError, EOFError):
        raise ValueError(
            f"{path}: neither a safetensors file nor a torch.save of tensors alone; other pickles are not read, as "
            "that runs their code; save the tensors by name, in a place you trust the file in"
        ) from None
    while isinstance(found, dict) and len(found) == 1 and (key := next(iter(found))) in WRAPPERS:
        found = found[key]
    if not isinstance(found, dict) or not all(isinstance(n, str) and isinstance(t, Tensor) for n, t in found.items()):
        raise ValueError(f"{path}: holds no dictionary of tensors by name; give the file an official code wrote")
    return {name: tensor.detach() for name, tensor in found.items()}


__all__ = ["export_official", "import_official"]
