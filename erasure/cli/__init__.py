"""The command line. Heavy imports happen inside the commands, so that ``--help`` answers at once."""

from __future__ import annotations

import copy
import errno
import os
import sys
import warnings
from collections.abc import Callable
from typing import Annotated, Any, NoReturn

import typer

from erasure.cli import batches, browser, doctor, evaluate, files, lists, make, push, register, serve, verify, world
from erasure.cli.options import KEEP, LOOK_UP, fail, note
from erasure.io import one_line
from erasure.terminal import say

app = typer.Typer(
    name="erasure",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        say(f"erasure {version(doctor.DISTRIBUTION)}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Take a concept out of what a diffusion model draws, and say honestly what that did."""


for group in (make, browser, evaluate, batches, files, push, serve, verify, lists, doctor):
    app.add_typer(group.commands)
app.add_typer(world.commands, name="world", rich_help_panel=LOOK_UP)
app.add_typer(register.commands, name="register", rich_help_panel=KEEP)


def overview(commands: typer.Typer) -> typer.Typer:
    """The same commands without their options: all that their list shows, made in a third of the time."""
    bare = copy.copy(commands)
    bare.registered_commands = [copy.copy(info) for info in commands.registered_commands]
    for info in bare.registered_commands:
        info.callback = _without_options(info.callback)
    bare.registered_groups = [copy.copy(group) for group in commands.registered_groups]
    for group in bare.registered_groups:
        group.typer_instance = group.typer_instance and overview(group.typer_instance)
    return bare


def _without_options(command: Any) -> Callable[[], None]:
    def bare() -> None: ...

    bare.__name__, bare.__doc__ = command.__name__, command.__doc__
    return bare


def main(commands: typer.Typer = app) -> NoReturn:
    """Run one of the commands. Bad input is one line on the error stream and a non-zero exit, never a traceback."""
    warnings.showwarning = lambda message, *_, **__: note(str(message))
    try:
        (overview(commands) if sys.argv[1:] in ([], ["-h"], ["--help"]) else commands)()
        sys.exit(0)
    except SystemExit as stopped:  # typer turns Ctrl-C into a silent exit
        if stopped.code == 130:
            fail("stopped; nothing half-written was left behind", 130)
        raise
    except OSError as error:
        full = error.errno == errno.ENOSPC
        fail("no space left on the disk; free some and run the same command again" if full else one_line(error), 2)
    except (ValueError, ArithmeticError, ImportError) as error:
        fail(one_line(error), 2)
    except Exception as error:
        if os.environ.get("ERASURE_DEBUG"):
            raise
        fail(f"{type(error).__name__}: {one_line(error)} (ERASURE_DEBUG=1 shows where)", 2)


__all__ = ["app", "main"]
