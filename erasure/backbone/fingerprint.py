"""Which model is this? A sketch of the weights that survives a change of dtype but not a fine-tune."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from erasure.io import sha256

TENSORS, VALUES = 48, 4
# of an IP-Adapter, and of AnimateDiff's motion adapter
BLOCK = 2**16  # 32-bit words that are summed up at a time; they and their factors fit a processor's cache
ADDED = re.compile(r"\.processor\.|^encoder_hid_proj\.image_projection_layers\.|^image_proj\.|\.motion_modules\.")


def fingerprint(module: nn.Module, *, originals: dict[str, Tensor] | None = None) -> dict[str, Any]:
    """Names and shapes as a hash, and a few weights of some tensors spread over the module.

    Exact bytes would tell a float16 copy of a model from the float32 one. Instead ``samples`` holds four values of each
    of 48 tensors; :func:`matches` compares them within bfloat16 rounding. A fine-tune of all weights exceeds that
    somewhere; a change of a few layers may stand between the samples: this tells models apart, it does not detect
    tampering. What adapters add is no part of the model they are on: an IP-Adapter's image projections, and keys and
    values in the attention processors; a motion adapter's temporal modules.

    Args:
        originals: tensors to read instead of the module's own, by parameter name (weights under an applied erasure).
    """
    own = {name: p for name, p in module.named_parameters() if not ADDED.search(name)}
    state = {**own, **(originals or {})}
    layout = sha256(repr([(name, tuple(t.shape)) for name, t in sorted(state.items())]))
    return {"layout": layout[:16], "samples": [round(value, 6) for value in _samples(state)]}


def _samples(state: dict[str, Tensor]) -> Iterable[float]:
    names = sorted(name for name, tensor in state.items() if tensor.ndim >= 2)
    for i in range(min(TENSORS, len(names))):
        tensor = state[names[i * len(names) // min(TENSORS, len(names))]].detach().flatten()
        places = [j * (tensor.numel() - 1) // (VALUES - 1) for j in range(VALUES)]
        yield from tensor[places].float().tolist()


def matches(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two fingerprints are of one model, up to the rounding of float16 or bfloat16.

    In float64: what overflows there fits no model. Without samples of at least one tensor it is no fingerprint.
    """
    if a.get("layout") != b.get("layout"):
        return False
    x, y = (torch.tensor(each.get("samples", []), dtype=torch.float64) for each in (a, b))
    if len(x) != len(y) or len(x) < VALUES or not (torch.isfinite(x).all() and torch.isfinite(y).all()):
        return False
    return bool(((x - y).abs() <= 0.01 * torch.maximum(x.abs(), y.abs()) + 1e-5).all())


def content(module: nn.Module) -> str:
    """A hash of every bit of every parameter and buffer, with names, dtypes and shapes.

    Unlike a :func:`fingerprint`, it tells a fine-tune of one row, or a float16 copy, from the original. Blocks of
    32-bit words are summed up with fixed random 64-bit factors on the device that holds them, and the sums are hashed:
    that reads the weights once, at the speed of memory, and moves nothing to the processor. Two versions of a block
    have one sum by chance once in 2^33 times. It is not kept between calls: a change through ``.data`` counts nowhere.
    """
    factors = torch.randint(-(2**63), 2**63 - 1, (BLOCK,), generator=torch.Generator().manual_seed(0))
    tensors = sorted({**dict(module.named_parameters()), **dict(module.named_buffers())}.items())
    read = [(name, str(t.dtype), tuple(t.shape), _sums(t.detach(), factors.to(t.device))) for name, t in tensors]
    return sha256(repr(read))


def _sums(tensor: Tensor, factors: Tensor) -> list[int]:
    raw = tensor.contiguous().reshape(-1).view(torch.uint8)
    if len(raw) % 4 or raw.storage_offset() % 4:
        raw = torch.cat([raw, raw.new_zeros(-len(raw) % 4)])
    parts = raw.view(torch.int32).split(BLOCK)
    return torch.stack([(part.long() * factors[: len(part)]).sum() for part in parts]).tolist()


def short(print_: dict[str, Any]) -> str:
    """Eight characters for messages and cards."""
    return sha256(repr(print_))[:8]


def difference(part: str, expected: dict[str, Any] | None, found: dict[str, Any] | None) -> str:
    """How a part of a pipeline differs from that of another, for a message; None for a pipeline without it."""
    if expected is None or found is None:
        has = "has no" if expected is None else "has a"
        return f"which {has} {part}, and this pipeline has {'one' if found is not None else 'none'}"
    return f"({part} {short(expected)}), this pipeline's {part} is {short(found)}"
