"""The commands that list what there is: methods and probes."""

from __future__ import annotations

import typer

from erasure.cli.options import follow
from erasure.terminal import PlainTable, console, lines, say

ROOMY = 80  # characters of a line
commands = typer.Typer()


@commands.command(epilog="Example: [bold]erasure methods[/bold]")
def methods() -> None:
    """List methods, presets and papers."""
    from erasure.methods import available, method_class

    table = PlainTable("method", "what it does", "presets", "paper")
    for name in sorted(available()):
        kind = method_class(name)
        table.add_row(
            name,
            kind.summary,
            lines(*kind.presets),
            lines(kind.reference.venue, *([f"arXiv {kind.reference.arxiv}"] if kind.reference.arxiv else [])),
        )
    _print(table, 0, 2)
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
