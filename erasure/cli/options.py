"""What the commands share: options, the base model, the way out."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.text import Text

from erasure.io import meant, named, printable, rich_text
from erasure.terminal import console, say

# Headings in `erasure -h`, and above the options of `erasure evaluate`.
MAKE, MEASURE, HAND_ON, KEEP, LOOK_UP = "Erase and look", "Measure", "Files and hub", "Many, and in service", "Look up"
ARMS, PROBES, JUDGES = "What is compared", "What is asked", "Who judges"

Base = Annotated[str, typer.Option(help="emoji-world, a diffusers folder, a .safetensors checkpoint, or a hub id.")]
OwnBase = Annotated[str, typer.Option(help="Its base model; by default the one it was made on.")]
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


Config = Annotated[
    Path | None,
    typer.Option(
        parser=path,
        help="For a base that is one .safetensors file: the diffusers folder whose configs go with it; by default the "
        "one around or beside the file, or the hub's.",
    ),
]


def one_of(*names: str) -> Callable[[str], str]:
    """A parser for an option that takes one of some names, in the spelling of recipes (``single_file``) too."""

    def chosen(text: str) -> str:
        name = str(text).strip().casefold().replace("_", "-")
        if name not in names:
            raise typer.BadParameter(f"unknown {str(text)!r}{meant(text, names)}; choose one of {', '.join(names)}")
        return name

    return chosen


def base_of(base: str, edits: Iterable[Any]) -> str:
    """The base that was named, or the one that erasures were made on; Emoji World without any."""
    from erasure.concept import WORLD

    made_on = {edit.config["base"]["name"]: edit.name for edit in edits}
    if base or not made_on:
        return base or WORLD
    name, edit = next(iter(made_on.items()))
    if len(made_on) > 1:
        raise ValueError(f"the erasures were made on different bases, {sorted(made_on)}; use them one at a time")
    if name != WORLD and "/" not in name and not Path(name).exists():  # a file or folder, of which the path is not kept
        raise FileNotFoundError(f"{edit!r} was made on {name!r}, which is not here; say where it is with --base")
    return name


def open_base(
    base: str,
    device: str | None,
    dtype: str | None = None,
    *,
    variant: str | None = None,
    config: str | Path | None = None,
) -> Any:
    """The base pipeline, with a word of what is going on."""
    from erasure.opening import load_base

    with console.status(rich_text(f"loading {base}")):
        return load_base(base, device=device, dtype=dtype, variant=variant, config=config)


def base_options(base: str, config: Path | None) -> str:
    """The options that open the same base in the next command; none for Emoji World."""
    named = "" if base == "emoji-world" else f" --base {shlex.quote(base)}"
    return named if config is None else f"{named} --config {shlex.quote(str(config))}"


def check_names(method: str | None = None, suite: str | None = None) -> None:
    """Meet a slip in a name before the libraries that take seconds to import, and the model that takes minutes."""
    if method is not None:
        from erasure.methods import METHODS

        METHODS.check(method)
    if suite is not None:
        from erasure.concept import Suite

        Suite.load(suite)


def note_unknown(base: str, texts: Iterable[str]) -> None:
    """Say what Emoji World was never shown; of other bases nothing is known."""
    from erasure.concept import WORLD
    from erasure.world.spec import spec

    for text in texts if base == WORLD else ():
        if reason := spec().unknown(text):
            note(reason)


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
