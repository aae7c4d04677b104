"""The detectors of Emoji World, ready to use.

>>> first, second = detectors()  # doctest: +SKIP
>>> first.scores([picture], "concept").argmax()  # doctest: +SKIP
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from erasure.eval.detectors.base import NOTHING, Detector, DetectorCard
from erasure.eval.worldkit.classifier import (
    AttributeClassifier,
    classifier_a,
    classifier_b,
    labels,
    probabilities,
    tensor,
)
from erasure.io import sha256_file
from erasure.world.scenes import prompt
from erasure.world.spec import spec

if TYPE_CHECKING:
    from erasure.eval.detectors.clip import ClipDetector

WEIGHTS = Path(__file__).parent / "weights"
BUILDERS = {"a": classifier_a, "b": classifier_b}
EMPTY = ("nothing", "an empty background", "a picture of nothing")  # what the clip model calls a picture of nothing


class ClassifierDetector:
    """An :class:`AttributeClassifier` as a detector.

    Args:
        model: the network, in eval mode.
        card: what was measured about it.
        batch_size: pictures per forward pass.
    """

    def __init__(self, model: AttributeClassifier, card: DetectorCard, *, batch_size: int = 128) -> None:
        self.model, self.card, self.name = model.eval(), card, card.name
        self.batch_size = batch_size

    def labels(self, attribute: str) -> tuple[str, ...]:
        """The labels of an attribute; the last of "concept" is "nothing". Empty for an attribute it does not know."""
        return tuple(self.card.labels.get(attribute, ()))

    def scores(self, images: Sequence[Image.Image], attribute: str) -> np.ndarray:
        """Probabilities ``(images, labels)``. Two objects in a picture share the probability of "concept"."""
        known = labels(attribute)
        if not images:
            return np.zeros((0, len(known)), dtype=np.float32)
        return probabilities(self.model, fitted(images), batch=self.batch_size)[attribute]

    @torch.no_grad()
    def features(self, images: Sequence[Image.Image]) -> tuple[str, np.ndarray]:
        body = torch.cat([self.model.body(x).float() for x in tensor(fitted(images)).split(self.batch_size)])
        return "penultimate layer", torch.cat([body.mean(dim=(2, 3)), body.amax(dim=(2, 3))], dim=1).numpy()

    def log_probabilities(self, pixels: Tensor, attribute: str) -> Tensor:
        side = spec().size
        if pixels.shape[-2:] != (side, side):
            pixels = F.interpolate(pixels, (side, side), mode="bicubic", antialias=True)
        return self.model(pixels)[attribute].log_softmax(dim=1)


def fitted(images: Sequence[Image.Image]) -> np.ndarray:
    """Pictures at the size of the world, uint8 ``(n, 64, 64, 3)``."""
    size = (spec().size, spec().size)
    rgb = [image.convert("RGB") for image in images]
    return np.stack([np.asarray(x if x.size == size else x.resize(size, Image.Resampling.BICUBIC)) for x in rgb])


def load(name: str) -> Detector:
    """One of the shipped detectors: "a" (residual), "b" (plain) or "clip" (zero-shot open_clip model).

    All are trained independently of the generator and of each other. Select with one and score with another.

    Raises:
        ValueError: an unknown name, or weights that are not those the card describes.
        FileNotFoundError: the weights are not there.
    """
    if name not in (*BUILDERS, "clip"):
        raise ValueError(f"no such detector of the world; got {name!r}; choose one of {[*BUILDERS, 'clip']}")
    return clip() if name == "clip" else classifier(name)


@functools.cache
def classifier(name: str) -> ClassifierDetector:
    """One of the shipped classifiers, "a" or "b". Raises as :func:`load`."""
    path = WEIGHTS / f"{name}.safetensors"
    card = checked_card(name, path)
    model = BUILDERS[name]()
    model.load_state_dict({key: value.float() for key, value in load_file(path).items()})
    return ClassifierDetector(model.requires_grad_(False), card)


@functools.cache
def clip() -> ClipDetector:
    """The world's open_clip model as a zero-shot detector. Raises as :func:`load`."""
    path = WEIGHTS / "clip" / "open_clip_model.safetensors"
    return clip_detector(path.parent, checked_card("clip", path))


def clip_detector(folder: Path, card: DetectorCard) -> ClipDetector:
    """An open_clip model that was trained on the world."""
    from erasure.eval.detectors.clip import ClipDetector  # open_clip takes seconds to import

    return ClipDetector.load(folder, name=card.name, labels=world_phrases(), templates=("{}",), card=card)


def world_phrases() -> dict[str, dict[str, tuple[str, ...]]]:
    """The phrases of the world's labels, for zero-shot detection: attribute -> label -> phrases."""
    world = spec()
    words = {name: emoji.phrases() for name, emoji in world.concepts.items()}
    return {
        "concept": {**{name: (*kinds["name"], *kinds["synonym"]) for name, kinds in words.items()}, NOTHING: EMPTY},
        # averaged over every concept, so that the text features are of the style or the colour
        "style": {style: tuple(prompt(name, style=style) for name in words) for style in world.styles},
        "background": {hue: tuple(prompt(name, background=hue) for name in words) for hue in world.backgrounds},
    }


def checked_card(name: str, path: Path) -> DetectorCard:
    """The card beside the weights.

    Raises:
        FileNotFoundError: there are no weights.
        ValueError: the card is about other weights.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no weights; reinstall, or `python -m erasure.eval.worldkit.train {name}`")
    card = DetectorCard.from_json(WEIGHTS / f"{name}.json")
    if (found := sha256_file(path)) != card.weights_sha256:
        raise ValueError(
            f"{path}: not the weights its card is about; got {found[:12]}, expected {str(card.weights_sha256)[:12]}; "
            f"reinstall, or retrain with `python -m erasure.eval.worldkit.train {name}`"
        )
    return card


def detectors() -> tuple[Detector, Detector]:
    """The default pair, A and B: independent in design, seed and augmentation."""
    return classifier("a"), classifier("b")
