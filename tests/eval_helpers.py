"""What the evaluator's tests share: edits and detectors simple enough to recompute by hand, and a demonstration."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from erasure.concept import Suite
from erasure.eval.compare import _Job, _pictures, _records
from erasure.eval.detectors.base import DetectorCard
from erasure.eval.records import Arm, Distance, Evaluation
from erasure.eval.stats import Estimate
from erasure.world.scenes import Scene, compose, place, render
from erasure.world.spec import spec


class PixelDetector:
    """Calls a picture by its mean brightness: a rule that anyone can recompute."""

    def __init__(
        self, name: str = "pixels", labels: Sequence[str] = ("cat", "dog", "sun", "nothing"), attribute: str = "concept"
    ) -> None:
        self.name, self.attribute, self._labels = name, attribute, tuple(labels)
        self.card = DetectorCard(
            name, "1", labels={attribute: self._labels}, sensitivity={attribute: 1.0}, specificity={attribute: 1.0}
        )

    def labels(self, attribute: str) -> tuple[str, ...]:
        return self._labels if attribute == self.attribute else ()

    def scores(self, images: Sequence[Image.Image], attribute: str) -> np.ndarray:
        level = np.array([np.asarray(image, dtype=float).mean() / 256 for image in images])
        rows = np.full((len(images), len(self._labels)), 0.1 / (len(self._labels) - 1))
        rows[np.arange(len(images)), (level * len(self._labels)).astype(int)] = 0.9
        return rows


class AddNoise:
    """An erasure that does nothing clever: it shifts the denoiser's text projections, and gives them back."""

    def __init__(self, name: str = "noise", scale: float = 1.0, faithful: bool = True) -> None:
        self.name, self.config, self.scale, self.faithful = name, {"method": "noise", "scale": scale}, scale, faithful
        self._kept: dict[str, torch.Tensor] = {}

    def apply(self, pipe) -> None:
        generator = torch.Generator().manual_seed(7)
        for name, tensor in pipe.unet.state_dict().items():
            if "attn2.to_v" in name or "conv_out" in name:
                self._kept[name] = tensor.clone()
                tensor += self.scale * torch.randn(tensor.shape, generator=generator)

    def remove(self, pipe) -> None:
        state = pipe.unet.state_dict()
        for name, tensor in self._kept.items():
            state[name].copy_(tensor + (0 if self.faithful else 1e-6))
        self._kept.clear()


class Oracle:
    """Knows what was rendered (by the picture's bytes), and errs now and then."""

    def __init__(self, name: str, truth: dict[bytes, str], *, errors: float) -> None:
        self.name, self.truth, self.errors = name, truth, errors
        self._labels = (*spec().concepts, "nothing")
        figures = {"sensitivity": {"concept": 1 - errors}, "specificity": {"concept": 1 - errors / 80}}
        self.card = DetectorCard(
            name, "demo", preprocessing="none", labels={"concept": self._labels}, notes="Fabricated.", **figures
        )

    def labels(self, attribute: str) -> tuple[str, ...]:
        return self._labels if attribute == "concept" else ()

    def scores(self, images: Sequence[Image.Image], attribute: str) -> np.ndarray:
        rows = np.full((len(images), len(self._labels)), 0.001)
        for row, image in zip(rows, images, strict=True):
            rng = np.random.default_rng(list(image.tobytes()[::997]) + [sum(self.name.encode())])
            label = self.truth.get(image.tobytes(), "nothing")
            if rng.random() < self.errors:
                label = str(rng.choice(self._labels))
            row[self._labels.index(label)] = 1
        return rows / rows.sum(1, keepdims=True)


def demo_evaluation() -> Evaluation:
    """A fabricated evaluation of the superhero suite: renders stand in for generations, oracles for detectors."""
    suite, world = Suite.load("superhero"), spec()
    truth: dict[bytes, str] = {}
    detectors = (Oracle("classifier", truth, errors=0.02), Oracle("clip[tiny]", truth, errors=0.05))
    job = _Job(suite, tuple(suite.prompts()), (0, 1), detectors, None, {})
    # what is drawn for the target, then how often a neighbour and an unrelated thing are lost
    arms = {
        "base": (["superhero"] * 40 + ["supervillain"], 0.01, 0.01),
        "uce": (["ninja", "elf", "elf", "astronaut", "supervillain", "genie", "ninja", "vampire"], 0.05, 0.01),
        "esd": ([None, None, "genie", None, "superhero", "rose"], 0.24, 0.03),
    }
    records, pictures = [], []
    for arm, (instead, near, far) in arms.items():
        images = []
        for prompt in job.prompts:
            row = []
            for seed in job.seeds:
                rng = np.random.default_rng([len(prompt.text), seed, *prompt.text.encode()])
                style = next((s for s in world.styles if s in prompt.text), str(rng.choice(list(world.styles))))
                colour = next(
                    (b for b in world.backgrounds if b in prompt.text), str(rng.choice(list(world.backgrounds)))
                )
                placement, chance = (
                    place(rng, 0, 1),
                    np.random.default_rng([*prompt.text.encode(), seed, *arm.encode()]),
                )
                lost = chance.random() < {"target": 1, "neighbours": near, "unrelated": far}[prompt.group]
                choices = instead if prompt.group == "target" else [None, "elf", "wizard"]
                shown = choices[chance.integers(len(choices))] if lost else prompt.label
                if shown is None:
                    image = compose([], [], world.backgrounds[colour].rgb)
                    noise = chance.normal(0, 14, (64, 64, 3))
                    image = Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))
                else:
                    image = render(Scene((shown,), style, colour, (placement,)))
                truth[image.tobytes()] = shown or "nothing"
                row.append(image)
            images.append(row)
        rows = [
            dataclasses.replace(
                r,
                clip_cosine=0.31 - 0.02 * len(arm) * (r.group == "target"),
                clip_hit=r.verdicts["clip[tiny]"].hit,
            )
            for r in _records(arm, job, images)
        ]
        records += rows
        pictures += _pictures(job, images, rows)
    value = {"base": 2.1, "uce": 2.4, "esd": 5.9}
    return Evaluation(
        suite=suite,
        arms=tuple(Arm(name, f"{i}" * 40, {"method": name, "preset": "official-2025"}) for i, name in enumerate(arms)),
        detectors={d.name: d.card for d in detectors},
        records=tuple(records),
        pictures=tuple(pictures),
        distances=tuple(
            Distance(arm, "frechet[clip[tiny]]", Estimate(v, None, None, "point", 160, 160)) for arm, v in value.items()
        ),
        settings={
            "base": "emoji-world", "base_weights": "0" * 40, "scheduler": "DDIMScheduler", "num_inference_steps": 25,
            "guidance_scale": 5.0, "seeds": [0, 1], "clip": "clip[tiny]", "autocast": False,
            "versions": {"torch": "2.15.0", "diffusers": "0.42.1", "python": "3.11"}, "seconds": 143.2,
        },
        warnings=("Fabricated for the demonstration of this page: renders, not generations.",),
    )  # fmt: skip
