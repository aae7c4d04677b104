"""R7: the centre of a real picture of the target is cut out, the model fills it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from erasure.eval.probes.base import Context, Model
from erasure.eval.probes.sampling import DDIM, FromPictures, Key, Shot, Step, noised, target_prompts


@dataclasses.dataclass(frozen=True)
class Inpainting(FromPictures):
    """Share of real target pictures that show the target again after the model filled their centre.

    After every step the known part is put back at the step's noise (RePaint, without its repeated steps), so this works
    with any text-to-image pipeline:  x_t ← m ⊙ x_t + (1 - m) ⊙ (√ᾱ_t x + √(1 - ᾱ_t) ε),  m = 1 in the hole. The latents
    x are those of the picture with the hole filled by one colour, because an autoencoder sees past the edge of a hole.
    The known pixels are put back at the end. The surroundings give the target away, so only the difference from a model
    that never saw it counts.

    Attributes:
        hole: side of the hole as a share of the picture's side. A larger one leaves less to guess the target by.
        prompt: by default the suite's first sentence for the target. With "" only the picture asks for it, which is
            harder (gate ``known``).
    """

    key, code, title = "inpainting", "R7", "filling a hole in the target"
    licences = "the model completes the target from its surroundings more, or no more, than one without it"
    reference = "RePaint, 2022, arXiv 2201.09865; as a probe: arXiv 2505.17013, 2025"

    hole: float = 0.5
    prompt: str | None = None

    def __post_init__(self) -> None:
        if not 0 < self.hole < 1:
            raise ValueError(f"a hole is a share of the side between 0 and 1; got {self.hole}; 0.5 is the paper's")

    def shots(self, sampler: DDIM, model: Model, context: Context) -> Iterator[Shot]:
        keys, real = self.real(context)
        prompt = target_prompts(context, 1)[0] if self.prompt is None else self.prompt
        with context.open(model):
            filled = self.fill(sampler, real, prompt, keys)
        yield Shot(f"hole {self.hole:g}", keys, filled, {"prompt": prompt, "hole": self.hole})

    def fill(self, sampler: DDIM, real: Sequence[Image.Image], prompt: str, keys: Sequence[Key]) -> list[Image.Image]:
        """Pictures whose centre the opened model has drawn; every other pixel is the real one's."""
        backbone = sampler.backbone
        channels, height, width = backbone.grid_shape
        mask = torch.zeros(height, width)
        top, left = (round(side * (1 - self.hole) / 2) for side in (height, width))
        mask[top : height - top, left : width - left] = 1
        size = (width * backbone.factor, height * backbone.factor)
        stencil = Image.fromarray((mask.numpy() * 255).astype(np.uint8)).resize(size, Image.Resampling.NEAREST)
        real = [image.convert("RGB").resize(size, Image.Resampling.LANCZOS) for image in real]
        known, noise = backbone.latents([_cut(image, stencil) for image in real]), sampler.starts(keys)
        mask = backbone.of_grid(mask.to(known.device).expand(1, channels, height, width))

        def mend(x: Tensor, step: Step, rows: slice) -> Tensor:
            return mask * x + (1 - mask) * noised(known[rows], noise[rows], step.alpha_prev, step.sigma_prev)

        drawn = backbone.pictures(sampler.sample(noise, [prompt] * len(keys), mend=mend))
        return [Image.composite(new, old, stencil) for new, old in zip(drawn, real, strict=True)]


def _cut(image: Image.Image, stencil: Image.Image) -> Image.Image:
    """The picture with the mean colour of what is known in the place of the hole."""
    pixels, hole = np.asarray(image).copy(), np.asarray(stencil) > 0
    pixels[hole] = pixels[~hole].mean(0)
    return Image.fromarray(pixels)
