"""The mean of several detectors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from erasure.eval.detectors.base import Detector, DetectorCard


class MeanDetector:
    """The mean of the probabilities of detectors that know the same labels.

    Independent detectors err on different pictures, so their mean errs less. Do not use it beside its members: they
    would count twice.
    """

    def __init__(self, detectors: Sequence[Detector]) -> None:
        attributes = ("concept", "style", "background")
        if len(detectors) < 2 or len({tuple(d.labels(a) for a in attributes) for d in detectors}) > 1:
            raise ValueError(
                f"a mean needs two detectors or more with the same labels; got {[d.name for d in detectors]}; "
                "leave the odd one out"
            )
        self.detectors = tuple(detectors)
        self.name = " + ".join(detector.name for detector in detectors)
        self.card = DetectorCard(
            name=self.name,
            version="+".join(detector.card.version for detector in detectors),
            labels={attribute: self.labels(attribute) for attribute in attributes},
            notes="Mean of the members' probabilities.",
        )

    def labels(self, attribute: str) -> tuple[str, ...]:
        return tuple(self.detectors[0].labels(attribute))

    def scores(self, images: Sequence[Image.Image], attribute: str) -> np.ndarray:
        return np.mean([detector.scores(images, attribute) for detector in self.detectors], axis=0)
