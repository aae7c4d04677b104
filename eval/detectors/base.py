"""Detectors, and the card with the errors of one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from erasure.io import parse_json, printable, read_bytes, write_json

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image
    from torch import Tensor

NOTHING = "nothing"  # the label of a picture in which no concept can be recognised


@dataclasses.dataclass(frozen=True)
class DetectorCard:
    """What a detector is, and how often it errs.

    Attributes:
        weights_sha256: hash of its weights file; None without one.
        preprocessing: of a picture, in words.
        labels: attribute ("concept", "style", "background") to its labels.
        sensitivity: attribute to the share of true cases found, measured on *generated* pictures. None = not measured.
        specificity: attribute to the share of other pictures that do not get the label. None = not measured.
        notes: where the two figures come from, and known weaknesses.
    """

    name: str
    version: str
    weights_sha256: str | None = None
    preprocessing: str = ""
    labels: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    sensitivity: Mapping[str, float] | None = None
    specificity: Mapping[str, float] | None = None
    notes: str = ""

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> DetectorCard:
        """The inverse of ``to_dict``; keys that this version does not know are refused."""
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(raw) - known):
            raise ValueError(f"unknown keys in a detector card; got {unknown}; known keys are {sorted(known)}")
        if missing := {"name", "version"} - set(raw):
            raise ValueError(f"a detector card lacks {sorted(missing)}; got {sorted(raw)}; add them")
        labels = {attribute: tuple(names) for attribute, names in raw.get("labels", {}).items()}
        return cls(**{**raw, "labels": labels})

    def to_json(self, path: str | Path) -> None:
        """Write the card, completely or not at all."""
        write_json(path, self.to_dict())

    @classmethod
    def from_json(cls, path: str | Path) -> DetectorCard:
        """Read a card; a file that is none is refused by its name."""
        try:
            return cls.from_dict(parse_json(read_bytes(path)))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: not a detector card ({printable(error)}); is the file complete?") from None


@runtime_checkable
class Detector(Protocol):
    """Anything that gives probabilities of labels for pictures.

    The detector that selects pictures must not score them: pass two independent ones to ``evaluate``.
    """

    name: str
    card: DetectorCard

    def labels(self, attribute: str) -> tuple[str, ...]:
        """The labels of an attribute ("concept", "style" or "background"), empty if it has none; the last of
        "concept" is "nothing"."""
        ...

    def scores(self, images: Sequence[Image.Image], attribute: str) -> np.ndarray:
        """Probabilities, (images, labels) float, rows sum to 1."""
        ...


@runtime_checkable
class WithFeatures(Protocol):
    """A detector with features of pictures."""

    def features(self, images: Sequence[Image.Image]) -> tuple[str, np.ndarray]:
        """What the numbers are ("penultimate layer"), and the features ``(n, d)``."""
        ...


@runtime_checkable
class WithGradients(Protocol):
    """A detector whose answers are differentiable in the pixels."""

    def log_probabilities(self, pixels: Tensor, attribute: str) -> Tensor:
        """``(n, labels)`` for pictures ``(n, 3, h, w)`` in [-1, 1] of any size."""
        ...
