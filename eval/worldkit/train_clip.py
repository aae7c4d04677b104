"""Train the small open_clip model of Emoji World on (picture, caption) pairs.

It is an ordinary open_clip model: a configuration, a tokenizer and weights in one folder that
``open_clip.create_model_and_transforms("local-dir:<folder>")`` opens. Its own vocabulary (about 1,400 byte-pair pieces
learnt from the caption grammar) keeps the folder below 2 MB.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTokenizer

from erasure.eval.detectors.base import NOTHING, Detector, DetectorCard
from erasure.eval.worldkit.augment import augment_a, augment_b, draw_scenes, nothing_views, scene_views
from erasure.eval.worldkit.classifier import tensor
from erasure.eval.worldkit.detectors import EMPTY, WEIGHTS, clip_detector, world_phrases
from erasure.eval.worldkit.train import HELD_OUT_SEED, summary
from erasure.io import read_json, sha256_file
from erasure.train import Draw, Training, step_rng, train_modules
from erasure.world.scenes import Scene, sample_caption
from erasure.world.train import learn_bpe

SEED = 3
VOCABULARY = 1200
TRAINING = Training.from_scratch(
    steps=3200, batch=128, lr=1.5e-3, warmup=100, decay=0.7, ema=0.995, weight_decay=0.05, save_every=200, seed=SEED
)
SCENES, NOTHINGS = 14_000, 1_000
CONFIG: dict[str, Any] = {
    "embed_dim": 96,
    "vision_cfg": {"image_size": 64, "patch_size": 8, "width": 128, "head_width": 32, "layers": 3, "mlp_ratio": 3.0},
    "text_cfg": {"context_length": 32, "width": 64, "heads": 2, "layers": 2, "hf_tokenizer_name": "local-dir"},
}
PREPROCESS = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}


def captions(scenes: list[Scene], rng: np.random.Generator) -> list[str]:
    """One non-empty caption per scene."""
    return [caption(scene, rng) for scene in scenes]


def caption(scene: Scene, rng: np.random.Generator) -> str:
    while not (text := sample_caption(scene, rng)):
        pass
    return text


def prepare(folder: Path) -> None:
    """Write tokenizer and configuration: an open_clip folder that lacks only its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = step_rng(SEED, 0, 20)
    texts = [*captions(draw_scenes(rng, 20_000, pairs=0.2), rng), *EMPTY * 20]
    vocabulary, merges = learn_bpe(texts, VOCABULARY)
    length = CONFIG["text_cfg"]["context_length"]
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=length)
    tokenizer.save_pretrained(folder)
    # The end token has the largest id, which is where open_clip's "argmax" pooling reads the sentence.
    model = {**CONFIG, "text_cfg": {**CONFIG["text_cfg"], "vocab_size": len(tokenizer)}}
    text = json.dumps({"model_cfg": model, "preprocess_cfg": PREPROCESS}, indent=2)
    (folder / "open_clip_config.json").write_text(text + "\n", "utf-8")


def train_clip(out: Path, *, device: torch.device, weights: Path = WEIGHTS) -> DetectorCard:
    """Train or resume in ``out``, then write ``weights/clip`` and its card."""
    folder = weights / "clip"
    prepare(folder)
    rng = step_rng(SEED, 0, 21)
    scenes = draw_scenes(rng, SCENES, pairs=0.2)
    images = np.concatenate([scene_views(scenes).images, nothing_views(rng, NOTHINGS).images])
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    torch.manual_seed(SEED)
    model_config = read_json(folder / "open_clip_config.json")["model_cfg"]
    model = open_clip.CLIP(**model_config).to(device).train()

    def loss(draw: Draw) -> Tensor:
        rng = draw.rng(22)
        chosen = rng.choice(len(images), size=TRAINING.batch_size, replace=False)
        texts = [caption(scenes[i], rng) if i < len(scenes) else str(rng.choice(EMPTY)) for i in chosen]
        with torch.autocast(device.type, enabled=False):
            halves = tensor(images[chosen]).chunk(2)
            x = torch.cat([augment_a(halves[0], rng), augment_b(halves[1], rng)])
        return contrastive_loss(model, x.to(device), tokenizer(texts).to(device))

    average = train_modules({"clip": model}, loss, training=TRAINING, folder=out)["clip"]
    state = {key: value.half().contiguous().cpu() for key, value in average.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    return ship_clip(weights)


def contrastive_loss(model: nn.Module, x: Tensor, ids: Tensor) -> Tensor:
    """CLIP's symmetric cross-entropy, with the targets shared among equal captions.

    A small world repeats its captions; a second picture of the same caption is no negative.
    """
    image, text, scale = model(x, ids)
    logits = scale.clamp(max=100) * image.float() @ text.float().T
    same = (ids[:, None] == ids[None]).all(dim=-1).float()
    target = same / same.sum(dim=1, keepdim=True)
    return 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))


def ship_clip(weights: Path = WEIGHTS) -> DetectorCard:
    """Measure the finished model on renders it never saw and write its card ``clip.json``."""
    card = DetectorCard(
        name="world-clip",
        version="1",
        weights_sha256=sha256_file(weights / "clip" / "open_clip_model.safetensors"),
        preprocessing="open_clip's own for the folder: RGB, 64x64 (bicubic), scaled to [-1, 1]",
        labels={attribute: tuple(phrases) for attribute, phrases in world_phrases().items()},
    )
    detector = clip_detector(weights / "clip", card)
    card = dataclasses.replace(card, notes="Zero-shot. " + summary(measure_clip(detector)))
    card.to_json(weights / "clip.json")
    return card


def measure_clip(detector: Detector, *, n: int = 600) -> dict[str, float]:
    """Zero-shot accuracy on held-out renders."""
    rng = step_rng(HELD_OUT_SEED, 1)
    views = scene_views(draw_scenes(rng, n))
    pictures = [Image.fromarray(image) for image in views.images]
    truth = {"concept": views.concepts[:, 0], "style": views.styles, "background": views.backgrounds}
    figures = {
        name: float((detector.scores(pictures, name).argmax(axis=1) == answer).mean()) for name, answer in truth.items()
    }
    empty = [Image.fromarray(image) for image in nothing_views(rng, n // 3).images]
    found = detector.scores(empty, "concept").argmax(axis=1) == detector.labels("concept").index(NOTHING)
    return {**figures, "nothing found": float(found.mean())}
