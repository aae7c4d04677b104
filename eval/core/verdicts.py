"""The verdicts of detectors on pictures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image

from erasure.eval.core.records import Verdict
from erasure.eval.detectors.base import NOTHING, Detector
from erasure.io import shown
from erasure.wording import folded, same

OFF = 0.02  # of a sum of probabilities, in half precision


def verdicts_of(
    detector: Detector, images: Sequence[Image.Image], wanted: Sequence[str], attribute: str
) -> list[Verdict]:
    """One verdict per picture. A label the detector does not know gives no verdict, never a miss."""
    known = labels_of(detector, attribute)
    if not known or not images:
        return [Verdict(None, None, None, None, f"{detector.name} has no labels for {attribute}")] * len(images)
    scores = scores_of(detector, images, attribute)
    check_probabilities(detector, scores)
    top = [known[i] for i in scores.argmax(-1)]
    nothing = _nothing(detector, images, attribute, top)
    out = []
    for row, winner, label, empty in zip(scores, top, wanted, nothing, strict=True):
        if not np.isfinite(row).all():  # the largest of NaN is any label, and would be a miss
            out.append(Verdict(None, None, None, None, f"{detector.name} gave NaN for this picture"))
            continue
        index = next((i for i, name in enumerate(known) if same(name, label)), None)
        if index is None:
            out.append(Verdict(winner, None, None, empty, f"{detector.name} has no label {label!r}"))
        else:
            out.append(Verdict(winner, float(row[index]), winner == known[index], empty))
    return out


def labels_of(detector: Detector, attribute: str) -> tuple[str, ...]:
    """The labels of an attribute.

    Raises:
        ValueError: they are no texts, or two are the same: nobody could say which of them was seen.
    """
    given = detector.labels(attribute)
    if isinstance(given, str) or not isinstance(given, Sequence) or not all(isinstance(x, str) for x in given):
        raise ValueError(f"{detector.name}: labels({attribute!r}) must give a tuple of texts; got {shown(given)}")
    if len({folded(label) for label in given}) < len(given):
        raise ValueError(f"{detector.name}: two labels of {attribute} are the same; got {shown(list(given))}")
    return tuple(given)


def scores_of(detector: Detector, images: Sequence[Image.Image], attribute: str) -> np.ndarray:
    """The numbers that a detector gives, ``(images, labels)``; the largest of a row is what it sees.

    Raises:
        ValueError: there is not a row for each picture and a number for each label.
    """
    given, shape = detector.scores(images, attribute), (len(images), len(labels_of(detector, attribute)))
    try:
        scores = np.asarray(given.detach().cpu() if hasattr(given, "detach") else given, dtype=float)
    except (TypeError, ValueError):
        raise ValueError(f"{detector.name}: scores must be numbers, {shape}; got {shown(given)}") from None
    if scores.shape != shape:
        raise ValueError(
            f"{detector.name}: scores must be (pictures, labels of {attribute}), here {shape}; got {scores.shape}"
        )
    return scores


def check_probabilities(detector: Detector, scores: np.ndarray) -> None:
    """Refuse what are no probabilities: a detector that gives them is broken, or its softmax is missing. NaN passes."""
    rows = scores[~np.isnan(scores).any(axis=-1)]
    if rows.size and (rows.min() < -OFF or abs(rows.sum(axis=-1) - 1).max() > OFF):
        raise ValueError(
            f"{detector.name}: scores must be probabilities, from 0 to 1 and 1 in sum; got a row from {rows.min():.3g} "
            f"to {rows.max():.3g}; put a softmax over the labels"
        )


def _nothing(
    detector: Detector, images: Sequence[Image.Image], attribute: str, top: Sequence[str]
) -> list[bool | None]:
    """Whether no concept can be recognised, whatever attribute the suite is about."""
    concepts = labels_of(detector, "concept")
    if NOTHING not in concepts:
        return [None] * len(images)
    if attribute == "concept":
        return [winner == NOTHING for winner in top]
    return [concepts[i] == NOTHING for i in scores_of(detector, images, "concept").argmax(-1)]


def among(name: str, names: Iterable[str]) -> bool:
    """Whether a name is one of several, as :func:`erasure.wording.same` compares them."""
    return any(same(name, other) for other in names)
