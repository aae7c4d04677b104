"""Hashes of bytes, text, files, plain data and tensors."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

Content = str | bytes | Iterable[bytes | memoryview]


def sha256(content: Content) -> str:
    """SHA-256 in hexadecimal of bytes, of text in UTF-8, or of pieces one after the other."""
    return _digest(hashlib.sha256(), content).hexdigest()


def blake2b(content: Content, *, size: int) -> str:
    """BLAKE2b in hexadecimal, of ``size`` bytes: quicker than SHA-256 where gigabytes of weights are hashed."""
    return _digest(hashlib.blake2b(digest_size=size), content).hexdigest()


def sha256_file(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file, read in pieces: a file larger than the memory has one too."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any, *, default: Callable[[Any], Any] | None = None, spaced: bool = False) -> str:
    """SHA-256 of plain data as JSON with sorted keys: the same whatever the order and spacing it was written in.

    Args:
        default: how to write what is not plain data (``str``); by default it is a TypeError.
        spaced: with a space behind commas and colons. Caches and published results hold hashes of that form; choose
            the default for new ones.
    """
    separators = (", ", ": ") if spaced else (",", ":")
    return sha256(json.dumps(value, sort_keys=True, default=default, separators=separators))


def seed_of(text: str) -> int:
    """64 bits that depend on the text alone, to start a random generator with."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def tensor_bytes(name: str, tensor: Any, *, described: bool = True) -> Iterator[bytes | memoryview]:
    """The pieces of a tensor to hash: name, dtype and shape (``described``) or the name alone, and its bytes."""
    import torch

    yield f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode() if described else name.encode()
    yield memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def _digest(hasher: Any, content: Content) -> Any:
    if isinstance(content, str):
        content = content.encode("utf-8")
    for piece in [content] if isinstance(content, bytes) else content:
        hasher.update(piece)
    return hasher


__all__ = [
    "Content",
    "blake2b",
    "seed_of",
    "sha256",
    "sha256_file",
    "sha256_json",
    "tensor_bytes",
]
