"""Which detectors judge which model: the world's own classifiers, or an open_clip model for everything else."""

from __future__ import annotations

from erasure.concept import WORLD, Suite
from erasure.eval.detectors.base import Detector
from erasure.eval.detectors.clip import ClipDetector, labels_of


def detectors_for(
    suite: Suite, *, clip: str = "ViT-B-32/openai", device: str = "cpu"
) -> tuple[list[Detector], ClipDetector]:
    """Detectors and the judge of image-text agreement for a suite.

    Args:
        clip: ``model/weights`` for open_clip, used for suites about real checkpoints.

    Raises:
        FileNotFoundError: the CLIP weights are neither here nor to be had.
    """
    if suite.base == WORLD:
        from erasure.eval.detectors import world

        judge = world.load("clip")
        assert isinstance(judge, ClipDetector)  # that is what the world ships under this name
        return list(world.detectors()), judge
    model, _, weights = clip.partition("/")
    try:
        judge = ClipDetector.load(model, weights or None, labels=labels_of(suite), device=device)
    except (OSError, RuntimeError) as error:
        raise FileNotFoundError(
            f"open_clip could not load {clip!r} ({type(error).__name__}); "
            "name a model/weights pair from open_clip.list_pretrained()"
        ) from None
    return [judge], judge
