"""The verdicts of detectors on pictures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from PIL import Image

from erasure.concept import same
from erasure.eval.core.records import Verdict
from erasure.eval.detectors.base import NOTHING, Detector


def verdicts_of(
    detector: Detector, images: Sequence[Image.Image], wanted: Sequence[str], attribute: str
) -> list[Verdict]:
    """One verdict per picture. A label the detector does not know gives no verdict, never a miss."""
    known = tuple(detector.labels(attribute))
    if not known or not images:
        return [Verdict(None, None, None, None, f"{detector.name} has no labels for {attribute}")] * len(images)
    scores = detector.scores(images, attribute)
    top = [known[i] for i in scores.argmax(-1)]
    nothing = _nothing(detector, images, attribute, top)
    out = []
    for row, winner, label, empty in zip(scores, top, wanted, nothing, strict=True):
        index = next((i for i, name in enumerate(known) if same(name, label)), None)
        if index is None:
            out.append(Verdict(winner, None, None, empty, f"{detector.name} has no label {label!r}"))
        else:
            out.append(Verdict(winner, float(row[index]), winner == known[index], empty))
    return out


def _nothing(
    detector: Detector, images: Sequence[Image.Image], attribute: str, top: Sequence[str]
) -> list[bool | None]:
    """Whether no concept can be recognised, whatever attribute the suite is about."""
    concepts = tuple(detector.labels("concept"))
    if NOTHING not in concepts:
        return [None] * len(images)
    if attribute == "concept":
        return [winner == NOTHING for winner in top]
    return [concepts[i] == NOTHING for i in detector.scores(images, "concept").argmax(-1)]


def among(name: str, names: Iterable[str]) -> bool:
    """Whether a name is one of several, as :func:`erasure.concept.same` compares them."""
    return any(same(name, other) for other in names)
