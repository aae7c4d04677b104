"""What must be kept, as a Gram matrix: bounded memory for any number of captions, additive, saved and reused."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from erasure.artifact.base import component_prints
from erasure.backbone import Backbone, Space
from erasure.backbone.fingerprint import matches
from erasure.backbone.text import PADDED, Conditioning, Span, TooLong
from erasure.io import parse_json, write_atomically

BATCH = 64  # captions encoded at a time


@dataclasses.dataclass(frozen=True)
class Gram:
    """``sum_j x_j x_j^T`` over the embeddings of captions.

    Two Grams over parts of a corpus add up to that of the whole, so that many processes can share the work.

    Attributes:
        matrices: space to the float64 matrix ``(d, d)``.
        counts: space to the number of embeddings in it.
        span: which tokens of each caption were counted.
        encoders: fingerprints of the text encoders.
    """

    matrices: dict[Space, Tensor]
    counts: dict[Space, int]
    span: Span
    encoders: dict[str, Any]

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        backbone: Backbone,
        captions: Iterable[str],
        *,
        span: Span = "all",
        spaces: Sequence[Space] | None = None,
    ) -> Self:
        """Accumulate over captions, a batch at a time; an iterator of millions is never held in memory.

        Captions that the text encoder cannot read whole are left out, and a warning says how many.

        Args:
            span: ``all`` (default) counts every token, padding included: what the layers really see.
            spaces: by default every space the architecture has.
        """
        matrices: dict[Space, Tensor] = {}
        counts: dict[Space, int] = {}
        for space in spaces or backbone.spaces:
            width = next(iter(backbone.text_sites(space).values())).weight.shape[1]
            matrices[space], counts[space] = torch.zeros(width, width, dtype=torch.float64), 0
        captions, left_out = iter(captions), list[str]()
        while batch := list(itertools.islice(captions, BATCH)):
            conditioning = _fitting(backbone, batch, span, left_out)
            if conditioning is None:
                continue
            for space in matrices:
                rows = conditioning.take(span) if space == "hidden" else conditioning.pooled_rows()
                x = torch.cat(rows).cpu().double()
                matrices[space].addmm_(x.T, x)
                counts[space] += len(x)
        if left_out:
            warnings.warn(
                f"{len(left_out)} captions are longer than the text encoder reads and were left out; the first one "
                f"begins with {left_out[0][:40]!r}",
                stacklevel=2,
            )
        return cls(matrices, counts, span, _encoders(backbone))

    def __add__(self, other: Gram) -> Gram:
        if (
            self.span != other.span
            or self.matrices.keys() != other.matrices.keys()
            or not self._same_encoders(other.encoders)
        ):
            raise ValueError("these Grams are of different text encoders, token spans or spaces; they do not add up")
        matrices = {space: matrix + other.matrices[space] for space, matrix in self.matrices.items()}
        counts = {space: count + other.counts[space] for space, count in self.counts.items()}
        return dataclasses.replace(self, matrices=matrices, counts=counts)

    def check(self, backbone: Backbone) -> Self:
        """Raise unless it was made with the pipeline's text encoders; returns itself."""
        if not self._same_encoders(_encoders(backbone)):
            raise ValueError(
                "this corpus was encoded by other text encoders than the pipeline's; make it again with them"
            )
        return self

    def _same_encoders(self, others: dict[str, Any]) -> bool:
        return self.encoders.keys() == others.keys() and all(matches(e, others[n]) for n, e in self.encoders.items())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file: ``d^2`` numbers in float64 for each space, and what they are of."""
        facts = {"counts": self.counts, "span": self.span, "encoders": self.encoders}
        write_atomically(
            Path(path),
            save({str(space): matrix for space, matrix in self.matrices.items()}, metadata={"gram": json.dumps(facts)}),
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError, ValueError: no such file, or not a Gram.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"no corpus at {path}; make one with `erasure gram CAPTIONS --out {path}`")
        try:
            with safe_open(path, "pt") as file:
                facts = parse_json(file.metadata()["gram"])
                matrices: Any = {space: file.get_tensor(space) for space in facts["counts"]}
        except (SafetensorError, KeyError, TypeError, ValueError):
            raise ValueError(f"{path}: not a Gram matrix, or damaged; make it again with `erasure gram`") from None
        return cls(matrices, **facts)


def _fitting(backbone: Backbone, captions: list[str], span: Span, left_out: list[str]) -> Conditioning | None:
    """The conditioning of those captions that fit, None if none does; the others are added to ``left_out``."""
    while captions:
        try:
            return backbone.encode(captions, padded=span in PADDED)
        except TooLong as error:
            left_out += error.prompts
            captions = [caption for caption in captions if caption not in error.prompts]
    return None


def _encoders(backbone: Backbone) -> dict[str, Any]:
    prints = component_prints(backbone)
    return {name: prints[name] for name in prints if name != backbone.denoiser_name}
