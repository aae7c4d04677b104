"""The commands that make many erasures: a recipe, and a comparison of methods."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from erasure.cli.options import Device, Dtype, Limit, follow
from erasure.io import check_writable
from erasure.terminal import PlainTable, console, say

commands = typer.Typer()


@commands.command(epilog="Example: [bold]erasure batch recipe.yaml[/bold]")
def batch(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe; see docs/batch.md.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    device: Device = None,
) -> None:
    """Run every cell of a recipe (bases x concepts x methods x seeds); finished cells are skipped."""
    from erasure.batch import Recipe, run

    plan = Recipe.load(recipe)
    cells = plan.cells()
    if dry_run:
        table = PlainTable("cell", "base", "concept", "method", "seed")
        for cell in cells:
            table.add_row(cell.key, cell.base, cell.target, cell.method.name, str(cell.seed))
        console.print(table)
        return
    check_writable(plan.out)
    if run(plan, device=device, console=console):
        raise typer.Exit(1)


@commands.command(
    epilog="Examples: [bold]erasure compare --suite superhero[/bold]  |  "
    "[bold]erasure compare --suite superhero --suite cat -m uce -m esd -m leco --out comparison[/bold]"
)
def compare(
    suite: Annotated[list[str], typer.Option(help="A shipped suite or a YAML file; repeat for more targets.")],
    method: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            "-m",
            help="Method by name; all by default, and one that does not fit the base counts as failed.",
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the results; the same command resumes there.")] = Path(
        "erasure-comparison"
    ),
    base: Annotated[str | None, typer.Option(help="Base model; the suites' own by default.")] = None,
    limit: Limit = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Make and evaluate every method on one or more targets, unattended; one table and one picture."""
    from erasure.batch import Recipe, run
    from erasure.batch.comparison import write_comparison
    from erasure.concept import Suite
    from erasure.methods import available

    check_writable(out)
    bases = {base or Suite.load(name).base for name in suite}
    if len(bases) > 1:
        raise ValueError(f"the suites are of different bases, {sorted(bases)}; compare them one at a time, or --base")
    plan = Recipe(
        version=1,
        out=out,
        concepts=tuple(suite),
        methods=tuple({"name": name} for name in method or sorted(available())),  # type: ignore[misc]
        bases=tuple(bases),
        limit=limit,
        dtype=dtype or "float32",  # type: ignore[arg-type]
    )
    failed = run(plan, device=device, console=console)
    for file in write_comparison(plan):
        say(f"{file.name} -> {file.resolve()}", wrap=False)
    follow("open comparison.png; every method's own report lies in its folder")
    if failed:
        raise typer.Exit(1)
