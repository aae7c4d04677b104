"""Names of parameters and modules across parts: bare in the first denoiser, ``part:name`` in all others."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from erasure.backbone.checks import parameters_of


def qualified(part: str, name: str, *, first: str) -> str:
    """The name across parts of what a part calls ``name``; ``first`` is the first denoiser's name on the pipeline."""
    return name if part == first else f"{part}:{name}"


def split(name: str, *, first: str) -> tuple[str, str]:
    """The part of a qualified name, and what it is called there."""
    part, colon, own = name.partition(":")
    return (part, own) if colon else (first, name)


def parameters_by_name(parts: Mapping[str, nn.Module], *, first: str) -> dict[str, nn.Parameter]:
    """Every parameter of some parts by qualified name, as they are called without a PEFT adapter around them."""
    return {
        qualified(part, name, first=first): parameter
        for part, module in parts.items()
        for name, parameter in parameters_of(module).items()
    }


__all__ = ["parameters_by_name", "qualified", "split"]
