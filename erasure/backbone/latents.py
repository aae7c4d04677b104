"""Between pictures and what a denoiser reads: autoencoders, how latents are normalised, and how they are packed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from erasure.backbone.drive import Driven


class Latents(Driven):
    """The half of a backbone that encodes real pictures and decodes latents.

    A *grid* is what the autoencoder makes of a picture, normalised as the pipeline does: ``(n, c, h, w)``. The denoiser
    reads it as it is, as a video of one frame, or packed: a token for every 2 x 2 of its places.

    Class attributes:
        packs: the denoiser's latents are such tokens, ``(n, h w / 4, 4 c)``, each with the channels of its four places.
        video_autoencoder: the autoencoder takes videos; a picture is one of one frame.
        normalised_by: what in the autoencoder's config says how its latents are normalised.
    """

    pipelines: ClassVar[str]
    packs: ClassVar[bool] = False
    video_autoencoder: ClassVar[bool] = False
    normalised_by: ClassVar[str] = "scaling_factor"

    @property
    def autoencoder(self) -> Any:
        """The autoencoder, where what the denoiser reads is known to be a picture's latents.

        Raises:
            ValueError: it is not.
        """
        vae, shape = getattr(self.pipe, "vae", None), self.latent_shape
        plain = len(shape) == 3 or (len(shape) == 4 and shape[1] == 1) or (len(shape) == 2 and self.packs)
        if vae is None or not plain or not hasattr(vae.config, self.normalised_by):
            raise ValueError(
                f"how a picture becomes the latents that {self.pipelines} denoises is not known (videos of several "
                "frames, another packing, or no plain autoencoder), so real pictures are not put through its denoiser"
            )
        return vae

    @property
    def factor(self) -> int:
        """Pixels of a picture for each place of the grid, along a side."""
        return int(getattr(self.pipe, "vae_scale_factor_spatial", None) or self.pipe.vae_scale_factor)

    @property
    def rows(self) -> int:
        """Rows of tokens of packed latents: those of a square, or of the height in ``call``."""
        height = self.call.get("height")
        return round(self.latent_shape[0] ** 0.5) if height is None else height // (2 * self.factor)

    @property
    def grid_shape(self) -> tuple[int, int, int]:
        """``(c, h, w)`` of the grid."""
        shape = self.latent_shape
        if len(shape) == 2:
            return shape[1] // 4, 2 * self.rows, 2 * (shape[0] // self.rows)
        return shape[0], shape[-2], shape[-1]

    def to_grid(self, x: Tensor) -> Tensor:
        """The denoiser's latents as ``(n, c, h, w)``."""
        if x.ndim == 3:
            return unpack(x, self.rows)
        return x.squeeze(2) if x.ndim == 5 else x

    def of_grid(self, grid: Tensor) -> Tensor:
        """``(n, c, h, w)`` as the denoiser reads them."""
        if len(self.latent_shape) == 2:
            return pack(grid)
        return grid.unsqueeze(2) if len(self.latent_shape) == 4 else grid

    def normalised(self, z: Tensor) -> Tensor:
        """The grid of what the autoencoder encodes, ``(n, c, h, w)``."""
        shift, scale = self._normalisation(z)
        return (z - shift) * scale

    def encoded_from(self, grid: Tensor) -> Tensor:
        """The inverse of :meth:`normalised`."""
        shift, scale = self._normalisation(grid)
        return grid / scale + shift

    def _normalisation(self, like: Tensor) -> tuple[Any, Any]:
        """What is taken off the autoencoder's latents, and by what they are multiplied then."""
        config = self.autoencoder.config
        return getattr(config, "shift_factor", None) or 0.0, config.scaling_factor

    @torch.no_grad()
    def latents(
        self, images: Sequence[Image.Image], *, size: tuple[int, int] | None = None, batch_size: int = 32
    ) -> Tensor:
        """Clean latents ``(n, *latent_shape)`` float32: means of the posterior.

        Args:
            size: width and height in pixels that pictures are brought to; the model's own by default.
        """
        vae = self.autoencoder
        width, height = size or (self.grid_shape[2] * self.factor, self.grid_shape[1] * self.factor)
        parts = []
        for i in range(0, len(images), batch_size):
            batch = [image.convert("RGB") for image in images[i : i + batch_size]]
            batch = [
                im if im.size == (width, height) else im.resize((width, height), Image.Resampling.LANCZOS)
                for im in batch
            ]
            x = torch.from_numpy(np.stack([np.asarray(im) for im in batch])).permute(0, 3, 1, 2).float() / 127.5 - 1
            x = x.to(vae.device, vae.dtype)
            encoded = vae.encode(x.unsqueeze(2) if self.video_autoencoder else x)
            # Sana's has no spread
            mean = encoded.latent_dist.mean if hasattr(encoded, "latent_dist") else encoded.latent
            mean = mean.squeeze(2) if self.video_autoencoder else mean
            parts.append(self.of_grid(self.normalised(mean).float()))
        return torch.cat(parts)

    @torch.no_grad()
    def pictures(self, latents: Tensor, *, batch_size: int = 32) -> list[Image.Image]:
        """Pictures of clean latents ``(n, *latent_shape)``."""
        out = []
        for part in latents.split(batch_size):
            decoded = self.decode(part).detach().float().cpu()
            processor = getattr(self.pipe, "image_processor", None) or self.pipe.video_processor
            out += processor.postprocess(decoded, output_type="pil")
        return out

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels ``(n, 3, height, width)`` from -1 to 1 of clean latents; differentiable."""
        vae = self.autoencoder
        z = self.encoded_from(self.to_grid(latents)).to(vae.dtype)
        return vae.decode(z.unsqueeze(2)).sample.squeeze(2) if self.video_autoencoder else vae.decode(z).sample


def pack(grid: Tensor) -> Tensor:
    """``(n, c, h, w)`` as tokens ``(n, h w / 4, 4 c)``: row by row, each with the channels of its 2 x 2 places."""
    n, c, h, w = grid.shape
    return grid.reshape(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(n, h * w // 4, 4 * c)


def unpack(tokens: Tensor, rows: int) -> Tensor:
    """The inverse of :func:`pack`, given the rows of tokens."""
    n, count, channels = tokens.shape
    wide = tokens.reshape(n, rows, count // rows, channels // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return wide.reshape(n, channels // 4, 2 * rows, 2 * (count // rows))


__all__ = ["Latents", "pack", "unpack"]
