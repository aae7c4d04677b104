"""Measures of pictures without labels: agreement with the prompt, distance from the base's pictures."""

from __future__ import annotations

import dataclasses
from typing import Any

from erasure.eval.core.records import BASE, GROUPS, Evaluation
from erasure.eval.stats import Estimate, mean, rate


@dataclasses.dataclass(frozen=True)
class Quality:
    """One measure of one arm and group.

    Attributes:
        measure: ``clip[...]`` (mean cosine of a picture and its prompt), ``kid[...]``, ``frechet[...]``, or KID and FID
            on Inception's features.
        value: with its interval over prompts. A distance of the base is the null: to itself with other seeds.
        change: minus the base's cosine, or minus the null, paired by prompt. None for the base.
    """

    arm: str
    group: str
    measure: str
    value: Estimate
    change: Estimate | None

    @property
    def title(self) -> str:
        return title_of(self.measure)

    @property
    def distance(self) -> bool:
        """Whether it is a distance of kept pictures, not an agreement with the prompt."""
        return not self.measure.startswith("clip[")

    @property
    def digits(self) -> str:
        """How its numbers are printed."""
        return ".2f" if self.measure.startswith("frechet[") or self.measure == "FID" else ".4f"


@dataclasses.dataclass(frozen=True)
class ClipRow:
    """How often the asked-for label is the nearest of the CLIP judge's labels (zero-shot), of one arm and group."""

    arm: str
    group: str
    accuracy: Estimate


def title_of(measure: str) -> str:
    """The name of a measure in reports, with its features."""
    if measure in ("FID", "KID"):
        return f"{measure}, Inception v3 features"
    kind, _, features = measure.removesuffix("]").partition("[")
    named = {"kid": "KID, {} features", "frechet": "Fréchet distance, {} features", "clip": "CLIP score, {}"}
    return named.get(kind, measure).format(features)


def quality(evaluation: Evaluation) -> list[Quality]:
    """Every measure, by arm and group: the CLIP score first, then kernel and Fréchet distances."""
    found = []
    for arm in evaluation.arms:
        rows = [_agreement(evaluation, arm.name, group) for group in GROUPS]
        found += [row for row in rows if row is not None]
        found += [
            Quality(arm.name, d.group, d.metric, d.value, d.change) for d in evaluation.distances if d.arm == arm.name
        ]
    return found


def _agreement(evaluation: Evaluation, arm: str, group: str) -> Quality | None:
    now, base = evaluation.select(arm, group), evaluation.select(BASE, group)
    if not now or all(r.clip_cosine is None for r in now):
        return None
    prompts = [r.prompt for r in now]
    pairs = zip((r.clip_cosine for r in now), (r.clip_cosine for r in base), strict=True)
    change = mean([None if a is None or b is None else a - b for a, b in pairs], prompts)
    judge = str(evaluation.settings.get("clip") or "CLIP")
    value = mean([r.clip_cosine for r in now], prompts)
    return Quality(arm, group, f"clip[{judge}]", value, None if arm == BASE else change)


def clip_rows(evaluation: Evaluation) -> list[ClipRow]:
    """Zero-shot accuracy of the CLIP judge, for every arm and group that it judged."""
    out = []
    for arm in evaluation.arms:
        for group in GROUPS:
            now = evaluation.select(arm.name, group)
            if now and any(r.clip_cosine is not None for r in now):
                out.append(ClipRow(arm.name, group, rate([r.clip_hit for r in now], [r.prompt for r in now])))
    return out


def blocks(evaluation: Evaluation) -> list[dict[str, Any]]:
    """The measures as blocks of the first table: one for each, a line for each arm, a cell for each group."""
    rows = quality(evaluation)
    out = []
    for measure in dict.fromkeys(row.measure for row in rows):
        cells = {(row.arm, row.group): row for row in rows if row.measure == measure}
        lines = [
            {
                "arm": arm.name,
                "role": arm.role,
                "cells": {g: cells[arm.name, g] for g in GROUPS if (arm.name, g) in cells},
            }
            for arm in evaluation.arms
        ]
        out.append({"title": title_of(measure), "distance": next(iter(cells.values())).distance, "lines": lines})
    return out


def notes(evaluation: Evaluation) -> list[str]:
    """What must be known to read the distances."""
    few = [d for d in evaluation.distances if d.value.value is None]
    out = [
        f"The distances of {g} were not measured: {r}."
        for g, r in dict.fromkeys((d.group, d.value.reason) for d in few)
    ]
    if any(d.value.value is not None for d in evaluation.distances):
        out.append(
            "Read KID first: it has no bias, however few pictures there are. The Fréchet distance needs many more "
            "pictures than features; with fewer it is far above 0 between equal models too, as the base's own row "
            "shows. Only the change means something, and neither compares with published figures."
        )
    return out


__all__ = ["ClipRow", "Quality", "blocks", "clip_rows", "notes", "quality", "title_of"]
