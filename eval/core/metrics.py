"""Pictures as features, and the Fréchet distance of two sets of features.

For Inception, pictures are resized as in clean-fid: the choice of resize changes FID by more than most edits do.

References: Heusel et al. 2017 (FID); Parmar et al. 2022, arXiv 2104.11222 (clean-fid).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

if TYPE_CHECKING:
    from erasure.eval.detectors.clip import ClipDetector

MIN_IMAGES = 16
INCEPTION = "inception"
INCEPTION_SIDE = 299


class ClipFeatures(torch.nn.Module):
    """The image tower of a :class:`ClipDetector` as a feature extractor: uint8 (n, 3, h, w) -> (n, d).

    Its unit vectors are multiplied by √d, so that features have a mean square of 1, for which the kernel of the kernel
    distance is made: ``(cos + 1)^3``.
    """

    def __init__(self, clip: ClipDetector) -> None:
        super().__init__()
        self.clip, self.name = clip, clip.name

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        unit = self.clip.image_features([Image.fromarray(p.permute(1, 2, 0).cpu().numpy()) for p in pixels])
        return unit * unit.shape[-1] ** 0.5


class InceptionFeatures(torch.nn.Module):
    """Inception v3 up to its last pooling: uint8 (n, 3, h, w) -> (n, 2048). Needs the extra ``fid``.

    Args:
        weights: file of its weights (torch-fidelity's pt_inception-2015-12-05), where none may be downloaded.
    """

    def __init__(self, weights: str | Path | None = None) -> None:
        from torchmetrics.image.fid import NoTrainInceptionV3

        super().__init__()
        self.name, file = INCEPTION, None if weights is None else str(weights)
        try:  # it would resize, but finds nothing left to do
            self.network = NoTrainInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=file)
        except ModuleNotFoundError:
            raise ImportError(
                "Inception features need torch-fidelity; install the extra: pip install 'diffusion-erasure[fid]'"
            ) from None

    def prepare(self, image: Image.Image) -> Image.Image:
        """A picture of any size as the network is to see it."""
        return clean_resize(image)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.network(pixels)


def features_of(images: Sequence[Image.Image], extractor: Any, *, batch: int = 64) -> np.ndarray:
    """Features ``(n, d)`` in float64.

    Args:
        extractor: module from uint8 pictures (n, 3, h, w) to features (n, d). Pictures are of one size, or it has
            ``prepare``, which makes them so.
    """
    prepare = getattr(extractor, "prepare", lambda image: image)
    with torch.no_grad():
        parts = [
            extractor(_pixels([prepare(image) for image in images[start : start + batch]])).cpu().double().numpy()
            for start in range(0, len(images), batch)
        ]
    return np.concatenate(parts)


def frechet_distance(x: np.ndarray, y: np.ndarray, p: np.ndarray | None = None) -> float:
    """``|m1 - m2|² + tr(C1 + C2 - 2 (C1 C2)^(1/2))`` of features ``x`` and ``y (n, d)``, rows weighted by ``p``.

    With ``C = Aᵀ A`` the last trace is the nuclear norm of ``A1 A2ᵀ``, which is small where there are few pictures.
    """
    n = len(x)
    p = np.full(n, 1 / n) if p is None else p
    a, b = _centred(x, p), _centred(y, p)
    means = float(((p @ x - p @ y) ** 2).sum())
    return means + float((a**2).sum() + (b**2).sum()) - 2 * float(np.linalg.norm(a @ b.T, "nuc"))


def _centred(x: np.ndarray, p: np.ndarray) -> np.ndarray:
    """``A`` with ``Aᵀ A`` the covariance of weighted features; at most as many rows as features."""
    kept = p > 0
    a = np.sqrt(p[kept, None] * len(x) / (len(x) - 1)) * (x[kept] - p @ x)
    return np.asarray(np.linalg.qr(a, mode="r")) if len(a) > a.shape[1] else a


def clean_resize(image: Image.Image, side: int = INCEPTION_SIDE) -> Image.Image:
    """A picture resized as in clean-fid (Parmar et al. 2022): PIL's bicubic, which widens with the scale, per channel
    in floating point. Rounded to 8 bits once, at the end, since the network of torchmetrics takes 8 bits (clean-fid
    itself goes on with fractions)."""
    channels = np.asarray(image.convert("RGB"), dtype=np.float32)
    resized = [
        np.asarray(Image.fromarray(channels[..., i]).resize((side, side), Image.Resampling.BICUBIC)) for i in range(3)
    ]
    return Image.fromarray(np.stack(resized, axis=-1).clip(0, 255).round().astype(np.uint8))


def _pixels(images: Sequence[Image.Image]) -> torch.Tensor:
    arrays = np.stack([np.asarray(image.convert("RGB")) for image in images])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).contiguous()
