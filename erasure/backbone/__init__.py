"""The only code that knows an architecture: names of layers, token spans, how to sample."""

from __future__ import annotations

from typing import Any

from erasure.backbone.base import Backbone, Site, Space, denoiser_of
from erasure.backbone.unet import UNetBackbone


def backbone_of(pipe: Any) -> Any:
    """The backbone of a pipeline, or of a backbone itself."""
    return pipe if isinstance(pipe, Backbone) else UNetBackbone(pipe)


__all__ = ["Backbone", "Site", "Space", "UNetBackbone", "backbone_of", "denoiser_of"]
