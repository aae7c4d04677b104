"""What four bits a weight cost a retrained model: ``python -m studies.four_bits [gold/superhero-0.safetensors]``.

The same prompt and noise for all 72 concepts of Emoji World, from the model as it is and from the same model packed as
:mod:`erasure.world.retrain` stores one. Prints JSON: the share of pictures that get the same verdict, the share that is
right before and after, the mean difference of a pixel (of 255) and the size of the file.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import StableDiffusionPipeline, UniPCMultistepScheduler
from torch import nn

from erasure.eval.core.pictures import generate
from erasure.eval.detectors.mean import MeanDetector
from erasure.eval.worldkit.detectors import detectors
from erasure.world import path
from erasure.world.retrain import FOLDER, pack, stored_gold, unpack
from erasure.world.scenes import prompt
from erasure.world.spec import spec
from erasure.world.train import stored_model


def drawn(parts: dict[str, nn.Module]) -> list[Any]:
    """One picture for each concept, the styles in turn."""
    pipe = StableDiffusionPipeline.from_pretrained(path(), **parts)
    pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config)
    styles = list(spec().styles)
    prompts = [prompt(name, style=styles[i % len(styles)]) for i, name in enumerate(spec().concepts)]
    rows = generate(pipe, prompts, num_inference_steps=8, guidance_scale=3.0, batch_size=24)
    return [row[0] for row in rows]


def main(file: Path) -> dict[str, Any]:
    start, model = stored_model(file.parent / "start"), stored_gold(file)
    packed = pack(model, start)
    again = unpack(packed, copy.deepcopy(start))
    before, after = drawn(model), drawn(again)
    judge, names = MeanDetector(detectors()), list(spec().concepts)
    known = judge.labels("concept")
    first, second = ([known[i] for i in judge.scores(images, "concept").argmax(1)] for images in (before, after))
    pixels = [np.abs(np.asarray(a, float) - np.asarray(b, float)).mean() for a, b in zip(before, after, strict=True)]
    return {
        "model": file.name,
        "pictures": len(names),
        "same verdict": float(np.mean([a == b for a, b in zip(first, second, strict=True)])),
        "right before": float(np.mean([a == b for a, b in zip(first, names, strict=True)])),
        "right after": float(np.mean([a == b for a, b in zip(second, names, strict=True)])),
        "mean pixel difference": round(float(np.mean(pixels)), 2),
        "megabytes": round(sum(t.numel() * t.element_size() for t in packed.values()) / 1e6, 2),
    }


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]) if sys.argv[1:] else FOLDER / "superhero-0.safetensors"), indent=1))
