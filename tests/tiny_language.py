"""Small vocabularies with the real chat templates, and small random language models, for tiny pipelines."""

from __future__ import annotations

import functools
import json
from typing import Any

from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralImageProcessor,
    PixtralProcessor,
    PixtralVisionConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from tests.tiny import WORDS, clip_tokenizer

# --- tokenizers -----------------------------------------------------------------------------------------------------

# the words of every template, so that each is one token: the prefixes then have the length they have in the original
TEMPLATES = [
    "system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of "
    "the objects and background:",
    SYSTEM_MESSAGE,
    "user\n",
    "assistant\n",
    "\n\n",
]

CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
INSTRUCT = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'system' %}[SYSTEM_PROMPT]{{ message.content[0].text }}[/SYSTEM_PROMPT]"
    "{% else %}[INST]{% for part in message.content %}{{ part.text }}{% endfor %}[/INST]{% endif %}{% endfor %}"
)


@functools.cache
def pieces(first: tuple[str, ...] = ()) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A byte-level BPE: (vocabulary, merges), words of WORDS and of the templates are one piece, others several."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=list(first),
        show_progress=False,
    )
    learner.train_from_iterator([*WORDS, *TEMPLATES] * 20, trainer)
    model = json.loads(learner.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


@functools.cache
def qwen_tokenizer(template: str = CHAT) -> Qwen2Tokenizer:
    """Qwen's tokenizer class with a small vocabulary: its chat template, no start token, padding on the right."""
    vocabulary, merges = pieces(("<|endoftext|>",))
    words = Qwen2Tokenizer(
        vocab=vocabulary, merges=merges, chat_template=template, model_max_length=131072, padding_side="right"
    )
    special = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    words.add_special_tokens({"additional_special_tokens": special})
    words.add_tokens(["<think>", "</think>"])
    return words


def fast_tokenizer(special: tuple[str, ...], **settings: Any) -> PreTrainedTokenizerFast:
    """A byte-level BPE behind the class that Llama 3 and Mistral's Tekken are loaded with; puts bos first."""
    vocabulary, merges = pieces(special)
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    backend.add_special_tokens(list(special))
    bos = settings["bos_token"]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, **settings)


@functools.cache
def pixtral_processor() -> PixtralProcessor:
    """FLUX.2-dev's processor: [SYSTEM_PROMPT] and [INST], padding on the left."""
    special = ("<s>", "</s>", "<pad>", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[INST]", "[/INST]")
    words = fast_tokenizer(
        (*special, "[IMG]", "[IMG_BREAK]", "[IMG_END]"),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
        model_max_length=131072,
    )
    return PixtralProcessor(
        image_processor=PixtralImageProcessor(), tokenizer=words, patch_size=14, chat_template=INSTRUCT
    )


@functools.cache
def llama_tokenizer() -> PreTrainedTokenizerFast:
    """Llama 3.1's conventions: begin_of_text first, padding (by HiDream: with the end token) on the right."""
    return fast_tokenizer(
        ("<|begin_of_text|>", "<|eot_id|>"),
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        padding_side="right",
        model_max_length=131072,
    )


# --- encoders ------------------------------------------------------------------------------------------------------


def decoder(layers: int, vocabulary: int, width: int = 16) -> dict[str, Any]:
    """The settings a small decoder-only language model shares with every other one."""
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 8192,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": 0,
    }


def qwen_vl(family: str, layers: int) -> Any:
    """A random Qwen2.5-VL ("2.5") or Qwen3-VL ("3") with a vision tower that text never reaches."""
    words = qwen_tokenizer()
    text = {**decoder(layers, len(words)), "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]}}
    vision: dict[str, Any] = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16}
    vision |= {"out_hidden_size": 16, "patch_size": 14}
    special = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
    ids = {f"{name}_token_id": words.convert_tokens_to_ids(f"<|{token}|>") for name, token in special.items()}
    if family == "2.5":
        text.pop("head_dim")
        config = Qwen2_5_VLConfig(text_config=text, vision_config={**vision, "fullatt_block_indexes": [0]}, **ids)
        return Qwen2_5_VLForConditionalGeneration(config).eval()
    text["rope_parameters"] |= {"mrope_interleaved": True}
    vision |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision, **ids)).eval()


def mistral(layers: int) -> Mistral3ForConditionalGeneration:
    words = pixtral_processor()
    config = Mistral3Config(
        text_config=MistralConfig(**decoder(layers, len(words.tokenizer))),
        vision_config=PixtralVisionConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28
        ),
        image_token_index=words.image_token_id,
    )
    return Mistral3ForConditionalGeneration(config).eval()


def long_clip(width: int, projection: int) -> CLIPTextModelWithProjection:
    """CLIP with 248 positions, as HiDream's two encoders have them."""
    words = clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=248,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
        projection_dim=projection,
    )
    return CLIPTextModelWithProjection(config).eval()
