"""Tiny randomly initialised pipelines, built from configs as users' pipelines are built, only small."""

from __future__ import annotations

import functools

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from erasure import erase
from erasure.world.train import learn_bpe

WORDS = [
    "a photo of a superhero",
    "a ninja and a wizard",
    "the cat in the style of van gogh",
    "spiderman, batman",
    "an animal",
]


@functools.cache
def tokenizer(length: int = 77) -> CLIPTokenizer:
    """CLIP's tokenizer class with a small vocabulary: words of WORDS are one piece, others several."""
    vocabulary, merges = learn_bpe(WORDS * 50, 700)
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=length)


def tiny_pipeline(
    *,
    width: int = 32,
    channels: tuple[int, ...] = (16, 32),
    prediction_type: str = "epsilon",
    seed: int = 0,
    length: int = 77,
) -> StableDiffusionPipeline:
    """A Stable Diffusion 1.x pipeline (2.x with ``prediction_type="v_prediction"``), random weights, eval mode."""
    torch.manual_seed(seed)
    words = tokenizer(length)
    text = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=length,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    levels = len(channels)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=channels,
        layers_per_block=1 if levels == 2 else 2,
        down_block_types=("CrossAttnDownBlock2D",) * (levels - 1) + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (levels - 1),
        attention_head_dim=2,
        cross_attention_dim=width,
        norm_num_groups=8,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
    )
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text).eval(),
        tokenizer=words,
        unet=unet.eval(),
        scheduler=DDIMScheduler(
            prediction_type=prediction_type, clip_sample=False, set_alpha_to_one=False, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def weights(pipe: StableDiffusionPipeline) -> dict[str, torch.Tensor]:
    """A copy of every tensor of the UNet and the text encoder."""
    parts = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    return {
        f"{part}.{name}": tensor.clone()
        for part, module in parts.items()
        for name, tensor in module.state_dict().items()
    }


def identical(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Bit for bit the same."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


make = functools.partial(erase, apply=False)
