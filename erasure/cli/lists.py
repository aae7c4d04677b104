"""The commands that list what there is: methods and probes."""

from __future__ import annotations

from typing import Annotated

import typer

from erasure.cli.options import follow
from erasure.io import meant
from erasure.terminal import PlainTable, console, lines, say

ROOMY = 80  # characters of a line
commands = typer.Typer()


@commands.command(
    epilog="Examples: [bold]erasure methods[/bold]  |  [bold]erasure methods --for flux --no-training[/bold]"
)
def methods(
    architecture: Annotated[
        str | None,
        typer.Option("--for", help="Only those that work on this architecture: sd-unet, sdxl, sd3, flux ..."),
    ] = None,
    training: Annotated[
        bool | None, typer.Option("--training/--no-training", help="Only those that train, or only those that do not.")
    ] = None,
) -> None:
    """List methods, presets and papers."""
    from erasure.backbone import architectures
    from erasure.methods import available, method_class
    from erasure.methods.finetune import FineTune

    known = architectures()
    if architecture is not None and architecture not in known:
        raise ValueError(
            f"unknown architecture {architecture!r}{meant(architecture, known)}; choose one of {sorted(known)}"
        )
    table = PlainTable("method", "what it does", "presets", "paper")
    for name in sorted(available()):
        kind = method_class(name)
        trains = issubclass(kind, FineTune)
        works = architecture is None or kind.architectures is None or architecture in kind.architectures
        if works and training in (None, trains):
            table.add_row(
                name,
                kind.summary,
                lines(*kind.presets),
                lines(kind.reference.venue, *([f"arXiv {kind.reference.arxiv}"] if kind.reference.arxiv else [])),
            )
    _print(table, 0, 2)
    if not table.row_count:
        say("No method fits. Leave out --for or --training.")
        return
    say("The first preset of each method is used unless another is named; official-* and paper are published settings.")
    follow("erasure erase CONCEPT --method NAME --out FOLDER")


@commands.command(epilog="Example: [bold]erasure probes[/bold]")
def probes() -> None:
    """List the probes: what each asks, what it is evidence about, and which presets run it."""
    from erasure.eval.probes import PRESETS, names, probe_class

    table = PlainTable("probe", "", "what it asks", "evidence about", "access", "presets")
    section = ""
    for name in names():
        kind = probe_class(name)
        if kind.section != section:
            table.add_section()
            section = kind.section
        ran = ", ".join(preset for preset in PRESETS if preset in kind.presets)
        table.add_row(
            name, kind.code, kind.title, lines(f"{kind.section},", kind.level), kind.access.replace("_", " "), ran
        )
    _print(table, 0, 3)
    say(
        "Evidence about: outputs are pictures, behaviour is what the model does from inside, weights are its "
        "parameters, system is the model with its filters. Access is what whoever asks must hold."
    )
    follow("erasure evaluate --suite superhero --method uce --preset quick --probe NAME")


def _print(table: PlainTable, *names: int) -> None:
    """A table with columns of names to copy, which stay in one piece where the terminal has room."""
    for i in names:
        table.columns[i].no_wrap = console.width >= ROOMY
    console.print(table)
