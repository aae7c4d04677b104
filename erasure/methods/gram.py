"""What must be kept, summed up: bounded memory for any number of captions, additive, saved and reused."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from erasure.artifact.base import component_prints
from erasure.backbone import Backbone, Space
from erasure.backbone.fingerprint import matches
from erasure.backbone.text import PADDED, Conditioning, Span
from erasure.io import parse_json, write_atomically
from erasure.methods.kept import SKETCH, Accumulator, Kept

BATCH = 64  # captions encoded at a time


@dataclasses.dataclass(frozen=True)
class Gram:
    """``sum_j x_j x_j^T`` over the embeddings of captions.

    Two Grams over parts of a corpus add up to that of the whole, so that many processes can share the work. Where
    embeddings are wider than ``WIDE`` it is a sketch: at most ``SKETCH`` rows with the directions of most
    energy, exact for up to as many embeddings.

    Attributes:
        kept: space to the float64 matrix ``(d, d)``, or to the rows of the sketch.
        counts: space to the number of embeddings in it.
        span: which tokens of each caption were counted.
        encoders: fingerprints of the text encoders.
    """

    kept: dict[Space, Kept]
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
        sums: dict[Space, Accumulator] = {}
        counts: dict[Space, int] = {}
        for space in spaces or backbone.spaces:
            width = backbone.width(space)
            sums[space], counts[space] = Accumulator(width), 0
        captions, left_out = iter(captions), list[str]()
        while batch := list(itertools.islice(captions, BATCH)):
            fitting = backbone.fitting(batch)
            left_out += [caption for caption in batch if caption not in fitting]
            if not fitting:
                continue
            layers = [one.read(fitting, padded=span in PADDED) for one in backbone.read_at()]
            for space, total in sums.items():
                rows = embeddings(layers, span, space)
                total.add(rows)
                counts[space] += len(rows)
        warn_left_out(left_out)
        return cls({space: total.kept() for space, total in sums.items()}, counts, span, encoder_prints(backbone))

    def __add__(self, other: Gram) -> Gram:
        if self.span != other.span or self.kept.keys() != other.kept.keys() or not self._same_encoders(other.encoders):
            raise ValueError("these Grams are of different text encoders, token spans or spaces; they do not add up")
        kept = {space: (mine + other.kept[space]).shrunk(SKETCH) for space, mine in self.kept.items()}
        counts = {space: count + other.counts[space] for space, count in self.counts.items()}
        return dataclasses.replace(self, kept=kept, counts=counts)

    def less(self, other: Gram) -> Gram:
        """Without some of its captions. Of matrices alone: nobody knows what a sketch has left of a caption."""
        if any(kept.low_rank for kept in (*self.kept.values(), *other.kept.values())):
            raise ValueError("nothing can be taken out of a sketch; sum up the captions that are left")
        kept = {space: Kept(mine.data - other.kept[space].data) for space, mine in self.kept.items()}
        counts = {space: count - other.counts[space] for space, count in self.counts.items()}
        return dataclasses.replace(self, kept=kept, counts=counts)

    def check(self, backbone: Backbone) -> Self:
        """Raise unless it was made with the pipeline's text encoders; returns itself."""
        if not self._same_encoders(encoder_prints(backbone)):
            raise ValueError(
                "this corpus was encoded by other text encoders than the pipeline's; make it again with them"
            )
        return self

    def _same_encoders(self, others: dict[str, Any]) -> bool:
        return self.encoders.keys() == others.keys() and all(matches(e, others[n]) for n, e in self.encoders.items())

    def save(self, path: str | os.PathLike[str], *, notes: Mapping[str, str] | None = None) -> None:
        """Write one safetensors file: a float64 matrix for each space, and what they are of.

        Args:
            notes: further entries of the file's metadata.
        """
        facts: dict[str, Any] = {"counts": self.counts, "span": self.span, "encoders": self.encoders}
        facts["lost"] = {space: kept.lost for space, kept in self.kept.items() if kept.low_rank}
        tensors = {str(space): kept.data.contiguous() for space, kept in self.kept.items()}
        write_atomically(Path(path), save(tensors, metadata={**(notes or {}), "gram": json.dumps(facts)}))

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
                lost = facts.pop("lost", {})  # of sketches; files from before there were any have matrices alone
                kept: Any = {s: Kept(file.get_tensor(s), s in lost, lost.get(s, 0.0)) for s in facts["counts"]}
        except (SafetensorError, KeyError, TypeError, ValueError):
            raise ValueError(f"{path}: not a Gram matrix, or damaged; make it again with `erasure gram`") from None
        return cls(kept, **facts)


def warn_left_out(captions: Sequence[str]) -> None:
    """One warning for all the captions of a corpus that the text encoder cannot read whole, if there are any."""
    if captions:
        warnings.warn(
            f"{len(captions)} captions are longer than the text encoder reads and were left out; the first one begins "
            f"with {captions[0][:40]!r}",
            stacklevel=3,
        )


def embeddings(layers: Sequence[Conditioning], span: Span, space: Space) -> Tensor:
    """``(n, d)``: what a Gram counts of some captions, read at every layer of the text encoder that is erased at."""
    if space == "pooled":  # which comes from one layer
        return torch.cat(layers[0].pooled_rows())
    return torch.cat([row for conditioning in layers for row in conditioning.take(span)])


def encoder_prints(backbone: Backbone) -> dict[str, Any]:
    """Fingerprints of the text encoders, without the erasures on them."""
    prints = component_prints(backbone)
    return {name: prints[name] for name in prints if name != backbone.denoiser_name}
