"""Train the detectors of Emoji World: ``python -m erasure.eval.worldkit.train a --out runs/detectors``.

``a`` and ``b`` are the attribute classifiers, ``clip`` a small open_clip model. Each is trained on renders only, with
its own seed and augmentation. Runs checkpoint and resume; the finished weights go to ``eval/worldkit/weights`` in half
precision, with a card.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from erasure.eval.detectors.base import NOTHING, DetectorCard
from erasure.eval.worldkit.augment import UNKNOWN, Views, augment_a, augment_b, draw_scenes, nothing_views, scene_views
from erasure.eval.worldkit.classifier import (
    ATTRIBUTES,
    AttributeClassifier,
    both_present,
    labels,
    probabilities,
    tensor,
)
from erasure.eval.worldkit.detectors import BUILDERS, WEIGHTS
from erasure.io import sha256_file
from erasure.train import Draw, Training, step_rng, train_modules
from erasure.world.artwork import strangers

HELD_OUT_SEED = 990  # scenes that measure; no training run draws from it
Augment = Callable[[Tensor, np.random.Generator], Tensor]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How one classifier is trained.

    Attributes:
        build: makes the untrained network.
        augment: degrades a batch ``(n, 3, 64, 64)``.
        training: its seed is also that of initial weights, scenes and batches; no two recipes share one. Raise
            ``iterations`` if accuracy on held-out renders is too low.
        scenes, nothing: pictures rendered once before training, with and without something to recognise.
    """

    build: Callable[[], AttributeClassifier]
    augment: Augment
    training: Training
    scenes: int = 12_000
    nothing: int = 4_000

    @classmethod
    def named(cls, name: str, augment: Augment, *, steps: int, seed: int) -> Recipe:
        """The recipe of one of the world's own networks."""
        training = Training.from_scratch(
            steps=steps,
            batch=64,
            lr=2e-3,
            warmup=60,
            decay=0.7,
            ema=0.995,
            weight_decay=0.02,
            save_every=200,
            seed=seed,
        )
        return cls(BUILDERS[name], augment, training)


RECIPES = {"a": Recipe.named("a", augment_a, steps=2600, seed=1), "b": Recipe.named("b", augment_b, steps=2000, seed=2)}


def training_views(recipe: Recipe, drawings: np.ndarray | None) -> Views:
    """The pictures a classifier learns from: every combination, 30 % pairs, and a quarter of nothing."""
    rng = step_rng(recipe.training.seed, 0, 10)
    scenes = scene_views(draw_scenes(rng, recipe.scenes, pairs=0.3))
    return scenes + nothing_views(rng, recipe.nothing, drawings)


def attribute_loss(logits: dict[str, Tensor], views: Views) -> Tensor:
    """Cross-entropy of the concept (a pair is half one and half the other) and half that of style and background."""
    first, second = torch.from_numpy(views.concepts).to(logits["concept"].device).T
    styles, backgrounds = (torch.from_numpy(known).to(first.device) for known in (views.styles, views.backgrounds))
    concept = 0.5 * (F.cross_entropy(logits["concept"], first) + F.cross_entropy(logits["concept"], second))
    style = F.cross_entropy(logits["style"], styles, ignore_index=UNKNOWN)
    background = F.cross_entropy(logits["background"], backgrounds, ignore_index=UNKNOWN)
    return concept + 0.5 * (style + background)


def train_classifier(
    recipe: Recipe, folder: Path, drawings: np.ndarray | None, *, device: torch.device
) -> AttributeClassifier:
    """Train or resume one classifier in ``folder``; returns the averaged weights."""
    views = training_views(recipe, drawings)
    torch.manual_seed(recipe.training.seed)
    model = recipe.build().to(device).train()

    def loss(draw: Draw) -> Tensor:
        rng = draw.rng(11)
        batch = views[rng.integers(len(views), size=recipe.training.batch_size)]
        with torch.autocast(device.type, enabled=False):
            x = recipe.augment(tensor(batch.images), rng)
        return attribute_loss(model(x.to(device)), batch)

    average = train_modules({"classifier": model}, loss, training=recipe.training, folder=folder)
    return cast(AttributeClassifier, average["classifier"])


# --- what was learnt -------------------------------------------------------------------------------------------------


def measure(model: nn.Module, drawings: np.ndarray | None, *, n: int = 1000) -> dict[str, float]:
    """Accuracy on renders that no training run drew."""
    rng = step_rng(HELD_OUT_SEED, 0)
    single, pair = scene_views(draw_scenes(rng, n)), scene_views(draw_scenes(rng, n // 4, pairs=1.0))
    unseen = scene_views(draw_scenes(rng, n // 4, held_out=1.0))
    nothing = nothing_views(rng, n // 2)
    answers = probabilities(model, single.images)
    truth = {"concept": single.concepts[:, 0], "style": single.styles, "background": single.backgrounds}
    figures = {name: float((answers[name].argmax(1) == truth[name]).mean()) for name in ATTRIBUTES}
    figures["worst concept"] = min(
        float((answers["concept"].argmax(1) == c)[truth["concept"] == c].mean()) for c in np.unique(truth["concept"])
    )
    empty = labels("concept").index(NOTHING)
    figures["called nothing though something"] = float((answers["concept"].argmax(1) == empty).mean())
    paired = probabilities(model, pair.images)["concept"]
    figures["pairs, both present"] = float(both_present(paired, pair.concepts).mean())
    seen = probabilities(model, unseen.images)["concept"].argmax(1)
    figures["never-trained combinations"] = float((seen == unseen.concepts[:, 0]).mean())
    figures["nothing found"] = float((probabilities(model, nothing.images)["concept"].argmax(1) == empty).mean())
    if drawings is not None:
        outside = nothing_views(rng, n // 2, drawings).images[1::2]
        figures["emoji outside the world called nothing"] = float(
            (probabilities(model, outside)["concept"].argmax(1) == empty).mean()
        )
    return figures


def ship(name: str, model: nn.Module, figures: dict[str, float], *, weights: Path = WEIGHTS) -> DetectorCard:
    """Write ``<name>.safetensors`` in half precision and its card ``<name>.json``."""
    weights.mkdir(parents=True, exist_ok=True)
    path = weights / f"{name}.safetensors"
    save_file({key: value.half().contiguous().cpu() for key, value in model.state_dict().items()}, path)
    card = DetectorCard(
        name=f"world-{name}",
        version="1",
        weights_sha256=sha256_file(path),
        preprocessing="RGB, resized to 64x64 (bicubic) if needed, scaled to [-1, 1]",
        labels={attribute: labels(attribute) for attribute in ATTRIBUTES},
        notes=summary(figures),
    )
    card.to_json(weights / f"{name}.json")
    return card


def summary(figures: dict[str, float]) -> str:
    """The measured figures in one sentence of a card."""
    return "On held-out renders: " + ", ".join(f"{key} {value:.3f}" for key, value in figures.items()) + "."


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a detector of Emoji World.")
    parser.add_argument("name", choices=[*RECIPES, "clip"])
    parser.add_argument("--out", type=Path, default=Path("runs/detectors"), help="checkpoints go here")
    parser.add_argument("--strangers", type=Path, default=Path("runs/world/strangers.npz"), help="other emoji")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    if arguments.name == "clip":
        from erasure.eval.worldkit.train_clip import train_clip

        train_clip(arguments.out / "clip", device=device)
        return
    drawings = strangers(arguments.strangers)
    model = train_classifier(RECIPES[arguments.name], arguments.out / arguments.name, drawings, device=device)
    model = model.half().float()  # measure what is shipped
    card = ship(arguments.name, model, measure(model, drawings))
    sys.stdout.write(card.notes + "\n")


if __name__ == "__main__":
    main()
