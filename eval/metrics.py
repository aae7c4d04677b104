"""Distances between sets of pictures.

Fréchet and kernel distances come from torchmetrics with any feature extractor. They carry the names FID and KID only
when the features are Inception's: on other features the numbers mean something else and are called
``frechet[<features>]`` and ``kid[<features>]``. Both depend on the number of pictures, so sets of different size are
refused and a *null* (the base model against itself with other seeds) belongs beside every value.

References: Heusel et al. 2017 (FID); Bińkowski et al. 2018 (KID).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from erasure.eval.stats import Estimate

if TYPE_CHECKING:
    from erasure.eval.detectors.clip import ClipDetector

MIN_IMAGES = 16
INCEPTION = "inception"


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
) -> tuple[str, Estimate]:
    """The Fréchet distance of two sets of pictures: |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)).

    Args:
        real, fake: as many pictures in each. With n pictures and d features it is biased upwards by an amount that
            depends on n and on the model; below n of about 10 d only comparisons with the null mean anything.
        extractor: module from uint8 pictures (n, 3, h, w) to features (n, d). None = Inception v3 (downloads weights,
            needs torch-fidelity).
        name: of the features.

    Returns:
        The metric's name, and its value. It has no interval: read it against the null.
    """
    title = _title("FID", "frechet", extractor, name)
    if problem := _problem(real, fake):
        return title, Estimate.missing(problem)
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=extractor or 2048)
    value = _run(metric, real, fake)
    return title, _point(value, len(real), "torchmetrics, no interval: compare with the null")


def kid(
    real: Sequence[Image.Image],
    fake: Sequence[Image.Image],
    extractor: torch.nn.Module | None = None,
    name: str = INCEPTION,
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
        metric = KernelInceptionDistance(feature=extractor or 2048, subsets=1, subset_size=len(real))
        value = _run(metric, real, fake)
    return title, _point(value, len(real), "torchmetrics, one full subset, no interval: compare with the null")


def _title(proper: str, other: str, extractor: torch.nn.Module | None, name: str) -> str:
    return proper if extractor is None and name == INCEPTION else f"{other}[{name}]"


def _problem(real: Sequence[Image.Image], fake: Sequence[Image.Image]) -> str | None:
    if len(real) != len(fake):
        return f"sets of different size cannot be compared ({len(real)} and {len(fake)} pictures)"
    if len(real) < MIN_IMAGES:
        return f"too few pictures ({len(real)}; at least {MIN_IMAGES})"
    return None


def _run(metric: Any, real: Sequence[Image.Image], fake: Sequence[Image.Image], batch: int = 64) -> float:
    with torch.no_grad(), torch.random.fork_rng(devices=[]):  # torchmetrics shuffles with the global generator
        for images, is_real in ((real, True), (fake, False)):
            for start in range(0, len(images), batch):
                metric.update(_pixels(images[start : start + batch]), real=is_real)
        value = metric.compute()
    return float(value[0] if isinstance(value, tuple) else value)


def _pixels(images: Sequence[Image.Image]) -> torch.Tensor:
    arrays = np.stack([np.asarray(image.convert("RGB")) for image in images])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).contiguous()


def _point(value: float, n: int, method: str) -> Estimate:
    if not np.isfinite(value):
        return Estimate.missing("the distance is not finite; too few pictures for these features")
    return Estimate(value, None, None, method, n, n)
