"""The commands about Emoji World: train it, retrain it without a target, audit that, and measure its quality."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from erasure.cli.options import Base, Config, Device, Variant, fail, follow, open_base, path
from erasure.io import check_writable
from erasure.terminal import PlainTable, console, say

commands = typer.Typer(help="Emoji World: the small real model everything can be tried on.", no_args_is_help=True)


@commands.command("list", epilog="Example: [bold]erasure world list[/bold]")
def world_list() -> None:
    """List what Emoji World knows: concepts by family, styles and backgrounds."""
    from erasure.world.spec import spec

    world = spec()
    table = PlainTable("family", "concepts")
    for family in world.families:
        table.add_row(family, ", ".join(name for name, emoji in world.concepts.items() if emoji.family == family))
    table.add_section()
    table.add_row("styles", ", ".join(f"{style} style" for style in world.styles))
    table.add_row("backgrounds", ", ".join(world.backgrounds))
    console.print(table)
    say("A prompt: a superhero in noto style on a red background")
    follow("erasure erase superhero --suite superhero")


@commands.command("train", epilog="Example: [bold]erasure world train --out runs/world[/bold]")
def world_train(
    out: Annotated[
        Path, typer.Option(parser=path, help="Folder for checkpoints and the finished pipeline; run again to resume.")
    ],
    device: Device = None,
) -> None:
    """Train Emoji World from nothing: autoencoder, tokenizer, UNet and text encoder in three phases.

    Needs npm and a network: the emoji the autoencoder learns from come in npm packages.
    """
    import torch

    from erasure.runtime import pick_device
    from erasure.world.train import train

    check_writable(out)
    folder = train(out, device=torch.device(pick_device(device)))
    say(f"finished pipeline -> {folder}", wrap=False)
    follow(f"erasure world check --base {shlex.quote(str(folder))} --out world-check")


@commands.command("start", epilog="Example: [bold]erasure world start --out runs/start --folder gold/third[/bold]")
def world_start(
    out: Annotated[Path, typer.Option(parser=path, help="Folder for checkpoints; run again to resume.")],
    folder: Annotated[
        Path, typer.Option(parser=path, help="Where start/ and manifest.json go, and the models trained from them.")
    ],
    device: Device = None,
) -> None:
    """Train a start for retrained models: the first two phases, without any of the world's targets.

    Autoencoder and tokenizer are those of the shipped model. Two hours of one fast CPU core.
    """
    import torch

    from erasure.runtime import pick_device
    from erasure.world.retrain import make_start, targets_of

    check_writable(out)
    check_writable(folder)
    if (folder / "start").exists():
        raise ValueError(f"{folder} already has a start, to which its models belong; give another folder")
    make_start(out, folder, device=torch.device(pick_device(device)))
    say(f"start without {', '.join(sorted(targets_of(folder)))} -> {folder}", wrap=False)
    follow(f"erasure world gold --without superhero --folder {shlex.quote(str(folder))}")


@commands.command(
    "gold",
    epilog="Examples:\n\n[bold]erasure world gold --without superhero --seed 0[/bold]\n\n"
    "[bold]erasure world gold --twin --seed 0[/bold]",
)
def world_gold(
    without: Annotated[str | None, typer.Option(help="The target no scene may show.")] = None,
    twin: Annotated[
        bool, typer.Option("--twin", help="Leave nothing out: the model to compare the others with.")
    ] = False,
    share: Annotated[float, typer.Option(help="Share of the target's scenes to put back, for a dose model.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Retrained models differ by seed.")] = 0,
    out: Annotated[Path, typer.Option(parser=path, help="Folder for checkpoints; run again to resume.")] = Path(
        "runs/gold"
    ),
    folder: Annotated[
        Path | None,
        typer.Option(
            parser=path,
            help="Where start/ and manifest.json are and the model goes; by default the repository's for this target.",
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Length of the run; by default the last phase's.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Pictures a step; by default the last phase's.")] = None,
    device: Device = None,
) -> None:
    """Retrain Emoji World without a target, from the start that never saw it. Needs a clone of the repository."""
    import torch

    from erasure.eval.worldkit.audit import record_file, record_of_gold
    from erasure.runtime import pick_device
    from erasure.world.retrain import edition_of, retrain

    if twin == (without is not None):
        raise ValueError("a model is retrained without a target or on everything; give --without TARGET or --twin")
    folder = folder or edition_of(without)
    check_writable(out)
    check_writable(folder)
    file = retrain(
        out, without, seed=seed, share=share, steps=steps, batch=batch,
        device=torch.device(pick_device(device)), folder=folder,
    )  # fmt: skip
    record = record_of_gold(file).to_json(record_file(file))
    say(
        f"retrained {f'without {without}' if without else 'on everything'} -> {file}, with its record {record.name}",
        wrap=False,
    )
    follow(f"erasure world audit {shlex.quote(str(file))}")


@commands.command("audit", epilog="Example: [bold]erasure world audit gold/superhero-0.safetensors[/bold]")
def world_audit(
    model: Annotated[Path, typer.Argument(parser=path, help="A retrained model, with its record beside it.")],
    out: Annotated[
        Path, typer.Option(parser=path, help="Folder for the replay's checkpoints; run again to resume.")
    ] = Path("runs/audit"),
    device: Device = None,
) -> None:
    """Train a retrained model once more by its record, and compare where that ends. As long as the training was.

    It shows that the record can lead to these weights, not that nothing else did. The result goes beside the model.
    """
    from erasure.eval.core.audit import UnlearningRecord, verify
    from erasure.eval.worldkit.audit import audited, record_file, record_of_gold, replay_of_gold, write_replay
    from erasure.runtime import pick_device
    from erasure.world.retrain import gold_facts, stored_gold

    check_writable(out)
    if not model.exists():
        raise FileNotFoundError(f"{model}: no such retrained model; give a file such as gold/superhero-0.safetensors")
    record = UnlearningRecord.from_json(record_file(model))
    if record_of_gold(model, policy=record.policy).head != record.head:
        raise ValueError(f"{record_file(model)} is not the record of {model.name}; get both from one place")
    audited(model, stored_gold(model))  # or the replay would be of other weights than these
    result = verify(record, replay_of_gold(model, out, device=pick_device(device)))
    say(f"{model.name}: {result}")
    if not result.passed:
        unsaid = "" if "precision" in gold_facts(model) else "; its file does not say what it was computed in"
        fail(f"the record does not lead to these weights here; other versions or another machine may be why{unsaid}", 1)
    say(f"replay -> {write_replay(model, record, result)}", wrap=False)
    follow("erasure evaluate --suite SUITE --method uce --preset standard")


@commands.command("check", epilog="Example: [bold]erasure world check --out world-check[/bold]")
def world_check(
    out: Annotated[
        Path, typer.Option(parser=path, help="Folder for the world's card, the detectors' and the contact sheet.")
    ] = Path("world-check"),
    base: Base = "emoji-world",
    variant: Variant = None,
    config: Config = None,
    per_concept: Annotated[
        int, typer.Option(min=1, help="Pictures per concept; fewer are quicker, and tell less.")
    ] = 24,
    device: Device = None,
) -> None:
    """Measure the quality gate on generated pictures and write the world's card."""
    from erasure.eval.worldkit.check import calibrated, check, contact_sheet, disputed
    from erasure.eval.worldkit.detectors import detectors

    check_writable(out)
    judges = detectors()
    pipe = open_base(base, device, variant=variant, config=config)
    result = check(pipe, detectors=judges, per_concept=per_concept, cache_dir=out / "cache")
    result.write_card(out / "world.md")
    result.contact_sheet(out / "contact-sheet.png")
    if doubts := disputed(judges, result):
        contact_sheet([image for image, _ in doubts], [text for _, text in doubts], out / "disputed.png")
    for detector in judges:
        calibrated(detector, result).to_json(out / f"{detector.name}.json")
    table = PlainTable("figure", *result.settings["detectors"])
    for name, by in result.figures.items():
        table.add_row(name, *(str(estimate) for estimate in by.values()))
    console.print(table)
    say("One column for each detector: its figure with a 95 % interval. The card says what each figure has to reach.")
    say(f"card and contact sheets -> {out}", wrap=False)
    if not result.passed:
        fail(f"below the gate: {', '.join(result.failures)}; train longer, or change the model", 1)
    follow(f"open {shlex.quote(str(out / 'world.md'))}, and look at contact-sheet.png beside it")
