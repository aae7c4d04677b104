"""Write the table of architectures in docs/architectures.md: what is edited in each, counted on its published shape.

python docs/architectures.py
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AuraFlowTransformer2DModel,
    ChromaTransformer2DModel,
    CogVideoXTransformer3DModel,
    CogView4Transformer2DModel,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    LTXVideoTransformer3DModel,
    Lumina2Transformer2DModel,
    PixArtTransformer2DModel,
    QwenImageTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    WanTransformer3DModel,
    ZImageTransformer2DModel,
)

from erasure.backbone import Backbone, architectures
from erasure.methods import BUILT_IN, method_class

PAGE = Path(__file__).with_suffix(".md")
BEGIN, END = "<!-- architectures: begin -->", "<!-- architectures: end -->"


def sdxl_unet(**settings: Any) -> UNet2DConditionModel:
    """The U-Net of SDXL, which Kolors has too."""
    return UNet2DConditionModel(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(320, 640, 1280),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        **settings,
    )


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
    ("Stable Diffusion XL", "sdxl", lambda: sdxl_unet(projection_class_embeddings_input_dim=2816)),
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
    ("FLUX.2 dev", "flux2", Flux2Transformer2DModel),
    (
        "FLUX.2 klein 4B",
        "flux2-klein",
        lambda: Flux2Transformer2DModel(
            num_layers=5, num_single_layers=20, num_attention_heads=24, joint_attention_dim=7680, guidance_embeds=False
        ),
    ),
    ("Qwen-Image", "qwen-image", QwenImageTransformer2DModel),
    ("Z-Image, Z-Image-Turbo", "z-image", ZImageTransformer2DModel),
    ("Wan 2.1 14B (2.2: two of them)", "wan", WanTransformer3DModel),
    ("Chroma", "chroma", ChromaTransformer2DModel),
    ("PixArt-alpha, PixArt-Sigma", "pixart", lambda: PixArtTransformer2DModel(caption_channels=4096)),
    ("Sana 1.6B", "sana", SanaTransformer2DModel),
    ("Lumina Image 2", "lumina2", lambda: Lumina2Transformer2DModel(hidden_size=2304, cap_feat_dim=2304)),
    ("AuraFlow", "auraflow", lambda: AuraFlowTransformer2DModel(caption_projection_dim=3072)),
    ("CogView4 6B", "cogview4", CogView4Transformer2DModel),
    ("LTX-Video 2B", "ltx", LTXVideoTransformer3DModel),
    (
        "CogVideoX 5B",
        "cogvideox",
        lambda: CogVideoXTransformer3DModel(
            num_attention_heads=48, num_layers=42, use_rotary_positional_embeddings=True
        ),
    ),
    (
        "Kolors",
        "kolors",
        lambda: sdxl_unet(
            encoder_hid_dim=4096, encoder_hid_dim_type="text_proj", projection_class_embeddings_input_dim=5632
        ),
    ),
]


def table() -> str:
    """One line for each published model."""
    columns = ("model", "architecture", "text enters by", "behind", "pooled text enters by", "guidance")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for model, architecture, build in PUBLISHED:
        with torch.device("meta"):
            denoiser = build()
        backbone = architectures()[architecture]
        cells = [
            model,
            f"`{architecture}`",
            sites(backbone, denoiser, "hidden"),
            norm(backbone, denoiser),
            sites(backbone, denoiser, "pooled") if "pooled" in backbone.spaces else "no such embedding",
            guidance(backbone),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", by_method()])


def supported(method: str, architecture: str) -> bool:
    known = method_class(method).architectures
    return known is None or architecture in known


def norm(backbone: type[Backbone], denoiser: Any) -> str:
    """The norm between the text and its entry, if there is one."""
    found = object.__new__(backbone).sites_of(denoiser, "hidden")
    norms = {id(module): name for name, module in denoiser.named_modules()}
    return next((f"`{norms[id(site.norm)]}`" for site in found.values() if site.norm is not None), "nothing")


def guidance(backbone: type[Backbone]) -> str:
    """How the pipeline guides: two predictions in one batch or in two calls, or a number given to the denoiser."""
    if backbone.guidance == "embedded":
        return "embedded"
    return "two calls" if backbone.guidance_calls else "one batch"


def by_method() -> str:
    """One line for each method: the architectures it works on."""
    lines = ["| method | kind | architectures |", "|---|---|---|"]
    for name in sorted(BUILT_IN):
        where = [a for a in architectures() if supported(name, a)]
        every = "all" if len(where) == len(architectures()) else ", ".join(f"`{a}`" for a in where)
        lines.append(f"| `{name}` | {method_class(name).summary} | {every} |")
    return "\n".join(lines)


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
