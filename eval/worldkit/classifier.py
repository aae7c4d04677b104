"""Two small attribute classifiers for Emoji World: concept, style and background, one softmax each.

The concepts include ``NOTHING`` for "nothing recognisable", because an erased model often draws a smear.

:func:`classifier_a` (residual) and :func:`classifier_b` (plain) differ in width, depth, kernels and normalisation, and
are trained with different seeds and augmentations, so that one may select and the other score.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from erasure.eval.detectors.base import NOTHING
from erasure.world.spec import spec

ATTRIBUTES = ("concept", "style", "background")


def labels(attribute: str) -> tuple[str, ...]:
    """The answers to one attribute, in the order of the logits.

    Raises:
        ValueError: the attribute is not concept, style or background.
    """
    world = spec()
    answers = {
        "concept": (*world.concepts, NOTHING),
        "style": tuple(world.styles),
        "background": tuple(world.backgrounds),
    }
    if attribute not in answers:
        raise ValueError(f"unknown attribute; got {attribute!r}; the world's attributes are {sorted(answers)}")
    return answers[attribute]


class AttributeClassifier(nn.Module):
    """A convolutional body that names a concept at every place of the picture, and one style and background for all.

    The concept's distribution is a mixture over places l,  p(c) = sum_l w_l p_l(c),  with weights w_l by the network: a
    picture of two objects gets half of each.

    ``forward`` takes pictures ``(n, 3, 64, 64)`` in [-1, 1] and returns logits ``(n, labels)`` by attribute.

    Attributes:
        body: pictures to features ``(n, width, h, w)``.
        width: channels of those features.
    """

    def __init__(self, body: nn.Module, width: int) -> None:
        super().__init__()
        self.body = body
        self.concept = nn.Conv2d(width, len(labels("concept")), 1)
        self.weight = nn.Conv2d(width, 1, 1)
        self.style = nn.Linear(2 * width, len(labels("style")))
        self.background = nn.Linear(2 * width, len(labels("background")))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = x.contiguous(memory_format=torch.channels_last)  # several times faster on CPU than the default layout
        features = self.body(x).float()
        there = self.concept(features).float().flatten(2).log_softmax(dim=1)
        weight = self.weight(features).float().flatten(2).log_softmax(dim=2)
        pooled = torch.cat([features.mean(dim=(2, 3)), features.amax(dim=(2, 3))], dim=1)
        return {
            "concept": (there + weight).logsumexp(dim=2),
            "style": self.style(pooled).float(),
            "background": self.background(pooled).float(),
        }


class Residual(nn.Module):
    """Two 3x3 convolutions around a shortcut (He et al. 2016), with group normalisation.

    Group rather than batch normalisation, because the shipped weights are an average over training and running
    statistics cannot be averaged with them.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.GroupNorm(8, width)
        self.second, self.norm2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.GroupNorm(8, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.second(F.relu(self.norm(self.first(x)))))
        return F.relu(x + y)


def plain(a: int, b: int, kernel: int, stride: int) -> list[nn.Module]:
    """One convolution, layer normalisation over channels and space, and SiLU."""
    padding = (kernel - stride + 1) // 2
    return [nn.Conv2d(a, b, kernel, stride, padding, bias=False), nn.GroupNorm(1, b), nn.SiLU()]


def classifier_a() -> AttributeClassifier:
    """Residual network: 32, 64, 128 channels at 32, 16, 8 pixels; 0.5 M parameters."""

    def halve(a: int, b: int) -> list[nn.Module]:
        return [nn.Conv2d(a, b, 3, stride=2, padding=1, bias=False), nn.GroupNorm(8, b), nn.ReLU()]

    body = nn.Sequential(*halve(3, 32), Residual(32), *halve(32, 64), Residual(64), *halve(64, 128), Residual(128))
    return AttributeClassifier(body, 128)


def classifier_b() -> AttributeClassifier:
    """Plain network: 8-pixel patches every 4, then 96 channels at 16 and 144 at 8 pixels; 0.5 M parameters."""
    layers = [(3, 64, 8, 4), (64, 96, 3, 1), (96, 96, 3, 1), (96, 144, 3, 2), (144, 144, 3, 1)]
    return AttributeClassifier(nn.Sequential(*(module for layer in layers for module in plain(*layer))), 144)


def tensor(images: np.ndarray) -> Tensor:
    """uint8 ``(n, 64, 64, 3)`` to float ``(n, 3, 64, 64)`` in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def probabilities(model: nn.Module, images: np.ndarray, *, batch: int = 128) -> dict[str, np.ndarray]:
    """Softmax answers ``(n, labels)`` by attribute for uint8 pictures ``(n, 64, 64, 3)``."""
    device = next(model.parameters()).device
    parts: dict[str, list[np.ndarray]] = {name: [np.zeros((0, len(labels(name))), np.float32)] for name in ATTRIBUTES}
    for i in range(0, len(images), batch):
        logits = model(tensor(images[i : i + batch]).to(device))
        for name in ATTRIBUTES:
            parts[name].append(logits[name].softmax(dim=1).cpu().numpy())
    return {name: np.concatenate(part) for name, part in parts.items()}


def both_present(p: np.ndarray, concepts: np.ndarray) -> np.ndarray:
    """Whether the two likeliest labels are the pair, ``(n,)``; ``p`` is ``(n, labels)``, ``concepts`` ``(n, 2)``."""
    top = np.sort(np.argsort(p, axis=1)[:, -2:], axis=1)
    return (top == np.sort(concepts, axis=1)).all(axis=1)
