"""What the original codes, and the programs that follow them, call the layers that diffusers has under its own names.

Checkpoints of one file, ComfyUI, Forge and kohya's scripts have the original names. Of a U-Net every layer has one. Of
transformers most are listed here for the layers that text enters by; inside their blocks the originals hold query, key
and value in one matrix, for which ComfyUI takes diffusers' names where it has a map of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

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
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}

# Architectures whose layers have the same name in both, but for beginnings that are listed.
SAME: Mapping[str, Mapping[str, str]] = {
    "qwen-image": {},
    "ltx": {"proj_in": "patchify_proj", "time_embed": "adaln_single"},
}
# The layers that text enters by, of the others.
ENTRIES: Mapping[str, Mapping[str, str]] = {
    "sd3": {"context_embedder": "context_embedder", "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0"},
    "flux": {"context_embedder": "txt_in", "time_text_embed.text_embedder.linear_1": "vector_in.in_layer"},
    "chroma": {"context_embedder": "txt_in"},
    "flux2": {"context_embedder": "txt_in"},
    "flux2-klein": {"context_embedder": "txt_in"},
    "z-image": {"cap_embedder.1": "cap_embedder.1"},
    "lumina2": {"time_caption_embed.caption_embedder.1": "cap_embedder.1"},
    "auraflow": {"context_embedder": "cond_seq_linear"},
    "pixart": {"caption_projection.linear_1": "y_embedder.y_proj.fc1"},
}
# Wan renames, and joins nothing.
WAN = (
    (r"^condition_embedder\.text_embedder\.linear_1$", "text_embedding.0"),
    (r"^condition_embedder\.text_embedder\.linear_2$", "text_embedding.2"),
    (r"^condition_embedder\.time_embedder\.linear_1$", "time_embedding.0"),
    (r"^condition_embedder\.time_embedder\.linear_2$", "time_embedding.2"),
    (r"^condition_embedder\.time_proj$", "time_projection.1"),
    (r"\.attn1\.", ".self_attn."),
    (r"\.attn2\.", ".cross_attn."),
    (r"\.to_([qkv])$", r".\1"),
    (r"\.to_out\.0$", ".o"),
    (r"\.ffn\.net\.0\.proj$", ".ffn.0"),
    (r"\.ffn\.net\.2$", ".ffn.2"),
    (r"^proj_out$", "head.head"),
)
# ComfyUI maps diffusers' own names inside the blocks of these.
MAPPED = re.compile(r"\.(attn|attention|attn1|attn2|ff|ff_context|ff_i|ff_t)\.")
COMFYUI_MAPS = ("sd3", "flux", "auraflow", "pixart", "z-image")
# Not among ComfyUI's own models; nodes of other people may open them under names that we do not know.
WORKS = "what works: lora or peft with diffusers, single-file, pipeline"
NOT_IN_COMFYUI = {"kolors": "Kolors", "sana": "Sana", "cogview4": "CogView4", "cogvideox": "CogVideoX"}


def original_unet_names(unet: Any) -> dict[str, str]:
    """Each parameter of a diffusers U-Net to its name in the original code, without ``model.diffusion_model.``.

    Both schemes number the same tree of blocks, so the map is written out from the blocks a model has.
    """
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


def native_module(backbone: Any, module: str) -> str | None:
    """A layer of a denoiser by the original code's name; None where there is none, or none that we know."""
    architecture = backbone.architecture
    if architecture in NOT_IN_COMFYUI:
        return None
    if backbone.denoiser_name == "unet":
        return original_unet_names(backbone.denoiser).get(f"{module}.weight", "").removesuffix(".weight") or None
    if architecture in SAME:
        renamed = SAME[architecture]
        begin = next((old for old in renamed if module == old or module.startswith(f"{old}.")), None)
        return module if begin is None else renamed[begin] + module.removeprefix(begin)
    if architecture == "wan":
        for pattern, new in WAN:
            module = re.sub(pattern, new, module)
        return module
    return ENTRIES.get(architecture, {}).get(module)


def comfyui_stem(backbone: Any, module: str) -> str:
    """What stands before ``.lora_A.weight`` in a LoRA for ComfyUI.

    ``diffusion_model.`` and the original name is what every model there takes; ``transformer.`` and diffusers' name
    only those that have a map of them.

    Raises:
        ValueError: there is no name that ComfyUI would find.
    """
    native = native_module(backbone, module)
    if native is not None:
        return f"diffusion_model.{native}"
    if backbone.architecture in COMFYUI_MAPS and MAPPED.search(module):
        return f"transformer.{module}"
    raise ValueError(_unknown(backbone, module))


def kohya_stem(backbone: Any, module: str) -> str:
    """What stands before ``.lora_up.weight`` in kohya's LoRAs: of U-Nets diffusers' names with underscores but for
    the few that the original SDXL code names, of transformers the original names with underscores.

    Raises:
        ValueError: the original has no layer of this name.
    """
    if backbone.denoiser_name == "unet":
        if backbone.architecture in NOT_IN_COMFYUI and module == "encoder_hid_proj":
            raise ValueError(_unknown(backbone, module))
        known = OUTER.get(module) if module.startswith("add_embedding.") else None
        return "lora_unet_" + (known or module).replace(".", "_")
    native = native_module(backbone, module)
    if native is None:
        raise ValueError(_unknown(backbone, module))
    return "lora_unet_" + native.replace(".", "_")


def _unknown(backbone: Any, module: str) -> str:
    if name := NOT_IN_COMFYUI.get(backbone.architecture):
        return f"{name} is none of ComfyUI's own models, and has no names of its own there; {WORKS}"
    told = f"the original code has no layer of its own for {module} of {backbone.architecture}"
    return f"{told}, or none that we know; {WORKS}"


__all__ = ["comfyui_stem", "kohya_stem", "native_module", "original_unet_names"]
