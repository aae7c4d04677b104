"""The only code that knows an architecture: names of layers, token spans, how to sample."""

from __future__ import annotations

from typing import Any

from erasure.backbone.unet import UNetBackbone

Backbone = UNetBackbone  # SDXL, SD3 and FLUX join here


def backbone_of(pipe: Any) -> Backbone:
    """The backbone of a pipeline, or of a backbone itself."""
    return pipe if isinstance(pipe, UNetBackbone) else UNetBackbone(pipe)


__all__ = ["Backbone", "UNetBackbone", "backbone_of"]
