"""Emoji World's controls: models retrained without a target, their twins, and their common start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from erasure.backbone import denoiser_of
from erasure.concept import Suite
from erasure.eval.core.models import Model, Role, Swapped
from erasure.eval.worldkit.audit import audited
from erasure.world.retrain import TWIN, edition_of, gold_facts, stored_gold, targets_of
from erasure.world.train import stored_model


def controls_of_world(
    suite: Suite, pipe: Any, *, count: int, twins: int = 0, folder: Path | None = None
) -> list[Model]:
    """The controls for a suite of one of the world's targets; none for any other suite.

    Args:
        pipe: Emoji World.
        count: how many retrained models at most. twins: how many of those retrained on everything, for as many steps
            of as many pictures as the retrained models.
        folder: of their files, ``start/`` and ``manifest.json``; by default the repository's for the target.
    """
    target = suite.concept.name
    folder = folder or edition_of(target)
    if suite.also or not (folder / "manifest.json").exists() or target not in targets_of(folder):
        return []
    device, dtype = pipe.device, denoiser_of(pipe).dtype
    golds = sorted(folder.glob(f"{target}-[0-9]*.safetensors"))[:count]
    alike = [
        file for file in sorted(folder.glob(f"{TWIN}-[0-9]*.safetensors")) if {length(file)} == {*map(length, golds)}
    ]
    found = [gold(file, device, dtype) for file in golds] + [twin(file, device, dtype) for file in alike[:twins]]
    if (folder / "start").exists():
        start = {part: moved(module, device, dtype) for part, module in stored_model(folder / "start").items()}
        config = {
            "scope": "denoiser and text encoder",
            "trained": f"two phases of three; it never saw {', '.join(sorted(targets_of(folder)))}",
        }
        found.append(Model("start", "null", Swapped("start", start, config=config)))
    return found


def length(file: Path) -> tuple[int, int]:
    """How long a retrained model was trained: steps, and pictures a step."""
    facts = gold_facts(file)
    return facts["steps"], facts["batch"]


def gold(file: Path, device: torch.device, dtype: torch.dtype) -> Model:
    """A model retrained without the target, with the facts of its record."""
    model, facts = stored_gold(file), gold_facts(file)
    saw = [part for part in facts["scope"].values() if not part.startswith("none")]
    scope = f"denoiser and text encoder, {facts['steps']:,} steps of {facts['batch']} pictures; "
    scope += f"autoencoder and tokenizer are the base's; what saw it of these: {'; '.join(saw)}"
    config = {"scope": scope, "seed": facts["seed"], "without": facts["without"], "audit": audited(file, model)}
    return retrained(f"gold {facts['seed']}", "gold", model, config, device, dtype)


def twin(file: Path, device: torch.device, dtype: torch.dtype) -> Model:
    """A model retrained on everything, with the steps and settings of the retrained ones."""
    facts = gold_facts(file)
    scope = f"denoiser and text encoder, {facts['steps']:,} steps of {facts['batch']} pictures, nothing left out"
    config = {"scope": scope, "seed": facts["seed"]}
    return retrained(f"twin {facts['seed']}", "twin", stored_gold(file), config, device, dtype)


def retrained(
    name: str, role: Role, parts: dict[str, nn.Module], config: dict[str, Any], device: torch.device, dtype: torch.dtype
) -> Model:
    here = {part: moved(module, device, dtype) for part, module in parts.items()}
    return Model(name, role, Swapped(name, here, config=config))


def moved(module: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Ready to draw with; diffusers logs a remark on every cast, so there is none without need."""
    module = module.eval().to(device)
    return module if next(module.parameters()).dtype == dtype else module.to(dtype)
