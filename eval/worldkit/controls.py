"""Models of Emoji World that never saw a target: retrained ones, and the one that all of them start from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from erasure.backbone import denoiser_of
from erasure.concept import Suite
from erasure.eval.core.models import Model, Swapped
from erasure.eval.worldkit.audit import audited
from erasure.world.retrain import FOLDER, gold_facts, stored_gold
from erasure.world.spec import spec
from erasure.world.train import stored_model


def of_world(suite: Suite, pipe: Any, *, count: int, folder: Path | None = None) -> list[Model]:
    """The controls for a suite of one of the world's targets; none for any other suite.

    Args:
        pipe: Emoji World.
        count: how many retrained models at most.
        folder: where they are, with ``start/`` beside them; the repository's by default.
    """
    folder, target = FOLDER if folder is None else folder, suite.concept.name
    if target not in spec().targets or suite.also:
        return []
    device, dtype = pipe.device, denoiser_of(pipe).dtype
    found = []
    for file in sorted(folder.glob(f"{target}-[0-9]*.safetensors"))[:count]:
        seed = int(file.stem.rpartition("-")[2])
        model, facts = stored_gold(file), gold_facts(file)
        saw = [part for part in facts["scope"].values() if not part.startswith("none")]
        scope = f"denoiser and text encoder, {facts['steps']:,} steps of {facts['batch']} pictures; "
        scope += f"autoencoder and tokenizer are the base's; what saw it of these: {'; '.join(saw)}"
        config = {"scope": scope, "seed": seed, "without": target, "audit": audited(file, model)}
        parts = {part: module.eval().to(device, dtype) for part, module in model.items()}
        found.append(Model(f"gold {seed}", "gold", Swapped(f"gold {seed}", parts, config=config)))
    if (folder / "start").exists():
        start = {part: module.eval().to(device, dtype) for part, module in stored_model(folder / "start").items()}
        config = {"scope": "denoiser and text encoder", "trained": "two phases of three; it saw no target of the world"}
        found.append(Model("start", "null", Swapped("start", start, config=config)))
    return found
