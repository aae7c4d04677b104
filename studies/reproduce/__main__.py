"""Measure a published number again: ``python -m studies.reproduce --list``, from a clone of the repository."""

from __future__ import annotations

import runpy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from erasure.cli.options import Device, Dtype, Variant, open_base
from erasure.terminal import PlainTable, console, lines, say

commands = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")

Row = Annotated[str | None, typer.Argument(help="Which row; see --list.")]
ListRows = Annotated[bool, typer.Option("--list", help="List the rows, their published numbers, what lacks.")]
Arm = Annotated[str, typer.Option(help="Which published model this is.")]
Prompts = Annotated[list[str] | None, typer.Option(help="kind=FILE, your own copy; repeat for more.")]
Unchecked = Annotated[bool, typer.Option("--unchecked", help="Take files with another number of rows.")]
OtherBase = Annotated[str | None, typer.Option(help="Base model; the row's own by default.")]
Erasures = Annotated[
    list[str] | None,
    typer.Option(
        help="Folder or hub id: what makes the arm of the base. TARGET=FOLDER, repeated, where a row is the mean of "
        "models that lack one target each."
    ),
]
Judge = Annotated[
    str | None,
    typer.Option(help="FILE.py:FUNCTION of pictures and what each should show, for rows that have no judge here."),
]
OwnPictures = Annotated[
    list[str] | None, typer.Option(help="NAME=FOLDER of your pictures, for rows that begin with some; repeat.")
]
Real = Annotated[Path | None, typer.Option(help="Folder of real pictures, one per prompt, for distances.")]
Inception = Annotated[Path | None, typer.Option(help="File of Inception's weights; downloaded without.")]
Results = Annotated[Path, typer.Option(help="Folder for pictures and results; run again to go on.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Pictures per call.")]
Trial = Annotated[int | None, typer.Option(min=1, help="At most so many rows of each file: a trial.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Other sampler steps than the row's: a trial.")]


@commands.command(
    epilog="Examples: [bold]python -m studies.reproduce --list[/bold]  |  "
    "[bold]python -m studies.reproduce 1 --prompts i2p=i2p.csv --out reproduction[/bold]"
)
def reproduce(
    row: Row = None,
    list_rows: ListRows = False,
    arm: Arm = "original",
    prompts: Prompts = None,
    unchecked: Unchecked = False,
    base: OtherBase = None,
    variant: Variant = None,
    erasure: Erasures = None,
    judge: Judge = None,
    pictures: OwnPictures = None,
    real: Real = None,
    inception: Inception = None,
    out: Results = Path("reproduction"),
    batch_size: BatchSize = 8,
    limit: Trial = None,
    steps: Steps = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Measure a published number again, with your own weights and prompt files. Base rows first."""
    from erasure.eval.core.prompt_files import load
    from studies.reproduce import RECIPES, Inputs, Pictures
    from studies.reproduce import reproduce as measure

    if list_rows or row is None:
        console.print(rows_table(RECIPES))
        return
    recipe = recipe_of(RECIPES, row, arm)
    files = {
        kind: load(file, kind, expected=None if unchecked else "published")
        for kind, file in pairs("--prompts", "kind=FILE", prompts, f"row {row} reads {list(recipe.files)}").items()
    }
    inputs = Inputs(
        files=files, real=None if real is None else Pictures.of(real), clip=open_clip_model(device),
        judge=None if judge is None else function_of(judge), imagenet=imagenet_model(device),
        pictures={name: Pictures.of(Path(at)) for name, at in pairs("--pictures", "NAME=FOLDER", pictures).items()},
        inception=inception, batch_size=batch_size, limit=limit, num_inference_steps=steps,
    )  # fmt: skip
    change = change_of(recipe, erasure or [])
    pipe = open_base(base or recipe.base, device, dtype, variant=variant)
    if getattr(pipe, "safety_checker", None) is not None:
        pipe.safety_checker = None
        say("The safety checker is off: what the model draws is measured, not what a filter lets through.")
    found = measure(row, pipe, inputs, out, arm=arm, change=change)
    console.print(results_table(found))
    for warning in found.warnings:
        say(f"! {warning}")
    say(f"results -> {out}")


def recipe_of(recipes: Mapping[str, Any], row: str, arm: str) -> Any:
    """The recipe of a row.

    Raises:
        ValueError: no such row, or it has no such arm.
    """
    if row not in recipes:
        raise ValueError(f"unknown row {row!r}; choose one of {list(recipes)}")
    if arm not in recipes[row].arms:
        raise ValueError(f"row {row} has no published model {arm!r}; choose one of {list(recipes[row].arms)}")
    return recipes[row]


def change_of(recipe: Any, sources: Sequence[str]) -> Any:
    """What makes the arm of the base: an erasure, one for each target of a row that needs several, or None."""
    from erasure.artifact import Erasure

    if not sources:
        return None
    if recipe.models == 1:
        if len(sources) > 1:
            raise ValueError(f"row {recipe.row} is about one model; got {len(sources)} erasures; give one --erasure")
        return Erasure.from_pretrained(sources[0])
    named = pairs("--erasure", "TARGET=FOLDER", sources, f"row {recipe.row} is the mean of models that lack one each")
    return {target: Erasure.from_pretrained(at) for target, at in named.items()}


def pairs(option: str, form: str, given: Sequence[str] | None, why: str = "") -> dict[str, str]:
    """What an option of the form NAME=VALUE says.

    Raises:
        ValueError: no name, or one name twice.
    """
    found: dict[str, str] = {}
    for one in given or []:
        name, equals, value = one.partition("=")
        if not equals or name in found:
            raise ValueError(f"{option} needs {form}, each name once; got {one!r}" + (f"; {why}" if why else ""))
        found[name] = value
    return found


def function_of(source: str) -> Any:
    """FUNCTION of FILE.py, which is run.

    Raises:
        ValueError: no such file, or none of that name in it.
    """
    file, _, name = source.rpartition(":")
    if not Path(file).is_file():
        raise ValueError(f"--judge needs FILE.py:FUNCTION; got {source!r}; give a file that is there")
    found = runpy.run_path(file).get(name)
    if not callable(found):
        raise ValueError(f"{file} has no function {name!r}; --judge needs FILE.py:FUNCTION")
    return found


def rows_table(recipes: Mapping[str, Any]) -> PlainTable:
    """The rows of published numbers."""
    table = PlainTable("row", "setting", "", "published", "prompt files", "lacks")
    for recipe in recipes.values():
        arms = (
            f"{arm}: " + ", ".join(f"{name} {known.value:g}" for name, known in numbers.items())
            for arm, numbers in recipe.arms.items()
        )
        table.add_row(
            recipe.row, recipe.setting, recipe.confidence, lines(*arms), ", ".join(recipe.files), recipe.lacks
        )
    return table


def open_clip_model(device: str | None) -> Callable[[str], Any]:
    """Opens "model/weights", when it is asked for."""
    from erasure.eval.detectors.clip import ClipDetector
    from erasure.runtime import pick_device

    def opened(name: str) -> ClipDetector:
        model, _, weights = name.partition("/")
        return ClipDetector.load(model, weights, device=pick_device(device))

    return opened


def imagenet_model(device: str | None) -> Callable[[Any], Any]:
    """Opens a classifier of ImageNet by its weights, when it is asked for."""
    from erasure.runtime import pick_device
    from studies.reproduce.imagenet import ImageNet

    return lambda weights: ImageNet(weights, device=pick_device(device))


def results_table(found: Any) -> PlainTable:
    """What was measured beside what was published."""
    table = PlainTable("metric", "measured, 95 % interval", "published", "band", "verdict")
    for one in found.results:
        low, high = one.band
        measured = one.estimate.reason if one.estimate.value is None else f"{one.estimate:.4g}"
        table.add_row(one.metric, measured, f"{one.published:g}", f"{low:.4g} to {high:.4g}", one.verdict)
    return table


if __name__ == "__main__":
    from erasure.cli import main

    main(commands)
