"""Which prompt an embedding is: a denoiser gets no words, so those that the text encoder reads are remembered."""

from __future__ import annotations

import collections
import functools
import threading
from typing import Any

import torch
from torch import Tensor, nn

from erasure.artifact.hooks import Installed
from erasure.backbone import Backbone
from erasure.pipelines.calls import Copies

REMEMBERED = 64  # prompts
NEAR = 0.01  # of its norm: what an embedding may differ by from that of the same prompt, encoded in another batch


class Heard(Installed):
    """A hook on a pipeline's first text encoder (a CLIP), and the prompts it read last, whichever thread drew.

    Prompts are decoded from their tokens. They are encoded once more, by the backbone, when an embedding is looked up:
    so clip_skip, several encoders and their padding are what the denoiser receives.
    """

    def __init__(self, backbone: Backbone, **options: Any) -> None:
        self.pipe, self._given, self._options = backbone.pipe, backbone, options
        self.lock = threading.RLock()
        self.own = threading.local()  # encoding of its own is not remembered
        self.length = 0
        self.known: collections.OrderedDict[str, Tensor | None] = collections.OrderedDict()

    @functools.cached_property
    def backbone(self) -> Any:
        """For encoding prompts, with tokenizers of its own."""
        return type(self._given)(Copies().make(self.pipe), **self._options)

    def listen(self) -> Any:
        """Put the hook on the encoder."""
        return self.pipe.text_encoder.register_forward_pre_hook(self._hear, with_kwargs=True)

    def encode(self, prompts: list[str]) -> Any:
        """The backbone's conditioning of prompts, which are not remembered."""
        self.own.encodes = True
        try:
            with self.lock, torch.no_grad():
                return self.backbone.encode(prompts)
        finally:
            self.own.encodes = False

    def find(self, rows: Tensor) -> list[str | None]:
        """The prompt of each row of ``(n, length, d)`` token embeddings; None where it was not heard."""
        with self.lock:
            new = self.backbone.fitting([prompt for prompt, mean in self.known.items() if mean is None])
            if new:
                hidden = self.encode(new).hidden.float()
                self.length = hidden.shape[1]
                self.known.update(zip(new, hidden.mean(dim=1).cpu(), strict=True))
            known = {prompt: mean for prompt, mean in self.known.items() if mean is not None}
        return [self._nearest(row.float(), known) for row in rows]

    def _nearest(self, row: Tensor, known: dict[str, Tensor]) -> str | None:
        if not row.any():  # what SDXL's guidance has in the place of the empty prompt
            return ""
        if not known or len(row) != self.length:
            return None
        means = torch.stack(list(known.values()))
        distance, best = (means - row.mean(dim=0).cpu()).norm(dim=1).min(dim=0)
        return list(known)[int(best)] if distance <= NEAR * means[best].norm() else None

    def _hear(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None or getattr(self.own, "encodes", False):
            return
        tokenizer = self.pipe.tokenizer  # a copy would not decode
        last = tokenizer.eos_token_id
        with self.lock:
            for row in ids.tolist():
                end = row.index(last, 1) if last in row[1:] else len(row)
                prompt = tokenizer.decode(row[1:end]).strip()
                self.known.setdefault(prompt, None)
                self.known.move_to_end(prompt)
                while len(self.known) > REMEMBERED:
                    self.known.popitem(last=False)


__all__ = ["REMEMBERED", "Heard"]
