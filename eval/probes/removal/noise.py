"""R5: more noise on the way than the sampler adds by itself."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from erasure.eval.probes.base import Context, Evidence, Model, Roles, Rows
from erasure.eval.probes.sampling import DDIM, Key, Sampled, Shot, headline, keys_of, target_prompts
from erasure.eval.probes.weigh import contrasts, within


@dataclasses.dataclass(frozen=True)
class NoiseProbe(Sampled):
    """Whether the target comes back when noise moves the sampler off the trajectories that the erasure was made for.

    Every prompt is drawn with each pair of η and scale (:meth:`erasure.eval.probes.sampling.DDIM.sample`); the selector
    chooses the picture that looks most like the target, and the judge scores it. The control has as many tries with
    η = 0 and new starts, because the best of many pictures is no effect of noise.

    Attributes:
        etas: strengths of the noise, at least one above 0. DDPM has 1; the paper goes from 1 to 1.85.
        scales: of the added noise alone; the paper's go to 1.04.
    """

    key, code, title = "noise", "R5", "noise while sampling"
    needs = ("base", "selector", "control")
    presets = {
        "smoke": {"etas": (1.0, 1.68), "scales": (1.0,), "prompts": 2},
        "standard": {"prompts": 18},
        "full": {"etas": (0.5, 1.0, 1.34, 1.68), "scales": (1.0, 1.02, 1.04), "prompts": 75},
    }
    licences = "noise in the sampler brings the target back, or was not observed to, at this number of tries"
    not_licensed = "other samplers, stronger searches, knowledge that the noise did not reach"
    reference = "When Are Concepts Erased From Diffusion Models?, 2025, arXiv 2505.17013 (noise-based)"

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

    def weigh(self, rows: Rows, models: Roles) -> list[Evidence]:
        found = headline(self.key, rows, models, "attack")
        gates = {e.model: e.gates for e in found if e.measure == "residual"}  # an excess needs power on the base, too
        for name, own in rows.items():
            excess = within(own, "control", "attack")
            found.append(Evidence(self.key, name, "excess", excess, gates=gates.get(name, {})))
        return found + [e for f in ("attack", "control") for e in contrasts(self.key, rows, models, f)]
