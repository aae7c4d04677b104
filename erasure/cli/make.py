"""The commands that make erasures and pictures: a demo, one erasure, pictures before and after, a whole recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from erasure.cli.evaluate import compare, make_erasures
from erasure.cli.options import Base, Device, Dtype, Limit, Variant, open_base
from erasure.io import parse_yaml
from erasure.terminal import PlainTable, console, say

commands = typer.Typer()

Method = Annotated[str, typer.Option("--method", "-m", help="See `erasure methods`.")]
Preset = Annotated[str | None, typer.Option(help="Named settings of the method; 'recommended' by default.")]
Settings = Annotated[list[str] | None, typer.Option("--set", help="One setting, key=value; repeat for more.")]
Keep = Annotated[list[str] | None, typer.Option(help="A prompt that must not change; repeat for more.")]
Anchor = Annotated[str | None, typer.Option(help="What to draw instead; the empty prompt by default.")]
Synonyms = Annotated[list[str] | None, typer.Option(help="Another word for the concept; repeat for more.")]
Kind = Annotated[str | None, typer.Option(help="object (default), style, identity, nsfw or other.")]
SuiteName = Annotated[
    str | None,
    typer.Option(help="Take concepts, synonyms, neighbours and the keep list from a suite; --keep adds to it."),
]
Whole = Annotated[Path | None, typer.Option(help="Also write the whole edited UNet or transformer here.")]
Checkpoint = Annotated[Path | None, typer.Option(help="Folder for training state; run again to resume.")]


@commands.command(epilog="Example: [bold]erasure demo[/bold]")
def demo(
    out: Annotated[Path, typer.Option(help="Folder for erasures, pictures and report.")] = Path("erasure-demo"),
    suite: Annotated[str, typer.Option(help="Which world suite.")] = "superhero",
    limit: Limit = None,
    device: Device = None,
) -> None:
    """Erase a concept from Emoji World with UCE and with ESD, evaluate both, write the report."""
    from erasure.concept import Suite
    from erasure.eval.detectors.choice import detectors_for

    pipe = open_base("emoji-world", device)
    plan = Suite.load(suite)
    detectors, judge = detectors_for(plan)
    edits = make_erasures(pipe, plan, ["uce", "esd"], out / "erasures")
    compare(pipe, edits, plan, out, limit=limit, detectors=detectors, clip=judge)


@commands.command(
    epilog="Examples: [bold]erasure erase superhero --keep ninja --keep wizard --out superhero-uce[/bold]  |  "
    "[bold]erasure erase 'Van Gogh' --kind style --base CompVis/stable-diffusion-v1-4 -m esd --out no-van-gogh[/bold]"
)
def erase(
    concept: Annotated[str, typer.Argument(help="What to erase.")],
    out: Annotated[Path, typer.Option(help="Folder for the erasure.")],
    base: Base = "emoji-world",
    variant: Variant = None,
    method: Method = "uce",
    preset: Preset = None,
    keep: Keep = None,
    anchor: Anchor = None,
    synonym: Synonyms = None,
    kind: Kind = None,
    suite: SuiteName = None,
    settings: Settings = None,
    unet: Whole = None,
    checkpoint: Checkpoint = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Make an erasure and save it."""
    from erasure.api import erase as make
    from erasure.artifact import save_denoiser
    from erasure.artifact.files import check_folder
    from erasure.methods import method_class

    if unet is not None and unet.resolve() == out.resolve():
        raise ValueError(f"--unet and --out are one folder ({out}); give two")
    check_folder(out)
    targets, kept = _concepts(concept, suite, kind=kind, anchor=anchor, synonyms=tuple(synonym or ()))
    changes = _settings(settings)
    method_class(method).preset(preset, **changes)  # a slip is found before the model is loaded
    pipe = open_base(base, device, dtype, variant=variant)
    keeping = [*kept, *(keep or [])] or None
    edit = make(pipe, targets, method, keep=keeping, preset=preset, checkpoint=checkpoint, apply=False, **changes)
    edit.save_pretrained(out)
    say(f"{edit.name}: {_summary(edit, out)} -> {out}")
    if unet is not None:
        if all(name.startswith("text_encoder") for name in edit.parameter_names):
            raise ValueError(
                f"{edit.name!r} changes no weight of the denoiser, so --unet would write the base's; leave it out (the "
                f"erasure is in {out})"
            )
        edit.apply(pipe)
        say(f"whole denoiser -> {save_denoiser(pipe, unet)}")


def _summary(edit: Any, folder: Path) -> str:
    """Kind, size and effect of an erasure, in one line."""
    size = sum(file.stat().st_size for file in folder.iterdir())
    moved = (edit.config.get("report") or {}).get("relative_change")
    effect = "changes no weight" if edit.intervention == "adapter" else f"relative weight change {moved:.2e}"
    return f"{edit.kind}, {size / 1000:.1f} kB, {effect}"


@commands.command(
    epilog="Example: [bold]erasure generate 'a superhero' 'a ninja' --erasure superhero-uce --out pictures[/bold]"
)
def generate(
    prompts: Annotated[list[str], typer.Argument(help="What to draw.")],
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")],
    erasure: Annotated[list[str] | None, typer.Option(help="Folder or hub id; repeat to stack.")] = None,
    scale: Annotated[float, typer.Option(help="How strongly, 0 to 1.")] = 1.0,
    base: Base = "emoji-world",
    variant: Variant = None,
    seeds: Annotated[int, typer.Option(min=1, help="Pictures per prompt.")] = 1,
    steps: Annotated[
        int | None, typer.Option(min=1, max=1000, help="Sampler steps; 8 on emoji-world, 25 elsewhere.")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(min=0, max=100, help="Classifier-free guidance; 3 on emoji-world, 7.5 elsewhere.")
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Draw prompts before and after erasures, from the same noise."""
    from erasure.artifact import Erasure
    from erasure.concept import WORLD
    from erasure.eval import generate as draw
    from erasure.pipelines import load_erasure

    edits = [Erasure.from_pretrained(source) for source in erasure or []]  # a slip is found before anything is drawn
    pipe = open_base(base, device, dtype, variant=variant)
    usual = (8, 3.0) if base == WORLD else (25, 7.5)
    sampler: dict[str, Any] = {
        "num_inference_steps": usual[0] if steps is None else steps,
        "guidance_scale": usual[1] if guidance is None else guidance,
    }
    arms = {"before": draw(pipe, prompts, seeds=range(seeds), **sampler)}
    for edit in edits:
        load_erasure(pipe, edit, scale=scale)
    if edits:
        arms["after"] = draw(pipe, prompts, seeds=range(seeds), **sampler)
    out.mkdir(parents=True, exist_ok=True)
    for arm, rows in arms.items():
        for i, row in enumerate(rows):
            for seed, image in enumerate(row):
                image.save(out / f"{i:03d}-{seed}-{arm}.png")
    say(f"{sum(len(row) for rows in arms.values() for row in rows)} pictures -> {out}")


@commands.command(epilog="Example: [bold]erasure batch recipe.yaml[/bold]")
def batch(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe; see docs/batch.md.")],
    dry_run: Annotated[bool, typer.Option(help="Print the plan and stop.")] = False,
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
    if run(plan, device=device, console=console):
        raise typer.Exit(1)


def _concepts(name: str, suite: str | None, **more: Any) -> tuple[list[Any], tuple[str, ...]]:
    """The concepts and what to keep: all those of a suite, or the one of the command line."""
    from erasure.concept import Concept, Suite, same

    given = {key: value for key, value in more.items() if value}
    if suite is None:
        return [Concept(name, **given)], ()
    if given:
        raise ValueError(f"the suite decides about {sorted(given)}; leave these options out, or leave --suite out")
    plan = Suite.load(suite)
    if not same(plan.concept.name, name):
        raise ValueError(f"the suite {suite!r} is about {plan.concept.name!r}, not {name!r}; name one or the other")
    return list(plan.concepts), plan.kept


def _settings(pairs: list[str] | None) -> dict[str, Any]:
    """``["lamb=0.1", "variant=u"]`` -> ``{"lamb": 0.1, "variant": "u"}``."""
    settings = {}
    for pair in pairs or []:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"--set needs key=value; got {pair!r}")
        settings[key.strip()] = parse_yaml(value)
    return settings
