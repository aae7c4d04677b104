"""Prompts with free words: conditioning as a differentiable function of some input embeddings."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from erasure.backbone import backbone_of
from erasure.backbone.text import Text, tokenise
from erasure.eval.probes.base import Missing

MARK = "<v>"  # the place of the free words in a prompt


class FreeWords:
    """``k`` free word vectors in the prompts of a Stable Diffusion 1.x / 2.x pipeline, in the place of ``<v>``.

    Args:
        pipe: its text encoder reads them. It has a hook during :meth:`text`, and is not changed.
        prompts: each with one ``<v>`` for all free words, as in "a photo of <v>", or with ``count`` of them.
        count: how many vectors there are.
    """

    def __init__(self, pipe: Any, prompts: Sequence[str], *, count: int) -> None:
        if backbone_of(pipe).architecture != "sd-unet":
            raise Missing("free words are for pipelines with one CLIP text encoder (Stable Diffusion 1.x and 2.x)")
        if bad := next((prompt for prompt in prompts if prompt.count(MARK) not in (1, count)), None):
            raise ValueError(
                f"a prompt needs one {MARK} where the {count} free words stand, or one for each; got {bad!r}"
            )
        self.encoder, self.tokenizer, self.count = pipe.text_encoder, pipe.tokenizer, count
        filler, rows, places = self.tokenizer.eos_token_id, list[list[int]](), list[list[int]]()
        for prompt in prompts:
            row, *rest = (
                self.tokenizer(part.strip(), add_special_tokens=False).input_ids if part.strip() else []
                for part in prompt.split(MARK)
            )
            place: list[int] = []
            for part in rest:
                here = range(len(row), len(row) + count // len(rest))
                place += [1 + i for i in here]  # after the token that begins every sentence
                row = [*row, *[filler for _ in here], *part]
            rows.append(row)
            places.append(place)
        self.ids, self.places = self._padded(rows), torch.tensor(places)

    @property
    def table(self) -> Tensor:
        """Input embeddings of the vocabulary ``(tokens, d)``."""
        return self.encoder.get_input_embeddings().weight.detach()

    def text(self, vectors: Tensor, rows: Sequence[int] | Tensor | None = None) -> Text:
        """Conditioning with the free words at ``vectors``, differentiable in them; of all prompts, or of some ``rows``.

        ``vectors`` are ``(k, d)``, the same in every prompt, or ``(n, k, d)``.
        """
        chosen = torch.arange(len(self.ids)) if rows is None else torch.as_tensor(rows)
        ids = self.ids[chosen].to(self.encoder.device)
        each = vectors.expand(len(ids), -1, -1) if vectors.ndim == 2 else vectors
        with self._embedded(self.places[chosen], each):
            return Text(self.encoder(ids).last_hidden_state)

    def tokens(self, vectors: Tensor) -> list[int]:
        """The nearest word of the vocabulary to each vector by cosine, ``k`` token ids; never a special token."""
        table = torch.nn.functional.normalize(self.table.float(), dim=-1)
        near = torch.nn.functional.normalize(vectors.detach().float(), dim=-1) @ table.T
        near[:, list(self.tokenizer.all_special_ids)] = -torch.inf
        return near.argmax(dim=-1).tolist()

    def spelled(self, ids: Sequence[int], row: int = 0) -> str:
        """A prompt with tokens in the place of the free words. As a string it may tokenise to others: pieces join."""
        filled = self.ids[row].clone()
        filled[self.places[row]] = torch.tensor(list(ids))
        words, last = filled[1:].tolist(), self.tokenizer.eos_token_id
        return self.tokenizer.decode(words[: words.index(last)] if last in words else words).strip()

    def _padded(self, rows: list[list[int]]) -> Tensor:
        length = self.tokenizer.model_max_length
        if long := next((row for row in rows if len(row) + 2 > length), None):
            raise ValueError(f"{len(long)} tokens do not fit a text encoder of {length}; use fewer free words")
        (empty,), _ = tokenise(self.tokenizer, [""])
        first, pad, end = int(empty[0]), int(empty[-1]), self.tokenizer.eos_token_id
        return torch.tensor([[first, *row, end, *[pad] * (length - len(row) - 2)] for row in rows])

    @contextlib.contextmanager
    def _embedded(self, places: Tensor, vectors: Tensor) -> Iterator[None]:
        """Put the vectors in the place of the fillers' embeddings while the encoder reads."""

        def put(module: Any, args: Any, embedded: Tensor) -> Tensor:
            out = embedded.clone()
            out[torch.arange(len(out))[:, None], places] = vectors.to(out.dtype)
            return out

        handle = self.encoder.get_input_embeddings().register_forward_hook(put)
        try:
            yield
        finally:
            handle.remove()
