"""What the commands share: options, the base model, the way out."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.text import Text

from erasure.io import named, printable, rich_text
from erasure.terminal import console, say

Base = Annotated[str, typer.Option(help="emoji-world, a diffusers folder, a .safetensors checkpoint, or a hub id.")]
Variant = Annotated[
    str | None, typer.Option(help="Open the base's files of this variant, e.g. fp16; the plain ones by default.")
]
Device = Annotated[str | None, typer.Option(help="cuda, mps or cpu; the best one here by default.")]
Dtype = Annotated[str | None, typer.Option(help="float32 (default), float16 or bfloat16.")]
Limit = Annotated[
    int | None, typer.Option(min=1, help="At most so many prompts per group: a quick trial, no evidence.")
]


def path(text: Any) -> Path:
    """A path of the command line; an empty one is a slip, often of a variable that is not set."""
    try:
        return named(str(text))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def open_base(base: str, device: str | None, dtype: str | None = None, *, variant: str | None = None) -> Any:
    """The base pipeline, with a word of what is going on."""
    from erasure.opening import load_base

    with console.status(rich_text(f"loading {base}")):
        return load_base(base, device=device, dtype=dtype, variant=variant)


def follow(command: str) -> None:
    """Say which command a user may want next."""
    say(f"next: {command}", wrap=False)


def note(message: str) -> None:
    """A line on the error stream that stops nothing."""
    say(f"note: {message}", on=Console(stderr=True))


def fail(message: str, code: int) -> NoReturn:
    """One line on the error stream, and an exit code."""
    text = Text.assemble(("error:", "red"), " ", printable(message, limit=2000))
    Console(stderr=True).print(text, highlight=False, soft_wrap=True)
    sys.exit(code)
