"""The commands that list what there is: methods and probes."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from typing import Annotated, Any

import typer

from erasure.cli.options import LOOK_UP, follow
from erasure.io import meant
from erasure.terminal import PlainTable, console, lines, say

ROOMY = 80  # characters of a line
commands = typer.Typer()


@commands.command(
    rich_help_panel=LOOK_UP,
    epilog="Examples:\n\n[bold]erasure methods[/bold]\n\n[bold]erasure methods esd[/bold]\n\n"
    "[bold]erasure methods --for flux --no-training[/bold]",
)
def methods(
    name: Annotated[str | None, typer.Argument(help="One method: what it is, its settings and its presets.")] = None,
    architecture: Annotated[
        str | None,
        typer.Option("--for", help="Only those that work on this architecture: sd-unet, sdxl, sd3, flux ..."),
    ] = None,
    training: Annotated[
        bool | None, typer.Option("--training/--no-training", help="Only those that train, or only those that do not.")
    ] = None,
) -> None:
    """List methods, presets and papers; with a name, the settings of one."""
    if name is not None:
        if (architecture, training) != (None, None):
            raise ValueError(
                f"--for and --training choose among methods; got the method {name!r}; give one or the other"
            )
        _describe(name)
        return
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
    follow("erasure methods NAME, for the settings of one; erasure erase CONCEPT --method NAME")


def _describe(name: str) -> None:
    """One method with its settings, as its docstring and those of its base classes explain them."""
    from erasure.methods import method_class

    kind = method_class(name)
    paper = kind.reference
    say(f"{name}: {kind.summary}")
    say(f"{paper.title}. {paper.venue}" + (f", arXiv {paper.arxiv}" if paper.arxiv else ""))
    chosen, about = kind.preset(), explained(kind)
    first, *others = kind.presets
    table = PlainTable("setting", first, "what it is")
    for field in dataclasses.fields(kind):
        table.add_row(field.name, _value(getattr(chosen, field.name)), about.get(field.name, ""))
    _print(table, 0)
    for preset in others:
        own = kind.preset(preset)
        changed = [f.name for f in dataclasses.fields(kind) if getattr(own, f.name) != getattr(chosen, f.name)]
        say(f"--preset {preset}: {', '.join(f'{key}={_value(getattr(own, key))}' for key in changed)}")
    follow(f"erasure erase CONCEPT --method {name} --set {dataclasses.fields(kind)[0].name}=VALUE")


def explained(kind: type) -> dict[str, str]:
    """What the fields of a class are, from the "Attributes:" of its docstring and its base classes' docstrings."""
    found: dict[str, str] = {}
    for one in reversed(kind.__mro__):
        _, _, text = inspect.cleandoc(one.__doc__ or "").partition("\nAttributes:\n")
        for entry in re.split(r"\n(?= {4}\w)", "\n" + text.split("\n\n")[0]):
            names, colon, said = entry.strip().partition(":")
            said = re.sub(r":\w+:`~?(?:[\w.]+\.)?(\w+)`", r"\1", " ".join(said.split())).replace("``", "")
            found |= {key.strip(): said for key in names.split(",") if colon}
    return found


def _value(value: Any) -> str:
    """A setting as ``--set`` takes it."""
    return json.dumps(value, ensure_ascii=False, default=str) if not isinstance(value, str) or not value else value


@commands.command(rich_help_panel=LOOK_UP, epilog="Example: [bold]erasure suites[/bold]")
def suites() -> None:
    """List the suites that ship: what each takes out, on which base, and how many pictures it asks for."""
    from erasure.concept import WIDE, Suite

    table = PlainTable("suite", "target", "base", "pictures")
    for name in Suite.shipped():
        suite = Suite.load(name)
        table.add_row(name, suite.target, suite.base, str(len(suite.prompts(wide=WIDE)) * suite.pictures(wide=WIDE)))
    _print(table, 0, 2)
    say(
        "Pictures: drawn for each model. A suite is a YAML file with targets, neighbours and what must stay. For your "
        "own, start from a copy of one:"
    )
    say(str(Suite.folder()), wrap=False)
    follow("erasure evaluate --suite NAME --method uce")


@commands.command(rich_help_panel=LOOK_UP, epilog="Example: [bold]erasure probes[/bold]")
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
