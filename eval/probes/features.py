"""The judge's features of the suite's pictures, for probes that compare pictures without their labels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from erasure.eval.core.pictures import limited
from erasure.eval.detectors.base import Detector, WithFeatures
from erasure.eval.probes.base import Context, Model, Observation
from erasure.eval.probes.weigh import of_family

WIDTH = 64  # features kept of each picture


def featured(model: Model, context: Context, *, images_per_prompt: int, limit: int | None) -> list[Observation]:
    """Draw at most ``limit`` prompts of each group of the suite; one row per picture, with its ``features``."""
    asked = limited(context.suite.prompts(), limit)
    with context.open(model) as pipe:
        drawn = context.pictures(pipe, model, [p.text for p in asked], seeds=range(images_per_prompt))
    name, features = features_of(context.judge, [image for _, _, image in drawn])
    groups = [p.group for p in asked for _ in range(images_per_prompt)]
    return [
        Observation(
            model.name, group, text, seed, None, None, {"of": name, "features": [float(f"{x:.4g}") for x in row]}
        )
        for group, (text, seed, _), row in zip(groups, drawn, features, strict=True)
    ]


def features_of(judge: Detector, images: Sequence[Image.Image]) -> tuple[str, np.ndarray]:
    """What the features of a detector are, and those of pictures ``(n, d)``, d at most 64.

    Its own features where it has some (:class:`~erasure.eval.detectors.base.WithFeatures`), the image embedding of a
    CLIP model, else its answers. Longer ones are projected by a fixed Gaussian matrix, which keeps distances to about
    10 % (Johnson and Lindenstrauss 1984).
    """
    if isinstance(judge, WithFeatures):
        layer, found = judge.features(images)
    elif hasattr(judge, "image_features"):
        layer, found = "image embedding", judge.image_features(images).float().cpu().numpy()
    else:
        known = [a for a in ("concept", "style", "background") if judge.labels(a)]
        layer, found = "answers", np.concatenate([judge.scores(images, a) for a in known], axis=1)
    if (d := found.shape[1]) > WIDTH:
        found = found @ (np.random.default_rng(d).standard_normal((d, WIDTH)) / np.sqrt(WIDTH))
    return f"{layer} of {judge.name}", found


def placed(rows: Sequence[Observation], family: str) -> dict[tuple[str, int], np.ndarray]:
    """The features of a family's pictures by prompt and seed."""
    return {(r.cluster, r.seed): np.array(r.facts["features"], dtype=float) for r in of_family(rows, family)}
