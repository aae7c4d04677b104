"""The denoiser from inside: losses and predictions on real pictures, for probes that look at weights."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from erasure.backbone import backbone_of
from erasure.backbone.text import Text
from erasure.backbone.unet import UNetBackbone
from erasure.eval.probes.base import Missing


@dataclasses.dataclass(frozen=True)
class Denoiser:
    """A pipeline with a UNet, as a function of latents, time and text.

    Args:
        pipe: an opened pipeline; what wraps it is not seen.

    Raises:
        Missing: the architecture has no UNet.
    """

    pipe: Any

    def __post_init__(self) -> None:
        if not isinstance(backbone_of(self.pipe), UNetBackbone):
            raise Missing(f"{type(self.pipe).__name__} has no UNet; this probe is for Stable Diffusion 1.x, 2.x and XL")

    @functools.cached_property
    def backbone(self) -> UNetBackbone:
        found = backbone_of(self.pipe)
        assert isinstance(found, UNetBackbone)  # checked when it was made
        return found

    @property
    def alphas(self) -> Tensor:
        """Cumulative products of the noise schedule, ``(T,)`` float32."""
        return self.pipe.scheduler.alphas_cumprod.to(self.backbone.device).float()

    @torch.no_grad()
    def latents(self, images: Sequence[Image.Image], *, batch_size: int = 32) -> Tensor:
        """Scaled latents ``(n, c, h, w)`` float32: means of the autoencoder's posterior, at the model's own size."""
        vae, side = self.pipe.vae, self.backbone.latent_shape[1] * self.pipe.vae_scale_factor
        parts = []
        for i in range(0, len(images), batch_size):
            batch = [image.convert("RGB") for image in images[i : i + batch_size]]
            batch = [
                im if im.size == (side, side) else im.resize((side, side), Image.Resampling.LANCZOS) for im in batch
            ]
            x = torch.from_numpy(np.stack([np.asarray(im) for im in batch])).permute(0, 3, 1, 2).float() / 127.5 - 1
            posterior = vae.encode(x.to(vae.device, vae.dtype)).latent_dist
            shift = getattr(vae.config, "shift_factor", None) or 0.0
            parts.append(((posterior.mean - shift) * vae.config.scaling_factor).float())
        return torch.cat(parts)

    @torch.no_grad()
    def pictures(self, latents: Tensor, *, batch_size: int = 32) -> list[Image.Image]:
        """Pictures of scaled latents ``(n, c, h, w)``."""
        vae, out = self.pipe.vae, []
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        for part in latents.split(batch_size):
            decoded = vae.decode((part / vae.config.scaling_factor + shift).to(vae.dtype)).sample
            out += self.pipe.image_processor.postprocess(decoded.detach().float().cpu(), output_type="pil")
        return out

    def text(self, prompts: Sequence[str]) -> Text:
        """Conditioning of prompts, one row each, without gradients."""
        return self.backbone.encode(prompts).text

    def noised(self, x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """``sqrt(a_t) x + sqrt(1 - a_t) noise`` for clean latents ``x (n, c, h, w)`` and timesteps ``t (n,)``."""
        a = self.alphas[t].reshape(-1, 1, 1, 1)
        return a.sqrt() * x + (1 - a).sqrt() * noise

    def wanted(self, x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """What a perfect denoiser predicts, in the model's own parameterisation."""
        if self.backbone.prediction_type == "v_prediction":
            a = self.alphas[t].reshape(-1, 1, 1, 1)
            return a.sqrt() * noise - (1 - a).sqrt() * x
        return noise

    def predict(self, x: Tensor, t: Tensor, text: Text) -> Tensor:
        """The model's output for noised latents, float32; differentiable."""
        return self.backbone.predict(x.to(self.backbone.dtype), t, text.to(self.backbone.dtype)).float()

    def noise_of(self, predicted: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The noise that a prediction at noised latents ``x`` stands for, whatever the parameterisation."""
        if self.backbone.prediction_type == "v_prediction":
            a = self.alphas[t].reshape(-1, 1, 1, 1)
            return a.sqrt() * predicted + (1 - a).sqrt() * x
        return predicted

    def losses(self, x: Tensor, t: Tensor, noise: Tensor, text: Text) -> Tensor:
        """Squared error of the prediction for each row, ``(n,)``; differentiable in the model and in ``text``."""
        predicted = self.predict(self.noised(x, t, noise), t, text)
        return (predicted - self.wanted(x, t, noise)).square().mean(dim=(1, 2, 3))


def noise_like(x: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal noise from a CPU generator, where ``x`` is."""
    return torch.randn(x.shape, generator=generator).to(x.device)
