"""Emoji World's CLIP in the form of transformers, for programs that open no other."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizerFast

SOURCE = Path(__file__).resolve().parents[1] / "eval" / "worldkit" / "weights" / "clip"
LAYER = {
    "ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}  # fmt: skip
OUTER = {
    "logit_scale": "logit_scale",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}


def save(folder: Path) -> CLIPModel:
    """Write model and processor into a folder that ``CLIPModel.from_pretrained`` opens."""
    cfg = json.loads((SOURCE / "open_clip_config.json").read_text())["model_cfg"]
    see, read = cfg["vision_cfg"], cfg["text_cfg"]
    tokenizer = CLIPTokenizerFast.from_pretrained(SOURCE, local_files_only=True)
    common = {"hidden_act": "gelu", "projection_dim": cfg["embed_dim"]}
    config = CLIPConfig(
        projection_dim=cfg["embed_dim"],
        text_config={
            **common, "vocab_size": read["vocab_size"], "hidden_size": read["width"],
            "intermediate_size": 4 * read["width"],
            "num_hidden_layers": read["layers"], "num_attention_heads": read["heads"],
            "max_position_embeddings": read["context_length"], "eos_token_id": tokenizer.eos_token_id,
            "bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            **common, "hidden_size": see["width"], "intermediate_size": int(see["mlp_ratio"] * see["width"]),
            "num_hidden_layers": see["layers"], "num_attention_heads": see["width"] // see["head_width"],
            "image_size": see["image_size"], "patch_size": see["patch_size"],
        },
    )  # fmt: skip
    model = CLIPModel(config).eval()
    known = renamed(load_file(SOURCE / "open_clip_model.safetensors"))
    lacking = model.load_state_dict(known, strict=False)
    assert not lacking.unexpected_keys and all(name.endswith("position_ids") for name in lacking.missing_keys)
    half = [0.5] * 3
    side = {"shortest_edge": see["image_size"]}
    images = CLIPImageProcessor(size=side, crop_size=see["image_size"], image_mean=half, image_std=half)
    model.save_pretrained(folder)
    CLIPProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(folder)
    return model


def renamed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for name, value in tensors.items():
        tensor, part = value.float(), "vision_model" if name.startswith("visual.") else "text_model"
        if name in OUTER:
            found[OUTER[name]] = tensor
        elif name in ("text_projection", "visual.proj"):
            found["text_projection.weight" if part == "text_model" else "visual_projection.weight"] = tensor.T
        else:
            _, _, rest = name.partition("resblocks.")
            i, _, layer = rest.partition(".")
            stem = f"{part}.encoder.layers.{i}."
            if layer.startswith("attn.in_proj_"):
                for letter, third in zip("qkv", tensor.chunk(3), strict=True):
                    found[f"{stem}self_attn.{letter}_proj.{layer.removeprefix('attn.in_proj_')}"] = third
            else:
                module, _, kind = layer.rpartition(".")
                found[f"{stem}{LAYER[module]}.{kind}"] = tensor
    return {name: tensor.contiguous() for name, tensor in found.items()}
