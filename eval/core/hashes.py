"""The hash of a pipeline's weights: for caching pictures, and to check that weights were restored."""

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

    Takes several seconds for SD 1.4 in float32; see :class:`WeightHashes` for frequent use.
    """
    pieces = (piece for name, tensor in _tensors(pipe) for piece in io.tensor_bytes(name, tensor))
    return io.blake2b(pieces, size=20)


class WeightHashes:
    """:func:`weights_hash` for frequent use: weights that were hashed before are recognised by a sum over their bytes.

    The sum is taken on the device of the weights and is several times faster. (PyTorch's version counters miss writes
    through ``.data``, shared memory and NumPy.) With 64 bits per tensor two contents collide with probability 2^-64;
    the factors are drawn anew each time, so that nobody can make weights that have the sum of others. About 100 bytes
    are kept per state.
    """

    def __init__(self) -> None:
        self._known: dict[str, str] = {}
        drawn = np.random.default_rng().integers(2**64, size=(2 * LEVELS, WIDTH), dtype=np.uint64)
        self._factors: dict[str, Any] = {"cpu": drawn | 1}  # by device; odd, so that every change of a word counts

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
