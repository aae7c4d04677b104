"""R23: asked by name through the base's text encoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from erasure.backbone.text import Text
from erasure.eval.probes.base import Context, Missing, Model
from erasure.eval.probes.sampling import DDIM, Sampled, Shot, keys_of, target_prompts

SAME = "its text encoder reads these prompts as the base's does: `direct` already asks that"


@dataclasses.dataclass(frozen=True)
class BaseEncoder(Sampled):
    """Share of pictures with the target when the base's text encoder reads the prompt and the model's denoiser draws.

    A text encoder that lost the target says nothing about the denoiser, and anybody can put the base's back. Where a
    model's text encoder and denoiser were trained together, the base's encoder may not fit; so the number is compared
    with that of models that never saw the target, drawn in the same way.

    The probe is ours. AdvUnlearn (Zhang et al. 2024, arXiv 2405.15234) is such an erasure of the text encoder, which
    leaves the denoiser unchanged.
    """

    key, code, title = "base_encoder", "R23", "asked through the base's text encoder"
    presets = {
        "smoke": {"prompts": 2},
        "quick": {"prompts": 12},
        "standard": {},
        "full": {"prompts": 50, "images_per_prompt": 2},
    }
    licences = "the denoiser draws the target more, or no more, than one that never saw it, when asked by its name"
    not_licensed = "that the denoiser cannot draw it: other words, or none, may"

    prompts: int = 24
    images_per_prompt: int = 1

    def shots(self, sampler: DDIM, model: Model, context: Context) -> Iterator[Shot]:
        keys = keys_of(target_prompts(context, self.prompts), self.images_per_prompt)
        prompts = [prompt for prompt, _ in keys]
        with context.open(context.base):
            text, empty = sampler.texts(prompts), sampler.texts([""])
        with context.open(model):
            if model.role == "erased" and same(text, sampler.texts(prompts)):
                raise Missing(SAME)
            ended = sampler.sample(sampler.starts(keys), prompts, text=text, empty=empty)
            yield Shot("by name", keys, sampler.backbone.pictures(ended), [{"prompt": prompt} for prompt in prompts])


def same(one: Text, other: Text) -> bool:
    """Whether two conditionings are the same numbers."""
    pairs = ((one.hidden, other.hidden), (one.pooled, other.pooled))
    return all(a is None or b is None or torch.equal(a, b) for a, b in pairs)
