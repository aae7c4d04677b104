"""The hash of a pipeline's weights: what a picture is cached by, and how it is seen that a model was given back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from erasure import io
from erasure.backbone import parts_of

WIDTH = 4096  # words that are summed with a factor each
LEVELS = 4  # of sums of sums: enough for 4096^4 words


def modules_of(pipe: Any) -> dict[str, nn.Module]:
    """The parts of a pipeline that hold weights, by name: denoisers, text encoders, autoencoder."""
    found = {**parts_of(pipe), "vae": getattr(pipe, "vae", None)}
    return {part: module for part, module in found.items() if isinstance(module, nn.Module)}


def weights_hash(pipe: Any) -> str:
    """BLAKE2b of every tensor of the denoisers, text encoders and autoencoder: name, dtype, shape and bytes.

    Two pipelines with one hash draw the same pictures. SD 1.4 in float32 takes several seconds; see
    :class:`WeightHashes` for asking often.
    """
    pieces = (piece for name, tensor in _tensors(pipe) for piece in io.tensor_bytes(name, tensor))
    return io.blake2b(pieces, size=20)


class WeightHashes:
    """:func:`weights_hash` for a run that asks again and again: weights that were hashed before are recognised.

    They are recognised by a sum over all their bytes, which is taken where the weights are and is several times as
    quick. PyTorch counts a tensor's versions, which would be quicker still, but writes through ``.data``, shared memory
    and NumPy leave no trace there, and an erasure that writes so would pass for the base. A sum of 64 bits a tensor
    tells any two contents apart but for a chance of 2^-64; it is no defence against weights that are forged to collide.

    Nothing of a model is kept but a digest of the sums and the hash, some 100 bytes a state.
    """

    def __init__(self) -> None:
        self._known: dict[str, str] = {}
        drawn = np.random.default_rng(0).integers(2**64, size=(2 * LEVELS, WIDTH), dtype=np.uint64)
        self._factors: dict[str, Any] = {"cpu": drawn | 1}  # by device; odd, so that no change is lost to a factor

    def __call__(self, pipe: Any) -> str:
        sums = (f"{name}:{t.dtype}:{tuple(t.shape)}:{self.sum_of(t)};".encode() for name, t in _tensors(pipe))
        key = io.blake2b(sums, size=32)
        if key not in self._known:
            self._known[key] = weights_hash(pipe)
        return self._known[key]

    def sum_of(self, tensor: Tensor) -> int:
        """The sum of the tensor's 64-bit words modulo 2^64, each times a factor that depends on its place."""
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        whole = len(flat) // 8 * 8
        rest = int.from_bytes(bytes(flat[whole:].tolist()), "little") if whole < len(flat) else 0
        if flat.device.type == "cpu":
            words: Any = flat[:whole].numpy().view(np.uint64)
        else:
            words = (flat[:whole].clone() if flat.storage_offset() % 8 else flat[:whole]).view(torch.int64)
        return (self._total(words, str(flat.device), 0) + rest * 31) % 2**64

    def _total(self, words: Any, device: str, level: int) -> int:
        """Of ``(n,)`` words: the sums of every ``WIDTH`` of them, summed in the same way with other factors."""
        if device not in self._factors:
            self._factors[device] = torch.from_numpy(self._factors["cpu"].view(np.int64)).to(device)
        own, others = self._factors[device][2 * level : 2 * level + 2]
        full = len(words) // WIDTH * WIDTH
        tail = int(_dot(words[full:], others[: len(words) - full]))
        return tail + (self._total(_dot(words[:full].reshape(-1, WIDTH), own), device, level + 1) if full else 0)


def _dot(words: Any, factors: Any) -> Any:
    """Products with the factors, summed over the last axis modulo 2^64."""
    return words @ factors if isinstance(words, np.ndarray) else (words * factors).sum(dim=-1)


def _tensors(pipe: Any) -> Iterator[tuple[str, Tensor]]:
    for part, module in modules_of(pipe).items():
        for name, tensor in sorted(module.state_dict().items()):
            yield f"{part}.{name}", tensor


__all__ = ["WeightHashes", "modules_of", "weights_hash"]
