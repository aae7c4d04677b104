"""What the tests of probes share: a tiny assessment with every role in it, cheap material, fabricated rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from erasure.backbone import backbone_of
from erasure.concept import Concept, Suite, Words
from erasure.eval.core.material import Example
from erasure.eval.core.models import Model, Swapped, randomised
from erasure.eval.probes.base import Context, Observation
from tests.eval_helpers import AddNoise, PixelDetector
from tests.tiny import tiny_pipeline

SUITE = Suite(
    version=1,
    name="tiny",
    concept=Concept("cat", neighbours=("dog",), synonyms=("kitty",), templates=("{}", "a picture of {}")),
    unrelated=("sun",),
    words=Words(
        paraphrases=("house cat",),
        misspellings=("caat",),
        descriptions=("a pet that meows",),
        superclasses=("an animal",),
        translations={"es": ("un gato",)},
        beside=("a house",),
    ),
    images_per_prompt=1,
    num_inference_steps=2,
)
ROLES = {"base": "base", "UCE": "erased", "gold-0": "gold", "gold-1": "gold", "start": "null"}


class TinyMaterial:
    """Flat pictures: dark ones are cats, bright ones something else."""

    key = "tiny"

    def target(self, count: int, *, seed: int = 0, member: bool | None = False) -> list[Example]:
        return [self._example("cat", 20, i, seed, member) for i in range(count)]

    def kept(
        self, count: int, *, seed: int = 0, member: bool | None = False, labels: Sequence[str] | None = None
    ) -> list[Example]:
        return [
            self._example((labels or ("dog", "sun"))[i % len(labels or "12")], 120, i, seed, member)
            for i in range(count)
        ]

    def _example(self, label: str, level: int, i: int, seed: int, member: bool | None) -> Example:
        rng = np.random.default_rng([level, i, seed, bool(member)])
        pixels = rng.normal(level, 12, (16, 16, 3)).clip(0, 255).astype(np.uint8)
        return Example(Image.fromarray(pixels), f"a {label}", label, f"{label} {i} {seed} {member}", member)


class TextNoise:
    """An erasure that does nothing clever on any architecture: it shifts the layers by which the text enters."""

    name, config = "noise", {"method": "noise"}

    def apply(self, pipe: Any) -> None:
        generator = torch.Generator().manual_seed(7)
        layers = [site.linear.weight.data for site in backbone_of(pipe).text_sites().values()]
        self._kept = [(weight, weight.clone()) for weight in layers]
        for weight in layers:
            weight += 0.5 * torch.randn(weight.shape, generator=generator)

    def remove(self, pipe: Any) -> None:
        for weight, before in self._kept:
            weight.copy_(before)


def tiny_context(*, architecture: str | None = None, **changes: Any) -> Context:
    """Base, one erasure, two "retrained" models (other random weights), a null with a random denoiser.

    Args:
        architecture: of :func:`tests.small.small`; by default the small Stable Diffusion 1.x of most tests.
    """
    from tests.small import small  # which imports every architecture

    pipe, *golds = (
        tiny_pipeline(seed=seed) if architecture is None else small(architecture, seed=seed) for seed in (0, 1, 2)
    )
    part = "unet" if hasattr(pipe, "unet") else "transformer"
    edit = AddNoise(scale=0.5) if architecture is None else TextNoise()
    models = [
        Model("base", "base"),
        Model("noise", "erased", edit),
        *(Model(f"gold-{i}", "gold", Swapped(f"gold-{i}", {part: getattr(g, part)})) for i, g in enumerate(golds)),
        Model("random", "null", randomised(pipe, seed=9)),
    ]
    given = {
        "pipe": pipe,
        "models": {model.name: model for model in models},
        "suite": SUITE,
        "judge": PixelDetector(),
        "selector": PixelDetector("other pixels"),
        "material": TinyMaterial(),
        "batch_size": 8,
        "progress": False,
    }
    return Context(**{**given, **changes})


def rows_of(
    rates: Mapping[str, float], *, prompts: int = 20, seeds: int = 2, family: str = "name", seed: int = 0
) -> dict[str, list[Observation]]:
    """Fabricated 0/1 observations: for each model of ``rates`` hits with that probability."""
    torch.manual_seed(seed)
    return {
        name: [
            Observation(name, family, f"prompt {p}", s, float(torch.rand(()) < rate))
            for p in range(prompts)
            for s in range(seeds)
        ]
        for name, rate in rates.items()
    }
