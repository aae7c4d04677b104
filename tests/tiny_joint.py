"""Tiny randomly initialised pipelines of the joint-attention generation and of Wan, built from configs.

Small in width and depth, true in structure: the real classes, the real chat templates with as many tokens before and
behind the prompt, the padding side and masks of the original, as many encoder layers as the pipeline's defaults read.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    ChromaPipeline,
    ChromaTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    Flux3Transformer2DModel,
    HiDreamImagePipeline,
    HiDreamImageTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers.modular_pipelines import ModularPipeline
from diffusers.modular_pipelines.flux3.before_denoise import Flux3PrepareLatentsStep
from diffusers.modular_pipelines.flux3.modular_blocks_flux3 import Flux3AutoBlocks
from diffusers.modular_pipelines.flux3.modular_blocks_flux3_distilled import Flux3DistilledAutoBlocks
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2VLImageProcessor,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    UMT5Config,
    UMT5EncoderModel,
)

from tests.tiny import clip_tokenizer, t5_encoder, t5_tokenizer
from tests.tiny_language import (
    CHAT,
    decoder,
    llama_tokenizer,
    long_clip,
    mistral,
    pixtral_processor,
    qwen_tokenizer,
    qwen_vl,
)

# --- pipelines ------------------------------------------------------------------------------------------------------


def autoencoder(kind: type, channels: int, levels: int = 2) -> Any:
    """AutoencoderKL or AutoencoderKLFlux2 with a spatial factor of 2 ** (levels - 1)."""
    extra = {"shift_factor": 0.0} if kind is AutoencoderKL else {}
    return kind(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=(8,) * levels,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=channels,
        **extra,
    ).eval()


def dynamic(**settings: Any) -> FlowMatchEulerDiscreteScheduler:
    """The scheduler of every image model here: a shift that depends on the size of the image."""
    return FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, **settings)


def flux2_transformer(context: int, *, guidance_embeds: bool) -> Flux2Transformer2DModel:
    return Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=context,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    ).eval()


def flux2_klein(*, is_distilled: bool = False) -> Flux2KleinPipeline:
    """Hidden layers 9, 18 and 27 stacked; a layer follows, because a last one would be behind the final norm."""
    words = qwen_tokenizer()
    pipe = Flux2KleinPipeline(
        vae=autoencoder(AutoencoderKLFlux2, 4),
        text_encoder=Qwen3ForCausalLM(Qwen3Config(**decoder(28, len(words)))).eval(),
        tokenizer=words,
        transformer=flux2_transformer(3 * 16, guidance_embeds=False),
        scheduler=dynamic(),
        is_distilled=is_distilled,
    )
    pipe.default_sample_size = 8
    return pipe


def flux2() -> Flux2Pipeline:
    """Hidden layers 10, 20 and 30 of a Mistral stacked; the guidance scale is an input of the denoiser."""
    pipe = Flux2Pipeline(
        vae=autoencoder(AutoencoderKLFlux2, 4),
        text_encoder=mistral(31),
        tokenizer=pixtral_processor(),
        transformer=flux2_transformer(3 * 16, guidance_embeds=True),
        scheduler=dynamic(),
    )
    pipe.default_sample_size = 8
    return pipe


def qwen_image() -> QwenImagePipeline:
    pipe = QwenImagePipeline(
        vae=AutoencoderKLQwenImage(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 1],
            num_res_blocks=1,
            temperal_downsample=[False],
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        ).eval(),
        text_encoder=qwen_vl("2.5", 2),
        tokenizer=qwen_tokenizer(),
        transformer=QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(4, 6, 6),
        ).eval(),
        scheduler=dynamic(shift_terminal=0.02, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192),
    )
    pipe.default_sample_size = 8
    return pipe


def z_image() -> ZImagePipeline:
    """Its size is 1024 pixels unless given; an autoencoder with a factor of 128 makes eight latent pixels of them."""
    words = qwen_tokenizer()
    return ZImagePipeline(
        vae=autoencoder(AutoencoderKL, 4, levels=8),
        text_encoder=Qwen3Model(Qwen3Config(**decoder(3, len(words)))).eval(),
        tokenizer=words,
        transformer=ZImageTransformer2DModel(
            in_channels=4,
            dim=32,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=16,
            axes_dims=[4, 6, 6],
        ).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def wan_transformer() -> WanTransformer3DModel:
    return WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=64,
    ).eval()


def wan(*, two: bool = False) -> WanPipeline:
    """480 x 832 pixels and 81 frames unless given: the autoencoder has a factor of 16 in space and in time."""
    return WanPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=UMT5EncoderModel(
            UMT5Config(vocab_size=len(t5_tokenizer()), d_model=16, d_ff=32, d_kv=8, num_layers=2, num_heads=2)
        ).eval(),
        vae=AutoencoderKLWan(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[True] * 4,
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
            scale_factor_spatial=16,
            scale_factor_temporal=16,
        ).eval(),
        transformer=wan_transformer(),
        transformer_2=wan_transformer() if two else None,
        boundary_ratio=0.875 if two else None,
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0
        ),
    )


def chroma() -> ChromaPipeline:
    pipe = ChromaPipeline(
        vae=autoencoder(AutoencoderKL, 4),
        text_encoder=t5_encoder(16),
        tokenizer=t5_tokenizer(),
        transformer=ChromaTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(4, 4, 8),
            approximator_num_channels=16,
            approximator_hidden_dim=16,
            approximator_layers=1,
        ).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
    )
    pipe.default_sample_size = 8
    return pipe


def hidream() -> HiDreamImagePipeline:
    llama = LlamaForCausalLM(LlamaConfig(**decoder(3, len(llama_tokenizer())), attn_implementation="eager")).eval()
    pipe = HiDreamImagePipeline(
        vae=autoencoder(AutoencoderKL, 4),
        text_encoder=long_clip(16, 12),
        tokenizer=clip_tokenizer(),
        text_encoder_2=long_clip(24, 20),
        tokenizer_2=clip_tokenizer("!"),
        text_encoder_3=t5_encoder(24),
        tokenizer_3=t5_tokenizer(),
        text_encoder_4=llama,
        tokenizer_4=llama_tokenizer(),
        transformer=HiDreamImageTransformer2DModel(
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            caption_channels=[24, 16],
            text_emb_dim=32,
            num_routed_experts=2,
            num_activated_experts=1,
            axes_dims_rope=(8, 4, 4),
            max_resolution=(8, 8),
            llama_layers=[0, 1, 2],
        ).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    pipe.default_sample_size = 8
    return pipe


def flux3(*, distilled: bool = False) -> Any:
    """A modular pipeline without the prompt upsampler (a language model that writes the prompt anew)."""
    words = qwen_tokenizer()
    blocks = Flux3DistilledAutoBlocks() if distilled else Flux3AutoBlocks()
    blocks.sub_blocks.pop("prompt_upsampler")
    size = Flux3PrepareLatentsStep(default_height=16, default_width=16)
    blocks.sub_blocks["denoise"].sub_blocks["text2image"].sub_blocks["prepare_latents"] = size
    pipe = blocks.init_pipeline()
    pipe.update_components(
        vae=autoencoder(AutoencoderKLFlux2, 4),
        text_encoder=qwen_vl("3", 33),
        tokenizer=Qwen3VLProcessor(
            image_processor=Qwen2VLImageProcessor(),
            tokenizer=words,
            video_processor=Qwen3VLVideoProcessor(),
            chat_template=CHAT,
        ),
        transformer=Flux3Transformer2DModel(
            in_channels=16,
            cond_in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=8 * 16,
            timestep_channels=16,
            axes_dims_rope=(4, 4, 4, 4),
            flow_map=distilled,
        ).eval(),
    )
    return pipe


JOINT: dict[str, Callable[[], Any]] = {
    "flux2": flux2,
    "flux2-klein": flux2_klein,
    "flux2-klein-distilled": functools.partial(flux2_klein, is_distilled=True),
    "z-image": z_image,
    "qwen-image": qwen_image,
    "wan": wan,
    "wan2.2": functools.partial(wan, two=True),
    "chroma": chroma,
    "hidream": hidream,
    "flux3": flux3,
    "flux3-distilled": functools.partial(flux3, distilled=True),
}


def tiny_joint(architecture: str, *, seed: int = 0) -> Any:
    """A pipeline of one of JOINT: random weights that depend on the seed alone, eval mode, no progress bar."""
    torch.manual_seed(seed)
    pipe = JOINT[architecture]()
    pipe.set_progress_bar_config(disable=True)
    return pipe


# --- what a denoiser is called with, and where the text enters it ---------------------------------------------------


def modular(pipe: Any) -> bool:
    return isinstance(pipe, ModularPipeline)


def draw(pipe: Any, prompts: str | list[str], *, seed: int = 0, **settings: Any) -> torch.Tensor:
    """Latents of two steps, drawn by the pipeline's own call (a modular pipeline takes one prompt per call)."""
    settings = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(seed), **settings}
    if modular(pipe):
        return pipe(prompt=prompts, output="latents", **settings)
    return pipe(prompt=prompts, output_type="latent", return_dict=False, **settings)[0]


def denoisers(pipe: Any) -> dict[str, nn.Module]:
    parts = {name: getattr(pipe, name, None) for name in ("transformer", "transformer_2")}
    return {name: part for name, part in parts.items() if part is not None}


def calls(pipe: Any, prompts: str | list[str], **settings: Any) -> list[tuple[str, dict[str, Any]]]:
    """(part, arguments by name) of every denoiser call of one draw, in order."""
    found: list[tuple[str, dict[str, Any]]] = []

    def listen(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            found.append((name, inspect.signature(module.forward).bind(*arguments, **keywords).arguments))

        return hook

    handles = [part.register_forward_pre_hook(listen(n), with_kwargs=True) for n, part in denoisers(pipe).items()]
    try:
        draw(pipe, prompts, **settings)
    finally:
        for handle in handles:
            handle.remove()
    return found


def tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from tensors(part)


def text_arguments(pipe: Any, **settings: Any) -> dict[str, list[torch.Tensor]]:
    """The arguments of the first denoiser call that differ between two prompts and the same noise."""
    prompts = ("a superhero", "the cat in the style of van gogh")
    a, b = (calls(pipe, prompt, **settings)[0][1] for prompt in prompts)
    pairs = {name: (list(tensors(a[name])), list(tensors(b[name]))) for name in a}
    same = {
        name: len(x) == len(y) and all(p.shape == q.shape and torch.equal(p, q) for p, q in zip(x, y, strict=True))
        for name, (x, y) in pairs.items()
    }
    return {name: pairs[name][0] for name in pairs if not same[name]}


def rows(values: Iterator[torch.Tensor] | list[torch.Tensor]) -> set[bytes]:
    return {row.tobytes() for value in values for row in value.detach().float().flatten(0, -2).numpy()}


def entry_linears(pipe: Any, **settings: Any) -> dict[str, str]:
    """{"part:path of an nn.Linear": "argument" or "argument behind path of a norm"}: who reads the text unmixed.

    Read from a draw: every row of the module's input is, bit for bit, a row of a text argument or of a norm's output
    on one.
    """
    known: dict[str, set[bytes]] = {}
    for name, values in text_arguments(pipe, **settings).items():
        floats = [value for value in values if value.is_floating_point() and value.ndim > 1]
        known |= {name: rows(floats)} if floats else {}
    found: dict[str, str] = {}

    def hook(path: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if not (inputs and isinstance(inputs[0], torch.Tensor) and inputs[0].ndim > 1):
            return
        read = rows([inputs[0]])
        source = next((name for name, known_rows in known.items() if read <= known_rows), None)
        if source is not None and isinstance(module, nn.Linear):
            found[path] = source
        elif source is not None and "Norm" in type(module).__name__:
            known[f"{source} behind {path}"] = rows([output])

    handles = [
        module.register_forward_hook(functools.partial(hook, f"{part}:{name}"))
        for part, denoiser in denoisers(pipe).items()
        for name, module in denoiser.named_modules()
    ]
    try:
        draw(pipe, "a superhero", **settings)
    finally:
        for handle in handles:
            handle.remove()
    return found
