"""Erasures as files other programs read: LoRA, and the whole pipeline.

``W (I + U V^T) - W = (W U) V^T``: an operator erasure *is* a LoRA, with up matrix ``W U (out, n)`` and down matrix
``V^T (n, d)``, exact at every scale. A weight difference is one only as far as its rank goes, which an SVD tells.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save
from torch import Tensor

from erasure.artifact.base import Erasure, exact
from erasure.artifact.gated import GatedErasure
from erasure.artifact.lora import LoraErasure
from erasure.artifact.operator import OperatorErasure
from erasure.artifact.stack import stack_of
from erasure.backbone import Backbone, backbone_of
from erasure.backbone.names import parameters_by_name, split
from erasure.io import check_file, check_writable, write_atomically

Layout = Literal["diffusers", "kohya"]
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"  # the name load_lora_weights looks for
EXACT = 1e-6  # singular values below this share of the largest are rounding


def export_lora(
    edit: Erasure, pipe: Any, path: str | os.PathLike[str], *, layout: Layout = "diffusers", rank: int | None = None
) -> Path:
    """Write an erasure as a LoRA.

    Operators and LoRAs are written exactly. A gated adapter loses its gate, so that it acts on every prompt: a warning
    says so, and the file's metadata (``"gate": "left out"``).

    Args:
        edit: the erasure.
        pipe: its base model: up matrices are made of the base's weights. Erasures on it are looked through.
        path: ``diffusers``: a folder for ``pipe.load_lora_weights(folder)``; a second denoiser's (Wan 2.2) is in
            ``folder/transformer_2``, for ``load_lora_weights(..., load_into_transformer_2=True)``. ``kohya``: a file
            for A1111, ComfyUI and their relatives, U-Nets only; diffusers loads it too.
        layout: whose names the tensors get.
        rank: cut every layer to this rank. Only for weight differences whose own rank is too high for a LoRA; what was
            lost is in the file's metadata as ``relative_error``.

    Raises:
        ValueError: the erasure is not this pipeline's, is no change of its denoiser, changes what no LoRA can (biases,
            norms), or its rank is so high that a LoRA would be larger than the difference itself, and no ``rank`` was
            given.
    """
    backbone = backbone_of(pipe)
    check_file(path) if layout == "kohya" else check_writable(path)
    edit.check_base(backbone)
    if layout not in ("diffusers", "kohya"):
        raise ValueError(f"unknown layout of a LoRA; got {layout!r}; choose 'diffusers' or 'kohya'")
    if layout == "kohya" and backbone.denoiser_name != "unet":
        raise ValueError(f"kohya's names are for U-Nets; this is {backbone.architecture}; use layout='diffusers'")
    if rank is not None and rank < 1:
        raise ValueError(f"a rank is 1 or more; got {rank}; leave it out for an exact LoRA")
    refuse_elsewhere(edit, backbone)
    exact_rank = isinstance(edit, OperatorErasure | LoraErasure | GatedErasure)
    if rank is not None and exact_rank:
        raise ValueError(f"{edit.name!r} is a LoRA of its own rank, exactly; got rank={rank}; leave it out")
    error = 0.0
    if isinstance(edit, OperatorErasure):
        pairs = _of_operator(edit, backbone)
    elif isinstance(edit, LoraErasure | GatedErasure):
        pairs = _of_factors(edit)
    else:
        pairs, error = _of_delta(edit, backbone, rank)
    gate = {"gate": "left out"} if isinstance(edit, GatedErasure) else {}
    if gate:
        warnings.warn(
            f"{edit.name!r} acts as far as the prompt resembles the concept, and a LoRA cannot: the file acts on every "
            "prompt; what was measured with the gate does not hold for it",
            stacklevel=2,
        )
    facts = {
        "name": edit.name,
        "method": edit.config["method"],
        "base": edit.config["base"]["name"],
        "concepts": [concept["name"] for concept in edit.config["concepts"]],
        "relative_error": error,
        **gate,
    }
    metadata = {"format": "pt", "erasure": json.dumps(facts, ensure_ascii=False)}
    files: dict[Path, dict[str, Tensor]] = {}
    for module, (up, down) in pairs.items():
        part, own = split(module, first=backbone.denoiser_name)
        folder = Path(path) if part == backbone.denoiser_name else Path(path) / part
        file = folder / DIFFUSERS_FILE if layout == "diffusers" else folder
        files.setdefault(file, {}).update(_names(own, up, down, layout, backbone.denoiser_name))
    for file, named in files.items():
        write_atomically(file, save({name: tensor.contiguous() for name, tensor in named.items()}, metadata=metadata))
    return next(iter(files))


def refuse_elsewhere(edit: Erasure, backbone: Backbone) -> None:
    """Refuse erasures that are no change of a denoiser: of a text encoder, or of what happens while it draws."""
    sites = edit.sites if isinstance(edit, GatedErasure) else edit.parameter_names
    if not sites:
        raise ValueError(f"{edit.name!r} is a {edit.kind}, which changes no layer; a file of weights cannot hold it")
    parts = {site: split(site, first=backbone.denoiser_name)[0] for site in sites}
    if other := next((site for site, part in parts.items() if part not in backbone.denoisers), None):
        part = parts[other]
        raise ValueError(
            f"{edit.name!r} changes the {part} ({other}), and a LoRA here is one of the denoiser; apply it and save "
            f"that module instead: pipe.{part}.save_pretrained(folder)"
        )


def base_weights(backbone: Backbone) -> dict[str, Tensor]:
    """The parameters of every part, by qualified name, as they are without the erasures on them."""
    own = parameters_by_name(backbone.components, first=backbone.denoiser_name)
    return {**{name: parameter.detach() for name, parameter in own.items()}, **stack_of(backbone).originals}


def _of_operator(edit: OperatorErasure, backbone: Backbone) -> dict[str, tuple[Tensor, Tensor]]:
    """``W U`` and ``V^T`` of every site, the latter zero at the columns that do not read the text."""
    weights, pairs = base_weights(backbone), {}
    for site in edit.site_spaces:
        w = exact(weights[f"{site}.weight"]).cpu()
        columns = edit.columns(site)
        u, v = (factor.double() for factor in edit.factors(site))
        down = torch.zeros(u.shape[1], w.shape[1], dtype=torch.float64)
        down[:, columns] = v.T
        pairs[site] = (w[:, columns] @ u).float(), down.float()
    return pairs


def _of_factors(edit: LoraErasure | GatedErasure) -> dict[str, tuple[Tensor, Tensor]]:
    """``B`` and ``A`` of every layer, filled up to one rank: readers tell it, and the scale, from one layer."""
    sites = edit.sites if isinstance(edit, GatedErasure) else edit.config.sites or ()
    ups, downs = ({site: edit.tensors[f"{site}.lora_{k}"].float() for site in sites} for k in "BA")
    n = max(len(down) for down in downs.values())
    pairs = {}
    for site in sites:
        up, down = ups[site], downs[site]
        more = n - len(down)
        up = torch.cat([up, up.new_zeros(len(up), more, *up.shape[2:])], dim=1)
        pairs[site] = up, torch.cat([down, down.new_zeros(more, *down.shape[1:])])
    return pairs


def _of_delta(edit: Erasure, backbone: Backbone, rank: int | None) -> tuple[dict[str, tuple[Tensor, Tensor]], float]:
    """Factors of every changed layer by SVD, all of one rank, and the relative error of the whole."""
    layers = {
        backbone.qualified(part, name)
        for part, denoiser in backbone.denoiser_parts.items()
        for name, module in denoiser.named_modules()
        if _takes_lora(module)
    }
    flat, lost, whole = {}, 0.0, 0.0
    for name, delta in edit.tensors.items():
        module, _, kind = name.rpartition(".")
        whole += float(delta.double().square().sum())
        if kind == "weight" and module in layers:
            flat[module] = delta.double().flatten(1)
        elif delta.any() and rank is None:
            raise ValueError(
                f"a LoRA cannot change {name}; export the whole UNet, or leave it out with rank= (the error is noted)"
            )
        else:
            lost += float(delta.double().square().sum())
    spectra = {module: torch.linalg.svd(delta, full_matrices=False) for module, delta in flat.items()}
    needed = {module: int((s > EXACT * s[0]).sum()) for module, (_, s, _) in spectra.items() if s[0] > 0}
    for module, n in needed.items() if rank is None else ():
        rows, columns = flat[module].shape
        if n * (rows + columns) > rows * columns:
            raise ValueError(
                f"the change of {module} has rank {n} of {min(rows, columns)}: a LoRA of it would be larger than the "
                "difference itself; export the whole UNet, or give rank= for an approximation (its error is noted)"
            )
    n = rank or max(needed.values(), default=1)  # one rank for all: readers tell it, and the scale, from one layer
    pairs = {}
    for module in needed:
        left, s, right = spectra[module]
        root = s[:n].sqrt()
        lost += float(s[n:].square().sum())
        shape = edit.tensors[f"{module}.weight"].shape
        up, down = _padded(left[:, :n] * root, n), _padded((right[:n].T * root), n).T
        up, down = up.reshape(shape[0], n, *[1] * (len(shape) - 2)), down.reshape(n, *shape[1:])
        pairs[module] = up.float(), down.float()
    return pairs, (lost / whole) ** 0.5 if whole else 0.0


def _takes_lora(module: Any) -> bool:
    return isinstance(module, torch.nn.Linear | torch.nn.Conv2d)


def _padded(factor: Tensor, n: int) -> Tensor:
    return torch.nn.functional.pad(factor, (0, n - factor.shape[1]))


def _names(module: str, up: Tensor, down: Tensor, layout: Layout, denoiser: str) -> dict[str, Tensor]:
    """A layer's pair by the names of a layout; kohya's alpha equals the rank, which makes the scale 1."""
    if layout == "diffusers":
        return {f"{denoiser}.{module}.lora_B.weight": up, f"{denoiser}.{module}.lora_A.weight": down}
    # kohya calls layers as diffusers does, with underscores, but for the few that the original SDXL code names
    stem = "lora_unet_" + KOHYA.get(module, module).replace(".", "_")
    return {
        f"{stem}.lora_up.weight": up,
        f"{stem}.lora_down.weight": down,
        f"{stem}.alpha": torch.tensor(float(len(down))),
    }


KOHYA: Mapping[str, str] = {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}


__all__ = ["base_weights", "export_lora"]
