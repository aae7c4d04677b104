"""The commands that make erasures and pictures: a demo, one erasure, pictures before and after, a whole recipe."""

from __future__ import annotations

import math
import shlex
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from erasure.cli.evaluate import compare, make_erasures
from erasure.cli.options import Base, Device, Dtype, Limit, Variant, follow, open_base
from erasure.io import parse_yaml, printable
from erasure.terminal import PlainTable, console, say

BATCH = 16  # pictures that are drawn together
commands = typer.Typer()

Method = Annotated[str, typer.Option("--method", "-m", help="See `erasure methods`.")]
Preset = Annotated[str | None, typer.Option(help="Named settings of the method; 'recommended' by default.")]
Settings = Annotated[list[str] | None, typer.Option("--set", help="One setting, key=value; repeat for more.")]
Keep = Annotated[list[str] | None, typer.Option(help="A prompt that must not change; repeat, or put commas between.")]
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
    named = [part.strip() for given in keep or [] for part in given.split(",") if part.strip()]
    keeping = [*kept, *named] or None
    edit = make(pipe, targets, method, keep=keeping, preset=preset, checkpoint=checkpoint, apply=False, **changes)
    edit.save_pretrained(out)
    say(f"{edit.name} -> {out}")
    for line in _summary(edit, out):
        say(f"  {line}")
    if unet is not None:
        if all(name.startswith("text_encoder") for name in edit.parameter_names):
            raise ValueError(
                f"{edit.name!r} changes no weight of the denoiser, so --unet would write the base's; leave it out (the "
                f"erasure is in {out})"
            )
        edit.apply(pipe)
        say(f"whole denoiser -> {save_denoiser(pipe, unet)}")
    where = "" if base == "emoji-world" else f" --base {shlex.quote(base)}"
    follow(f"erasure generate {shlex.quote(f'a {concept}')} --erasure {shlex.quote(str(out))}{where} --out pictures")


def _summary(edit: Any, folder: Path) -> list[str]:
    """What an erasure is and what it moved, in words."""
    from erasure.artifact.card import report_rows

    size = sum(file.stat().st_size for file in folder.iterdir())
    figures, groups = report_rows(edit.config.get("report") or {})
    moved = figures.get("relative_change")
    if edit.intervention == "adapter":
        effect = "no weight changes: it can be taken off"
    else:
        effect = (
            f"the weights it changes move by {moved:.2g} times their size" if moved is not None else "edits weights"
        )
    lines = [f"{edit.kind}, {size / 1000:.1f} kB; {effect}"]
    if groups:
        seen = ", ".join(f"{group} {100 * share:.0f} %" for group, share, _ in groups)
        lines.append(f"how far the words moved: {seen}; far is right for the target, and for it alone")
    return lines


@commands.command(
    epilog="Example: [bold]erasure generate 'a superhero' 'a ninja' --erasure superhero-uce --grid --out out[/bold]"
)
def generate(
    prompts: Annotated[list[str], typer.Argument(help="What to draw.")],
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")],
    erasure: Annotated[list[str] | None, typer.Option(help="Folder or hub id; repeat to stack.")] = None,
    scale: Annotated[float, typer.Option(help="How strongly: 0 not at all, 1 as it was made.")] = 1.0,
    base: Base = "emoji-world",
    variant: Variant = None,
    images: Annotated[int, typer.Option(min=1, max=1000, help="Pictures of each prompt.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Of the first picture; the next ones have the next numbers.")] = 0,
    grid: Annotated[bool, typer.Option("--grid", help="Also one sheet, before above after, as grid.png.")] = False,
    steps: Annotated[
        int | None, typer.Option(min=1, max=1000, help="Sampler steps; 8 on emoji-world, 25 elsewhere.")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(min=0, max=100, help="Classifier-free guidance; 3 on emoji-world, 7.5 elsewhere.")
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Draw prompts before and after erasures, from the same noise. Every picture is saved as soon as it is drawn."""
    from erasure.artifact import Erasure
    from erasure.concept import WORLD
    from erasure.pipelines import load_erasure

    if not math.isfinite(scale):
        raise ValueError(f"--scale must be a number; got {scale}; 1 is as the erasure was made")
    edits = [Erasure.from_pretrained(source) for source in erasure or []]  # a slip is found before anything is drawn
    out.mkdir(parents=True, exist_ok=True)  # a folder that cannot be written to is found before anything is drawn
    pipe = open_base(base, device, dtype, variant=variant)
    usual = (8, 3.0) if base == WORLD else (25, 7.5)
    sampler: dict[str, Any] = {
        "num_inference_steps": usual[0] if steps is None else steps,
        "guidance_scale": usual[1] if guidance is None else guidance,
    }
    seeds = range(seed, seed + images)
    rows = {"before": _drawn(pipe, prompts, seeds, out, "before", sampler)}
    for edit in edits:
        load_erasure(pipe, edit, scale=scale)
    if edits:
        rows["after"] = _drawn(pipe, prompts, seeds, out, "after", sampler)
    if grid:
        sheet(rows, [f"{prompt}, {number}" if images > 1 else prompt for prompt in prompts for number in seeds]).save(
            out / "grid.png"
        )
    say(f"{sum(map(len, rows.values()))} pictures -> {out}" + (f", all of them in {out / 'grid.png'}" if grid else ""))
    follow("erasure evaluate --suite SUITE --erasure FOLDER" if edits else "erasure erase CONCEPT --out FOLDER")


def _drawn(
    pipe: Any, prompts: Sequence[str], seeds: Sequence[int], out: Path, arm: str, sampler: Mapping[str, Any]
) -> list[Any]:
    """The pictures of every prompt with every seed, each written as soon as its batch is drawn."""
    from erasure.eval import generate as draw

    found, together = [], max(1, BATCH // len(seeds))  # prompts
    for start in range(0, len(prompts), together):
        rows = draw(pipe, prompts[start : start + together], seeds=seeds, batch_size=BATCH, **sampler)
        for i, row in enumerate(rows, start):
            for number, image in zip(seeds, row, strict=True):
                image.save(out / f"{i:03d}-{number}-{arm}.png")
                found.append(image)
    return found


def sheet(rows: Mapping[str, Sequence[Any]], titles: Sequence[str], *, side: int = 192, margin: int = 64) -> Any:
    """Pictures in rows, each with a name, under their titles."""
    from PIL import Image, ImageDraw

    font, head = _font(13), 54
    page = Image.new("RGB", (margin + side * len(titles), head + side * len(rows)), "white")
    pen = ImageDraw.Draw(page)
    for x, title in enumerate(titles):
        pen.multiline_text((margin + x * side + 4, 4), textwrap.fill(printable(title), side // 8), "black", font)
    for y, (name, images) in enumerate(rows.items()):
        pen.text((4, head + y * side + side // 2), name, "black", font)
        for x, image in enumerate(images):
            page.paste(image.resize((side - 4, side - 4)), (margin + x * side, head + y * side))
    return page


def _font(size: int) -> Any:
    """A font that every installation has: matplotlib's own, which knows more letters than PIL's."""
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)


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
