"""Small random vision-language models with processors made by hand: their real classes, chat templates and tokens."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import (
    CLIPImageProcessor,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from tests.tiny_language import decoder, fast_tokenizer, qwen_tokenizer, qwen_vl

FAMILIES = ("qwen2.5-vl", "idefics3", "llava")
SPELLINGS = ("yes", "Yes", "no", "No")
QWEN = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = (
    "{% for message in messages %}{{ message.role }}: {% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def vlm(family: str, *, seed: int = 0) -> tuple[Any, Any]:
    """A model and its processor."""
    torch.manual_seed(seed)
    model, processor = {"qwen2.5-vl": _qwen, "idefics3": _idefics, "llava": _llava}[family]()
    for weight in model.parameters():
        if weight.ndim > 1:  # larger than a fresh model's, so that pictures and words make a difference
            torch.nn.init.normal_(weight, std=0.4)
    return model, processor


def _qwen() -> tuple[Any, Any]:
    words = copy.deepcopy(qwen_tokenizer(QWEN))
    words.add_tokens(list(SPELLINGS))
    model = qwen_vl("2.5", 1)
    model.resize_token_embeddings(len(words), mean_resizing=False)
    pictures = Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=28 * 56)
    return model, Qwen2_5_VLProcessor(pictures, words, Qwen2VLVideoProcessor(), chat_template=QWEN)


def _words() -> Any:
    words = fast_tokenizer(
        ("<s>", "</s>", "<pad>", "<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"),
        bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left", model_max_length=4096,
    )  # fmt: skip
    words.add_tokens(list(SPELLINGS))
    return words


VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
          "image_size": 28, "patch_size": 14}  # fmt: skip


def _idefics() -> tuple[Any, Any]:
    words = _words()
    config = Idefics3Config(
        image_token_id=words.convert_tokens_to_ids("<image>"), vision_config=VISION, scale_factor=2,
        text_config={"model_type": "llama", **decoder(1, len(words))},
    )  # fmt: skip
    pictures = Idefics3ImageProcessor(size={"longest_edge": 28}, max_image_size={"longest_edge": 28},
                                      do_image_splitting=False)  # fmt: skip
    processor = Idefics3Processor(pictures, words, image_seq_len=1, chat_template=PLAIN)
    return Idefics3ForConditionalGeneration(config).eval(), processor


def _llava() -> tuple[Any, Any]:
    words = _words()
    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **VISION, "projection_dim": 16},
        text_config={"model_type": "llama", **decoder(1, len(words))},
        image_token_index=words.convert_tokens_to_ids("<image>"), image_seq_length=4, vision_feature_layer=-1,
    )  # fmt: skip
    pictures = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = LlavaProcessor(
        pictures, words, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=PLAIN,
    )  # fmt: skip
    return LlavaForConditionalGeneration(config).eval(), processor
