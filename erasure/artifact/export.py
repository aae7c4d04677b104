"""Erasures as LoRA files that other programs read, under the names that each of them looks for."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors.torch import save
from torch import Tensor

from erasure.artifact.base import Erasure
from erasure.artifact.denoiser import check_export
from erasure.artifact.factors import Pairs, factors, filled
from erasure.artifact.gated import GatedErasure
from erasure.backbone import Backbone, backbone_of
from erasure.backbone.names import split
from erasure.backbone.native import comfyui_stem, kohya_stem
from erasure.io import check_writable, write_atomically, write_json

Layout = Literal["diffusers", "peft", "kohya", "comfyui"]
FOLDERS = ("diffusers", "peft")  # layouts that are folders; the others are files
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"  # the name load_lora_weights looks for
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"


def export_lora(
    edit: Erasure,
    pipe: Any,
    path: str | os.PathLike[str],
    *,
    layout: Layout = "diffusers",
    rank: int | None = None,
    ranks: Sequence[int] = (),
) -> Path:
    """Write an erasure as a LoRA.

    Operators and LoRAs are written exactly. A gated adapter loses its gate, so that it acts on every prompt: a warning
    says so, and the file's metadata (``"gate": "left out"``).

    Args:
        edit: the erasure.
        pipe: its base model: up matrices are made of the base's weights. Erasures on it are looked through.
        path: ``diffusers``: a folder for ``pipe.load_lora_weights(folder)``. ``peft``: a folder for
            ``PeftModel.from_pretrained(denoiser, folder)`` and for servers that take PEFT folders. ``kohya``,
            ``comfyui``: a file. A second denoiser's (Wan 2.2) is in ``folder/transformer_2`` (for diffusers,
            ``load_lora_weights(..., load_into_transformer_2=True)``), or in ``file-transformer_2.safetensors``.
        layout: whose names the tensors get. ``kohya`` is for A1111, Forge and ComfyUI, ``comfyui`` for ComfyUI and
            Forge alone; docs/travel.md says which program reads what.
        rank: cut every layer to this rank. Only for weight differences whose own rank is too high for a LoRA; what was
            lost is in the file's metadata as ``relative_error``.
        ranks: the ranks that the reader knows: layers are filled up with zeros to the next of them.

    Raises:
        ValueError: the erasure is not this pipeline's, is no change of its denoiser, changes what no LoRA can (biases,
            norms), or its rank is so high that a LoRA would be larger than the difference itself, and no ``rank`` was
            given; or the layout has no name for a layer that it changes. Nothing is written.
    """
    if layout not in get_args(Layout):
        raise ValueError(f"unknown layout of a LoRA; got {layout!r}; choose one of {list(get_args(Layout))}")
    backbone = backbone_of(pipe)
    check_writable(path) if layout in FOLDERS else check_export(pipe, path)
    edit.check_base(backbone)
    if rank is not None and rank < 1:
        raise ValueError(f"a rank is 1 or more; got {rank}; leave it out for an exact LoRA")
    pairs, error = factors(edit, backbone, rank)
    return write_lora(edit, backbone, path, filled(pairs, ranks), layout=layout, error=error)


def write_lora(
    edit: Erasure,
    backbone: Backbone,
    path: str | os.PathLike[str],
    pairs: Pairs,
    *,
    layout: Layout,
    error: float = 0.0,
) -> Path:
    """Write the pairs of an erasure under the names of a layout; see :func:`export_lora`.

    Args:
        error: the relative error of the pairs, for the file's metadata.
    """
    check_writable(path) if layout in FOLDERS else check_export(backbone.pipe, path)
    files = named_tensors(pairs, backbone, layout)
    if isinstance(edit, GatedErasure):
        warnings.warn(
            f"{edit.name!r} acts as far as the prompt resembles the concept, and a LoRA cannot: the file acts on every "
            "prompt; what was measured with the gate does not hold for it",
            stacklevel=3,
        )
    metadata = {"format": "pt", "erasure": json.dumps(_facts(edit, error), ensure_ascii=False)}
    written = [_write(Path(path), part, named, layout, metadata, backbone, edit) for part, named in files.items()]
    return written[0]


def named_tensors(pairs: Pairs, backbone: Backbone, layout: Layout) -> dict[str, dict[str, Tensor]]:
    """The tensors of each denoiser by the names of a layout.

    Raises:
        ValueError: the layout has no name for one of the layers.
    """
    files: dict[str, dict[str, Tensor]] = {}
    for module, (up, down) in pairs.items():
        part, own = split(module, first=backbone.denoiser_name)
        files.setdefault(part, {}).update(NAMES[layout](backbone, own, up, down))
    return files


def _diffusers(backbone: Backbone, module: str, up: Tensor, down: Tensor) -> dict[str, Tensor]:
    stem = f"{backbone.denoiser_name}.{module}"
    return {f"{stem}.lora_B.weight": up, f"{stem}.lora_A.weight": down}


def _peft(backbone: Backbone, module: str, up: Tensor, down: Tensor) -> dict[str, Tensor]:
    stem = f"base_model.model.{module}"
    return {f"{stem}.lora_B.weight": up, f"{stem}.lora_A.weight": down}


def _kohya(backbone: Backbone, module: str, up: Tensor, down: Tensor) -> dict[str, Tensor]:
    """Its alpha equals the rank, which makes the scale 1."""
    stem, alpha = kohya_stem(backbone, module), torch.tensor(float(len(down)))
    return {f"{stem}.lora_up.weight": up, f"{stem}.lora_down.weight": down, f"{stem}.alpha": alpha}


def _comfyui(backbone: Backbone, module: str, up: Tensor, down: Tensor) -> dict[str, Tensor]:
    """Without an alpha the scale is 1 there, and diffusers reads more of such files."""
    stem = comfyui_stem(backbone, module)
    return {f"{stem}.lora_B.weight": up, f"{stem}.lora_A.weight": down}


NAMES: dict[Layout, Callable[[Backbone, str, Tensor, Tensor], dict[str, Tensor]]] = {
    "diffusers": _diffusers,
    "peft": _peft,
    "kohya": _kohya,
    "comfyui": _comfyui,
}


def _facts(edit: Erasure, error: float) -> dict[str, Any]:
    return {
        "name": edit.name,
        "method": edit.config["method"],
        "base": edit.config["base"]["name"],
        "concepts": [concept["name"] for concept in edit.config["concepts"]],
        "relative_error": error,
        **({"gate": "left out"} if isinstance(edit, GatedErasure) else {}),
    }


def _write(
    path: Path,
    part: str,
    named: dict[str, Tensor],
    layout: Layout,
    metadata: dict[str, str],
    backbone: Backbone,
    edit: Erasure,
) -> Path:
    """Write what belongs to one denoiser; the first one's place is ``path`` itself."""
    first = part == backbone.denoiser_name
    if layout in FOLDERS:
        file = (path if first else path / part) / (DIFFUSERS_FILE if layout == "diffusers" else PEFT_FILE)
    else:
        file = path if first else path.with_name(f"{path.stem}-{part}{path.suffix}")
    content = save({name: tensor.contiguous() for name, tensor in named.items()}, metadata=metadata)
    write_atomically(file, content)
    if layout == "peft":
        begin, end = "base_model.model.", ".lora_A.weight"
        downs = {name.removeprefix(begin).removesuffix(end): down for name, down in named.items() if name.endswith(end)}
        write_json(file.with_name(PEFT_CONFIG), _peft_config(edit, list(downs), len(next(iter(downs.values())))))
    return file


def _peft_config(edit: Erasure, modules: list[str], rank: int) -> dict[str, Any]:
    """Alpha equals the rank, which makes the scale 1."""
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": edit.config["base"]["name"],
        "task_type": None,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": modules,
    }


__all__ = ["FOLDERS", "Layout", "export_lora", "named_tensors", "write_lora"]
