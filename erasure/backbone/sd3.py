"""Stable Diffusion 3 and 3.5: CLIP and T5 in one sequence, with a pooled CLIP embedding beside the timestep."""

from __future__ import annotations

from typing import Any

from torch import nn

from erasure.backbone.base import Backbone, Site, Space
from erasure.backbone.noise import Flow
from erasure.backbone.streams import Streams
from erasure.backbone.text import Conditioning, Segment, in_batches, tokenise


class SD3Backbone(Backbone):
    """Stable Diffusion 3 and 3.5: 77 CLIP tokens, then T5's. Works without T5, as the pipeline does.

    Text enters by one biased layer, the pooled embedding by another. Biases stay as they are.

    Args:
        max_sequence_length: T5 tokens a prompt is padded to, 256 as in the pipeline. T5 sees its padding, so give what
            you draw with.
    """

    architecture = "sd3"
    pipelines = "Stable Diffusion 3 / 3.5"
    requires = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
    spaces = ("hidden", "pooled")
    text_arguments = {"encoder_hidden_states": "hidden", "pooled_projections": "pooled"}
    prompt_arguments = {"prompt_embeds": "hidden", "pooled_prompt_embeds": "pooled"}
    noise = Flow("thousandths")
    streams = Streams(apart="transformer_blocks", text_first=False)

    def __init__(self, pipe: Any, *, max_sequence_length: int = 256, **options: Any) -> None:
        self.max_sequence_length = max_sequence_length
        super().__init__(pipe, **options)

    def sites_of(self, denoiser: Any, space: Space) -> dict[str, Site]:
        """The layer that embeds the tokens, or the first of those that embed the pooled vector."""
        return named_sites(denoiser, space, hidden="context_embedder", pooled="time_text_embed.text_embedder.linear_1")

    def encoder_widths(self) -> dict[str, int]:
        names = ("text_encoder", "text_encoder_2", "text_encoder_3")
        *clips, t5 = (getattr(self.pipe, name, None) for name in names)
        pooled = sum(clip.config.projection_dim for clip in clips if clip is not None)
        return {"pooled": pooled} | ({"hidden": t5.config.d_model} if t5 is not None else {})

    def tokenizers(self) -> dict[str, tuple[Any, int]]:
        clips = ((name, getattr(self.pipe, name)) for name in ("tokenizer", "tokenizer_2"))
        read = {name: (tokenizer, tokenizer.model_max_length) for name, tokenizer in clips}
        if self.pipe.text_encoder_3 is not None:
            read["tokenizer_3"] = (self.pipe.tokenizer_3, self.max_sequence_length)
        return read

    def _encode(self, prompts: list[str], *, padded: bool) -> Conditioning:
        """``hidden (n, 77 + 256, 4096)``, ``pooled (n, 2048)``, both encoders' side by side.

        The first segment holds both CLIP encoders' last but one layers side by side, filled up with zeros; its token
        positions are the first tokenizer's. The second is T5's; without T5 there are zeros in its place.
        """
        return in_batches(self._batch, prompts, self.batch_size)

    def _batch(self, prompts: list[str]) -> Conditioning:
        ids, counts = tokenise(self.pipe.tokenizer, prompts)
        tokenise(self.pipe.tokenizer_2, prompts, name="tokenizer_2")
        t5 = None
        if self.pipe.text_encoder_3 is not None:
            t5 = tokenise(self.pipe.tokenizer_3, prompts, length=self.max_sequence_length, name="tokenizer_3")
        hidden, _, pooled, _ = self.pipe.encode_prompt(
            prompts,
            prompt_2=None,
            prompt_3=None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        clip = ids.shape[1]
        segments = [Segment.of(hidden[:, :clip], ids, counts)]
        if t5 is not None:
            segments.append(Segment.of(hidden[:, clip:], *t5, bos=False))
        return Conditioning(hidden, tuple(segments), pooled)


def named_sites(
    denoiser: nn.Module, space: Space, *, hidden: str, pooled: str | None = None, norm: str | None = None
) -> dict[str, Site]:
    """The one entry of a space by its module's name; empty where the denoiser has no such linear layer."""
    name = hidden if space == "hidden" else pooled
    modules = dict(denoiser.named_modules())
    linear = modules.get(name or "")
    if not isinstance(linear, nn.Linear):
        return {}
    return {str(name): Site(linear, "entry" if space == "hidden" else "pooled", modules[norm] if norm else None)}
