"""Embedders: what puts texts and pictures into one space, in which near means alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from erasure.io import shown

By = Literal["caption", "picture"]
Query = str | Image.Image

SAMPLE = "a picture"  # a text, and a picture below, by which an embedder is known again
ALIKE = 0.99  # cosine from which it is the same one: other devices and precisions round, other weights do not


class Embedder(Protocol):
    """Anything with a name and two towers; the CLIP detectors of :mod:`erasure.eval.detectors` have them."""

    @property
    def name(self) -> str:
        """Of the model and its weights: a store made with one is not read with another."""
        ...

    def text_features(self, texts: Sequence[str], /) -> Tensor:
        """``(n, d)``, of any length."""
        ...

    def image_features(self, images: Sequence[Image.Image], /) -> Tensor:
        """``(n, d)``, of any length, in the space of the texts."""
        ...


@dataclasses.dataclass(frozen=True)
class OpenClipEmbedder:
    """An open_clip model as an embedder.

    Attributes:
        model: with ``encode_text`` and ``encode_image``; in evaluation mode.
        preprocess: picture -> ``(3, height, width)``, as open_clip returns it.
        tokenizer: texts -> ids, as open_clip returns it.
        name: of the model and its weights.
        batch_size: texts or pictures per forward pass.

    >>> OpenClipEmbedder.load("ViT-B-32", "laion2b_s34b_b79k")  # doctest: +SKIP
    """

    model: Any
    preprocess: Callable[[Image.Image], Tensor]
    tokenizer: Callable[[list[str]], Tensor]
    name: str
    batch_size: int = 64

    @classmethod
    def load(cls, model: str | Path, pretrained: str | None = None, *, device: str = "cpu") -> Self:
        """A model by its name and the tag of its weights, ``hf-hub:org/name``, or a local folder.

        Raises:
            ValueError: a name without the tag of weights.
        """
        import open_clip  # takes seconds

        folder = Path(model)
        source = f"local-dir:{folder}" if folder.is_dir() else str(model)
        if not pretrained and ":" not in source:
            raise ValueError(
                f"an open_clip model needs weights; got {str(model)!r} alone; name their tag too, or give a folder"
            )
        network, _, preprocess = open_clip.create_model_and_transforms(source, pretrained=pretrained, device=device)
        name = folder.name if folder.is_dir() else "/".join(filter(None, (str(model), pretrained)))
        return cls(network.eval(), preprocess, open_clip.get_tokenizer(source), f"open_clip {name}")

    @torch.no_grad()
    def text_features(self, texts: Sequence[str], /) -> Tensor:
        return self._each(lambda part: self.model.encode_text(self.tokenizer(part).to(self._device)), texts)

    @torch.no_grad()
    def image_features(self, images: Sequence[Image.Image], /) -> Tensor:
        def encode(part: list[Image.Image]) -> Tensor:
            pixels = torch.stack([self.preprocess(image.convert("RGB")) for image in part])
            return self.model.encode_image(pixels.to(self._device))

        return self._each(encode, images)

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _each(self, encode: Callable[[list[Any]], Tensor], items: Sequence[Any]) -> Tensor:
        parts = [list(items[i : i + self.batch_size]) for i in range(0, len(items), self.batch_size)]
        return torch.cat([encode(part).float().cpu() for part in parts])


def vectors(embedder: Embedder, queries: Sequence[Query]) -> np.ndarray:
    """Unit vectors ``(n, d)`` float32 of texts, or of pictures.

    Raises:
        ValueError: they are of other shapes, zero, or no numbers; or both are in one list.
    """
    texts = isinstance(queries[0], str)
    if any(isinstance(query, str) != texts for query in queries):
        raise ValueError("texts and pictures are embedded apart; got both in one list; ask for each by itself")
    found = (embedder.text_features if texts else embedder.image_features)(list(queries))  # type: ignore[arg-type]
    rows = torch.as_tensor(found).detach().float().cpu().numpy()
    if rows.ndim != 2 or len(rows) != len(queries):
        raise ValueError(
            f"an embedder gives one vector for each text or picture; {embedder.name!r} gave the shape {rows.shape} for "
            f"{len(queries)}; return (n, d)"
        )
    lengths = np.linalg.norm(rows.astype(np.float64), axis=1)
    wrong = np.flatnonzero(~(np.isfinite(lengths) & (lengths > 0)))
    if len(wrong):
        what = shown(queries[wrong[0]]) if texts else "a picture"
        raise ValueError(
            f"{embedder.name!r} gave a vector that is zero, infinite or no number for {what}; such a vector is near "
            "nothing; look at its weights and its precision"
        )
    return (rows / lengths[:, None]).astype(np.float32)


def signature(embedder: Embedder) -> np.ndarray:
    """``(2, d)``: what an embedder makes of a fixed text and a fixed picture. Other weights make something else."""
    ramp = np.indices((64, 64)).sum(0).astype(np.uint8)
    sample = Image.fromarray(np.stack([2 * ramp, 255 - ramp, np.full_like(ramp, 128)], axis=-1))
    text, picture = vectors(embedder, [SAMPLE]), vectors(embedder, [sample])
    if text.shape != picture.shape:
        raise ValueError(
            f"texts and pictures need one space; {embedder.name!r} gives vectors of {text.shape[1]} and "
            f"{picture.shape[1]} numbers; use an embedder with two towers that fit, such as a CLIP model"
        )
    return np.concatenate([text, picture])


__all__ = ["By", "Embedder", "OpenClipEmbedder", "Query", "signature", "vectors"]
