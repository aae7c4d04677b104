"""Text conditioning and the token spans that methods edit."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

Span = Literal["bos", "content", "last_subject", "eos", "tail", "subject_to_end", "content_to_end", "all"]
SPANS: tuple[Span, ...] = get_args(Span)
SHOWN = 80  # characters of a prompt in an error
PADDED: tuple[Span, ...] = ("tail", "subject_to_end", "content_to_end", "all")  # spans that take in padding


@dataclasses.dataclass(frozen=True)
class Text:
    """Text as the denoiser receives it, one row a prompt.

    Attributes:
        hidden: ``(n, length, d)`` token embeddings.
        pooled: ``(n, d_pooled)`` or None where the architecture has no pooled path.
        mask: ``(n, length)``, true where the denoiser looks; None where it reads every token.
    """

    hidden: Tensor
    pooled: Tensor | None = None
    mask: Tensor | None = None

    def __len__(self) -> int:
        return len(self.hidden)

    def __getitem__(self, rows: Any) -> Text:
        """Rows by a slice, or by a tensor of indices, which may repeat."""
        return self._each(lambda part: part[rows])

    def repeat(self, n: int) -> Text:
        """One row ``n`` times."""
        return self._each(lambda part: part.expand(n, *part.shape[1:]))

    def to(self, dtype: torch.dtype) -> Text:
        """The embeddings in another dtype; a mask stays as it is."""
        pooled = None if self.pooled is None else self.pooled.to(dtype)
        return dataclasses.replace(self, hidden=self.hidden.to(dtype), pooled=pooled)

    def __add__(self, other: Text) -> Text:
        """The rows of one, then those of the other."""
        length = max(self.hidden.shape[1], other.hidden.shape[1])
        a, b = self.padded(length), other.padded(length)
        parts = [
            None if x is None or y is None else torch.cat([x, y]) for x, y in ((a.pooled, b.pooled), (a.mask, b.mask))
        ]
        return Text(torch.cat([a.hidden, b.hidden]), *parts)

    def padded(self, length: int) -> Text:
        """With masked zeros behind the tokens, up to a length. Only text with a mask can be padded."""
        missing = length - self.hidden.shape[1]
        if not missing:
            return self
        if self.mask is None or missing < 0:
            raise ValueError(
                f"text of {self.hidden.shape[1]} tokens cannot be brought to {length}: this architecture reads every "
                "token; encode the prompts together"
            )
        hidden = nn.functional.pad(self.hidden, (0, 0, 0, missing))
        return dataclasses.replace(self, hidden=hidden, mask=nn.functional.pad(self.mask, (0, missing)))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Text:
        parts = (None if part is None else change(part) for part in (self.pooled, self.mask))
        return Text(change(self.hidden), *parts)


@dataclasses.dataclass(frozen=True)
class Segment:
    """What one tokenizer's tokens of a batch of prompts became: a stretch of the sequence the denoiser reads.

    A row is ``constant prefix | words | tail``. The prefix is CLIP's start token, or the beginning of a chat template,
    or nothing (T5). The tail is the first end token (or the rest of the template) and the padding the denoiser reads;
    encoders collect the whole prompt there.

    Attributes:
        hidden: ``(n, length, d)`` token embeddings.
        ids: ``(n, length)`` token ids, padded.
        starts, ends: for each prompt, the positions of its first word piece and of the first token behind the words.
        stops: for each prompt, the position behind the last token the denoiser reads; the length without a mask.
    """

    hidden: Tensor
    ids: Tensor
    starts: tuple[int, ...]
    ends: tuple[int, ...]
    stops: tuple[int, ...]

    @classmethod
    def of(cls, hidden: Tensor, ids: Tensor, counts: Sequence[int], *, bos: bool = True) -> Segment:
        """From token counts (start token if there is one, words, first end token), as CLIP and T5 lay them out."""
        n, length = hidden.shape[:2]
        ends = tuple(count - 1 for count in counts)
        return cls(hidden, ids, (int(bos),) * n, ends, (length,) * n)

    @property
    def counts(self) -> tuple[int, ...]:
        """Tokens of each prompt up to and with the first one behind its words."""
        return tuple(end + 1 for end in self.ends)

    def span(self, name: Span) -> list[slice]:
        """Token positions of a span, one slice a prompt.

        ``bos`` the first token of the prefix; ``content`` the words; ``last_subject`` the last word piece; ``eos`` the
        first token behind the words; ``tail`` everything behind the words; ``subject_to_end`` last word piece and tail;
        ``content_to_end`` words and tail; ``all``. The last subject of the empty prompt is the token before the tail:
        the start token (as in the official UCE code), or the end token where nothing stands before it. ``bos`` is the
        end token there, too.
        """
        table: dict[str, Callable[[int, int, int], slice]] = {
            "bos": lambda start, end, stop: slice(0, 1) if start else slice(end, end + 1),
            "content": lambda start, end, stop: slice(start, end),
            "last_subject": lambda start, end, stop: slice(max(end - 1, 0), max(end, 1)),
            "eos": lambda start, end, stop: slice(end, min(end + 1, stop)),
            "tail": lambda start, end, stop: slice(end, stop),
            "subject_to_end": lambda start, end, stop: slice(max(end - 1, 0), stop),
            "content_to_end": lambda start, end, stop: slice(min(start, max(end - 1, 0)), stop),
            "all": lambda start, end, stop: slice(0, stop),
        }
        if name not in table:
            raise ValueError(f"unknown token span; got {name!r}; choose one of {list(SPANS)}")
        return [table[name](*row) for row in zip(self.starts, self.ends, self.stops, strict=True)]

    def take(self, name: Span) -> list[Tensor]:
        """The embeddings of a span: one ``(tokens, d)`` tensor a prompt."""
        return [self.hidden[i, span] for i, span in enumerate(self.span(name))]


@dataclasses.dataclass(frozen=True)
class Conditioning:
    """What the text encoders make of a batch of prompts.

    Attributes:
        hidden: ``(n, length, d)`` token embeddings as the denoiser receives them.
        segments: the stretches of ``hidden`` that hold tokens, one for each tokenizer whose tokens stand in it. SD3 has
            two, CLIP and T5; all others have one. A stretch of zeros, SD3 without its T5, is no segment.
        pooled: ``(n, d_pooled)`` or None where the architecture has no pooled path.
        mask: ``(n, length)`` or None where the denoiser reads every token.
    """

    hidden: Tensor
    segments: tuple[Segment, ...]
    pooled: Tensor | None = None
    mask: Tensor | None = None

    def __len__(self) -> int:
        return len(self.hidden)

    @property
    def text(self) -> Text:
        """The part of it that the denoiser is given."""
        return Text(self.hidden, self.pooled, self.mask)

    @property
    def ids(self) -> Tensor | None:
        """``(n, length)`` token ids; None where there are several segments, each with its own."""
        return self.segments[0].ids if len(self.segments) == 1 else None

    @property
    def counts(self) -> tuple[int, ...]:
        """Tokens of each prompt up to and with the first one behind its words."""
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

    def each(self, change: Callable[[Tensor], Tensor]) -> Conditioning:
        """The same with every token embedding changed: by the norm in front of an entry layer, say."""
        segments = tuple(dataclasses.replace(part, hidden=change(part.hidden)) for part in self.segments)
        return dataclasses.replace(self, hidden=change(self.hidden), segments=segments)

    @property
    def _only(self) -> Segment:
        if len(self.segments) != 1:
            raise ValueError(
                f"these embeddings come from {len(self.segments)} tokenizers in a row, so a prompt has no one span of "
                "tokens; ask each of .segments, or use .take"
            )
        return self.segments[0]


class TooLong(ValueError):
    """Prompts that do not fit a text encoder.

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
        length: tokens the encoder reads; by default what the tokenizer declares.
        name: the tokenizer's attribute on the pipeline, for the error.

    Raises:
        TooLong: a prompt does not fit the encoder. Truncating it could cut the very concept away.
        ValueError: padding comes first.
    """
    if tokenizer.padding_side != "right":
        raise ValueError(
            f"the {name} pads on the {tokenizer.padding_side}, so the places of a concept's words are not known; set "
            f"pipe.{name}.padding_side = 'right', as the model was trained"
        )
    length = length or tokenizer.model_max_length
    counts = tuple(len(ids) for ids in tokenizer(list(prompts)).input_ids)
    refuse_long(prompts, counts, length=length, name=name)
    ids = tokenizer(
        list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids
    return ids, counts


def refuse_long(prompts: Sequence[str], counts: Sequence[int], *, length: int, name: str) -> None:
    """Raise :class:`TooLong` for the prompts of more than ``length`` tokens."""
    long = [(prompt, count) for prompt, count in zip(prompts, counts, strict=True) if count > length]
    if long:
        prompt, count = long[0]
        begins = prompt if len(prompt) <= SHOWN else f"{prompt[:SHOWN]} ..."
        raise TooLong(
            f"the prompt is longer than the text encoder reads; {count} tokens of {length} ({name}): {begins!r}; "
            "shorten it",
            prompts=[prompt for prompt, _ in long],
        )


def nonempty(prompts: Sequence[str]) -> list[str]:
    """The prompts as a list.

    Raises:
        ValueError: there are none.
    """
    if not prompts:
        raise ValueError("no prompts to encode; got an empty list; give at least one")
    return list(prompts)


def converted(pipe: Any, tokenizer: Any, prompts: Sequence[str]) -> list[str]:
    """Prompts with the further vectors of multi-vector textual inversions written out, as the pipeline itself does.

    ``<hero>`` becomes ``<hero> <hero>_1`` where the tokenizer knows the second: both spellings are one prompt.
    """
    convert = getattr(pipe, "maybe_convert_prompt", None)
    if convert is None or not getattr(tokenizer, "added_tokens_encoder", None):
        return list(prompts)
    rest = {t for t in tokenizer.added_tokens_encoder if t.rpartition("_")[2].isdigit()}
    if not rest:
        return list(prompts)
    # a prompt that spells the further vectors already is brought back to the placeholder first
    spelled = [" ".join(word for word in prompt.split(" ") if word not in rest) for prompt in prompts]
    return list(convert(spelled, tokenizer))


@contextlib.contextmanager
def evaluating(*modules: nn.Module | None) -> Iterator[None]:
    """Run modules in evaluation mode (no dropout: T5 has some), and put each mode back."""
    present = [m for module in modules if module is not None for m in module.modules()]
    training = [(module, module.training) for module in present]
    try:
        for module in modules:
            if module is not None:
                module.eval()
        yield
    finally:
        for module, mode in training:
            module.training = mode


@contextlib.contextmanager
def precise(*modules: nn.Module | None) -> Iterator[None]:
    """Run half-precision modules in float32, a block at a time, so that memory grows by one block.

    Embeddings and what else stands outside the stacks of blocks are float32 for the whole time. Afterwards every
    parameter has its own data back. Float32 modules are run as they are.
    """
    with contextlib.ExitStack() as stack:
        for module in modules:
            if module is not None and any(_is_half(p) for p in module.parameters()):
                stack.enter_context(_precise(module))
        yield


@contextlib.contextmanager
def _precise(module: nn.Module) -> Iterator[None]:
    blocks = [block for part in module.modules() if isinstance(part, nn.ModuleList) for block in part]
    inside = {id(p) for block in blocks for p in block.parameters()}
    outside = [p for p in module.parameters() if id(p) not in inside]
    halves = {id(p): p.data for p in module.parameters()}
    buffers = {(m, k): b for m in module.modules() for k, b in m.named_buffers(recurse=False) if _is_half(b)}

    def widen(parameters: Sequence[nn.Parameter]) -> None:
        for p in parameters:
            p.data = p.data.float() if _is_half(p) else p.data

    def narrow(parameters: Sequence[nn.Parameter]) -> None:
        for p in parameters:
            p.data = halves[id(p)]

    handles = []
    for block in blocks:
        own = list(block.parameters())
        handles.append(block.register_forward_pre_hook(lambda *_, own=own: widen(own)))
        handles.append(block.register_forward_hook(lambda *_, own=own: narrow(own), always_call=True))
    try:
        widen(outside)
        for (owner, key), buffer in buffers.items():
            owner._buffers[key] = buffer.float()
        yield
    finally:
        for handle in handles:
            handle.remove()
        narrow(list(module.parameters()))
        for (owner, key), buffer in buffers.items():
            owner._buffers[key] = buffer


def _is_half(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.float16, torch.bfloat16)


def in_batches(encode: Callable[[list[str]], Conditioning], prompts: Sequence[str], size: int) -> Conditioning:
    """Encode prompts a batch at a time and join the parts, padded to one length where the denoiser takes a mask."""
    parts = [encode(list(prompts[i : i + size])) for i in range(0, len(prompts), size)]
    return parts[0] if len(parts) == 1 else functools.reduce(_joined, parts)


def _joined(a: Conditioning, b: Conditioning) -> Conditioning:
    text = a.text + b.text
    segments = tuple(_joined_segment(x, y) for x, y in zip(a.segments, b.segments, strict=True))
    return Conditioning(text.hidden, segments, text.pooled, text.mask)


def _joined_segment(a: Segment, b: Segment) -> Segment:
    length = max(a.hidden.shape[1], b.hidden.shape[1])

    def pad(segment: Segment) -> tuple[Tensor, Tensor]:
        missing = length - segment.hidden.shape[1]
        return nn.functional.pad(segment.hidden, (0, 0, 0, missing)), nn.functional.pad(segment.ids, (0, missing))

    (x, i), (y, j) = pad(a), pad(b)
    return Segment(torch.cat([x, y]), torch.cat([i, j]), a.starts + b.starts, a.ends + b.ends, a.stops + b.stops)
