"""Tokenizers in code, with the conventions of the originals: start tokens, end tokens, the side they pad on."""

from __future__ import annotations

import functools
import inspect
import json
from typing import Any

import diffusers
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertTokenizer, GemmaTokenizer, PreTrainedTokenizerFast

from tests.tiny import WORDS


def _corpus() -> list[str]:
    """Words of the tests and of the instruction Sana puts before every prompt, so that it stays short."""
    instruction = inspect.signature(diffusers.SanaPipeline.__call__).parameters["complex_human_instruction"].default
    return [*WORDS * 20, *instruction, "a superhero, an assistant designed to generate superior images"]


@functools.cache
def gemma_tokenizer() -> GemmaTokenizer:
    """Gemma's tokenizer class: ``<bos>`` first, no end token, spaces as ``▁``, bytes for what it never saw."""
    learner = Tokenizer(models.BPE(unk_token="<unk>"))
    learner.normalizer = normalizers.Replace(" ", "▁")
    learner.pre_tokenizer = pre_tokenizers.Split("▁", behavior="merged_with_next")
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256))]
    learner.train_from_iterator(
        _corpus(), trainers.BpeTrainer(vocab_size=900, special_tokens=special, show_progress=False)
    )
    model = json.loads(learner.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    words = GemmaTokenizer(vocab=model["vocab"], merges=merges, model_max_length=8192)
    words.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", words.bos_token_id)]
    )
    return words


@functools.cache
def glm_tokenizer() -> PreTrainedTokenizerFast:
    """GLM-4's conventions: ``[gMASK] <sop>`` before the text, padding with ``<|endoftext|>`` on the left."""
    return PreTrainedTokenizerFast(
        tokenizer_object=_glm("<|endoftext|>", "<sop>"), pad_token="<|endoftext|>", padding_side="left"
    )


class ChatGLMTokenizer(PreTrainedTokenizerFast):
    """What KolorsPipeline needs of ChatGLM3's tokenizer, without sentencepiece: left padding and position ids."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        encoding = super().__call__(*args, **kwargs)
        encoding.pop("token_type_ids", None)
        mask = torch.as_tensor(encoding["attention_mask"])
        encoding["position_ids"] = (mask.cumsum(-1) - 1) * mask
        return encoding


@functools.cache
def chatglm_tokenizer() -> ChatGLMTokenizer:
    """ChatGLM3's conventions: ``[gMASK] sop`` before the text, no end token, padding with ``<unk>`` on the left."""
    return ChatGLMTokenizer(
        tokenizer_object=_glm("<unk>", "sop"), pad_token="<unk>", padding_side="left", model_max_length=2048
    )


def _glm(pad: str, start: str) -> Tokenizer:
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=[pad], initial_alphabet=alphabet, show_progress=False)
    words.train_from_iterator(WORDS * 20, trainer)
    words.add_special_tokens([AddedToken(token, special=True) for token in ("[gMASK]", start)])
    tokens = [(token, words.token_to_id(token)) for token in ("[gMASK]", start)]
    words.post_processor = processors.TemplateProcessing(single=f"[gMASK] {start} $A", special_tokens=tokens)
    return words


@functools.cache
def bert_tokenizer() -> BertTokenizer:
    """BERT's tokenizer class: ``[CLS]`` first, ``[SEP]`` last, padding on the right."""
    letters = "abcdefghijklmnopqrstuvwxyz,.'"
    known = sorted({word.strip(",") for line in WORDS for word in line.split()} - set(letters))
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters), *known]
    return BertTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, model_max_length=77)
