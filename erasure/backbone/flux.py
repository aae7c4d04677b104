"""FLUX.1: T5 tokens, a pooled CLIP embedding, and guidance that is given to the denoiser as a number."""

from __future__ import annotations

from typing import Any

from erasure.backbone.base import Backbone, Site, Space
from erasure.backbone.noise import Flow
from erasure.backbone.sd3 import named_sites
from erasure.backbone.streams import Streams
from erasure.backbone.text import Conditioning, Segment, in_batches, tokenise


class FluxBackbone(Backbone):
    """FLUX.1: T5 tokens, and the pooled vector of a CLIP encoder whose tokens are not used.

    Args:
        max_sequence_length: T5 tokens a prompt is padded to, 512 as in the pipeline. T5 sees its padding, so give what
            you draw with: ``erase(FluxBackbone(pipe, max_sequence_length=256), ...)`` for FLUX.1 schnell as its authors
            run it.
    """

    architecture = "flux"
    pipelines = "FLUX.1"
    requires = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
    spaces = ("hidden", "pooled")
    text_arguments = {"encoder_hidden_states": "hidden", "pooled_projections": "pooled"}
    prompt_arguments = {"prompt_embeds": "hidden", "pooled_prompt_embeds": "pooled"}
    guidance = "embedded"
    noise = Flow("sigma")
    streams = Streams(apart="transformer_blocks", together="single_transformer_blocks")
    packs = True

    def __init__(self, pipe: Any, *, max_sequence_length: int = 512, **options: Any) -> None:
        self.max_sequence_length = max_sequence_length
        super().__init__(pipe, **options)

    def sites_of(self, denoiser: Any, space: Space) -> dict[str, Site]:
        """The layer that embeds the tokens, or the first of those that embed the pooled vector."""
        return named_sites(denoiser, space, hidden="context_embedder", pooled="time_text_embed.text_embedder.linear_1")

    def encoder_widths(self) -> dict[str, int]:
        clip, t5 = (getattr(self.pipe, name, None) for name in ("text_encoder", "text_encoder_2"))
        hidden = {} if t5 is None else {"hidden": t5.config.d_model}
        return hidden | ({} if clip is None else {"pooled": clip.config.hidden_size})

    def tokenizers(self) -> dict[str, tuple[Any, int]]:
        clip, t5 = self.pipe.tokenizer, self.pipe.tokenizer_2
        return {"tokenizer_2": (t5, self.max_sequence_length), "tokenizer": (clip, clip.model_max_length)}

    def _encode(self, prompts: list[str], *, padded: bool) -> Conditioning:
        """``hidden (n, 512, 4096)`` of T5, ``pooled (n, 768)`` of CLIP."""
        return in_batches(self._batch, prompts, self.batch_size)

    def _batch(self, prompts: list[str]) -> Conditioning:
        length = self.max_sequence_length
        ids, counts = tokenise(self.pipe.tokenizer_2, prompts, length=length, name="tokenizer_2")
        tokenise(self.pipe.tokenizer, prompts)
        hidden, pooled, _ = self.pipe.encode_prompt(
            prompts, prompt_2=None, device=self.device, max_sequence_length=length
        )
        return Conditioning(hidden, (Segment.of(hidden, ids, counts, bos=False),), pooled)


__all__ = ["FluxBackbone"]
