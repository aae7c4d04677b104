"""Tiny random relatives of Stable Diffusion: UNets that differ from it in one thing, built from configs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from tests.tiny import autoencoder, clip_encoder, clip_tokenizer, unet


def vision_encoder(width: int) -> CLIPVisionModelWithProjection:
    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=32,
            patch_size=16,
            projection_dim=width,
        )
    )


def image_processor() -> CLIPImageProcessor:
    return CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


def picture(size: int) -> Image.Image:
    return Image.effect_mandelbrot((size, size), (-2, -1.5, 1, 1.5), 20).convert("RGB")


def ddim(**settings: Any) -> diffusers.DDIMScheduler:
    return diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1, **settings)


def _text(width: int = 32) -> dict[str, Any]:
    return {"text_encoder": clip_encoder(clip_tokenizer(), width), "tokenizer": clip_tokenizer()}


_UNGUARDED = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def _stable_diffusion(denoiser: Any, scheduler: Any = None) -> Any:
    return diffusers.StableDiffusionPipeline(
        vae=autoencoder(4), unet=denoiser, scheduler=scheduler or ddim(), **_text(), **_UNGUARDED
    )


def _upscaler() -> Any:
    """x4: in most blocks ``attn1`` reads the text too, the noise level is a class."""
    denoiser = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=7,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        only_cross_attention=(True, True, False),
        attention_head_dim=2,
        cross_attention_dim=32,
        norm_num_groups=8,
        num_class_embeds=1000,
        use_linear_projection=True,
    )
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(4, 4, 4),
        norm_num_groups=2,
        scaling_factor=0.08333,
    )
    return diffusers.StableDiffusionUpscalePipeline(
        vae=vae,
        unet=denoiser,
        low_res_scheduler=diffusers.DDPMScheduler(beta_schedule="scaled_linear"),
        scheduler=ddim(prediction_type="v_prediction"),
        max_noise_level=350,
        **_text(),
    )


def _animatediff() -> Any:
    """The usual way there: a Stable Diffusion UNet and a motion adapter; temporal layers as wide as the text."""
    adapter = diffusers.MotionAdapter(
        block_out_channels=(16, 32), motion_layers_per_block=1, motion_num_attention_heads=2, motion_norm_num_groups=8
    )
    return diffusers.AnimateDiffPipeline(
        vae=autoencoder(4),
        unet=unet(32),
        motion_adapter=adapter,
        scheduler=diffusers.DDIMScheduler(beta_schedule="linear", clip_sample=False, steps_offset=1),
        **_text(),
    )


def _text_to_video() -> Any:
    return diffusers.TextToVideoSDPipeline(
        vae=autoencoder(4),
        unet=diffusers.UNet3DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
            up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
            cross_attention_dim=32,
            attention_head_dim=4,
            norm_num_groups=8,
        ),
        scheduler=ddim(),
        **_text(),
    )


def _lcm() -> Any:
    return diffusers.LatentConsistencyModelPipeline(
        vae=autoencoder(4),
        unet=unet(32, time_cond_proj_dim=16),
        scheduler=diffusers.LCMScheduler(),
        **_text(),
        **_UNGUARDED,
    )


def _lcm_stable_diffusion() -> Any:
    """The same UNet in the ordinary pipeline: guidance becomes an embedding there too."""
    return _stable_diffusion(unet(32, time_cond_proj_dim=16), diffusers.LCMScheduler(steps_offset=1))


def _unclip() -> Any:
    """Class labels are noised image embeddings behind a projection."""
    return diffusers.StableUnCLIPImg2ImgPipeline(
        feature_extractor=image_processor(),
        image_encoder=vision_encoder(12),
        image_normalizer=StableUnCLIPImageNormalizer(embedding_dim=12),
        image_noising_scheduler=diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        unet=unet(32, class_embed_type="projection", projection_class_embeddings_input_dim=24),
        scheduler=ddim(prediction_type="v_prediction"),
        vae=autoencoder(4),
        **_text(),
    )


def _text_projection() -> Any:
    """``encoder_hid_proj`` between the text and every key and value, at equal widths."""
    return _stable_diffusion(unet(32, encoder_hid_dim=32, encoder_hid_dim_type="text_proj"))


def dual_cross_attention() -> Any:
    """Two transformers in a place, as in Versatile Diffusion. diffusers 0.42 builds it and cannot call it."""
    return _stable_diffusion(unet(32, dual_cross_attention=True))


def _inpainting() -> Any:
    return diffusers.StableDiffusionInpaintPipeline(
        vae=autoencoder(4), unet=unet(32, in_channels=9), scheduler=ddim(), **_text(), **_UNGUARDED
    )


def _refiner() -> Any:
    """SDXL's refiner has no first text encoder, and five numbers for its time ids."""
    words = clip_tokenizer("!")
    return diffusers.StableDiffusionXLImg2ImgPipeline(
        vae=autoencoder(4),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=clip_encoder(words, 24, projection=20),
        tokenizer_2=words,
        unet=unet(
            24,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=20 + 5 * 4,
        ),
        scheduler=diffusers.EulerDiscreteScheduler(),
        requires_aesthetics_score=True,
        add_watermarker=False,
    )


def _ip_adapter() -> Any:
    """Keys and values of an image sit in the attention processors, beside those of the text."""
    denoiser = unet(32)
    widths = [m.to_k.out_features for name, m in denoiser.named_modules() if name.endswith("attn2")]
    keys = {f"{2 * i + 1}.to_{kind}_ip.weight": torch.randn(w, 32) for i, w in enumerate(widths) for kind in "kv"}
    projection = {
        "proj.weight": torch.randn(4 * 32, 12),
        "proj.bias": torch.zeros(4 * 32),
        "norm.weight": torch.ones(32),
        "norm.bias": torch.zeros(32),
    }
    pipe = diffusers.StableDiffusionPipeline(
        vae=autoencoder(4),
        unet=denoiser,
        scheduler=ddim(),
        safety_checker=None,
        feature_extractor=image_processor(),
        requires_safety_checker=False,
        image_encoder=vision_encoder(12),
        **_text(),
    )
    pipe.load_ip_adapter({"image_proj": projection, "ip_adapter": keys}, subfolder=None, weight_name=None)
    return pipe


RELATIVES: dict[str, Callable[[], Any]] = {
    "upscaler": _upscaler,
    "animatediff": _animatediff,
    "text-to-video": _text_to_video,
    "lcm": _lcm,
    "lcm-sd": _lcm_stable_diffusion,
    "unclip": _unclip,
    "text-projection": _text_projection,
    "inpainting": _inpainting,
    "refiner": _refiner,
    "ip-adapter": _ip_adapter,
}
