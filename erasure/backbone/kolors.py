"""Kolors: SDXL's U-Net, read by ChatGLM through one projection."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from erasure.backbone.base import Site, Space
from erasure.backbone.generic import TransformerBackbone
from erasure.backbone.noise import NoiseModel, diffusion_of
from erasure.backbone.text import Text
from erasure.backbone.unet import pooled_of, pooled_site, projection_site, with_pooled


class KolorsBackbone(TransformerBackbone):
    """Kolors: ChatGLM's last but one layer enters by ``encoder_hid_proj``, its last token beside the timestep."""

    architecture = "kolors"
    pipelines = "Kolors"
    denoisers = ("unet",)
    spaces = ("hidden", "pooled")
    latent_argument = "sample"
    encoded = ("hidden", None, "pooled")
    prompt_arguments = {"prompt_embeds": "hidden", "pooled_prompt_embeds": "pooled"}
    default_length = 256

    @property
    def noise(self) -> NoiseModel:
        return diffusion_of(self.pipe.scheduler, device=self.device)

    def sites_of(self, denoiser: Any, space: Space) -> dict[str, Site]:
        return projection_site(denoiser) if space == "hidden" else pooled_site(denoiser, numbers=6)

    def with_text(self, inputs: Mapping[str, Any], text: Text) -> dict[str, Any]:
        """The pooled embedding stands beside the sizes, among ``added_cond_kwargs``."""
        return with_pooled(super().with_text(inputs, text), text)

    def text_part(self, inputs: Mapping[str, Any], part: str) -> Any:
        return pooled_of(inputs) if part == "pooled" else super().text_part(inputs, part)
