"""ResNet-50 on ImageNet, as papers about erased objects judge by it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image


class ImageNet:
    """Says of pictures whether the likeliest of ImageNet's 1,000 classes is the one asked for.

    A thousand classes punish look-alikes: a picture of the class may be called by its neighbour's name. What the base
    reaches is the ceiling.

    Args:
        weights: of torchvision, downloaded on first use. "IMAGENET1K_V2" is its default since version 0.13, and what
            the scripts of ESD and of "When are concepts erased" ask for; "IMAGENET1K_V1" is what older papers had.
        device: where it runs.
    """

    def __init__(self, weights: str = "IMAGENET1K_V2", *, device: str | torch.device = "cpu") -> None:
        self.name, self._weights, self._device = f"resnet50[{weights}]", weights, device

    def __call__(self, images: Sequence[Image.Image], wanted: Sequence[str]) -> list[bool]:
        """One verdict per picture; classes by name, in any case.

        Raises:
            ValueError: a name that is no class of ImageNet.
        """
        network, preprocess, classes = _opened(self._weights, str(self._device))
        if unknown := sorted({name for name in wanted if name.casefold() not in classes}):
            raise ValueError(
                f"ImageNet has no classes {unknown}; write them as torchvision does ('English springer', 'chain saw')"
            )
        pixels = torch.stack([preprocess(image.convert("RGB")) for image in images]).to(self._device)
        with torch.no_grad():
            likeliest = network(pixels).argmax(dim=1).tolist()
        return [classes[i] == name.casefold() for i, name in zip(likeliest, wanted, strict=True)]


@functools.lru_cache(maxsize=1)
def _opened(weights: str, device: str) -> tuple[Any, Any, list[str]]:
    """The network, what prepares a picture for it, and the names of its classes in lower case."""
    from torchvision.models import ResNet50_Weights, resnet50

    known = ResNet50_Weights[weights]
    network = resnet50(weights=known).eval().to(device)
    return network, known.transforms(), [name.casefold() for name in known.meta["categories"]]
