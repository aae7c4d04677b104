"""Write the table of architectures in docs/architectures.md: what is edited in each, counted on its published shape.

python docs/architectures.py
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel

from erasure.backbone import Backbone, architectures
from erasure.methods import BUILT_IN, method_class

PAGE = Path(__file__).with_suffix(".md")
BEGIN, END = "<!-- architectures: begin -->", "<!-- architectures: end -->"

# Shapes as their authors published them. Weights are never made: the layers stand on the meta device.
PUBLISHED: list[tuple[str, str, Callable[[], Any]]] = [
    ("Stable Diffusion 1.x", "sd-unet", lambda: UNet2DConditionModel(cross_attention_dim=768)),
    (
        "Stable Diffusion 2.x",
        "sd-unet",
        lambda: UNet2DConditionModel(
            cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True
        ),
    ),
    (
        "Stable Diffusion XL",
        "sdxl",
        lambda: UNet2DConditionModel(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(320, 640, 1280),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        ),
    ),
    (
        "Stable Diffusion 3 medium",
        "sd3",
        lambda: SD3Transformer2DModel(num_layers=24, num_attention_heads=24, caption_projection_dim=1536),
    ),
    (
        "Stable Diffusion 3.5 large",
        "sd3",
        lambda: SD3Transformer2DModel(num_layers=38, num_attention_heads=38, caption_projection_dim=2432),
    ),
    ("FLUX.1 dev, schnell", "flux", FluxTransformer2DModel),
]


def table() -> str:
    """One line for each published model."""
    columns = ("model", "architecture", "text enters by", "pooled text enters by", "methods")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for model, architecture, build in PUBLISHED:
        with torch.device("meta"):
            denoiser = build()
        backbone = architectures()[architecture]
        cells = [
            model,
            f"`{architecture}`",
            sites(backbone, denoiser, "hidden"),
            sites(backbone, denoiser, "pooled") if "pooled" in backbone.spaces else "no such embedding",
            ", ".join(name for name in sorted(BUILT_IN) if supported(name, architecture)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def supported(method: str, architecture: str) -> bool:
    known = method_class(method).architectures
    guided = architectures()[architecture].guidance == "cfg" or method != "sld"
    return guided and (known is None or architecture in known)


def sites(backbone: type[Backbone], denoiser: Any, space: Any) -> str:
    """How many layers, which, how wide the embeddings are, and how many weights read them."""
    bare = object.__new__(backbone)  # no pipeline around the denoiser
    found = bare.sites_of(denoiser, space)
    names = sorted({name.split("attn2.")[-1] for name in found})
    millions = sum(site.weight.numel() for site in found.values()) / 1e6
    (width,) = {site.weight.shape[1] for site in found.values()}
    layers = " and ".join(f"`{name}`" for name in names)
    if any(site.columns for site in found.values()):
        layers += f", its first {width} columns"
    return f"{len(found)} x {layers}; width {width}; {millions:.1f} M weights"


def main() -> None:
    block = f"{BEGIN}\n{table()}\n{END}"
    PAGE.write_text(re.sub(f"{BEGIN}.*?{END}", lambda _: block, PAGE.read_text("utf-8"), flags=re.DOTALL), "utf-8")


if __name__ == "__main__":
    main()
