"""Published distances between two sets of pictures: FID and CMMD.

The Fréchet distance is called FID only on the last features of Inception (2048); on others the name says which. It
depends on the number of pictures, so sets of different size are refused.

References: Heusel et al. 2017 (FID); Jayasumana et al. 2024, arXiv 2401.09603 (CMMD).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from erasure.eval.core.metrics import INCEPTION, MIN_IMAGES, InceptionFeatures, features_of, frechet_distance
from erasure.eval.detectors.clip import ClipDetector
from erasure.eval.stats import Estimate

CMMD_SIGMA = 10.0  # of the paper, on unit vectors of CLIP ViT-L/14 at 336 pixels


def frechet(
    real: Sequence[Image.Image],
    fake: Sequence[Image.Image],
    extractor: torch.nn.Module | None = None,
    name: str = INCEPTION,
    *,
    weights: str | Path | None = None,
) -> tuple[str, Estimate]:
    """The Fréchet distance of two sets of pictures.

    Args:
        real, fake: as many pictures in each. With n pictures and d features it is biased upwards by an amount that
            depends on n and on the model; below n of about 10 d only comparisons with the null mean anything.
        extractor: as in :func:`features_of`. None = :class:`InceptionFeatures`, for pictures of any size.
        name: of the features.
        weights: of Inception.

    Returns:
        The metric's name, and its value. It has no interval: read it against the null.
    """
    title = "FID" if extractor is None and name == INCEPTION else f"frechet[{name}]"
    if problem := _problem(real, fake):
        return title, Estimate.missing(problem)
    extractor = extractor or InceptionFeatures(weights)
    value = frechet_distance(*(features_of(images, extractor) for images in (real, fake)))
    return title, _estimate(value, len(real), "no interval: compare with the null")


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
    return title, _estimate(value, len(real), "biased MMD, no interval: compare with the null")


def _kernel_mean(x: torch.Tensor, y: torch.Tensor, block: int = 1024) -> float:
    """Mean of the Gaussian kernel over all pairs of rows."""
    sums = [torch.exp(-torch.cdist(part, y).square() / (2 * CMMD_SIGMA**2)).sum() for part in x.split(block)]
    return float(torch.stack(sums).sum()) / (len(x) * len(y))


def _problem(real: Sequence[Image.Image], fake: Sequence[Image.Image]) -> str | None:
    if len(real) != len(fake):
        return f"sets of different size cannot be compared ({len(real)} and {len(fake)} pictures)"
    if len(real) < MIN_IMAGES:
        return f"too few pictures ({len(real)}; at least {MIN_IMAGES})"
    return None


def _estimate(value: float, n: int, method: str) -> Estimate:
    if not np.isfinite(value):
        return Estimate.missing("the distance is not finite; too few pictures for these features")
    return Estimate(value, None, None, method, n, n)
