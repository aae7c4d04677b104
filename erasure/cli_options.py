"""What the commands share: options, the console, the base model."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from erasure.io import rich_text
from erasure.terminal import console

Base = Annotated[str, typer.Option(help="emoji-world, a diffusers folder, a hub id, or a .safetensors file.")]
Device = Annotated[str | None, typer.Option(help="cuda, mps or cpu; the best one here by default.")]
Dtype = Annotated[str | None, typer.Option(help="float32 (default), float16 or bfloat16.")]
Limit = Annotated[int | None, typer.Option(help="At most so many prompts per group: quicker, and no evidence.")]


def open_base(base: str, device: str | None, dtype: str | None = None) -> Any:
    """The base pipeline, with a word of what is going on."""
    from erasure.runtime import load_base

    with console.status(rich_text(f"loading {base}")):
        return load_base(base, device=device, dtype=dtype)
