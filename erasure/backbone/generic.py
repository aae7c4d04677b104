"""Transformers that read one text encoder: each is a class of names.

The pipeline's own ``encode_prompt`` encodes. Where a prompt's words stand among the tokens (behind a chat template,
before an end token, between paddings) is read off the ids that its text encoder receives.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from erasure.backbone.base import Backbone, Site, Space
from erasure.backbone.listen import Call, listening
from erasure.backbone.sd3 import named_sites
from erasure.backbone.text import Conditioning, Segment, in_batches, refuse_long


class TransformerBackbone(Backbone):
    """One transformer (or two), one text encoder, one layer by which the text enters.

    Args:
        max_sequence_length: tokens a prompt is padded or cut to, by default the pipeline's own number. Encoders see
            their padding, so give what you draw with.

    Class attributes:
        entry, norm: names of the first linear layer that receives the text, and of the norm in front of it.
        encoded: what the values of ``encode_prompt`` are, in order: names of :class:`Text`'s parts, None for others.
        encode_call: further arguments of ``encode_prompt``.
        lowercases: whether the pipeline changes the prompt to lower case.
        default_length: the pipeline's own ``max_sequence_length``.
        reads_padding: whether the denoiser looks at masked tokens all the same.
    """

    entry: ClassVar[str]
    norm: ClassVar[str | None] = None
    encoded: ClassVar[tuple[str | None, ...]] = ("hidden",)
    encode_call: ClassVar[dict[str, Any]] = {"do_classifier_free_guidance": False}
    lowercases: ClassVar[bool] = False
    default_length: ClassVar[int] = 512
    reads_padding: ClassVar[bool] = False

    def __init__(self, pipe: Any, *, max_sequence_length: int | None = None, **options: Any) -> None:
        self.max_sequence_length = max_sequence_length or self.default_length
        super().__init__(pipe, **options)

    def sites_of(self, denoiser: Any, space: Space) -> dict[str, Site]:
        """The layer that embeds the tokens."""
        return named_sites(denoiser, space, hidden=self.entry, norm=self.norm)

    # --- encoding ---------------------------------------------------------------------------------------------------

    def _encode(self, prompts: list[str], *, padded: bool) -> Conditioning:
        """As the pipeline's ``encode_prompt``; every prompt's words, and the tail behind them, are found by ids."""
        return in_batches(self._batch, prompts, self.batch_size)

    def _batch(self, prompts: list[str]) -> Conditioning:
        parts, ids, lengths = self._spoken(prompts)
        empty = self._empty_ids
        written = [row[length[0] : length[1]].tolist() for row, length in zip(ids, lengths, strict=True)]
        place, tail = self._place
        found = [words_between(row, empty) if row != empty else (place, place) for row in written]
        hidden, mask = parts["hidden"], parts.get("mask")
        offset = [self.row_of(length[0], ids.shape[1], hidden.shape[1]) for length in lengths]
        ends_well = [not tail or row[-tail:] == empty[-tail:] for row in written]  # T5's end token survives a cut
        whole = [well and len(row) < ids.shape[1] for well, row in zip(ends_well, written, strict=True)]
        self._refuse_cut(prompts, found, whole, [hidden.shape[1] - o for o in offset])
        starts = tuple(max(a + o, 0) for (a, _), o in zip(found, offset, strict=True))
        ends = tuple(b + o for (_, b), o in zip(found, offset, strict=True))
        stops = self.stops(hidden, mask)
        shown = ids_of_rows(ids, [length[0] - o for length, o in zip(lengths, offset, strict=True)], hidden.shape[1])
        return Conditioning(hidden, (Segment(hidden, shown, starts, ends, stops),), parts.get("pooled"), mask)

    def stops(self, hidden: Tensor, mask: Tensor | None) -> tuple[int, ...]:
        """For each prompt, the position behind the last token the denoiser reads."""
        if mask is None or self.reads_padding:
            return (hidden.shape[1],) * len(hidden)
        return tuple(map(int, mask.bool().sum(dim=1)))

    def row_of(self, first: int, tokens: int, rows: int) -> int:
        """The row of the token that stands first in the text encoder's input, behind any padding on the left.

        Args:
            first: position of that token in the encoder's input.
            tokens, rows: lengths of the encoder's input and of what the denoiser receives.
        """
        return first - (tokens - rows)

    def _spoken(self, prompts: Sequence[str]) -> tuple[dict[str, Tensor], Tensor, list[tuple[int, int]]]:
        """The parts of the text, the encoder's token ids, and where each prompt's own ids begin and end."""
        heard: list[Call] = []
        with listening({"text_encoder": self.pipe.text_encoder}, before=heard.append):
            values = self.encode_prompt(list(prompts))
        parts = {
            n: value for n, value in zip(self.encoded, values, strict=False) if n is not None and value is not None
        }
        ids = torch.cat([call.inputs["input_ids"] for call in heard])
        masks = [call.inputs.get("attention_mask") for call in heard]
        real = ids != self.words.pad_token_id if any(m is None for m in masks) else torch.cat(masks).bool()  # type: ignore[arg-type]
        lengths = [(int(row.int().argmax()), int(len(row) - row.flip(0).int().argmax())) for row in real]
        return parts, ids.cpu(), lengths

    @property
    def words(self) -> Any:
        """The tokenizer, also where the pipeline holds a processor of text and pictures."""
        return getattr(self.pipe.tokenizer, "tokenizer", self.pipe.tokenizer)

    def encode_prompt(self, prompts: list[str]) -> Sequence[Any]:
        """The pipeline's own ``encode_prompt``, with as many of our arguments as it has."""
        known = inspect.signature(self.pipe.encode_prompt).parameters
        call = {"device": self.device, "max_sequence_length": self.max_sequence_length, **self.encode_call}
        return self.pipe.encode_prompt(prompt=prompts, **{k: v for k, v in call.items() if k in known})

    @functools.cached_property
    def _empty_ids(self) -> list[int]:
        _, ids, ((start, stop),) = self._spoken([""])
        return ids[0, start:stop].tolist()

    @functools.cached_property
    def _place(self) -> tuple[int, int]:
        """Where words would stand in the ids of the empty prompt, and how many tokens of a template stand behind."""
        _, ids, ((start, stop),) = self._spoken(["a"])
        row = ids[0, start:stop].tolist()
        before, end = words_between(row, self._empty_ids)
        return before, len(row) - end

    def tokenizers(self) -> dict[str, tuple[Any, int]]:
        return {"tokenizer": (self.words, self.max_sequence_length)}

    def check_lengths(self, prompts: Sequence[str]) -> None:
        """As everywhere. How much room a template leaves is seen where it is applied: what comes near is encoded."""
        room = self.max_sequence_length - len(self._empty_ids)
        if near := [p for p, count in zip(prompts, self._word_counts(prompts), strict=True) if count >= room]:
            self.encode(near)

    def _word_counts(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of each prompt alone, without template, start or end; behind a space, if that makes fewer."""
        texts = [prompt.strip().lower() if self.lowercases else prompt for prompt in prompts]
        return [min(len(self.words.tokenize(text)), len(self.words.tokenize(f" {text}"))) for text in texts]

    def _refuse_cut(
        self,
        prompts: Sequence[str],
        found: Sequence[tuple[int, int]],
        whole: Sequence[bool],
        stops: Sequence[int],
    ) -> None:
        """Raise for prompts of which the pipeline cut words away: before the encoder, or behind it, at a stop.

        Args:
            whole: whether what stands behind the words is there, and there was room left.
        """
        rows = zip(prompts, found, whole, stops, strict=True)
        suspects = [(p, b - a, b > stop) for p, (a, b), kept, stop in rows if not kept or b > stop]
        plain = self._word_counts([prompt for prompt, *_ in suspects])
        counted = zip(suspects, plain, strict=True)
        cut = [(p, n + len(self._empty_ids)) for (p, left, beyond), n in counted if beyond or left + 1 < n]
        if cut:
            counts = [count for _, count in cut]
            refuse_long([p for p, _ in cut], counts, length=min(counts) - 1, name="tokenizer")


def ids_of_rows(ids: Tensor, first: Sequence[int], rows: int) -> Tensor:
    """``(n, rows)``: the ids of the tokens whose embeddings the denoiser receives; 0 where no token was.

    Args:
        ids: ``(n, tokens)``, the text encoder's input.
        first: for each prompt, the token that became the first row.
    """
    places = torch.tensor(first)[:, None] + torch.arange(rows)
    inside = (places >= 0) & (places < ids.shape[1])
    return ids.gather(1, places.clamp(0, ids.shape[1] - 1)).where(inside, 0)


def words_between(ids: Sequence[int], empty: Sequence[int]) -> tuple[int, int]:
    """Where the words of a prompt begin and end in its ids, given those of the empty prompt: the template."""
    shorter = min(len(ids), len(empty))
    before = next((i for i in range(shorter) if ids[i] != empty[i]), shorter)
    rest = min(len(ids), len(empty)) - before
    after = next((i for i in range(rest) if ids[-1 - i] != empty[-1 - i]), rest)
    return before, len(ids) - after


__all__ = ["TransformerBackbone", "words_between"]
