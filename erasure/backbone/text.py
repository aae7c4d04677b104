"""Text conditioning and the token spans that methods edit."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

Span = Literal["bos", "content", "last_subject", "eos", "tail", "subject_to_end", "all"]


@dataclasses.dataclass(frozen=True)
class Conditioning:
    """What a text encoder says about a batch of prompts.

    Attributes:
        hidden: ``(n, length, d)`` token embeddings as the denoiser's cross-attention receives them.
        ids: ``(n, length)`` token ids, padded.
        counts: tokens of each prompt that are not padding: start, content and the first end token.
        pooled: ``(n, d_pooled)`` or None where the architecture has no pooled path.
    """

    hidden: Tensor
    ids: Tensor
    counts: tuple[int, ...]
    pooled: Tensor | None = None

    def __len__(self) -> int:
        return len(self.counts)

    def span(self, name: Span) -> list[slice]:
        """Token positions of a span, one slice a prompt.

        ``bos`` start token; ``content`` the words; ``last_subject`` the last word piece (for an empty prompt that is
        the start token, as in the official UCE code); ``eos`` the first end token; ``tail`` first end token and
        padding, where causal encoders collect the whole prompt; ``subject_to_end`` last subject and tail; ``all``.
        """
        length = self.hidden.shape[1]
        table = {
            "bos": lambda count: slice(0, 1),
            "content": lambda count: slice(1, count - 1),
            "last_subject": lambda count: slice(count - 2, count - 1),
            "eos": lambda count: slice(count - 1, count),
            "tail": lambda count: slice(count - 1, length),
            "subject_to_end": lambda count: slice(count - 2, length),
            "all": lambda count: slice(0, length),
        }
        if name not in table:
            raise ValueError(f"unknown token span; got {name!r}; choose one of {list(get_args(Span))}")
        return [table[name](count) for count in self.counts]

    def take(self, name: Span) -> list[Tensor]:
        """The embeddings of a span: one ``(tokens, d)`` tensor a prompt."""
        return [self.hidden[i, span] for i, span in enumerate(self.span(name))]


def tokenise(tokenizer: Any, prompts: Sequence[str]) -> tuple[Tensor, tuple[int, ...]]:
    """Padded ids ``(n, length)`` and the number of tokens of each prompt that are not padding.

    Raises:
        ValueError: a prompt does not fit the encoder. Truncating it could cut the very concept away.
    """
    length = tokenizer.model_max_length
    counts = tuple(len(tokenizer(prompt).input_ids) for prompt in prompts)
    for prompt, count in zip(prompts, counts, strict=True):
        if count > length:
            raise ValueError(
                f"the prompt is longer than the text encoder reads; {count} tokens of {length}: {prompt!r}; shorten it"
            )
    ids = tokenizer(
        list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids
    return ids, counts


@torch.no_grad()
def encode_clip(text_encoder: Any, tokenizer: Any, prompts: Sequence[str], *, batch_size: int = 64) -> Conditioning:
    """Encode prompts with one CLIP text encoder as Stable Diffusion 1.x and 2.x do: last hidden state, final norm."""
    if not prompts:
        raise ValueError("no prompts to encode; got an empty list; give at least one")
    ids, counts = tokenise(tokenizer, prompts)
    parts = []
    for batch in ids.to(text_encoder.device).split(batch_size):
        parts.append(text_encoder(batch).last_hidden_state)
    return Conditioning(torch.cat(parts), ids, counts)
