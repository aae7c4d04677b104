"""Tiny randomly initialised pipelines, built from configs as users' pipelines are built, only small."""

from __future__ import annotations

import functools
import gzip
import importlib.resources
import json
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from erasure import erase
from erasure.methods import method_class
from erasure.methods.finetune import FineTune
from erasure.world.train import learn_bpe

ARCHITECTURES = ("sd1", "sd2", "sdxl", "sd3", "flux")

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


def weights(pipe: Any) -> dict[str, torch.Tensor]:
    """A copy of every tensor of the denoiser and the text encoders."""
    parts = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
    return {
        f"{part}.{name}": tensor.clone()
        for part in parts
        if (module := getattr(pipe, part, None)) is not None
        for name, tensor in module.state_dict().items()
    }


def identical(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Bit for bit the same."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- every architecture, with the real tokenizers' conventions ------------------------------------------------------


@functools.cache
def clip_tokenizer(pad: str = "<|endoftext|>") -> CLIPTokenizer:
    """CLIP's own vocabulary of 49,408 entries, from the file of merges that open_clip ships."""
    file = importlib.resources.files("open_clip") / "bpe_simple_vocab_16e6.txt.gz"
    merges = gzip.decompress(file.read_bytes()).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    # the order in which GPT-2 and CLIP number bytes: printable ones first, the others after them
    letters = sorted(pre_tokenizers.ByteLevel.alphabet(), key=lambda c: (ord(c) >= 256, ord(c)))
    pieces = [*letters, *(f"{c}</w>" for c in letters), *(merge.replace(" ", "") for merge in merges)]
    vocabulary = {piece: i for i, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(
        vocab=vocabulary, merges=[tuple(m.split()) for m in merges], pad_token=pad, model_max_length=77
    )


@functools.cache
def t5_tokenizer() -> T5Tokenizer:
    """T5's tokenizer class with a small vocabulary: pieces, ``</s>``, padding; no start token."""
    learner = Tokenizer(models.Unigram())
    learner.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=special, unk_token="<unk>", show_progress=False)
    learner.train_from_iterator([f"{words} abcdefghijklmnopqrstuvwxyz" for words in WORDS] * 50, trainer)
    pieces = json.loads(learner.to_str())["model"]["vocab"][len(special) :]
    # The learner adds in the order of a hash table: the last digits of scores, and with them the order, vary.
    pieces = sorted(((piece, round(score, 4)) for piece, score in pieces), key=lambda entry: (-entry[1], entry[0]))
    vocabulary = [*((token, 0.0) for token in special), *pieces]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=512)


def clip_encoder(words: CLIPTokenizer, width: int, *, projection: int | None = None) -> Any:
    """A random CLIP text encoder; with a projection, as SDXL and SD3 have them."""
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
        projection_dim=projection or width,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def t5_encoder(width: int) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(vocab_size=len(t5_tokenizer()), d_model=width, d_ff=2 * width, d_kv=8, num_layers=2, num_heads=2)
    ).eval()


def autoencoder(channels: int) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=channels,
        shift_factor=0.0,
    )


def unet(width: int, **settings: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2,
        cross_attention_dim=width,
        norm_num_groups=8,
        **settings,
    ).eval()


def _sd(prediction_type: str, pad: str) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=autoencoder(4),
        text_encoder=clip_encoder(clip_tokenizer(pad), 32),
        tokenizer=clip_tokenizer(pad),
        unet=unet(32),
        scheduler=DDIMScheduler(
            prediction_type=prediction_type, clip_sample=False, set_alpha_to_one=False, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl() -> StableDiffusionXLPipeline:
    pads = clip_tokenizer(), clip_tokenizer("!")
    return StableDiffusionXLPipeline(
        vae=autoencoder(4),
        text_encoder=clip_encoder(pads[0], 16),
        text_encoder_2=clip_encoder(pads[1], 24, projection=20),
        tokenizer=pads[0],
        tokenizer_2=pads[1],
        unet=unet(
            40,
            use_linear_projection=True,
            transformer_layers_per_block=(1, 2),
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=20 + 6 * 4,
        ),
        scheduler=EulerDiscreteScheduler(),
        add_watermarker=False,
    )


def _sd3() -> StableDiffusion3Pipeline:
    pads = clip_tokenizer(), clip_tokenizer("!")
    return StableDiffusion3Pipeline(
        vae=autoencoder(16),
        text_encoder=clip_encoder(pads[0], 16, projection=12),
        text_encoder_2=clip_encoder(pads[1], 20, projection=20),
        text_encoder_3=t5_encoder(48),
        tokenizer=pads[0],
        tokenizer_2=pads[1],
        tokenizer_3=t5_tokenizer(),
        transformer=SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=16,
            out_channels=16,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=48,
            caption_projection_dim=32,
            pooled_projection_dim=32,
            pos_embed_max_size=8,
        ).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def _flux() -> FluxPipeline:
    pipe = FluxPipeline(
        vae=autoencoder(4),
        text_encoder=clip_encoder(clip_tokenizer(), 24),
        text_encoder_2=t5_encoder(48),
        tokenizer=clip_tokenizer(),
        tokenizer_2=t5_tokenizer(),
        transformer=FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=48,
            pooled_projection_dim=24,
            guidance_embeds=True,
            axes_dims_rope=(4, 4, 8),
        ).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    pipe.default_sample_size = 8  # 128 for every FLUX: no config holds it
    return pipe


def tiny(architecture: str, *, seed: int = 0) -> Any:
    """A pipeline of one of ARCHITECTURES: random weights, the real CLIP vocabulary, the padding of the original."""
    torch.manual_seed(seed)
    make_pipe = {
        "sd1": lambda: _sd("epsilon", "<|endoftext|>"),
        "sd2": lambda: _sd("v_prediction", "!"),
        "sdxl": _sdxl,
        "sd3": _sd3,
        "flux": _flux,
    }
    pipe = make_pipe[architecture]()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def shortest(method: str) -> dict[str, Any]:
    """Settings with which a method makes something of a tiny model as soon as possible."""
    own = {
        "double-projections": {"rank": 8},  # the everyday words fill a text of 32 dimensions
        "sld": {"warmup": 0},
        "safree": {"midpoint": 0.0},  # a random encoder gives one prompt much like another
        "eraseflow": {"early": 1, "late": 1},
        "receler": {"attack_steps": 1, "rank": 4},
        "gloce": {"generations": 1, "num_inference_steps": 2, "first": 0, "last": 2, "deviations": -20.0},
        "stereo": {"rounds": 1, "search_iterations": 1, "attack_iterations": 1, "pictures_each": 1},
    }
    short = {"iterations": 2, "trajectories": 2, "keep_steps": 2, "num_inference_steps": 2, "batch_size": 2}
    return {**(short if issubclass(method_class(method), FineTune) else {}), **own.get(method, {})}


make = functools.partial(erase, apply=False)
