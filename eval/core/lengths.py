"""Prompts that are too long for a text encoder, which would cut them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from erasure.backbone import backbone_of
from erasure.backbone.text import TooLong


def too_long(pipe: Any, prompts: Sequence[str]) -> dict[str, str]:
    """The prompts that do not fit the pipeline's text encoders, with the reason; ValueError where that is unknown."""
    backbone = backbone_of(pipe)
    found = {}
    try:
        backbone.check_lengths(prompts)
    except TooLong:
        for prompt in dict.fromkeys(prompts):
            try:
                backbone.check_lengths([prompt])
            except TooLong as reason:
                found[prompt] = str(reason)
    return found


def refuse_cut(pipe: Any, prompts: Sequence[str]) -> list[str]:
    """Raise ``TooLong`` where prompts of a suite do not fit; returns notes for the report where that is unknown."""
    try:
        found = too_long(pipe, prompts)
    except ValueError as reason:
        return [f"Whether the text encoder reads every prompt to its end is not known: {reason}."]
    if found:
        raise TooLong(
            f"the text encoder cuts {len(found)} of {len(prompts)} prompts, and their pictures would not show what is "
            f"asked for; {next(iter(found.values()))}, or take them out of the suite",
            prompts=list(found),
        )
    return []


__all__ = ["refuse_cut", "too_long"]
