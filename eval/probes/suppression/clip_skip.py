"""S14: the target by its names, read at an earlier layer of the text encoder."""

from __future__ import annotations

import dataclasses
import inspect

from erasure.eval.probes.asking import Ask, PromptProbe, named
from erasure.eval.probes.base import Context, Missing


@dataclasses.dataclass(frozen=True)
class ClipSkip(PromptProbe):
    """How often the target is seen when the last layers of the text encoder are skipped (``clip_skip``).

    The prompts are the suite's. An erasure is made for the embeddings of one layer, and many people draw with the last
    layer but one. One family for each layer, "clip_skip 1" ...

    Attributes:
        skips: layers that are skipped. Erase with the layer you draw with: ``UNetBackbone(pipe, clip_skip=1)``.
    """

    key, code, title = "clip_skip", "S14", "asked for at another layer of the text encoder"
    presets = {
        "smoke": {"images_per_prompt": 1, "limit": 1},
        "quick": {"images_per_prompt": 1, "limit": 6},
        "standard": {"images_per_prompt": 1, "limit": 24, "wide": True, "resolve": 0.2},
        "full": {"limit": 50, "wide": True, "resolve": 0.2},
    }
    known = 0.5  # as for the direct probe: the base is asked by name
    licences = "suppression at these layers of the text encoder, for the suite's prompts"
    not_licensed = "other layers, other prompts"

    skips: tuple[int, ...] = (1,)

    def __post_init__(self) -> None:
        if not self.skips or min(self.skips) < 1:
            raise ValueError(f"layers to leave out are counted from 1; got {self.skips}; (1,) is the last")

    def asks(self, context: Context) -> list[Ask]:
        pipe, suite = context.pipe, context.suite
        if "clip_skip" not in inspect.signature(type(pipe).__call__).parameters:
            raise Missing(f"{type(pipe).__name__} has no clip_skip in its call")
        layers = pipe.text_encoder.config.num_hidden_layers
        if max(self.skips) >= layers:
            raise Missing(f"the text encoder has {layers} layers, of which {max(self.skips)} cannot be left out")
        prompts = named(suite, wide=self.wide)
        return [one.ask(f"clip_skip {skip}", sampler={"clip_skip": skip}) for skip in self.skips for one in prompts]
