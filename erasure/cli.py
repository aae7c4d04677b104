"""The command line. Heavy imports happen inside the commands, so that ``--help`` answers at once."""

from __future__ import annotations

import errno
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.text import Text

from erasure import cli_eval, cli_files
from erasure.cli_options import Base, Device, Dtype, Limit, open_base
from erasure.io import fault_of, parse_yaml, printable, shown
from erasure.terminal import PlainTable, console, lines, say

app = typer.Typer(
    name="erasure",
    help="Take a concept out of what a diffusion model draws, and say honestly what that did.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
world_app = typer.Typer(help="Emoji World: the small real model everything can be tried on.", no_args_is_help=True)
app.add_typer(world_app, name="world")

Method = Annotated[str, typer.Option("--method", "-m", help="See `erasure methods`.")]
Preset = Annotated[str | None, typer.Option(help="Named settings of the method; 'recommended' by default.")]
Settings = Annotated[list[str] | None, typer.Option("--set", help="One setting, key=value; repeat for more.")]


@app.command(epilog="Example: [bold]erasure demo[/bold]")
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
    edits = cli_eval.make_erasures(pipe, plan, ["uce", "esd"], out / "erasures")
    cli_eval.compare(pipe, edits, plan, out, limit=limit, detectors=detectors, clip=judge)


@app.command(
    epilog="Examples: [bold]erasure erase superhero --keep ninja --keep wizard --out superhero-uce[/bold]  |  "
    "[bold]erasure erase 'Van Gogh' --kind style --base CompVis/stable-diffusion-v1-4 -m esd --out no-van-gogh[/bold]"
)
def erase(
    concept: Annotated[str, typer.Argument(help="What to erase.")],
    out: Annotated[Path, typer.Option(help="Folder for the erasure.")],
    base: Base = "emoji-world",
    method: Method = "uce",
    preset: Preset = None,
    keep: Annotated[list[str] | None, typer.Option(help="A prompt that must not change; repeat for more.")] = None,
    anchor: Annotated[str | None, typer.Option(help="What to draw instead; the empty prompt by default.")] = None,
    synonym: Annotated[list[str] | None, typer.Option(help="Another word for the concept; repeat for more.")] = None,
    kind: Annotated[str | None, typer.Option(help="object (default), style, identity, nsfw or other.")] = None,
    suite: Annotated[
        str | None,
        typer.Option(help="Take concepts, synonyms, neighbours and the keep list from a suite; --keep adds to it."),
    ] = None,
    settings: Settings = None,
    unet: Annotated[Path | None, typer.Option(help="Also write the whole edited UNet or transformer here.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Folder for training state; run again to resume.")] = None,
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
    pipe = open_base(base, device, dtype)
    keeping = [*kept, *(keep or [])] or None
    edit = make(pipe, targets, method, keep=keeping, preset=preset, checkpoint=checkpoint, apply=False, **changes)
    edit.save_pretrained(out)
    size = sum(f.stat().st_size for f in out.iterdir())
    say(
        f"{edit.name}: {edit.kind}, {size / 1000:.1f} kB, "
        f"relative weight change {edit.config['report']['relative_change']:.2e} -> {out}",
    )
    if unet is not None:
        edit.apply(pipe)
        say(f"whole denoiser -> {save_denoiser(pipe, unet)}")


@app.command(
    epilog="Example: [bold]erasure generate 'a superhero' 'a ninja' --erasure superhero-uce --out pictures[/bold]"
)
def generate(
    prompts: Annotated[list[str], typer.Argument(help="What to draw.")],
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")],
    erasure: Annotated[list[str] | None, typer.Option(help="Folder or hub id; repeat to stack.")] = None,
    scale: Annotated[float, typer.Option(help="How strongly, 0 to 1.")] = 1.0,
    base: Base = "emoji-world",
    seeds: Annotated[int, typer.Option(help="Pictures per prompt.")] = 1,
    steps: Annotated[int, typer.Option(help="Sampler steps.")] = 25,
    guidance: Annotated[
        float | None, typer.Option(help="Classifier-free guidance; 3 on emoji-world, 7.5 elsewhere.")
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Draw prompts before and after erasures, from the same noise."""
    from erasure.artifact import Erasure
    from erasure.eval import generate as draw
    from erasure.pipelines import load_erasure

    edits = [Erasure.from_pretrained(source) for source in erasure or []]  # a slip is found before anything is drawn
    pipe = open_base(base, device, dtype)
    strength = guidance if guidance is not None else 3.0 if base == "emoji-world" else 7.5
    arms = {"before": draw(pipe, prompts, seeds=range(seeds), num_inference_steps=steps, guidance_scale=strength)}
    for edit in edits:
        load_erasure(pipe, edit, scale=scale)
    if edits:
        arms["after"] = draw(pipe, prompts, seeds=range(seeds), num_inference_steps=steps, guidance_scale=strength)
    out.mkdir(parents=True, exist_ok=True)
    for arm, rows in arms.items():
        for i, row in enumerate(rows):
            for seed, image in enumerate(row):
                image.save(out / f"{i:03d}-{seed}-{arm}.png")
    say(f"{sum(len(row) for rows in arms.values() for row in rows)} pictures -> {out}")


app.command(
    epilog="Examples: [bold]erasure evaluate --suite superhero --erasure superhero-uce --out results[/bold]  |  "
    "[bold]erasure evaluate --suite superhero -m uce -m esd --prompt-filter --preset quick[/bold]"
)(cli_eval.evaluate)
app.command(epilog="Example: [bold]erasure report results --out report.html[/bold]")(cli_eval.report)
app.command(epilog="Example: [bold]erasure probes[/bold]")(cli_eval.probes)
app.command(
    epilog="Examples: [bold]erasure reproduce --list[/bold]  |  "
    "[bold]erasure reproduce 1 --prompts i2p=i2p.csv --out reproduction[/bold]"
)(cli_eval.reproduce)
app.command(epilog="Example: [bold]erasure export superhero-uce --format kohya --out superhero-uce.safetensors[/bold]")(
    cli_files.export
)
app.command(epilog="Example: [bold]erasure gram captions.txt --base emoji-world --out captions.safetensors[/bold]")(
    cli_files.gram
)
app.command(epilog="Example: [bold]erasure inspect superhero-uce[/bold]")(cli_files.inspect)
app.command(epilog="Example: [bold]erasure diff superhero-uce superhero-rece --json[/bold]")(cli_files.diff)


@app.command(epilog="Example: [bold]erasure batch recipe.yaml[/bold]")
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


@app.command(epilog="Example: [bold]erasure methods[/bold]")
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
            lines(kind.reference.venue, f"arXiv {kind.reference.arxiv}"),
        )
    console.print(table)


@app.command(epilog="Example: [bold]erasure doctor[/bold]")
def doctor() -> None:
    """Check the installation: versions, device, known traps, and the command that mends each."""
    from erasure.doctor import diagnose

    findings = diagnose()
    colours = {"ok": "green", "warn": "yellow", "fail": "red"}
    table = PlainTable("", "check", "found", "to mend it")
    for finding in findings:
        table.add_row(
            Text(finding.status, style=colours[finding.status]), finding.name, finding.detail, finding.remedy or ""
        )
    console.print(table)
    if any(finding.status == "fail" for finding in findings):
        raise typer.Exit(1)


@world_app.command("train", epilog="Example: [bold]erasure world train --out runs/world[/bold]")
def world_train(
    out: Annotated[Path, typer.Option(help="Folder for checkpoints and the finished pipeline; run again to resume.")],
    device: Device = None,
) -> None:
    """Train Emoji World from nothing: autoencoder, tokenizer, UNet and text encoder in three phases.

    Needs npm and a network: the emoji the autoencoder learns from come in npm packages.
    """
    import torch

    from erasure.runtime import pick_device
    from erasure.world.train import train

    say(f"finished pipeline -> {train(out, device=torch.device(pick_device(device)))}")


@world_app.command("gold", epilog="Example: [bold]erasure world gold --without superhero --seed 0[/bold]")
def world_gold(
    without: Annotated[str, typer.Option(help="The target no scene may show.")],
    seed: Annotated[int, typer.Option(min=0, help="Retrained models differ by seed.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for checkpoints; run again to resume.")] = Path("runs/gold"),
    steps: Annotated[int | None, typer.Option(min=1, help="Length of the run; by default the last phase's.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Pictures a step; by default the last phase's.")] = None,
    device: Device = None,
) -> None:
    """Retrain Emoji World without a target, from the start that never saw it. Needs a clone of the repository."""
    import torch

    from erasure.eval.audit import record_file, record_of_gold
    from erasure.runtime import pick_device
    from erasure.world.retrain import retrain

    file = retrain(out, without, seed=seed, device=torch.device(pick_device(device)), steps=steps, batch=batch)
    record = record_of_gold(file).to_json(record_file(file))
    say(f"retrained without {without} -> {file}, with its record {record.name}")


@world_app.command("audit", epilog="Example: [bold]erasure world audit gold/superhero-0.safetensors[/bold]")
def world_audit(
    model: Annotated[Path, typer.Argument(help="A retrained model, with its record beside it.")],
    out: Annotated[Path, typer.Option(help="Folder for the replay's checkpoints; run again to resume.")] = Path(
        "runs/audit"
    ),
    device: Device = None,
) -> None:
    """Train a retrained model once more by its record, and compare where that ends. As long as the training was.

    It shows that the record can lead to these weights, not that nothing else did.
    """
    from erasure.eval.audit import UnlearningRecord, audited, record_file, record_of_gold, replay_of_gold, verify
    from erasure.runtime import pick_device
    from erasure.world.retrain import stored_gold

    if not model.exists():
        raise FileNotFoundError(f"{model}: no such retrained model; give a file such as gold/superhero-0.safetensors")
    record = UnlearningRecord.from_json(record_file(model))
    if record_of_gold(model, policy=record.policy).head != record.head:
        raise ValueError(f"{record_file(model)} is not the record of {model.name}; get both from one place")
    audited(model, stored_gold(model))  # or the replay would be of other weights than these
    result = verify(record, replay_of_gold(model, out, device=pick_device(device)))
    say(f"{model.name}: {result}")
    if not result.passed:
        _fail("the record does not lead to these weights here; other versions or another machine may be why", 1)


@world_app.command("check", epilog="Example: [bold]erasure world check --out world-check[/bold]")
def world_check(
    out: Annotated[
        Path, typer.Option(help="Folder for the world's card, the detectors' and the contact sheet.")
    ] = Path("world-check"),
    base: Base = "emoji-world",
    per_concept: Annotated[int, typer.Option(help="Pictures per concept; fewer are quicker, and tell less.")] = 24,
    device: Device = None,
) -> None:
    """Measure the quality gate on generated pictures and write the world's card."""
    from erasure.eval.detectors.world import detectors
    from erasure.eval.world_check import calibrated, check, contact_sheet, disputed

    eyes = detectors()
    result = check(open_base(base, device), detectors=eyes, per_concept=per_concept, cache_dir=out / "cache")
    result.write_card(out / "world.md")
    result.contact_sheet(out / "contact-sheet.png")
    if doubts := disputed(eyes, result):
        contact_sheet([image for image, _ in doubts], [text for _, text in doubts], out / "disputed.png")
    for detector in eyes:
        calibrated(detector, result).to_json(out / f"{detector.name}.json")
    table = PlainTable("figure", *result.settings["detectors"])
    for name, by in result.figures.items():
        table.add_row(name, *(str(estimate) for estimate in by.values()))
    console.print(table)
    say(f"card and contact sheets -> {out}")
    if not result.passed:
        _fail(f"below the gate: {', '.join(result.failures)}; train longer, or change the model", 1)


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


def main() -> NoReturn:
    """Run a command. Bad input is one line on the error stream and a non-zero exit, never a traceback."""
    warnings.showwarning = lambda message, *_, **__: say(f"note: {message}", on=Console(stderr=True))
    try:
        app()
        sys.exit(0)
    except SystemExit as stopped:  # typer turns Ctrl-C into a silent exit
        if stopped.code == 130:
            _fail("stopped; nothing half-written was left behind", 130)
        raise
    except OSError as error:
        full = error.errno == errno.ENOSPC
        _fail("no space left on the disk; free some and run the same command again" if full else _one_line(error), 2)
    except (ValueError, ArithmeticError, ImportError) as error:
        _fail(_one_line(error), 2)
    except Exception as error:
        if os.environ.get("ERASURE_DEBUG"):
            raise
        _fail(f"{type(error).__name__}: {_one_line(error)} (ERASURE_DEBUG=1 shows where)", 2)


def _one_line(error: Exception) -> str:
    from pydantic import ValidationError

    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return fault_of(error) + (f"; got {shown(first['input'])}" if first["loc"] else "")
    return f"not readable as JSON: {error}" if isinstance(error, json.JSONDecodeError) else str(error)


def _fail(message: str, code: int) -> NoReturn:
    text = Text.assemble(("error:", "red"), " ", printable(message, limit=2000))
    Console(stderr=True).print(text, highlight=False, soft_wrap=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
