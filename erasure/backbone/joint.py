"""FLUX.2, Qwen-Image, Z-Image, Wan and Chroma: text encoders behind chat templates, joint attention, video."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from erasure.backbone.generic import TransformerBackbone
from erasure.backbone.latents import pack, unpack
from erasure.backbone.noise import Flow
from erasure.backbone.streams import Streams
from erasure.backbone.text import Text

MULTIPLE = 32  # of tokens, to which Z-Image fills up the picture and the text


class Flux2Backbone(TransformerBackbone):
    """FLUX.2 dev: three layers of Mistral side by side, behind a system message and paddings on the left."""

    architecture = "flux2"
    pipelines = "FLUX.2 dev"
    entry = "context_embedder"
    encoded = ("hidden",)
    guidance = "embedded"
    noise = Flow("sigma")
    streams = Streams(apart="transformer_blocks", together="single_transformer_blocks")
    packs = True
    normalised_by = "batch_norm_eps"

    def call_latents(self, noise: Tensor) -> Tensor:
        """The call takes ``(n, C, h, w)`` where the denoiser reads ``(n, h w, C)``."""
        return noise.unflatten(1, (self.rows, -1)).permute(0, 3, 1, 2)

    def normalised(self, z: Tensor) -> Tensor:
        """By the statistics of the autoencoder's batch norm, which has a channel for every place of a token."""
        mean, std = self._statistics(z)
        return unpack((pack(z) - mean) / std, z.shape[2] // 2)

    def encoded_from(self, grid: Tensor) -> Tensor:
        mean, std = self._statistics(grid)
        return unpack(pack(grid) * std + mean, grid.shape[2] // 2)

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        norm = self.autoencoder.bn
        std = (norm.running_var.float() + self.autoencoder.config.batch_norm_eps).sqrt()
        return norm.running_mean.to(like), std.to(like)


class Flux2KleinBackbone(Flux2Backbone):
    """FLUX.2 klein: three layers of Qwen3 side by side. Padding is not masked and carries the prompt."""

    architecture = "flux2-klein"
    pipelines = "FLUX.2 klein"
    guidance_calls = True
    null_prompt = ""

    @property
    def guidance(self) -> Literal["cfg", "none"]:  # type: ignore[override]
        """None in the distilled models."""
        return "none" if getattr(self.pipe.config, "is_distilled", True) else "cfg"  # the KV pipeline does not say

    def from_call(self, latents: Tensor) -> Tensor:
        """The call returns what the autoencoder decodes."""
        return self.of_grid(self.normalised(latents))


class QwenImageBackbone(TransformerBackbone):
    """Qwen-Image: the last layer of Qwen2.5-VL without its template's prefix, through ``RMSNorm, linear``."""

    architecture = "qwen-image"
    pipelines = "Qwen-Image"
    entry = "txt_in"
    norm = "txt_norm"
    encoded = ("hidden", "mask")
    text_arguments = {"encoder_hidden_states": "hidden", "encoder_hidden_states_mask": "mask"}
    prompt_arguments = {"prompt_embeds": "hidden", "prompt_embeds_mask": "mask"}
    guidance_argument = "true_cfg_scale"
    cuts = True
    guidance_calls = True
    null_prompt = " "
    noise = Flow("sigma")
    streams = Streams(apart="transformer_blocks")
    packs = True
    video_autoencoder = True
    normalised_by = "latents_mean"

    def encode_prompt(self, prompts: list[str]) -> Sequence[Any]:
        """With a mask also where no prompt is padded."""
        hidden, mask = super().encode_prompt(prompts)
        return hidden, torch.ones(hidden.shape[:2], dtype=torch.long, device=hidden.device) if mask is None else mask

    def _normalisation(self, like: Tensor) -> tuple[Any, Any]:
        return by_channel(self.autoencoder.config, like)

    def row_of(self, first: int, tokens: int, rows: int) -> int:
        """The template's prefix is cut off each prompt, wherever its padding stands; what is too long is cut behind."""
        return -self.pipe.prompt_template_encode_start_idx


class ZImageBackbone(TransformerBackbone):
    """Z-Image: the last but one layer of Qwen3 through ``RMSNorm, linear``; time runs backwards, inputs are lists."""

    architecture = "z-image"
    pipelines = "Z-Image"
    entry = "cap_embedder.1"
    norm = "cap_embedder.0"
    encoded = ("hidden", "mask")
    latent_argument = "x"
    time_argument = "t"
    cuts = True
    text_arguments = {"cap_feats": "hidden"}
    no_guidance = 0.0
    null_prompt = ""
    noise = Flow("one_minus_sigma", sign=-1)
    streams = Streams(together="layers", text_first=False)
    latent_dtype = torch.float32

    def encode_prompt(self, prompts: list[str]) -> Sequence[Any]:
        """The ragged list of the pipeline as one tensor and a mask."""
        rows, _ = self.pipe.encode_prompt(
            prompts,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        lengths = torch.tensor([len(row) for row in rows])
        hidden = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = torch.arange(hidden.shape[1])[None] < lengths[:, None]
        return hidden, mask.to(hidden.device)

    def row_of(self, first: int, tokens: int, rows: int) -> int:
        """Nothing is cut at the front; what is padded behind is cut."""
        return first

    def text_list(self, text: Text) -> list[Tensor]:
        """One ``(length, d)`` tensor a prompt, without its padding."""
        masks = text.mask if text.mask is not None else torch.ones(text.hidden.shape[:2], dtype=torch.bool)
        return [row[mask.bool()] for row, mask in zip(text.hidden, masks, strict=True)]

    def text_inputs(self, text: Text) -> dict[str, Any]:
        return {"cap_feats": self.text_list(text)}

    def prompt_inputs(self, text: Text) -> dict[str, Any]:
        return {"prompt_embeds": self.text_list(text)}

    def text_rows(self, inputs: Mapping[str, Any]) -> slice:
        """Behind the picture, filled up to a multiple of 32: the longest prompt of the batch, and the others to it."""
        longest = max(len(row) for row in self.text_of(inputs))
        return slice(-longest // MULTIPLE * MULTIPLE, None)

    def packed(self, x: Tensor) -> list[Tensor]:
        return list(x)

    def unpacked(self, x: Any) -> Tensor:
        return torch.stack(list(x))

    def output(self, raw: Any) -> Tensor:
        return torch.stack(list(raw))

    def call_latents(self, noise: Tensor) -> Tensor:
        """The denoiser reads pictures as videos of one frame."""
        return noise.squeeze(2)

    def from_call(self, latents: Tensor) -> Tensor:
        return latents.unsqueeze(2)


class WanBackbone(TransformerBackbone):
    """Wan 2.1 and 2.2: UMT5 tokens with zeros behind them, through ``linear, GELU, linear``; one or two denoisers.

    Pictures (one frame) by default; ``call={"num_frames": 81}`` for the pipeline's own length.
    """

    architecture = "wan"
    pipelines = "Wan 2.1 / 2.2"
    denoisers = ("transformer", "transformer_2")
    entry = "condition_embedder.text_embedder.linear_1"
    encoded = ("hidden",)
    guidance_calls = True
    noise = Flow("thousandths")
    latent_dtype = torch.float32
    call = {"num_frames": 1}
    video_autoencoder = True
    normalised_by = "latents_mean"

    def stops(self, hidden: Tensor, mask: Tensor | None) -> tuple[int, ...]:
        """Behind the last row that is not zero: the others are the same for every prompt."""
        used = hidden.abs().sum(dim=-1) > 0
        return tuple(int(row.nonzero().max()) + 1 if row.any() else 0 for row in used)

    def _normalisation(self, like: Tensor) -> tuple[Any, Any]:
        return by_channel(self.autoencoder.config, like)

    def part_at(self, t: float) -> str:
        ratio = getattr(self.pipe.config, "boundary_ratio", None)
        steps = self.pipe.scheduler.config.num_train_timesteps
        return "transformer" if ratio is None or t >= ratio * steps else "transformer_2"


class ChromaBackbone(TransformerBackbone):
    """Chroma: T5 tokens. Its attention adds the mask instead of excluding by it, so that padding is read as well."""

    architecture = "chroma"
    pipelines = "Chroma"
    entry = "context_embedder"
    encoded = ("hidden", None, "mask")
    prompt_arguments = {"prompt_embeds": "hidden", "prompt_attention_mask": "mask"}
    guidance_calls = True
    reads_padding = True
    noise = Flow("sigma")
    streams = Streams(apart="transformer_blocks", together="single_transformer_blocks")
    packs = True

    def with_text(self, inputs: Mapping[str, Any], text: Text) -> dict[str, Any]:
        """The mask stands before that of the picture's tokens."""
        picture = inputs["attention_mask"][:, text.hidden.shape[1] :]
        mask = torch.ones(text.hidden.shape[:2]) if text.mask is None else text.mask
        joint = torch.cat([mask.to(picture), picture], dim=1)
        return {**super().with_text(inputs, text), "attention_mask": joint}


def by_channel(config: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean, and one over the spread, of every channel of an autoencoder's latents ``(n, c, h, w)``."""
    mean, std = (
        torch.tensor(values).to(like).reshape(1, -1, 1, 1) for values in (config.latents_mean, config.latents_std)
    )
    return mean, 1 / std


__all__ = [
    "ChromaBackbone",
    "Flux2Backbone",
    "Flux2KleinBackbone",
    "QwenImageBackbone",
    "WanBackbone",
    "ZImageBackbone",
]
