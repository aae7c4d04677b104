"""The controls of an assessment, models that never saw the target, and its real pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from erasure.artifact.base import base_name
from erasure.concept import WORLD, Suite
from erasure.eval.core.material import FolderMaterial, Material
from erasure.eval.core.models import Model, Swapped, randomised, whole_model
from erasure.io import meant

# Retrained models that a preset takes, and models retrained on everything. C4 compares with three, and one more may be
# judged itself.
LIMITS = {"smoke": 2, "no-draw": 3, "quick": 2, "standard": 4, "full": 5}
TWINS = {"smoke": 0, "no-draw": 2, "quick": 1, "standard": 2, "full": 5}


def controls_for(
    suite: Suite, pipe: Any, preset: str, *, golds: Sequence[str | Path] = (), folder: Path | None = None
) -> list[Model]:
    """The controls of an assessment, as many as the preset compares with, retrained models first.

    For a target of Emoji World these are its retrained models, twins, and the model before it saw any target. A
    denoiser with random weights is added where there is no other control, and in the preset "full". Where there are
    retrained models, pictures are drawn of the nulls and no probe runs on them.

    Args:
        golds: folders or hub ids of pipelines that the user retrained without the target.
        folder: where Emoji World's retrained models are, by default the repository's.
    """
    if preset not in LIMITS:
        raise ValueError(f"unknown preset {preset!r}{meant(preset, LIMITS)}; choose one of {list(LIMITS)}")
    found = [
        Model(f"gold {i}", "gold", whole_model(pipe, source, name=f"gold {i}", intervention="retrained"))
        for i, source in enumerate(golds)
    ]
    if base_name(pipe) == WORLD:
        from erasure.eval.worldkit.controls import controls_of_world

        count, twins = (0, 0) if golds else (LIMITS[preset], TWINS[preset])
        found += controls_of_world(suite, pipe, count=count, twins=twins, folder=folder)
    if not found or preset == "full":
        found.append(Model("random", "null", randomised(pipe)))
    return found


def material_for(suite: Suite, folder: str | Path | None = None) -> Material | None:
    """The user's folder of pictures where one is given, the world's scenes for its suites, else nothing."""
    if folder is not None:
        return FolderMaterial(folder, suite.concept.name, also=[concept.name for concept in suite.also])
    if suite.base == WORLD:
        from erasure.eval.worldkit.material import material_of_world

        return material_of_world(suite)
    return None


def held_out(controls: Sequence[Model]) -> Swapped:
    """A retrained model to be judged like an erasure, the first whose record was replayed or else the first of all.

    It stays a control for the others. Put it among the erasures and pass all ``controls``: an assessment recognises
    that they are one model, draws it once, and compares it with the other retrained ones, so there must be two.
    """
    golds = [model.change for model in controls if model.role == "gold" and isinstance(model.change, Swapped)]
    if len(golds) < 2:
        raise ValueError(
            f"judging a retrained model takes two or more, one of them to compare with; got {len(golds)}; "
            "make them with `erasure world gold`, take a larger preset, or leave --retrained out"
        )
    return next((gold for gold in golds if (gold.config.get("audit") or {}).get("replayed")), golds[0])
