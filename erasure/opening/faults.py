"""What diffusers, transformers and safetensors raise, as one sentence."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import torch

from erasure.io import first_line

UNREACHED = "it is not on this machine, and the hub cannot be reached"
# What huggingface_hub and httpx raise where the network is off, or down.
OFFLINE = {"LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectionError", "ConnectTimeout", "ConnectError"}


def unreached(error: BaseException) -> bool:
    """Whether an error, or what it comes from, says that there was no network."""
    every = (error, error.__cause__, error.__context__)
    return any(type(one).__name__ in OFFLINE for one in every)


@contextlib.contextmanager
def reasons(source: Path) -> Iterator[None]:
    """What diffusers, transformers and safetensors raise, as one line that names what was being opened."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        raise ValueError(f"could not open {source}: {fault(error)}") from error


def fault(error: Exception) -> str:
    """The sentence of an error that says what is wrong."""
    first = re.split(r"(?<=[\w\])`'\"])\. (?=[A-Z])", " ".join(first_line(error).split()))[0].rstrip(".")
    if isinstance(error, KeyError):
        return f"it lacks the tensor or setting {first}"
    if isinstance(error, IndexError | AttributeError):  # a converter met names it does not know
        return f"its tensors are not named as those of such a model are ({first})"
    if absent := re.match(r"Failed to load (\w+)$", first):  # diffusers' words for a file without such a part
        return f"it holds no weights of a {absent[1]} under names that diffusers knows"
    if "meta tensor" in first:
        return "it lacks tensors that its config asks for; it is not complete, or of another model"
    return first[:300]


__all__ = ["UNREACHED", "fault", "reasons", "unreached"]
