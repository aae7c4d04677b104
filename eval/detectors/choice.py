"""The detectors for a suite: the world's classifiers, or an open_clip model for every other suite."""

from __future__ import annotations

from collections.abc import Sequence

from erasure.concept import WORLD, Suite
from erasure.eval.detectors.base import Detector
from erasure.eval.detectors.clip import ClipDetector, labels_of

CLIP = ("ViT-B-32/openai",)


def detectors_for(
    suite: Suite, *, clip: Sequence[str] = CLIP, device: str = "cpu"
) -> tuple[list[Detector], ClipDetector]:
    """Detectors and the judge of image-text agreement for a suite.

    Args:
        clip: ``model/weights`` for open_clip, used for suites about real checkpoints. The first scores; a second one
            selects, and attacks need it.

    Raises:
        FileNotFoundError: the CLIP weights are neither cached nor available.
    """
    if suite.base == WORLD:
        from erasure.eval.worldkit import detectors

        return list(detectors.detectors()), detectors.clip()
    judges = [_opened(name, suite, device) for name in clip]
    return [*judges], judges[0]


def _opened(name: str, suite: Suite, device: str) -> ClipDetector:
    model, _, weights = name.partition("/")
    try:
        return ClipDetector.load(model, weights or None, labels=labels_of(suite), device=device)
    except (OSError, RuntimeError) as error:
        raise FileNotFoundError(
            f"open_clip could not load {name!r} ({type(error).__name__}); "
            "name a model/weights pair from open_clip.list_pretrained()"
        ) from None
