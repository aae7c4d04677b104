"""The commands that make many erasures: a recipe, and a comparison of methods."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from erasure.cli.options import KEEP, MEASURE, Config, Device, Dtype, Limit, follow, path
from erasure.io import check_writable, fault_of
from erasure.terminal import PlainTable, console, print_json, say

commands = typer.Typer()
MOST = 100  # cells that are listed one by one


class RunByDefault(TyperGroup):
    """A group whose first argument may be a recipe: ``batch recipe.yaml`` is ``batch run recipe.yaml``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        recipe = any(arg.endswith((".yaml", ".yml")) or Path(arg).is_file() for arg in args)
        if recipe and args[0] not in self.commands:
            args = ["run", *args]
        return super().parse_args(ctx, args)


batch = typer.Typer(
    cls=RunByDefault,
    no_args_is_help=True,
    help="Many erasures from one YAML recipe: run it, look how far it is, put its results on one page.",
)
commands.add_typer(batch, name="batch", rich_help_panel=KEEP)
RecipeFile = Annotated[Path, typer.Argument(parser=path, help="YAML recipe; see docs/batch.md.")]


@batch.command(
    "run",
    epilog="Examples:\n\n[bold]erasure batch recipe.yaml[/bold]\n\n"
    "[bold]accelerate launch --num_processes 2 -m erasure.cli batch recipe.yaml[/bold]\n\n"
    "[bold]erasure batch recipe.yaml --engine ray[/bold]",
)
def batch_run(
    recipe: RecipeFile,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Run cells again that failed before; they are left otherwise.")
    ] = False,
    engine: Annotated[
        Literal["process", "ray"],
        typer.Option(help="process: this one, and others that are started likewise. ray: workers on a ray cluster."),
    ] = "process",
    workers: Annotated[
        int | None, typer.Option(min=1, help="With --engine ray: how many; one for each GPU, or CPU, by default.")
    ] = None,
    device: Device = None,
) -> None:
    """Run every cell of a recipe (bases x concepts x methods x seeds); finished cells are skipped.

    Start it as often as you like, on every machine that sees the folder: each process takes cells that nobody is at.
    """
    from erasure.batch import Recipe, run
    from erasure.batch.on_ray import run_on_ray

    if workers is not None and engine != "ray":
        raise typer.BadParameter("--workers is for --engine ray; start the command more often, or under torchrun")
    plan = Recipe.load(recipe)
    if dry_run:
        _print_plan(plan)
        return
    check_writable(plan.out)
    found: list[Any] = []
    common: dict[str, Any] = {
        "device": device, "console": console, "retry_failed": retry_failed, "each": found.append
    }  # fmt: skip
    failed = run_on_ray(plan, workers=workers, **common) if engine == "ray" else run(plan, **common)
    _print_states(_in_order(plan, found))
    follow(f"erasure batch collect {shlex.quote(str(recipe))}")
    if failed:
        raise typer.Exit(1)


@batch.command("status", epilog="Example: [bold]erasure batch status recipe.yaml[/bold]")
def batch_status(recipe: RecipeFile) -> None:
    """Say how many cells are done, failed, waiting, running or damaged, and what the others will take."""
    from erasure.batch import Recipe
    from erasure.batch.overview import rows

    found = list(rows(Recipe.load(recipe)))  # every erasure is hashed, once
    _print_states(found)
    _print_left(found)


@batch.command("collect", epilog="Example: [bold]erasure batch collect recipe.yaml[/bold]")
def batch_collect(recipe: RecipeFile) -> None:
    """Write index.html (a table that sorts), cells.csv and the comparison of methods into the recipe's folder."""
    from erasure.batch import Recipe
    from erasure.batch.overview import collect

    for file in collect(Recipe.load(recipe)):
        say(f"{file.name} -> {file.resolve()}", wrap=False)


@batch.command("prune", epilog="Example: [bold]erasure batch prune recipe.yaml --yes[/bold]")
def batch_prune(
    recipe: RecipeFile,
    yes: Annotated[bool, typer.Option("--yes", help="Delete them; without it they are only listed.")] = False,
) -> None:
    """Delete folders of cells that are no longer in the recipe."""
    from erasure.batch import Recipe
    from erasure.batch.overview import prunable, prune

    folders = prunable(Recipe.load(recipe))
    for folder in folders:
        say(str(folder), wrap=False)
    if yes:
        prune(folders)
    say(f"{len(folders)} folders {'deleted' if yes else 'of other cells; --yes deletes them'}")


@batch.command("validate", epilog="Example: [bold]erasure batch validate recipe.yaml[/bold]")
def batch_validate(recipe: RecipeFile) -> None:
    """Check a recipe, its suites, methods, settings and files, without opening a model."""
    from erasure.batch import Recipe

    plan = Recipe.load(recipe)
    say(f"{recipe.name} is valid: {len(plan.cells())} cells in {plan.out}", wrap=False)


@batch.command("schema", epilog="Example: [bold]erasure batch schema > recipe.schema.json[/bold]")
def batch_schema() -> None:
    """Print the JSON schema of recipes, for editors that complete and check YAML."""
    from pydantic import TypeAdapter

    from erasure.batch import Recipe

    print_json(TypeAdapter(Recipe).json_schema())


def _print_plan(plan: Any) -> None:
    from erasure.batch.overview import rows

    table = PlainTable("cell", "base", "concept", "method", "seed")
    cells = plan.cells()
    for cell in cells[:MOST]:
        table.add_row(cell.key, cell.base, cell.target, cell.method.name, str(cell.seed))
    console.print(table)
    if len(cells) > MOST:
        say(f"and {len(cells) - MOST} more")
    _print_left(rows(plan))


def _in_order(plan: Any, found: Iterable[Any]) -> list[Any]:
    """The rows of a run in the order of its recipe."""
    rows = {row.cell.key: row for row in found}
    return [rows[cell.key] for cell in plan.cells() if cell.key in rows]


def _print_states(found: Iterable[Any]) -> None:
    """A row for every cell, as far as they fit on a screen or two, and how many are in each state."""
    found, count = list(found), Counter[str]()
    bases = ("base",) if len({row.cell.base for row in found}) > 1 else ()
    table = PlainTable("cell", *bases, "state", "seconds", "note")
    for row in found:
        count[row.state] += 1
        if sum(count.values()) <= MOST or row.state in ("failed", "damaged"):
            shown = ", ".join(f"{group} {100 * rate:.0f} %" for group, rate in row.rates.items())
            seconds = f"{row.seconds:.0f}" if row.seconds else ""
            table.add_row(row.cell.key, *([row.cell.base] if bases else []), row.state, seconds, row.note or shown)
    console.print(table)
    say(", ".join(f"{number} {state}" for state, number in count.items()))


def _print_left(found: Iterable[Any]) -> None:
    from erasure.batch.overview import plan_of

    left = plan_of(found)
    if left.passes or left.seconds:
        say(
            f"left, going by finished cells: {left.passes:,} forward passes, {left.seconds / 3600:.1f} hours of one "
            f"process, {left.bytes / 1e9:.2f} GB"
        )
    if left.unknown:
        say(f"not known before a first cell is done: what {', '.join(left.unknown)} will take")


@commands.command(
    rich_help_panel=MEASURE,
    epilog="Examples:\n\n[bold]erasure compare --suite superhero[/bold]\n\n"
    "[bold]erasure compare --suite superhero --suite cat -m uce -m esd -m leco --out comparison[/bold]\n\n"
    "[bold]erasure compare --targets 5 --preset quick --out five[/bold]",
)
def compare(
    suite: Annotated[
        list[str] | None,
        typer.Option(help="A suite by name (`erasure suites`), or a YAML file; repeat for more targets."),
    ] = None,
    targets: Annotated[
        int | None,
        typer.Option(min=1, help="In place of suites: so many targets of emoji-world, at most 5; means over them."),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            "-m",
            help="Method by name; all by default, and one that does not fit the base counts as failed.",
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option(parser=path, help="Folder of the results; the same command resumes there.")
    ] = Path("erasure-comparison"),
    preset: Annotated[
        str | None,
        typer.Option(help="Evaluate by the probes of smoke (a trial), no-draw, quick, standard or full; see evaluate."),
    ] = None,
    probe: Annotated[list[str] | None, typer.Option(help="Run only this probe of the preset; repeat for more.")] = None,
    base: Annotated[str | None, typer.Option(help="Base model; the suites' own by default.")] = None,
    config: Config = None,
    limit: Limit = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Make and evaluate every method on one or more targets, unattended: tables and pictures.

    With a preset also: what is still in the weights, against what happened to the rest of the model.
    """
    from pydantic import ValidationError

    from erasure.batch import Recipe, run
    from erasure.batch.comparison import write_comparison
    from erasure.concept import Suite
    from erasure.methods import available

    suites = _suites(suite or [], targets)
    check_writable(out)
    bases = {base or Suite.load(name).base for name in suites}
    if len(bases) > 1:
        raise ValueError(f"the suites are of different bases, {sorted(bases)}; compare them one at a time, or --base")
    try:
        plan = Recipe(
            version=1,
            out=out,
            concepts=tuple(suites),
            methods=tuple(method or sorted(available())),  # type: ignore[arg-type]
            bases=tuple(bases),
            config=config,
            evaluate={"preset": preset, "probes": tuple(probe or ())},  # type: ignore[arg-type]
            limit=limit,
            dtype=dtype or "float32",  # type: ignore[arg-type]
        )
    except ValidationError as error:
        raise ValueError(fault_of(error)) from None
    found: list[Any] = []
    failed = run(plan, device=device, console=console, retry_failed=True, each=found.append)
    _print_states(_in_order(plan, found))
    for file in write_comparison(plan):
        say(f"{file.name} -> {file.resolve()}", wrap=False)
    follow("open comparison.png; every method's own report lies in its folder")
    if failed:
        raise typer.Exit(1)


def _suites(named: list[str], targets: int | None) -> list[str]:
    """The suites to compare on: those that are named, or the first of the world's five."""
    from erasure.batch.comparison import TARGETS

    if (targets is None) == (not named):
        raise ValueError(
            "compare on suites or on a number of targets; got "
            f"{'both' if named else 'neither'}; give --suite NAME, or --targets 5"
        )
    if targets is not None and targets > len(TARGETS):
        known = ", ".join(TARGETS)
        raise ValueError(f"emoji-world has {len(TARGETS)} targets for comparisons ({known}); got {targets}; take fewer")
    return named or list(TARGETS[:targets])
