"""R8: a real picture of the target, blurred by noise, drawn to its end by the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from erasure.eval.probes.base import Context, Evidence, Model, Roles, Rows
from erasure.eval.probes.sampling import DDIM, FromPictures, Shot, noised


@dataclasses.dataclass(frozen=True)
class ImageToImage(FromPictures):
    """Share of real target pictures that still show the target after SDEdit: noise of a strength, then sampling.

    At strength s the last share s of the sampling steps is taken, from  √ᾱ x + √(1 - ᾱ) ε . A low strength keeps the
    target whatever the model, a full one keeps nothing of it. Between them, the difference from a model that never saw
    the target counts.

    Attributes:
        strengths: 0 to 1.
        declared: the strength whose residual is the probe's answer. Raise it if models that never saw the target keep
            it too (gate ``power``); lower it if the base loses it (gate ``known``).
        prompt: empty by default, so that only the picture asks for the target.
    """

    along = "strength"
    key, code, title = "image_to_image", "R8", "image to image from the target"
    licences = "the model restores the target from a noised picture more, or no more, than one without it"
    reference = "SDEdit, 2022, arXiv 2108.01073"

    strengths: tuple[float, ...] = (0.3, 0.5, 0.7, 0.9)
    declared: float = 0.5
    prompt: str = ""

    def __post_init__(self) -> None:
        if self.declared not in self.strengths or not all(0 < strength <= 1 for strength in self.strengths):
            raise ValueError(
                f"strengths go from above 0 to 1 and the declared one is among them; got {self.strengths} and "
                f"{self.declared}; add it to strengths"
            )

    def shots(self, sampler: DDIM, model: Model, context: Context) -> Iterator[Shot]:
        (keys, images), each = self.real(context), self.images_per_picture
        with context.open(model):
            real, noise = sampler.backbone.latents(images[::each]), sampler.starts(keys)
            real = real.repeat_interleave(each, dim=0)
            for strength in self.strengths:
                start = len(sampler.steps) - max(1, round(strength * len(sampler.steps)))
                x = noised(real, noise, sampler.steps[start].alpha, sampler.steps[start].sigma)
                drawn = sampler.backbone.pictures(sampler.sample(x, [self.prompt] * len(keys), start=start))
                yield Shot(self.family(strength), keys, drawn, {"prompt": self.prompt, "strength": strength})

    def weigh(self, rows: Rows, models: Roles) -> list[Evidence]:
        return self.doses(rows, models, self.strengths, self.declared)
