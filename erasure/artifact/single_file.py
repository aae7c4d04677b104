"""Stable Diffusion 1.x / 2.x as the one file of the original code: what A1111, ComfyUI and their relatives open.

The same tensors under other names. Both schemes number the same tree of blocks, so the map is written out from the
blocks a model has; nothing in it depends on the size of the model.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from erasure.artifact.base import Erasure
from erasure.artifact.provenance import metadata_of, records_of
from erasure.artifact.stack import refuse_attached, stack_of
from erasure.backbone import backbone_of
from erasure.io import check_file, writing

KINDS = ("resnets", "attentions")
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
OUTER = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
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


def export_single_file(pipe: Any, path: str | os.PathLike[str], edit: Erasure | None = None) -> Path:
    """Write U-Net, autoencoder and text encoder as they are now into one safetensors file of the original layout.

    ``StableDiffusionPipeline.from_single_file(path, config=FOLDER)`` opens it, offline where FOLDER is the base model's
    own folder. Safety checker, tokenizer and scheduler are no part of such files.

    Args:
        edit: an erasure to have in it; the pipeline is left as it was. None: what is applied now.

    Raises:
        ValueError: not Stable Diffusion 1.x / 2.x, or its U-Net has blocks the layout has no name for.
    """
    check_file(path)
    backbone = backbone_of(pipe)
    if backbone.architecture != "sd-unet":
        raise ValueError(
            f"the original layout is for Stable Diffusion 1.x / 2.x; this is {backbone.architecture}; "
            "export the pipeline's folder instead"
        )
    refuse_attached(pipe)
    if edit is None:
        _write(pipe, Path(path))
    elif stack_of(pipe).layers:
        raise ValueError("the pipeline carries erasures already; remove them, or leave edit out to write what is on it")
    else:
        edit.apply(pipe)
        try:
            _write(pipe, Path(path))
        finally:
            edit.remove(pipe)
    return Path(path)


def original_names(unet: Any) -> dict[str, str]:
    """Each parameter of a diffusers U-Net to its name in the original code, without ``model.diffusion_model.``."""
    prefixes = {**OUTER, **_blocks(unet)}
    names = {}
    for name in unet.state_dict():
        stem = next((p for p in prefixes if name.startswith(f"{p}.")), None)
        if stem is None:
            raise ValueError(f"the original layout has no name for {name}; export the pipeline's folder instead")
        rest = name.removeprefix(f"{stem}.")
        part = rest.split(".")[0]
        if ".resnets." in f"{stem}.":
            rest = rest.replace(part, RESNET[part], 1)
        names[name] = f"{prefixes[stem]}.{rest}"
    return names


def _blocks(unet: Any) -> dict[str, str]:
    """Resnets, attentions and resamplers, which the original counts one after the other.

    A resampler is one of its own on the way down, and stands beside the last resnet on the way up.
    """
    names: dict[str, str] = {}
    n = 1
    for i, block in enumerate(unet.down_blocks):
        for j in range(len(block.resnets)):
            names |= {f"down_blocks.{i}.{kind}.{j}": f"input_blocks.{n}.{k}" for k, kind in enumerate(KINDS)}
            n += 1
        if getattr(block, "downsamplers", None):
            names[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{n}.0.op"
            n += 1
    for j, kind in ((0, "resnets.0"), (1, "attentions.0"), (2, "resnets.1")):
        names[f"mid_block.{kind}"] = f"middle_block.{j}"
    n = 0
    for i, block in enumerate(unet.up_blocks):
        for j in range(len(block.resnets)):
            names |= {f"up_blocks.{i}.{kind}.{j}": f"output_blocks.{n}.{k}" for k, kind in enumerate(KINDS)}
            n += 1
        if getattr(block, "upsamplers", None):
            place = 2 if getattr(block, "attentions", None) else 1
            names[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{n - 1}.{place}.conv"
    return names


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
    state = {name.removeprefix("text_model."): tensor for name, tensor in model.state_dict().items()}
    state.pop("embeddings.position_ids", None)
    if model.config.hidden_act == "quick_gelu":  # OpenAI's CLIP, Stable Diffusion 1.x
        return {f"cond_stage_model.transformer.text_model.{name}": tensor for name, tensor in state.items()}
    renamed = {f"cond_stage_model.model.{new}": state.pop(old) for old, new in OPEN_CLIP_OUTER.items()}
    for i in range(model.config.num_hidden_layers):
        old, new = f"encoder.layers.{i}", f"cond_stage_model.model.transformer.resblocks.{i}"
        for kind in ("weight", "bias"):
            projections = [state.pop(f"{old}.self_attn.{p}_proj.{kind}") for p in ("q", "k", "v")]
            renamed[f"{new}.attn.in_proj_{kind}"] = torch.cat(projections)
            renamed |= {
                f"{new}.{theirs}.{kind}": state.pop(f"{old}.{ours}.{kind}") for ours, theirs in OPEN_CLIP.items()
            }
    return renamed


def _write(pipe: Any, path: Path) -> None:
    unet = pipe.unet.state_dict()
    tensors = {f"model.diffusion_model.{new}": unet[old] for old, new in original_names(pipe.unet).items()}
    levels = len(pipe.vae.config.block_out_channels)
    vae = autoencoder(pipe.vae.state_dict(), levels=levels)
    tensors |= {f"first_stage_model.{name}": tensor for name, tensor in vae.items()}
    tensors |= text_encoder(pipe.text_encoder)
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with writing(path) as temporary:
        save_file(whole, temporary, metadata={"format": "pt", **metadata_of(records_of(pipe))})


__all__ = ["export_single_file", "original_names"]
