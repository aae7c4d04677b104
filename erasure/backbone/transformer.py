"""Stable Diffusion 3 / 3.5 and FLUX: transformers that read T5, with a pooled CLIP embedding beside the timestep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from erasure.backbone.base import Backbone, Site, Space
from erasure.backbone.text import Conditioning, Segment, encode_with, some, tokenise


class TransformerBackbone(Backbone):
    """What both share: text enters by one biased layer, the pooled embedding by another. Biases stay as they are.

    Behind the first layer the text is no embedding any more but a stream of its own, so there is nothing else to edit.

    Args:
        max_sequence_length: T5 tokens a prompt is padded to, by default as many as the pipeline pads to when nothing
            is said. T5 sees its padding, so give what you draw with: ``erase(FluxBackbone(pipe,
            max_sequence_length=256), ...)`` for FLUX.1 schnell as its authors run it.
    """

    denoiser_name = "transformer"
    spaces = ("hidden", "pooled")
    default_length = 512

    def __init__(self, pipe: Any, *, max_sequence_length: int | None = None) -> None:
        super().__init__(pipe)
        self.max_sequence_length = max_sequence_length or self.default_length

    @property
    def prediction_type(self) -> str:
        """``velocity``: both are rectified flows."""
        return "velocity"

    @classmethod
    def sites_of(cls, denoiser: nn.Module, space: Space) -> dict[str, Site]:
        """The layer that embeds the tokens, or the first of those that embed the pooled vector."""
        name = {"hidden": "context_embedder", "pooled": "time_text_embed.text_embedder.linear_1"}[space]
        modules = dict(denoiser.named_modules())
        return {name: Site(modules[name])} if isinstance(modules.get(name), nn.Linear) else {}


class SD3Backbone(TransformerBackbone):
    """Stable Diffusion 3 and 3.5: 77 CLIP tokens, then T5's. Works without T5, as the pipeline does."""

    architecture = "sd3"
    pipelines = "Stable Diffusion 3 / 3.5"
    requires = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
    default_length = 256

    def encode(self, prompts: Sequence[str], *, padded: bool = True) -> Conditioning:
        """``hidden (n, 77 + 256, 4096)``, ``pooled (n, 2048)``, both encoders' side by side.

        The first segment holds both CLIP encoders' last but one layers side by side, filled up with zeros; its token
        positions are the first tokenizer's. The second is T5's; without T5 there are zeros in its place.
        """
        prompts = some(prompts)
        ids, counts = tokenise(self.pipe.tokenizer, prompts)
        tokenise(self.pipe.tokenizer_2, prompts, name="tokenizer_2")
        t5 = None
        if self.pipe.text_encoder_3 is not None:
            t5 = tokenise(self.pipe.tokenizer_3, prompts, length=self.max_sequence_length, name="tokenizer_3")
        hidden, pooled = encode_with(
            self.pipe,
            prompts,
            prompt_3=None,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        clip = ids.shape[1]
        segments = [Segment(hidden[:, :clip], ids, counts)]
        if t5 is not None:
            segments.append(Segment(hidden[:, clip:], *t5, bos=False))
        return Conditioning(hidden, tuple(segments), pooled)


class FluxBackbone(TransformerBackbone):
    """FLUX.1: T5 tokens, and the pooled vector of a CLIP encoder whose tokens are not used."""

    architecture = "flux"
    pipelines = "FLUX.1"
    requires = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")

    def encode(self, prompts: Sequence[str], *, padded: bool = True) -> Conditioning:
        """``hidden (n, 512, 4096)`` of T5, ``pooled (n, 768)`` of CLIP."""
        prompts = some(prompts)
        ids, counts = tokenise(self.pipe.tokenizer_2, prompts, length=self.max_sequence_length, name="tokenizer_2")
        tokenise(self.pipe.tokenizer, prompts)
        hidden, pooled = encode_with(self.pipe, prompts, max_sequence_length=self.max_sequence_length)
        return Conditioning(hidden, (Segment(hidden, ids, counts, bos=False),), pooled)
