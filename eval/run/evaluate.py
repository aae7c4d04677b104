"""The evaluation: the paired pictures, and the four probes that read them alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch

from erasure.concept import WIDE, Suite
from erasure.eval.core.models import Applied, Kind, Model, Role
from erasure.eval.core.records import Arm, Evaluation
from erasure.eval.detectors.base import Detector
from erasure.eval.detectors.clip import ClipDetector
from erasure.eval.judge import PICTURES
from erasure.eval.probes import probe_class
from erasure.eval.probes.base import Missing, Observation
from erasure.eval.probes.pictured import PICTURED, Pictured
from erasure.eval.run.assessment import DETECTOR, Assessment, Cell, ModelCard
from erasure.eval.run.drawing import paired_pictures, sampler_text


def evaluate(
    pipe: Any,
    erasures: Mapping[str, Applied],
    suite: Suite,
    *,
    detectors: Sequence[Detector],
    controls: Sequence[Model] = (),
    clip: ClipDetector | None = None,
    extractors: Sequence[torch.nn.Module] | None = None,
    images_per_prompt: int | None = None,
    limit: int | None = None,
    wide: int | None = WIDE,
    batch_size: int = 16,
    autocast: bool | None = None,
    cache_dir: str | Path | None = None,
    progress: bool = True,
    hash_weights: Callable[[Any], str] | None = None,
) -> Assessment:
    """Compare a pipeline with each of its erasures on a suite: an assessment by the paired pictures alone.

    Args:
        pipe: the unmodified pipeline; it is returned unmodified.
        erasures: name of the arm to erasure.
        suite: prompts, groups and sampler settings.
        detectors: at least one. With several the report has their agreement, and claims use the least favourable of
            those that recognise the base's target.
        controls: models that never saw the target (retrained, or null), drawn like every arm; no claim is made of them.
        clip: an open_clip model that was not used in training; adds the cosine of every picture with its prompt.
        extractors: feature extractors for distances of kept (non-target) pictures from the base's, each with a
            ``name``; see :mod:`erasure.eval.core.distances`. By default the image features of ``clip``; () for none.
            With one picture per prompt they need one more set of base pictures, for the null.
        images_per_prompt: seeds per prompt, instead of the suite's.
        limit: at most this many of the suite's own prompts per group, spread evenly, for a trial; no claim is made
            then.
        wide: number of sentences, with one picture each instead of several, since an interval is about sentences; see
            :meth:`erasure.Suite.prompts`. None draws the suite's own sentences alone.
        autocast: bfloat16 arithmetic; by default where it is faster, see :mod:`erasure.runtime`.
        batch_size, cache_dir, progress: as in :func:`erasure.eval.core.pictures.generate`.
        hash_weights: a :class:`~erasure.eval.core.hashes.WeightHashes` that has hashed the models already.

    Raises:
        TooLong: prompts do not fit the text encoder, which would cut them.
        ValueError: no detector, two of one name, an arm called "base", or a pipeline that is wrapped or already carries
            an erasure; see :func:`erasure.eval.core.models.check_base`.
        RuntimeError: an erasure did not restore the weights. Each is applied and removed once before any drawing.
    """
    return assessment_of(paired_pictures(
        pipe, erasures, suite, detectors=detectors, controls=controls, clip=clip, extractors=extractors,
        images_per_prompt=images_per_prompt, limit=limit, wide=None if limit else wide, batch_size=batch_size,
        autocast=autocast, cache_dir=cache_dir, progress=progress, hash_weights=hash_weights,
    ))  # fmt: skip


def assessment_of(evaluation: Evaluation) -> Assessment:
    """An assessment by paired pictures alone, of a new or a stored evaluation: the probes that need no model, by every
    detector."""
    cards = [_card(arm, evaluation.arms[0]) for arm in evaluation.arms]
    cells = [_cell(probe, card.name, evaluation) for probe in PICTURED for card in cards]
    settings = {**evaluation.settings, "sampler": sampler_text(evaluation.settings)}
    return Assessment(evaluation, PICTURES, tuple(cards), tuple(cells), None, settings)


def _card(arm: Arm, base: Arm) -> ModelCard:
    """One model. In older evaluations the kind is inferred from weights and settings."""
    if arm.kind:
        kind = arm.kind
    elif arm.role != "erased" or arm == base:
        kind = "none" if arm == base else "retrained"
    elif arm.config.get("method") == "filter":
        kind = "filter"
    else:
        kind = "adapter" if arm.weights == base.weights else "weights"
    role = "base" if arm == base else arm.role
    return ModelCard(arm.name, cast(Role, role), cast(Kind, kind), arm.weights, arm.config)


def _cell(key: str, model: str, evaluation: Evaluation) -> Cell:
    """The observations of one probe in the pictures of one model, by every detector."""
    probe = probe_class(key)()
    if not isinstance(probe, Pictured):
        raise TypeError(f"{key} is in PICTURED and reads no stored pictures; make it a subclass of Pictured")
    rows: list[Observation] = []
    reasons: list[str] = []
    for detector in evaluation.detectors:
        try:
            found = probe.read(evaluation, model, detector)
        except Missing as reason:
            reasons.append(str(reason))
            continue
        rows += [dataclasses.replace(row, facts={**row.facts, DETECTOR: detector}) for row in found]
    missing = None if rows else "; ".join(dict.fromkeys(reasons)) or "no detector judged the pictures"
    return Cell(key, probe.version, probe.settings(), model, {"pictures": evaluation.key}, tuple(rows), missing)
