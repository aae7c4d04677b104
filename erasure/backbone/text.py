"""Text conditioning and the token spans that methods edit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

Span = Literal["bos", "content", "last_subject", "eos", "tail", "subject_to_end", "all"]
SPANS: tuple[Span, ...] = get_args(Span)
SHOWN = 80  # characters of a prompt in an error
PADDED: tuple[Span, ...] = ("tail", "subject_to_end", "all")  # spans that take in padding


@dataclasses.dataclass(frozen=True)
class Text:
    """What the denoiser is told, one row a prompt.

    Attributes:
        hidden: ``(n, length, d)`` token embeddings.
        pooled: ``(n, d_pooled)`` or None where the architecture has no pooled path.
    """

    hidden: Tensor
    pooled: Tensor | None = None

    def __len__(self) -> int:
        return len(self.hidden)

    def __getitem__(self, rows: Any) -> Text:
        """Some rows: a slice, or a tensor of indices, which may repeat."""
        return self._each(lambda embeddings: embeddings[rows])

    def repeat(self, n: int) -> Text:
        """One row ``n`` times."""
        return self._each(lambda embeddings: embeddings.expand(n, *embeddings.shape[1:]))

    def to(self, dtype: torch.dtype) -> Text:
        return self._each(lambda embeddings: embeddings.to(dtype))

    def __add__(self, other: Text) -> Text:
        """The rows of one, then those of the other."""
        both = None if self.pooled is None or other.pooled is None else torch.cat([self.pooled, other.pooled])
        return Text(torch.cat([self.hidden, other.hidden]), both)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Text:
        return Text(change(self.hidden), None if self.pooled is None else change(self.pooled))


@dataclasses.dataclass(frozen=True)
class Segment:
    """What one tokenizer's tokens of a batch of prompts became: a stretch of the sequence the denoiser reads.

    Attributes:
        hidden: ``(n, length, d)`` token embeddings.
        ids: ``(n, length)`` token ids, padded.
        counts: tokens of each prompt that are not padding: start token if there is one, content, first end token.
        bos: whether the tokens begin with a start token: CLIP's do, T5's do not.
    """

    hidden: Tensor
    ids: Tensor
    counts: tuple[int, ...]
    bos: bool = True

    def span(self, name: Span) -> list[slice]:
        """Token positions of a span, one slice a prompt.

        ``bos`` start token; ``content`` the words; ``last_subject`` the last word piece; ``eos`` the first end token;
        ``tail`` first end token and padding, where encoders collect the whole prompt; ``subject_to_end`` last subject
        and tail; ``all``. The last subject of the empty prompt is its first token: the start token (as in the official
        UCE code), or the end token where there is no start token. ``bos`` is the end token there, too.
        """
        length, first = self.hidden.shape[1], int(self.bos)
        table = {
            "bos": lambda end: slice(0, 1) if self.bos else slice(end, end + 1),
            "content": lambda end: slice(first, end),
            "last_subject": lambda end: slice(max(end - 1, 0), max(end, 1)),
            "eos": lambda end: slice(end, end + 1),
            "tail": lambda end: slice(end, length),
            "subject_to_end": lambda end: slice(max(end - 1, 0), length),
            "all": lambda end: slice(0, length),
        }
        if name not in table:
            raise ValueError(f"unknown token span; got {name!r}; choose one of {list(SPANS)}")
        return [table[name](count - 1) for count in self.counts]

    def take(self, name: Span) -> list[Tensor]:
        """The embeddings of a span: one ``(tokens, d)`` tensor a prompt."""
        return [self.hidden[i, span] for i, span in enumerate(self.span(name))]


@dataclasses.dataclass(frozen=True)
class Conditioning:
    """What the text encoders say about a batch of prompts.

    Attributes:
        hidden: ``(n, length, d)`` token embeddings as the denoiser receives them.
        segments: the stretches of ``hidden`` that hold tokens, one for each tokenizer whose tokens stand in it. SD3 has
            two, CLIP and T5; all others have one. A stretch of zeros, SD3 without its T5, is no segment.
        pooled: ``(n, d_pooled)`` or None where the architecture has no pooled path.
    """

    hidden: Tensor
    segments: tuple[Segment, ...]
    pooled: Tensor | None = None

    def __len__(self) -> int:
        return len(self.hidden)

    @property
    def text(self) -> Text:
        """What of it the denoiser is given."""
        return Text(self.hidden, self.pooled)

    @property
    def ids(self) -> Tensor | None:
        """``(n, length)`` token ids; None where there are several segments, each with its own."""
        return self.segments[0].ids if len(self.segments) == 1 else None

    @property
    def counts(self) -> tuple[int, ...]:
        """Tokens of each prompt that are not padding."""
        return self._only.counts

    def span(self, name: Span) -> list[slice]:
        """Token positions of a span, one slice a prompt; see :meth:`Segment.span`."""
        return self._only.span(name)

    def take(self, name: Span) -> list[Tensor]:
        """The embeddings of a span: one ``(tokens, d)`` tensor a prompt, all segments after one another."""
        return [torch.cat(parts) for parts in zip(*(segment.take(name) for segment in self.segments), strict=True)]

    def pooled_rows(self) -> list[Tensor]:
        """The pooled embedding of each prompt, ``(1, d_pooled)``.

        Raises:
            ValueError: the architecture has none.
        """
        if self.pooled is None:
            raise ValueError("this architecture has no pooled text embedding; leave pooled=False")
        return list(self.pooled[:, None])

    @property
    def _only(self) -> Segment:
        if len(self.segments) != 1:
            raise ValueError(
                f"these embeddings come from {len(self.segments)} tokenizers in a row, so a prompt has no one span of "
                "tokens; ask each of .segments, or use .take"
            )
        return self.segments[0]


class TooLong(ValueError):
    """Some prompts do not fit a text encoder.

    Attributes:
        prompts: those that do not.
    """

    def __init__(self, message: str, *, prompts: Sequence[str]) -> None:
        super().__init__(message)
        self.prompts = tuple(prompts)


def tokenise(
    tokenizer: Any, prompts: Sequence[str], *, length: int | None = None, name: str = "tokenizer"
) -> tuple[Tensor, tuple[int, ...]]:
    """Padded ids ``(n, length)`` and the number of tokens of each prompt that are not padding.

    Counts come from the unpadded prompt: what pads (the end token, or "!") is also a token like any other.

    Args:
        length: tokens the encoder reads; what the tokenizer says by default.
        name: the tokenizer's attribute on the pipeline, for the error.

    Raises:
        TooLong: a prompt does not fit the encoder. Truncating it could cut the very concept away.
    """
    length = length or tokenizer.model_max_length
    counts = tuple(len(ids) for ids in tokenizer(list(prompts)).input_ids)
    for prompt, count in zip(prompts, counts, strict=True):
        if count > length:
            begins = prompt if len(prompt) <= SHOWN else f"{prompt[:SHOWN]} ..."
            raise TooLong(
                f"the prompt is longer than the text encoder reads; {count} tokens of {length} ({name}): {begins!r}; "
                "shorten it",
                prompts=[p for p, n in zip(prompts, counts, strict=True) if n > length],
            )
    ids = tokenizer(
        list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids
    return ids, counts


def some(prompts: Sequence[str]) -> list[str]:
    """The prompts as a list.

    Raises:
        ValueError: there are none.
    """
    if not prompts:
        raise ValueError("no prompts to encode; got an empty list; give at least one")
    return list(prompts)


@torch.no_grad()
def encode_clip(
    text_encoder: Any, tokenizer: Any, prompts: Sequence[str], *, padded: bool = True, batch_size: int = 64
) -> Conditioning:
    """Encode prompts with one CLIP text encoder as Stable Diffusion 1.x and 2.x do: last hidden state, final norm.

    Args:
        padded: False reads no further than the longest prompt. The encoder is causal: the tokens before that are the
            same, and where prompts are names it is several times faster.
    """
    ids, counts = tokenise(tokenizer, some(prompts))
    ids = ids if padded else ids[:, : max(counts)]
    parts = []
    for batch in ids.to(text_encoder.device).split(batch_size):
        parts.append(text_encoder(batch).last_hidden_state)
    hidden = torch.cat(parts)
    return Conditioning(hidden, (Segment(hidden, ids, counts),))


@torch.no_grad()
def encode_with(pipe: Any, prompts: Sequence[str], *, batch_size: int = 16, **settings: Any) -> tuple[Tensor, Tensor]:
    """``hidden (n, length, d)`` and ``pooled (n, d_pooled)`` of prompts, by the pipeline's own ``encode_prompt``."""
    parts = []
    for i in range(0, len(prompts), batch_size):
        batch = list(prompts[i : i + batch_size])
        encoded = pipe.encode_prompt(prompt=batch, prompt_2=batch, device=pipe.device, **settings)
        parts.append((encoded[0], next(e for e in encoded[1:] if e is not None and e.ndim == 2)))
    hidden, pooled = zip(*parts, strict=True)
    return torch.cat(hidden), torch.cat(pooled)
