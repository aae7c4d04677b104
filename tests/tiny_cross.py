"""Tiny random pipelines whose text enters by cross-attention, a projection or a joint sequence, built from configs.

CROSS holds further architectures, RELATIVES UNets that differ from Stable Diffusion in one thing. Every pipeline runs
as ``pipe(prompt="a superhero", num_inference_steps=2, output_type="latent", **call(name))``. Widths are small, the
structure is that of the originals: masks, norms, projections, padding sides, learned sigma, and the autoencoder's
compression where it matters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers.pipelines.kolors.pipeline_kolors import KolorsPipeline
from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig, ChatGLMModel
from transformers import (
    BertConfig,
    BertModel,
    Gemma2Config,
    Gemma2Model,
    GlmConfig,
    GlmModel,
    UMT5Config,
    UMT5EncoderModel,
)

from tests.tiny import autoencoder, t5_encoder, t5_tokenizer, unet
from tests.tiny_relatives import RELATIVES, picture
from tests.tiny_words import bert_tokenizer, chatglm_tokenizer, gemma_tokenizer, glm_tokenizer

# --- text encoders and autoencoders ---------------------------------------------------------------------------------


def gemma_encoder(width: int) -> Gemma2Model:
    words = gemma_tokenizer()
    return Gemma2Model(
        Gemma2Config(
            vocab_size=len(words),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            pad_token_id=words.pad_token_id,
            bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id,
        )
    )


def autoencoder8(channels: int) -> diffusers.AutoencoderKL:
    """Compression 8, which PixArt's size bins and HunyuanDiT's grid take for granted."""
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        norm_num_groups=2,
        latent_channels=channels,
    )


# --- architectures --------------------------------------------------------------------------------------------------


def _pixart(pipeline: type) -> Any:
    return pipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5_encoder(48),
        vae=autoencoder8(4),
        transformer=diffusers.PixArtTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            cross_attention_dim=32,
            caption_channels=48,
            num_layers=2,
            sample_size=32,  # the pipeline refuses sizes other than 32, 64, 128, 256
            patch_size=4,
        ),
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    )


def _pixart_sigma() -> Any:
    return _pixart(diffusers.PixArtSigmaPipeline)


def _pixart_alpha() -> Any:
    return _pixart(diffusers.PixArtAlphaPipeline)


def _sana() -> Any:
    blocks = {f"{side}_block_types": ("ResBlock",) * 6 for side in ("encoder", "decoder")}
    blocks |= {f"{side}_block_out_channels": (8,) * 6 for side in ("encoder", "decoder")}
    blocks |= {f"{side}_layers_per_block": (1,) * 6 for side in ("encoder", "decoder")}
    blocks |= {f"{side}_qkv_multiscales": ((),) * 6 for side in ("encoder", "decoder")}
    return diffusers.SanaPipeline(
        tokenizer=gemma_tokenizer(),
        text_encoder=gemma_encoder(48),
        vae=diffusers.AutoencoderDC(latent_channels=8, scaling_factor=0.41407, **blocks),
        transformer=diffusers.SanaTransformer2DModel(
            in_channels=8,
            out_channels=8,
            num_attention_heads=4,
            attention_head_dim=8,
            num_cross_attention_heads=2,
            cross_attention_head_dim=16,
            cross_attention_dim=32,
            caption_channels=48,
            num_layers=2,
            sample_size=16,  # the pipeline refuses sizes other than 16, 32, 64, 128
        ),
        scheduler=diffusers.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )


def _lumina2() -> Any:
    return diffusers.Lumina2Pipeline(
        transformer=diffusers.Lumina2Transformer2DModel(
            sample_size=8,
            in_channels=4,
            hidden_size=32,
            num_layers=2,
            num_refiner_layers=1,
            num_attention_heads=4,
            num_kv_heads=2,
            multiple_of=8,
            axes_dim_rope=(4, 2, 2),
            axes_lens=(300, 64, 64),
            cap_feat_dim=48,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=autoencoder8(4),
        text_encoder=gemma_encoder(48),
        tokenizer=gemma_tokenizer(),
    )


def _auraflow() -> Any:
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 6,  # compression 32: the call draws 1024 whatever the model
        up_block_types=("UpDecoderBlock2D",) * 6,
        block_out_channels=(4,) * 6,
        norm_num_groups=2,
        latent_channels=4,
    )
    text = UMT5Config(vocab_size=len(t5_tokenizer()), d_model=48, d_ff=96, d_kv=8, num_layers=2, num_heads=2)
    return diffusers.AuraFlowPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=UMT5EncoderModel(text),
        vae=vae,
        transformer=diffusers.AuraFlowTransformer2DModel(
            sample_size=32,
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=48,
            caption_projection_dim=32,
            pos_embed_max_size=256,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=1.73),
    )


def _kolors() -> Any:
    """The class is imported from its file: ``diffusers.KolorsPipeline`` is a dummy where sentencepiece is missing."""
    text = ChatGLMConfig(
        num_layers=2,
        padded_vocab_size=len(chatglm_tokenizer()),
        hidden_size=48,
        ffn_hidden_size=64,
        kv_channels=12,
        num_attention_heads=4,
        seq_length=512,
        add_qkv_bias=True,
        multi_query_attention=True,
        multi_query_group_num=2,
        original_rope=True,
        use_cache=False,
    )
    encoder = ChatGLMModel(text, empty_init=False)
    for name, parameter in encoder.named_parameters():
        if "norm" in name:
            torch.nn.init.ones_(parameter)  # the class leaves its norms as it finds the memory
    return KolorsPipeline(
        vae=autoencoder(4),
        text_encoder=encoder,
        tokenizer=chatglm_tokenizer(),
        unet=unet(
            40,
            encoder_hid_dim=48,
            encoder_hid_dim_type="text_proj",
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=48 + 6 * 4,
        ),
        scheduler=diffusers.EulerDiscreteScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.014,
            num_train_timesteps=1100,
            timestep_spacing="leading",
            steps_offset=1,
        ),
    )


def _cogview4() -> Any:
    text = GlmConfig(
        vocab_size=len(glm_tokenizer()),
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        pad_token_id=glm_tokenizer().pad_token_id,
    )
    return diffusers.CogView4Pipeline(
        tokenizer=glm_tokenizer(),
        text_encoder=GlmModel(text),
        vae=autoencoder8(4),
        transformer=diffusers.CogView4Transformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            text_embed_dim=48,
            time_embed_dim=16,
            condition_dim=8,
            sample_size=8,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75, time_shift_type="linear"
        ),
    )


def _hunyuandit() -> Any:
    text = BertConfig(
        vocab_size=len(bert_tokenizer()),
        hidden_size=40,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
    )
    return diffusers.HunyuanDiTPipeline(
        vae=autoencoder8(4),
        text_encoder=BertModel(text),
        tokenizer=bert_tokenizer(),
        transformer=diffusers.HunyuanDiT2DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            patch_size=2,
            sample_size=8,
            hidden_size=32,
            num_layers=4,
            cross_attention_dim=40,
            cross_attention_dim_t5=48,
            pooled_projection_dim=24,
        ),
        scheduler=diffusers.DDPMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.018, prediction_type="v_prediction"
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        text_encoder_2=t5_encoder(48),
        tokenizer_2=t5_tokenizer(),
    )


def _ltx() -> Any:
    return diffusers.LTXPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            base_shift=0.95,
            max_shift=2.05,
            base_image_seq_len=1024,
            max_image_seq_len=4096,
            shift_terminal=0.1,
        ),
        vae=diffusers.AutoencoderKLLTXVideo(
            latent_channels=8,
            block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(8, 8, 8, 8),
            layers_per_block=(1,) * 5,
            decoder_layers_per_block=(1,) * 5,
        ),
        text_encoder=t5_encoder(48),
        tokenizer=t5_tokenizer(),
        transformer=diffusers.LTXVideoTransformer3DModel(
            in_channels=8,
            out_channels=8,
            num_attention_heads=2,
            attention_head_dim=16,
            cross_attention_dim=32,
            num_layers=2,
            caption_channels=48,
        ),
    )


def _cogvideox() -> Any:
    """As the 5B model: rotary positions, v prediction, and no signal at all at the first step."""
    return diffusers.CogVideoXPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5_encoder(48),
        vae=diffusers.AutoencoderKLCogVideoX(
            latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=2
        ),
        transformer=diffusers.CogVideoXTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            time_embed_dim=16,
            text_embed_dim=48,
            num_layers=2,
            sample_width=8,
            sample_height=8,
            sample_frames=5,
            use_rotary_positional_embeddings=True,
        ),
        scheduler=diffusers.CogVideoXDDIMScheduler(
            prediction_type="v_prediction",
            clip_sample=False,
            rescale_betas_zero_snr=True,
            snr_shift_scale=1.0,
            timestep_spacing="trailing",
        ),
    )


CROSS: dict[str, Callable[[], Any]] = {
    "pixart-sigma": _pixart_sigma,
    "pixart-alpha": _pixart_alpha,
    "sana": _sana,
    "lumina2": _lumina2,
    "auraflow": _auraflow,
    "kolors": _kolors,
    "cogview4": _cogview4,
    "hunyuandit": _hunyuandit,
    "ltx": _ltx,
    "cogvideox": _cogvideox,
}


def call(name: str) -> dict[str, Any]:
    """What the pipeline's call needs besides the prompt, or what keeps it small."""
    arguments: dict[str, dict[str, Any]] = {
        "hunyuandit": {"use_resolution_binning": False},  # otherwise every size becomes one of 1024 and more
        "ltx": {"height": 64, "width": 64, "num_frames": 9},
        "upscaler": {"image": picture(8)},
        "animatediff": {"num_frames": 2},
        "text-to-video": {"num_frames": 2},
        "unclip": {"image": picture(32)},
        "inpainting": {"image": picture(16), "mask_image": picture(16).convert("L")},
        "refiner": {"image": picture(16), "strength": 1.0},
        "ip-adapter": {"ip_adapter_image": picture(32)},
    }
    return arguments.get(name, {})


def tiny_cross(name: str, *, seed: int = 0) -> Any:
    """A pipeline of CROSS or RELATIVES: random weights from `seed`, every part in eval mode, no progress bar."""
    torch.manual_seed(seed)
    pipe = (CROSS | RELATIVES)[name]()
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe
