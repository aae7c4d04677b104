"""The only code that knows an architecture: names of layers, token spans, how a pipeline is driven.

A further architecture is a line in ``DENOISERS`` and a short file; see CONTRIBUTING.md, "Add a model".
"""

from __future__ import annotations

import importlib
from typing import Any

from erasure.backbone.base import Backbone, Site, Space, Step, denoiser_of, parts_of

# The denoiser's class to the backbone's. By class, not by layers: many call theirs the same and mean something else.
DENOISERS: dict[str, str] = {
    "UNet2DConditionModel": "erasure.backbone.unet:UNetBackbone",
    "UNetMotionModel": "erasure.backbone.unet:UNetBackbone",
    "UNet3DConditionModel": "erasure.backbone.unet:UNetBackbone",
    "SD3Transformer2DModel": "erasure.backbone.sd3:SD3Backbone",
    "FluxTransformer2DModel": "erasure.backbone.flux:FluxBackbone",
}
# One class of denoiser, several architectures: U-Nets by what they are conditioned on beside the text.
SDXL = "erasure.backbone.unet:SDXLBackbone"


def backbone_class(target: str) -> type[Backbone]:
    """The class at ``module:attribute``."""
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


def architectures() -> dict[str, type[Backbone]]:
    """Every architecture by its name; imports them all."""
    classes = [backbone_class(target) for target in dict.fromkeys([*DENOISERS.values(), SDXL])]
    return {backbone.architecture: backbone for backbone in classes}


def backbone_of(pipe: Any) -> Any:
    """The backbone of a pipeline, or of a backbone itself.

    Raises:
        ValueError: no supported architecture, or a state in which an edit would be lost; see :class:`Backbone`.
    """
    if isinstance(pipe, Backbone):
        return pipe
    unet, transformer = (getattr(pipe, name, None) for name in ("unet", "transformer"))
    denoiser = unet if unet is not None else transformer
    denoiser = getattr(denoiser, "_orig_mod", denoiser)  # the backbone refuses what is compiled
    if unet is not None and getattr(getattr(denoiser, "config", None), "addition_embed_type", None) == "text_time":
        return backbone_class(SDXL)(pipe)
    for kind in type(getattr(denoiser, "module", denoiser)).__mro__:
        if kind.__name__ in DENOISERS:
            return backbone_class(DENOISERS[kind.__name__])(pipe)
    if unet is not None:
        return backbone_class(DENOISERS["UNet2DConditionModel"])(pipe)
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
