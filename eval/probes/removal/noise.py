"""R5: more noise on the way than the sampler adds by itself."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import numpy as np
from PIL import Image

from erasure.eval.core.models import Model, Role
from erasure.eval.probes.base import Context, Evidence, Observation
from erasure.eval.probes.sampling import DDIM, Key, Sampled, Shot, headline, keys_of, target_prompts
from erasure.eval.probes.weigh import contrasts, values
from erasure.eval.stats import difference


@dataclasses.dataclass(frozen=True)
class NoiseProbe(Sampled):
    """Whether the target comes back when noise throws the sampler off the path that the erasure learnt to bend.

    Every prompt is drawn with each pair of η and scale (:meth:`erasure.eval.probes.sampling.DDIM.sample`); the selector
    takes the picture that looks most like the target and the judge says whether it is. The control has as many tries
    with η = 0 and new starts, selected and judged in the same way: a picture found among many is no effect of noise.

    Attributes:
        etas: strengths of the noise, at least one above 0. The paper goes from 1 to 1.85, past DDPM's 1.
        scales: of the added noise alone; the paper's go to 1.04.
        prompts: at most so many of the suite's. images_per_prompt: seeds of each, with all tries for every one.

    Raises:
        ValueError: no noise in it.
    """

    key: ClassVar = "noise"
    code: ClassVar = "R5"
    title: ClassVar = "noise while sampling"
    needs: ClassVar = ("base", "selector", "control")
    presets: ClassVar = {
        "smoke": {"etas": (1.0, 1.68), "scales": (1.0,), "prompts": 2},
        "standard": {},
        "full": {"etas": (0.5, 1.0, 1.34, 1.68), "scales": (1.0, 1.02, 1.04), "prompts": 75},
    }
    licences: ClassVar = "noise in the sampler brings the target back, or was not observed to, at this number of tries"
    not_licensed: ClassVar = "other samplers, stronger searches, knowledge that the noise did not reach"
    reference: ClassVar = "When Are Concepts Erased From Diffusion Models?, 2025, arXiv 2505.17013 (noise-based)"

    etas: tuple[float, ...] = (1.0, 1.34, 1.68)
    scales: tuple[float, ...] = (1.0,)
    prompts: int = 12
    images_per_prompt: int = 1

    def __post_init__(self) -> None:
        if min(self.etas, default=-1) < 0 or not max(self.etas, default=0) or not min(self.scales, default=0) > 0:
            raise ValueError(
                f"noise needs etas of 0 and more, one of them above 0, and positive scales; got {self.etas} and "
                f"{self.scales}; 1.0 and 1.0 are DDPM's"
            )

    def budget(self) -> str:
        tries = len(self.etas) * len(self.scales)
        return f"{tries} kinds of noise on each of {self.prompts} prompts, {self.images_per_prompt} times"

    def shots(self, sampler: DDIM, model: Model, context: Context) -> Iterator[Shot]:
        keys = keys_of(target_prompts(context, self.prompts), self.images_per_prompt)
        grid = list(itertools.product(self.etas, self.scales))
        prompts = [prompt for prompt, _ in keys]
        with context.open(model):
            noisy = [self._draw(sampler, keys, eta=eta, scale=scale) for eta, scale in grid]
            fresh = [
                self._draw(sampler, [(prompt, (1 + k) * self.images_per_prompt + seed) for prompt, seed in keys])
                for k in range(len(grid))
            ]
        for family, drawn in (("attack", noisy), ("control", fresh)):
            scores = [[seen["score"] for seen in context.see(own, detector=context.chooser)] for own in drawn]
            best = np.argmax(scores, axis=0).tolist()  # the best try of each prompt
            settings = [{"eta": eta, "scale": scale} if family == "attack" else {"eta": 0.0} for eta, scale in grid]
            facts = [{"prompt": prompts[i], "tries": len(grid), **settings[k]} for i, k in enumerate(best)]
            yield Shot(family, keys, [drawn[k][i] for i, k in enumerate(best)], facts)

    def _draw(self, sampler: DDIM, keys: Sequence[Key], *, eta: float = 0.0, scale: float = 1.0) -> list[Image.Image]:
        prompts = [prompt for prompt, _ in keys]
        latents = sampler.sample(sampler.starts(keys), prompts, eta=eta, scale=scale, keys=keys)
        return sampler.backbone.pictures(latents)

    def weigh(self, rows: Mapping[str, Sequence[Observation]], models: Mapping[str, Role]) -> list[Evidence]:
        found = headline(self.key, rows, models, "attack")
        gates = {e.model: e.gates for e in found if e.measure == "residual"}  # no power on the base, no excess either
        for name, own in rows.items():
            keys = [(row.cluster, row.seed) for row in own if row.family == "attack"]
            control, attack = (values(own, [(f, c, s) for c, s in keys]) for f in ("control", "attack"))
            excess = difference(control, attack, [cluster for cluster, _ in keys])
            found.append(Evidence(self.key, name, "excess", excess, gates=gates.get(name, {})))
        return found + [e for f in ("attack", "control") for e in contrasts(self.key, rows, models, f)]
