"""Distances between sets of pictures.

Fréchet and kernel distances come from torchmetrics with any feature extractor. They carry the names FID and KID only
when the features are the last ones of Inception (2048): on other features the numbers mean something else and are
called ``frechet[<features>]`` and ``kid[<features>]``. Both depend on the number of pictures, so sets of different size
are refused and a *null* (the base model against itself with other seeds) belongs beside every value.

For Inception, pictures are resized as in clean-fid: which resize is used moves FID by more than most edits do.

References: Heusel et al. 2017 (FID); Bińkowski et al. 2018 (KID); Parmar et al. 2022, arXiv 2104.11222 (clean-fid);
Jayasumana et al. 2024, arXiv 2401.09603 (CMMD).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from erasure.eval.stats import Estimate

if TYPE_CHECKING:
    from erasure.eval.detectors.clip import ClipDetector

MIN_IMAGES = 16
INCEPTION = "inception"
INCEPTION_SIDE = 299
CMMD_SIGMA = 10.0  # of the paper, on unit vectors of CLIP ViT-L/14 at 336 pixels


class ClipFeatures(torch.nn.Module):
    """The image tower of a :class:`ClipDetector` as a feature extractor: uint8 (n, 3, h, w) -> (n, d)."""

    def __init__(self, clip: ClipDetector) -> None:
        super().__init__()
        self.clip, self.name = clip, clip.name
        self.num_features = int(clip.image_features([Image.new("RGB", (64, 64))]).shape[-1])

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.clip.image_features([Image.fromarray(p.permute(1, 2, 0).cpu().numpy()) for p in pixels])


def frechet(
    real: Sequence[Image.Image],
    fake: Sequence[Image.Image],
    extractor: torch.nn.Module | None = None,
    name: str = INCEPTION,
    *,
    weights: str | Path | None = None,
) -> tuple[str, Estimate]:
    """The Fréchet distance of two sets of pictures: |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)).

    Args:
        real, fake: as many pictures in each. With n pictures and d features it is biased upwards by an amount that
            depends on n and on the model; below n of about 10 d only comparisons with the null mean anything.
        extractor: module from uint8 pictures (n, 3, h, w) to features (n, d), all pictures of one size. None =
            Inception v3 (needs torch-fidelity) after :func:`clean_resize`; pictures may then be of any size.
        name: of the features.
        weights: file of Inception's weights (torch-fidelity's pt_inception-2015-12-05), where none may be downloaded.

    Returns:
        The metric's name, and its value. It has no interval: read it against the null.
    """
    title = _title("FID", "frechet", extractor, name)
    if problem := _problem(real, fake):
        return title, Estimate.missing(problem)
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=extractor or _inception(weights))
    value = _run(metric, real, fake, clean=extractor is None)
    return title, _point(value, len(real), "torchmetrics, no interval: compare with the null")


def kid(
    real: Sequence[Image.Image],
    fake: Sequence[Image.Image],
    extractor: torch.nn.Module | None = None,
    name: str = INCEPTION,
    *,
    weights: str | Path | None = None,
) -> tuple[str, Estimate]:
    """The kernel distance: unbiased MMD^2 with the cubic polynomial kernel, over all pictures at once. May be below 0.

    Arguments and answer as for :func:`frechet`.
    """
    title = _title("KID", "kid", extractor, name)
    if problem := _problem(real, fake):
        return title, Estimate.missing(problem)
    from torchmetrics.image.kid import KernelInceptionDistance

    with warnings.catch_warnings():  # it warns that features are kept in memory, which is the point
        warnings.simplefilter("ignore", UserWarning)
        metric = KernelInceptionDistance(feature=extractor or _inception(weights), subsets=1, subset_size=len(real))
        value = _run(metric, real, fake, clean=extractor is None)
    return title, _point(value, len(real), "torchmetrics, one full subset, no interval: compare with the null")


def cmmd(real: Sequence[Image.Image], fake: Sequence[Image.Image], clip: ClipDetector) -> tuple[str, Estimate]:
    """CMMD: 1000 MMD^2 of the unit image vectors of a CLIP, k(x, y) = exp(-|x - y|^2 / (2 sigma^2)), sigma = 10.

    The biased (V-) statistic of the paper: means over all pairs, a picture with itself included. The published numbers
    are of ViT-L/14 at 336 pixels; the name carries the CLIP.
    """
    title = f"cmmd[{clip.name}]"
    if problem := _problem(real, fake):
        return title, Estimate.missing(problem)
    x, y = (clip.image_features(images).cpu().double() for images in (real, fake))
    value = 1000 * (_kernel_mean(x, x) + _kernel_mean(y, y) - 2 * _kernel_mean(x, y))
    return title, _point(value, len(real), "biased MMD, no interval: compare with the null")


def _kernel_mean(x: torch.Tensor, y: torch.Tensor, block: int = 1024) -> float:
    """Mean of the Gaussian kernel over all pairs of rows."""
    sums = [torch.exp(-torch.cdist(part, y).square() / (2 * CMMD_SIGMA**2)).sum() for part in x.split(block)]
    return float(torch.stack(sums).sum()) / (len(x) * len(y))


def clean_resize(image: Image.Image, side: int = INCEPTION_SIDE) -> Image.Image:
    """A picture resized as in clean-fid (Parmar et al. 2022): PIL's bicubic, which widens with the scale, per channel
    in floating point. Rounded to 8 bits once, at the end, since the network of torchmetrics takes 8 bits (clean-fid
    itself goes on with fractions)."""
    channels = np.asarray(image.convert("RGB"), dtype=np.float32)
    resized = [
        np.asarray(Image.fromarray(channels[..., i]).resize((side, side), Image.Resampling.BICUBIC)) for i in range(3)
    ]
    return Image.fromarray(np.stack(resized, axis=-1).clip(0, 255).round().astype(np.uint8))


def _inception(weights: str | Path | None) -> torch.nn.Module:
    """Inception v3 up to its last pooling, (n, 2048); it would resize, but finds nothing left to do."""
    from torchmetrics.image.fid import NoTrainInceptionV3

    file = None if weights is None else str(weights)
    network = NoTrainInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=file)
    network.num_features = 2048
    return network


def _title(proper: str, other: str, extractor: torch.nn.Module | None, name: str) -> str:
    return proper if extractor is None and name == INCEPTION else f"{other}[{name}]"


def _problem(real: Sequence[Image.Image], fake: Sequence[Image.Image]) -> str | None:
    if len(real) != len(fake):
        return f"sets of different size cannot be compared ({len(real)} and {len(fake)} pictures)"
    if len(real) < MIN_IMAGES:
        return f"too few pictures ({len(real)}; at least {MIN_IMAGES})"
    return None


def _run(
    metric: Any, real: Sequence[Image.Image], fake: Sequence[Image.Image], *, clean: bool = False, batch: int = 64
) -> float:
    with torch.no_grad(), torch.random.fork_rng(devices=[]):  # torchmetrics shuffles with the global generator
        for images, is_real in ((real, True), (fake, False)):
            for start in range(0, len(images), batch):
                part = images[start : start + batch]
                metric.update(_pixels([clean_resize(image) for image in part] if clean else part), real=is_real)
        value = metric.compute()
    return float(value[0] if isinstance(value, tuple) else value)


def _pixels(images: Sequence[Image.Image]) -> torch.Tensor:
    arrays = np.stack([np.asarray(image.convert("RGB")) for image in images])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).contiguous()


def _point(value: float, n: int, method: str) -> Estimate:
    if not np.isfinite(value):
        return Estimate.missing("the distance is not finite; too few pictures for these features")
    return Estimate(value, None, None, method, n, n)
