"""The only code that knows an architecture: names of layers, token spans, how a pipeline is driven.

A further architecture is a line in ``DENOISERS`` and a short file; see CONTRIBUTING.md, "Add a model".
"""

from __future__ import annotations

import importlib
import os
from typing import Any

from erasure.backbone.base import Backbone, Site, Space, Step, denoiser_of, parts_of
from erasure.backbone.checks import unwrapped

# The denoiser's class to the backbone's. By class, not by layers: many call theirs the same and mean something else.
DENOISERS: dict[str, str] = {
    "UNet2DConditionModel": "erasure.backbone.unet:UNetBackbone",
    "UNetMotionModel": "erasure.backbone.unet:UNetBackbone",
    "UNet3DConditionModel": "erasure.backbone.unet:UNetBackbone",
    "SD3Transformer2DModel": "erasure.backbone.sd3:SD3Backbone",
    "FluxTransformer2DModel": "erasure.backbone.flux:FluxBackbone",
    "Flux2Transformer2DModel": "erasure.backbone.joint:Flux2Backbone",
    "QwenImageTransformer2DModel": "erasure.backbone.joint:QwenImageBackbone",
    "ZImageTransformer2DModel": "erasure.backbone.joint:ZImageBackbone",
    "WanTransformer3DModel": "erasure.backbone.joint:WanBackbone",
    "ChromaTransformer2DModel": "erasure.backbone.joint:ChromaBackbone",
    "PixArtTransformer2DModel": "erasure.backbone.cross:PixArtBackbone",
    "SanaTransformer2DModel": "erasure.backbone.cross:SanaBackbone",
    "Lumina2Transformer2DModel": "erasure.backbone.cross:Lumina2Backbone",
    "AuraFlowTransformer2DModel": "erasure.backbone.cross:AuraFlowBackbone",
    "CogView4Transformer2DModel": "erasure.backbone.cross:CogView4Backbone",
    "LTXVideoTransformer3DModel": "erasure.backbone.cross:LTXBackbone",
    "CogVideoXTransformer3DModel": "erasure.backbone.cross:CogVideoXBackbone",
}
# Where one class of denoiser serves several architectures, the pipeline's class decides.
PIPELINES: dict[str, str] = {
    **dict.fromkeys(
        ("Flux2KleinPipeline", "Flux2KleinInpaintPipeline", "Flux2KleinKVPipeline"),
        "erasure.backbone.joint:Flux2KleinBackbone",
    ),
    **dict.fromkeys(
        ("KolorsPipeline", "KolorsImg2ImgPipeline", "KolorsPAGPipeline"), "erasure.backbone.kolors:KolorsBackbone"
    ),
}
SDXL = "erasure.backbone.unet:SDXLBackbone"
# Known, and not supported: why.
REFUSED: dict[str, str] = {
    "HunyuanDiT2DModel": "its pooled text is read by layers that are never called, so no edit of it could be checked",
    "HiDreamImageTransformer2DModel": "every block reads another layer of Llama through a projection of its own",
    "Flux3Transformer2DModel": "it has modular pipelines alone, whose calls take one prompt",
}


def backbone_class(target: str) -> type[Backbone]:
    """The class at ``module:attribute``."""
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


def architectures() -> dict[str, type[Backbone]]:
    """Every architecture by its name; imports them all."""
    classes = [backbone_class(target) for target in dict.fromkeys([*DENOISERS.values(), *PIPELINES.values(), SDXL])]
    return {backbone.architecture: backbone for backbone in classes}


def backbone_of(pipe: Any) -> Any:
    """The backbone of a pipeline, or of a backbone itself.

    Raises:
        ValueError: no supported architecture, or a state in which an edit would be lost; see :class:`Backbone`.
    """
    if isinstance(pipe, Backbone):
        return pipe
    if isinstance(pipe, str | os.PathLike):
        raise ValueError(f"a pipeline is needed, not its name {str(pipe)!r}; open it: erasure.opening.load_base(...)")
    unet, transformer = (getattr(pipe, name, None) for name in ("unet", "transformer"))
    denoiser = unwrapped(unet if unet is not None else transformer)  # the backbone refuses what is wrapped
    for kind in type(pipe).__mro__:
        if kind.__name__ in PIPELINES:
            return backbone_class(PIPELINES[kind.__name__])(pipe)
    if unet is not None and getattr(getattr(denoiser, "config", None), "addition_embed_type", None) == "text_time":
        return backbone_class(SDXL)(pipe)
    for kind in type(denoiser).__mro__:
        if kind.__name__ in DENOISERS:
            return backbone_class(DENOISERS[kind.__name__])(pipe)
        if kind.__name__ in REFUSED:
            raise ValueError(
                f"{type(pipe).__name__} is not supported: {REFUSED[kind.__name__]}; see docs/architectures.md for "
                "those that are"
            )
    if unet is not None:
        return backbone_class(DENOISERS["UNet2DConditionModel"])(pipe)
    if any(kind.__name__ in DENOISERS for kind in type(pipe).__mro__):
        raise ValueError(f"{type(pipe).__name__} is the denoiser alone; give the pipeline that holds it")
    found = "no denoiser" if denoiser is None else f"a {type(denoiser).__name__}"
    raise ValueError(
        f"{type(pipe).__name__} is not supported; it has {found}; "
        f"give a pipeline of {', '.join(backbone.pipelines for backbone in architectures().values())}"
    )


__all__ = [
    "DENOISERS",
    "Backbone",
    "Site",
    "Space",
    "Step",
    "architectures",
    "backbone_class",
    "backbone_of",
    "denoiser_of",
    "parts_of",
]
