"""An evaluation without pictures, for content that must not be drawn: the models by their weights, and nothing seen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from erasure.artifact.base import base_name
from erasure.backbone import denoiser_of
from erasure.concept import Suite
from erasure.eval.core.models import Applied, Model, check_restored, models_of
from erasure.eval.core.records import Arm, Evaluation
from erasure.eval.detectors.base import Detector
from erasure.eval.run.drawing import check_request

NOTHING_DRAWN = "No picture was drawn: what the models draw, of the target and of anything else, was not looked at."


def without_pictures(
    pipe: Any,
    erasures: Mapping[str, Applied],
    suite: Suite,
    *,
    detectors: Sequence[Detector],
    controls: Sequence[Model] = (),
    hash_weights: Callable[[Any], str],
    autocast: bool = False,
    **unused: Any,
) -> Evaluation:
    """The paired pictures without a picture: every change is put on once, hashed and taken off.

    Args:
        unused: what drawing would need.

    Raises:
        ValueError: no detector, whose labels are the words to compare with; or names that clash.
        RuntimeError: a change did not give the weights back.
    """
    models = models_of(erasures, controls)
    check_request([model.name for model in models[1:]], detectors, None, None)
    before, arms = hash_weights(pipe), []
    for model in models:
        with model.on(pipe):
            weights = hash_weights(pipe)
        check_restored(pipe, before, model.name, hash_weights=hash_weights)
        arms.append(Arm(model.name, weights, model.config, model.role, model.kind))
    return Evaluation(
        suite=suite,
        arms=tuple(arms),
        detectors={detector.name: detector.card for detector in detectors},
        records=(),
        pictures=(),
        distances=(),
        settings={
            "base": base_name(pipe), "base_of_the_suite": suite.base, "base_weights": before, "limit": None,
            "pipeline": type(pipe).__name__, "dtype": str(denoiser_of(pipe).dtype).removeprefix("torch."),
            "autocast": autocast, "scheduler": type(pipe.scheduler).__name__,
            "num_inference_steps": suite.num_inference_steps, "guidance_scale": suite.guidance_scale,
            "seeds": [], "prompts": 0, "clip": None, "versions": {}, "seconds": 0.0,
        },
        warnings=(NOTHING_DRAWN,),
    )  # fmt: skip
