"""PixArt, Sana, Lumina 2, AuraFlow, CogView4, LTX-Video and CogVideoX: one encoder, one entry layer."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from erasure.backbone.generic import TransformerBackbone
from erasure.backbone.noise import Flow, NoiseModel, diffusion_of
from erasure.backbone.streams import Streams

MASKED = {"prompt_embeds": "hidden", "prompt_attention_mask": "mask"}
MASKED_TEXT = {"encoder_hidden_states": "hidden", "encoder_attention_mask": "mask"}


class PixArtBackbone(TransformerBackbone):
    """PixArt-alpha and PixArt-Sigma: T5 through ``linear, GELU, linear``; the prediction holds a variance as well."""

    architecture = "pixart"
    pipelines = "PixArt-alpha / Sigma"
    entry = "caption_projection.linear_1"
    encoded = ("hidden", "mask")
    encode_call = {"do_classifier_free_guidance": False, "clean_caption": True}  # as the pipeline's call does
    lowercases = True
    text_arguments = MASKED_TEXT
    prompt_arguments = MASKED
    call = {"use_resolution_binning": False}

    def __init__(self, pipe: Any, *, max_sequence_length: int | None = None, **options: Any) -> None:
        length = 120 if type(pipe).__name__ == "PixArtAlphaPipeline" else 300
        super().__init__(pipe, max_sequence_length=max_sequence_length or length, **options)

    @property
    def noise(self) -> NoiseModel:
        return diffusion_of(self.pipe.scheduler, device=self.device)

    def output(self, raw: Tensor) -> Tensor:
        """The first half of the channels; the second is a variance that no sampler uses."""
        learned = self.denoiser.config.out_channels == 2 * self.denoiser.config.in_channels
        return raw.chunk(2, dim=1)[0] if learned else raw


class SanaBackbone(TransformerBackbone):
    """Sana: Gemma 2 behind a long instruction, of which the rows from the last token on are kept."""

    architecture = "sana"
    pipelines = "Sana"
    entry = "caption_projection.linear_1"
    encoded = ("hidden", "mask")
    lowercases = True
    default_length = 300
    text_arguments = MASKED_TEXT
    prompt_arguments = MASKED
    call = {"use_resolution_binning": False}
    noise = Flow("thousandths")

    def encode_prompt(self, prompts: list[str]) -> Any:
        """With the instruction that the pipeline's call puts before every prompt."""
        instruction = inspect.signature(self.pipe.__call__).parameters["complex_human_instruction"].default
        return self.pipe.encode_prompt(
            prompts,
            do_classifier_free_guidance=False,
            device=self.device,
            max_sequence_length=self.max_sequence_length,
            complex_human_instruction=instruction,
        )


class Lumina2Backbone(TransformerBackbone):
    """Lumina 2: Gemma 2 behind a system prompt, through ``RMSNorm, linear``; time runs backwards."""

    architecture = "lumina2"
    pipelines = "Lumina Image 2"
    entry = "time_caption_embed.caption_embedder.1"
    norm = "time_caption_embed.caption_embedder.0"
    encoded = ("hidden", "mask")
    default_length = 256
    text_arguments = MASKED_TEXT
    prompt_arguments = MASKED
    noise = Flow("one_minus_sigma", sign=-1)
    guidance_calls = True


class AuraFlowBackbone(TransformerBackbone):
    """AuraFlow: UMT5 tokens; behind them rows of zeros that the denoiser reads."""

    architecture = "auraflow"
    pipelines = "AuraFlow"
    entry = "context_embedder"
    default_length = 256
    noise = Flow("sigma")
    streams = Streams(apart="joint_transformer_blocks", together="single_transformer_blocks")

    def text_rows(self, inputs: Mapping[str, Any]) -> slice:
        """Behind the registers, which are learnt rows that every prompt has."""
        registers = self.denoiser.register_tokens.shape[1]
        return slice(registers, registers + super().text_rows(inputs).stop)

    def prompt_inputs(self, text: Any) -> dict[str, Any]:
        """The pipeline wants masks beside embeddings, and does nothing with them."""
        return {"prompt_embeds": text.hidden, "prompt_attention_mask": text.hidden[..., 0]}


class CogView4Backbone(TransformerBackbone):
    """CogView4: GLM tokens, filled up on the left to a multiple of sixteen; the encoder reads the filling."""

    architecture = "cogview4"
    pipelines = "CogView4"
    entry = "patch_embed.text_proj"
    default_length = 1024
    guidance_calls = True
    latent_dtype = torch.float32
    noise = Flow("thousandths")
    streams = Streams(together="transformer_blocks")


class LTXBackbone(TransformerBackbone):
    """LTX-Video: T5 through ``linear, GELU, linear``; latents are packed. Its scheduler cannot take a single step."""

    architecture = "ltx"
    pipelines = "LTX-Video"
    entry = "caption_projection.linear_1"
    encoded = ("hidden", "mask")
    default_length = 128
    text_arguments = MASKED_TEXT
    prompt_arguments = MASKED
    noise = Flow("thousandths")
    latent_dtype = torch.float32


class CogVideoXBackbone(TransformerBackbone):
    """CogVideoX 1.0 and 1.5: T5 through one layer, padding unmasked; latents are frames before channels."""

    architecture = "cogvideox"
    pipelines = "CogVideoX"
    entry = "patch_embed.text_proj"
    default_length = 226
    streams = Streams(together="transformer_blocks")

    @property
    def noise(self) -> NoiseModel:
        return diffusion_of(self.pipe.scheduler, device=self.device)


__all__ = [
    "AuraFlowBackbone",
    "CogVideoXBackbone",
    "CogView4Backbone",
    "LTXBackbone",
    "Lumina2Backbone",
    "PixArtBackbone",
    "SanaBackbone",
]
