"""The only code that knows an architecture: names of layers, token spans, how to sample."""

from __future__ import annotations

from typing import Any

from erasure.backbone.base import Backbone, Site, Space, denoiser_of
from erasure.backbone.transformer import FluxBackbone, SD3Backbone
from erasure.backbone.unet import SDXLBackbone, UNetBackbone

ARCHITECTURES: dict[str, type[Backbone]] = {
    backbone.architecture: backbone for backbone in (UNetBackbone, SDXLBackbone, SD3Backbone, FluxBackbone)
}
TRANSFORMERS = {"SD3Transformer2DModel": SD3Backbone, "FluxTransformer2DModel": FluxBackbone}


def backbone_of(pipe: Any) -> Any:
    """The backbone of a pipeline, or of a backbone itself.

    Raises:
        ValueError: no supported architecture, or a state in which an edit would be lost; see :class:`Backbone`.
    """
    if isinstance(pipe, Backbone):
        return pipe
    if getattr(pipe, "unet", None) is not None:
        return (SDXLBackbone if getattr(pipe, "text_encoder_2", None) is not None else UNetBackbone)(pipe)
    # By the name of the class, not by its layers: many transformers call theirs the same and mean something else.
    transformer = denoiser_of(pipe) if getattr(pipe, "transformer", None) is not None else None
    for kind in type(transformer).__mro__:
        if kind.__name__ in TRANSFORMERS:
            return TRANSFORMERS[kind.__name__](pipe)
    denoiser = "no denoiser" if transformer is None else f"a {type(transformer).__name__}"
    raise ValueError(
        f"{type(pipe).__name__} is not supported; it has {denoiser}; "
        f"give a pipeline of {', '.join(backbone.pipelines for backbone in ARCHITECTURES.values())}"
    )


__all__ = [
    "ARCHITECTURES",
    "Backbone",
    "FluxBackbone",
    "SD3Backbone",
    "SDXLBackbone",
    "Site",
    "Space",
    "UNetBackbone",
    "backbone_of",
    "denoiser_of",
]
