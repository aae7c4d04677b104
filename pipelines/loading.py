"""Load, weight, fuse and unload erasures on a stock pipeline. The pipeline's class is not changed."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

from erasure.artifact import Erasure
from erasure.artifact.base import Allow
from erasure.artifact.stack import Layer, Stack, check_scales, stack_of
from erasure.wording import listed


def load_erasure(
    pipe: Any,
    source: str | os.PathLike[str] | Erasure,
    *,
    name: str | None = None,
    scale: float = 1.0,
    allow: Allow | None = None,
) -> str:
    """Load an erasure onto a pipeline and apply it; returns the name it goes by.

    Args:
        source: a folder, a hub id, or an :class:`Erasure` already in memory.
        name: name on this pipeline; the erasure's own by default. Needed when two share one.
        scale: 0 to 1, how strongly.
        allow: "same-text-encoder" lets an operator erasure onto a fine-tune of its base, which it was not evaluated on.
    """
    edit = source if isinstance(source, Erasure) else Erasure.from_pretrained(source)
    edit = dataclasses.replace(edit, name=name) if name else edit
    edit.apply(pipe, scale, allow=allow)
    return edit.name


def refuse_unknown(stack: Stack, names: Sequence[str]) -> None:
    """Raise unless every name is loaded."""
    if unknown := [name for name in names if name not in stack.layers]:
        raise ValueError(
            f"not loaded on this pipeline: {unknown}; loaded are {list(stack.layers)}; call load_erasure first"
        )


def set_erasures(pipe: Any, names: str | Sequence[str], scales: float | Sequence[float] = 1.0) -> None:
    """Make exactly these loaded erasures active, at these scales. The others stay loaded at scale 0.

    Raises:
        ValueError: a name is not loaded, or names and scales differ in number.
    """
    stack = stack_of(pipe)
    wanted = listed(names)
    if len(set(wanted)) < len(wanted):
        raise ValueError(f"an erasure is named twice; got {wanted}; name each once")
    factors = check_scales(scales, len(wanted), of="names")
    scale = dict(zip(wanted, factors, strict=True))
    with stack.locked():
        refuse_unknown(stack, wanted)
        stack.set({name: Layer(layer.erasure, scale.get(name, 0.0)) for name, layer in stack.layers.items()})


def active_erasures(pipe: Any) -> dict[str, float]:
    """Names and scales of the erasures in force, in the order they were applied."""
    return {name: layer.scale for name, layer in stack_of(pipe).layers.items() if layer.scale}


def fuse_erasures(pipe: Any) -> None:
    """Make the active erasures permanent and free the copies of the original weights."""
    stack_of(pipe).forget()


def unload_erasures(pipe: Any, names: str | Sequence[str] | None = None) -> None:
    """Remove erasures by name; every one by default, after which every bit of the model is as it was.

    Raises:
        ValueError: a name is not loaded.
    """
    stack = stack_of(pipe)
    with stack.locked():
        gone = list(stack.layers) if names is None else listed(names)
        refuse_unknown(stack, gone)
        stack.set({name: layer for name, layer in stack.layers.items() if name not in gone})
