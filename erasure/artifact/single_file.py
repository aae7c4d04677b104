"""A model as one safetensors file: what A1111, ComfyUI and their relatives open.

Of Stable Diffusion 1.x, 2.x and XL the same tensors under the original code's names; of other models the denoiser. A
model that was opened from one file goes into a copy of that file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from erasure.artifact.base import Erasure
from erasure.artifact.denoiser import check_export
from erasure.artifact.patching import patched
from erasure.artifact.provenance import metadata_of, records_of
from erasure.artifact.stack import applied, refuse_attached, stack_of
from erasure.backbone import Backbone, backbone_of
from erasure.backbone.native import original_unet_names
from erasure.io import writing

ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
OPEN_CLIP_OUTER = {
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}


def export_single_file(
    pipe: Any, path: str | os.PathLike[str], edit: Erasure | None = None, *, scale: float = 1.0
) -> Path:
    """Write a model as it is now, or with an erasure in it, into one safetensors file.

    A pipeline that was opened from one file: a copy of that file, in which the edited tensors alone differ.
    Otherwise, of Stable Diffusion 1.x, 2.x and XL the U-Net, autoencoder and text encoders in the original layout:
    ``from_single_file(path, config=FOLDER)`` opens it, offline where FOLDER is the base model's own folder. Safety
    checker, tokenizer and scheduler are no part of such files. Of other models the denoiser alone, under diffusers'
    names: ``from_single_file`` of its class opens it; a second one (Wan 2.2) is in ``path-transformer_2.safetensors``.

    Args:
        edit: an erasure to have in it; the pipeline is left as it was. None: what is applied now.
        scale: how strongly ``edit`` is applied.

    Raises:
        ValueError: the U-Net has blocks the layout has no name for; or the erasure changes a part that is not in the
            file, or carries erasures already.
    """
    check_export(pipe, path)
    backbone = backbone_of(pipe)
    refuse_attached(pipe)
    source = Path(str(pipe.config.get("_name_or_path") or ""))
    if edit is None:
        return _write(pipe, backbone, Path(path), source)
    if not edit.parameter_names:
        raise ValueError(
            f"{edit.name!r} is of kind {edit.kind}: it acts while pictures are drawn, and no file of weights holds it"
        )
    if stack_of(pipe).layers:
        raise ValueError("the pipeline carries erasures already; remove them, or leave edit out to write what is on it")
    with applied(edit, pipe, scale):
        return _write(pipe, backbone, Path(path), source, edit, scale)


def autoencoder(state: dict[str, Tensor], *, levels: int) -> dict[str, Tensor]:
    """An AutoencoderKL's tensors under the original's names. Attention was a 1x1 convolution there."""
    rules = [
        (r"\.down_blocks\.(\d+)\.resnets\.", r".down.\1.block."),
        (r"\.down_blocks\.(\d+)\.downsamplers\.0\.", r".down.\1.downsample."),
        (r"\.up_blocks\.(\d+)\.resnets\.", lambda m: f".up.{levels - 1 - int(m[1])}.block."),
        (r"\.up_blocks\.(\d+)\.upsamplers\.0\.", lambda m: f".up.{levels - 1 - int(m[1])}.upsample."),
        (r"\.mid_block\.resnets\.(\d)\.", lambda m: f".mid.block_{int(m[1]) + 1}."),
        (r"\.conv_norm_out\.", ".norm_out."),
        (r"\.conv_shortcut\.", ".nin_shortcut."),
    ]
    renamed = {}
    for name, tensor in state.items():
        if found := re.fullmatch(r"(\w+)\.mid_block\.attentions\.0\.(.+)\.(weight|bias)", name):
            part, layer, kind = found.groups()
            new = f"{part}.mid.attn_1.{ATTENTION[layer]}.{kind}"
            tensor = tensor[:, :, None, None] if tensor.dim() == 2 else tensor
        else:
            new = name
            for pattern, replacement in rules:
                new = re.sub(pattern, replacement, new)  # type: ignore[call-overload]
        renamed[new] = tensor
    return renamed


def text_encoder(model: Any) -> dict[str, Tensor]:
    """A CLIP text encoder's tensors: 1.x kept transformers' names, 2.x those of open_clip, keys and values in one."""
    if model.config.hidden_act == "quick_gelu":  # OpenAI's CLIP, Stable Diffusion 1.x
        return _openai_clip(model, "cond_stage_model.transformer.text_model.")
    return _open_clip(model, "cond_stage_model.model.")


def _openai_clip(model: Any, prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in _inner(model).items()}


def _open_clip(model: Any, prefix: str) -> dict[str, Tensor]:
    state = _inner(model)
    renamed = {new: state.pop(old) for old, new in OPEN_CLIP_OUTER.items()}
    if (projection := state.pop("text_projection.weight", None)) is not None:
        renamed["text_projection"] = projection.T
    for i in range(model.config.num_hidden_layers):
        old, new = f"encoder.layers.{i}", f"transformer.resblocks.{i}"
        for kind in ("weight", "bias"):
            projections = [state.pop(f"{old}.self_attn.{p}_proj.{kind}") for p in ("q", "k", "v")]
            renamed[f"{new}.attn.in_proj_{kind}"] = torch.cat(projections)
            renamed |= {
                f"{new}.{theirs}.{kind}": state.pop(f"{old}.{ours}.{kind}") for ours, theirs in OPEN_CLIP.items()
            }
    return {f"{prefix}{name}": tensor for name, tensor in renamed.items()}


def _inner(model: Any) -> dict[str, Tensor]:
    state = {name.removeprefix("text_model."): tensor for name, tensor in model.state_dict().items()}
    state.pop("embeddings.position_ids", None)
    return state


def _write(
    pipe: Any, backbone: Backbone, path: Path, source: Path, edit: Erasure | None = None, scale: float = 1.0
) -> Path:
    if source.suffix == ".safetensors" and source.is_file():
        tensors, metadata = patched(pipe, backbone, source, edit, scale)
        return _save(tensors, path, {**metadata, **metadata_of(records_of(pipe))})
    if backbone.architecture in ("sd-unet", "sdxl"):
        return _save(_original(pipe, backbone), path, metadata_of(records_of(pipe)))
    records = records_of(pipe)
    if other := next((part for part in records if part not in backbone.denoisers), None):
        raise ValueError(
            f"the {other} is edited, and a single file of {backbone.architecture} holds the denoiser alone; export the "
            "pipeline's folder instead"
        )
    written = []
    for part, denoiser in backbone.denoiser_parts.items():
        file = path if part == backbone.denoiser_name else path.with_name(f"{path.stem}-{part}{path.suffix}")
        mine = {name: entries for name, entries in records.items() if name == part}
        written.append(_save(denoiser.state_dict(), file, metadata_of(mine)))
    return written[0]


def _original(pipe: Any, backbone: Backbone) -> dict[str, Tensor]:
    """Stable Diffusion 1.x, 2.x and XL under the names of the original code."""
    unet = pipe.unet.state_dict()
    tensors = {f"model.diffusion_model.{new}": unet[old] for old, new in original_unet_names(pipe.unet).items()}
    levels = len(pipe.vae.config.block_out_channels)
    vae = autoencoder(pipe.vae.state_dict(), levels=levels)
    tensors |= {f"first_stage_model.{name}": tensor for name, tensor in vae.items()}
    if backbone.architecture == "sd-unet":
        return tensors | text_encoder(pipe.text_encoder)
    first = {}
    if getattr(pipe, "text_encoder", None) is not None:
        first = _openai_clip(pipe.text_encoder, "conditioner.embedders.0.transformer.text_model.")
    return tensors | first | _open_clip(pipe.text_encoder_2, f"conditioner.embedders.{1 if first else 0}.model.")


def _save(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> Path:
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with writing(path) as temporary:
        save_file(whole, temporary, metadata={"format": "pt", **metadata})
    return path


__all__ = ["export_single_file"]
