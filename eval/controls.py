"""Models that never saw the target, to compare with: retrained ones where they exist, null controls where not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from erasure.artifact.base import base_name
from erasure.backbone import denoiser_of
from erasure.concept import WORLD, Suite
from erasure.eval.audit import audited
from erasure.eval.models import Model, Swapped, randomised, whole_model
from erasure.world.retrain import FOLDER, gold_facts, stored_gold
from erasure.world.spec import spec
from erasure.world.train import stored_model

LIMITS = {"smoke": 2, "quick": 2, "standard": 3, "full": 5}  # retrained models that a preset compares with


def controls_for(
    suite: Suite, pipe: Any, preset: str, *, golds: Sequence[str | Path] = (), folder: Path = FOLDER
) -> list[Model]:
    """The controls of an assessment, retrained models first.

    Args:
        golds: folders or hub ids of pipelines that the user retrained without the target.
        folder: where Emoji World's retrained models are; those of the suite's target are found by themselves.

    Returns:
        As many retrained models as the preset compares with, and null controls: for a target of Emoji World the model
        as it was before it ever saw a target; a denoiser with random weights where there is nothing better, and beside
        it in the preset "full".
    """
    if preset not in LIMITS:
        raise ValueError(f"unknown preset {preset!r}; choose one of {list(LIMITS)}")
    count, device, dtype = LIMITS[preset], pipe.device, denoiser_of(pipe).dtype
    found = [
        Model(f"gold {i}", "gold", whole_model(pipe, source, name=f"gold {i}", intervention="retrained"))
        for i, source in enumerate(golds)
    ]
    of_world = base_name(pipe) == WORLD and suite.concept.name in spec().targets and not suite.also
    if of_world and not golds:
        for file in sorted(folder.glob(f"{suite.concept.name}-*.safetensors"))[:count]:
            seed = int(file.stem.rpartition("-")[2])
            model, facts = stored_gold(file), gold_facts(file)
            saw = [part for part in facts["scope"].values() if not part.startswith("none")]
            scope = f"denoiser and text encoder, {facts['steps']:,} steps of {facts['batch']} pictures; "
            scope += f"autoencoder and tokenizer are the base's; what saw it of these: {'; '.join(saw)}"
            config = {"scope": scope, "seed": seed, "without": suite.concept.name, "audit": audited(file, model)}
            parts = {part: module.eval().to(device, dtype) for part, module in model.items()}
            found.append(Model(f"gold {seed}", "gold", Swapped(f"gold {seed}", parts, config=config)))
    if of_world and (folder / "start").exists():
        start = {part: module.eval().to(device, dtype) for part, module in stored_model(folder / "start").items()}
        config = {"scope": "denoiser and text encoder", "trained": "two phases of three; it saw no target of the world"}
        found.append(Model("start", "null", Swapped("start", start, config=config)))
    if not found or preset == "full":
        found.append(Model("random", "null", randomised(pipe)))
    return found


def held_out(controls: Sequence[Model]) -> Swapped:
    """The first retrained model, to be judged like an erasure. It stays a control for every other one.

    Put it among the erasures beside all ``controls``: an assessment sees that they are one model, looks at it once, and
    holds it against the other retrained ones.

    Raises:
        ValueError: there are not two retrained models: one to judge, one to compare it with.
    """
    golds = [model for model in controls if model.role == "gold"]
    if len(golds) < 2 or not isinstance(golds[0].change, Swapped):
        raise ValueError(
            f"judging a retrained model takes two or more, one of them to compare with; got {len(golds)}; "
            "make them with `erasure world gold`, take a larger preset, or leave --retrained out"
        )
    return golds[0].change
