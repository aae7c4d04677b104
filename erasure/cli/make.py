"""The commands that make erasures and pictures: a demo, one erasure, pictures before and after, a whole recipe."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from erasure.cli.arms import make_erasures, read_erasures
from erasure.cli.evaluate import compare
from erasure.cli.options import (
    MAKE,
    Base,
    Config,
    Device,
    Dtype,
    Limit,
    OwnBase,
    Variant,
    base_of,
    base_options,
    check_names,
    follow,
    note,
    note_unknown,
    open_base,
    path,
)
from erasure.io import check_writable, folder_name, parse_yaml, writing
from erasure.terminal import say

BATCH = 16  # pictures that are drawn together
commands = typer.Typer()

Method = Annotated[str, typer.Option("--method", "-m", help="See `erasure methods`.")]
Preset = Annotated[str | None, typer.Option(help="Named settings of the method; 'recommended' by default.")]
Settings = Annotated[list[str] | None, typer.Option("--set", help="One setting, key=value; repeat for more.")]
Keep = Annotated[list[str] | None, typer.Option(help="A prompt that must not change; repeat, or put commas between.")]
Anchor = Annotated[str | None, typer.Option(help="What to draw instead; the empty prompt by default.")]
Synonyms = Annotated[
    list[str] | None, typer.Option(help="Another word for the concept; repeat, or put commas between.")
]
Kind = Annotated[str | None, typer.Option(help="object (default), style, identity, nsfw or other.")]
SuiteName = Annotated[
    str | None,
    typer.Option(help="Take concepts, synonyms, neighbours and the keep list from a suite; --keep adds to it."),
]
Whole = Annotated[Path | None, typer.Option(parser=path, help="Also write the whole edited UNet or transformer here.")]
Checkpoint = Annotated[Path | None, typer.Option(parser=path, help="Folder for training state; run again to resume.")]


@commands.command(rich_help_panel=MAKE, epilog="Example: [bold]erasure demo[/bold]")
def demo(
    out: Annotated[Path, typer.Option(parser=path, help="Folder for erasures, pictures and report.")] = Path(
        "erasure-demo"
    ),
    suite: Annotated[str, typer.Option(help="Which world suite.")] = "superhero",
    limit: Limit = None,
    device: Device = None,
) -> None:
    """Erase a concept from Emoji World with UCE and with ESD, evaluate both, write the report."""
    from erasure.concept import WORLD, Suite
    from erasure.eval.detectors.choice import detectors_for

    plan = Suite.load(suite)
    if plan.base != WORLD:
        raise ValueError(f"the demo is of {WORLD}; got the suite {suite!r} for {plan.base}; use `erasure evaluate`")
    check_writable(out)
    pipe = open_base(WORLD, device)
    detectors, judge = detectors_for(plan)
    edits = make_erasures(pipe, plan, ["uce", "esd"], out / "erasures")
    compare(pipe, edits, plan, out, limit=limit, detectors=detectors, clip=judge)


@commands.command(
    rich_help_panel=MAKE,
    epilog="Examples:\n\n[bold]erasure erase superhero --keep ninja --keep wizard --out superhero-uce[/bold]\n\n"
    "[bold]erasure erase 'Van Gogh' --kind style --base CompVis/stable-diffusion-v1-4 -m esd --out no-van-gogh[/bold]",
)
def erase(
    concept: Annotated[str, typer.Argument(help="What to erase.")],
    out: Annotated[
        Path | None, typer.Option(parser=path, help="Folder for the erasure; CONCEPT-METHOD here by default.")
    ] = None,
    base: Base = "emoji-world",
    variant: Variant = None,
    config: Config = None,
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
    check_names(method, suite)
    named, synonyms = _names(keep, "--keep"), _names(synonym, "--synonym")
    targets, kept = _concepts(concept, suite, kind=kind, anchor=anchor, synonyms=tuple(synonyms))
    changes = _settings(settings)
    from erasure.api import erase as make  # takes seconds
    from erasure.artifact.denoiser import check_denoiser
    from erasure.artifact.files import CONFIG, check_folder
    from erasure.methods import method_class
    from erasure.methods.finetune import FineTune
    from erasure.opening import quiet
    from erasure.wording import with_article

    out = out or Path(folder_name(f"{concept}-{method}").replace(" ", "-"))
    if unet is not None and unet.resolve() == out.resolve():
        raise ValueError(f"--unet and --out are one folder ({out}); give two")
    if out.suffix in (".safetensors", ".ckpt", ".pt"):
        raise ValueError(
            f"an erasure is a folder; got --out {out}; leave {out.suffix} away, and let `erasure export` write a file"
        )
    check_folder(out)
    if unet is not None:
        check_denoiser(unet)
    replaced = ", in place of the erasure that was there" if (out / CONFIG).exists() else ""
    if "," in concept:
        note(f"{concept!r} is erased as one concept; several are named in a suite (--suite FILE)")
    if checkpoint is not None and not issubclass(method_class(method), FineTune):
        note(f"{method} trains nothing, so --checkpoint is not used")
    method_class(method).preset(preset, **changes)  # a slip is found before the model is loaded
    pipe = open_base(base, device, dtype, variant=variant, config=config)
    keeping = [*kept, *named]
    with quiet():  # faults are raised, and the encoder's remarks on lengths come before them
        edit = make(
            pipe, targets, method, keep=keeping or None, preset=preset, checkpoint=checkpoint, apply=False, **changes
        )
    edit.save_pretrained(out)
    say(f"{edit.name} -> {out}{replaced}", wrap=False)
    for line in _summary(edit, out):
        say(f"- {line}")
    if unet is not None:
        _save_whole(pipe, edit, unet, out)
    where = base_options(base, config)
    asked = " ".join(shlex.quote(prompt) for prompt in [_asking(targets[0]), *map(with_article, keeping[:1])])
    follow(f"erasure generate {asked} --erasure {shlex.quote(str(out))}{where} --grid --out pictures")


def _save_whole(pipe: Any, edit: Any, unet: Path, out: Path) -> None:
    """Write the whole edited denoiser."""
    from erasure.artifact import save_denoiser

    if all(name.startswith("text_encoder") for name in edit.parameter_names):
        raise ValueError(
            f"{edit.name!r} changes no weight of the denoiser, so --unet would write the base's; leave it out (the "
            f"erasure is in {out})"
        )
    edit.apply(pipe)
    say(f"whole denoiser -> {save_denoiser(pipe, unet)}", wrap=False)


@commands.command(
    rich_help_panel=MAKE,
    epilog="Examples:\n\n[bold]erasure neighbours wizard[/bold]\n\n"
    "[bold]erasure neighbours 'Claude Monet' --kind style --base CompVis/stable-diffusion-v1-4 -n 12[/bold]",
)
def neighbours(
    concept: Annotated[str, typer.Argument(help="What is to be erased.")],
    base: Base = "emoji-world",
    variant: Variant = None,
    config: Config = None,
    kind: Kind = None,
    n: Annotated[int, typer.Option("-n", min=1, max=100, help="How many.")] = 8,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Suggest a keep list: what an erasure of the concept is likely to damage on this model. Nothing is drawn."""
    from erasure.concept import Concept
    from erasure.methods.neighbours import suggest_neighbours

    target = Concept(concept, **({"kind": kind} if kind else {}))  # type: ignore[arg-type]
    found = suggest_neighbours(open_base(base, device, dtype, variant=variant, config=config), target, n=n)
    for name in found:
        say(f"- {name}")
    say("Look through them: a name that means the concept itself has to go. Add what else must stay.")
    where = base_options(base, config)
    where += f" --kind {kind}" if kind else ""
    follow(f"erasure erase {shlex.quote(concept)} --keep {shlex.quote(', '.join(found))}{where}")


def _names(given: Sequence[str] | None, option: str) -> list[str]:
    """The prompts of ``--keep`` or ``--synonym``: each holds one, or several with commas between."""
    found = {text: [part.strip() for part in text.split(",") if part.strip()] for text in given or ()}
    if empty := [text for text, names in found.items() if not names]:
        raise ValueError(f"{option} needs a prompt; got {empty[0]!r}; leave it out, or name one")
    return [name for names in found.values() for name in names]


def _summary(edit: Any, folder: Path) -> list[str]:
    """What an erasure is and what it moved, in words."""
    from erasure.artifact.card import in_words
    from erasure.artifact.files import CONFIG, SYSTEM, WEIGHTS

    return in_words(
        edit, sum((folder / name).stat().st_size for name in (CONFIG, WEIGHTS, SYSTEM) if (folder / name).exists())
    )


@commands.command(
    rich_help_panel=MAKE,
    epilog="Example: [bold]erasure generate 'a superhero' 'a ninja' --erasure superhero-uce --grid --out out[/bold]",
)
def generate(
    prompts: Annotated[list[str], typer.Argument(help="What to draw.")],
    out: Annotated[Path, typer.Option(parser=path, help="Folder for the pictures.")] = Path("pictures"),
    erasure: Annotated[list[str] | None, typer.Option(help="Folder or hub id; repeat to stack.")] = None,
    scale: Annotated[float | None, typer.Option(help="How strongly: 0 not at all, 1 (default) as it was made.")] = None,
    base: OwnBase = "",
    variant: Variant = None,
    config: Config = None,
    images: Annotated[int, typer.Option(min=1, max=1000, help="Pictures of each prompt.")] = 1,
    seed: Annotated[
        int, typer.Option(min=0, max=2**62, help="Seed of the first picture; the next ones count up from it.")
    ] = 0,
    grid: Annotated[bool, typer.Option("--grid", help="Also one sheet, before above after, as grid.png.")] = False,
    steps: Annotated[
        int | None, typer.Option(min=1, max=1000, help="Sampler steps; 8 on emoji-world, 25 elsewhere.")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Guidance, 0 to 100; 3 on emoji-world, the pipeline's own elsewhere.")
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Draw prompts before and after erasures, from the same noise. Every picture is saved as soon as it is drawn."""
    for option, number in (("scale", scale), ("guidance", guidance)):
        if number is not None and not 0 <= number <= 100:
            raise ValueError(f"--{option} is a number from 0 to 100; got {number}; leave it out for the usual one")
    if scale is not None and not erasure:
        raise ValueError(f"--scale is of an erasure; got {scale} and no erasure; add --erasure FOLDER, or leave it out")
    from erasure.backbone import backbone_of  # takes seconds
    from erasure.eval.core.lengths import too_long
    from erasure.opening import quiet
    from erasure.pictures import sheet, usual_settings
    from erasure.pipelines import load_erasure

    edits = read_erasures(erasure or [])  # a slip is found before anything is drawn
    base = base_of(base, edits.values())
    check_writable(out)
    note_unknown(base, prompts)
    pipe = open_base(base, device, dtype, variant=variant, config=config)
    for edit in edits.values():
        edit.check_base(backbone_of(pipe))  # before anything is drawn
    chosen = {"num_inference_steps": steps, "guidance_scale": guidance}
    sampler = {**usual_settings(base, pipe), **{key: value for key, value in chosen.items() if value is not None}}
    out.mkdir(parents=True, exist_ok=True)
    with quiet(), contextlib.suppress(ValueError):  # an architecture of which nothing is known
        for reason in too_long(pipe, prompts).values():
            note(reason)
    seeds = range(seed, seed + images)
    rows = {"before": _drawn(pipe, prompts, seeds, out, "before", sampler)}
    for edit in edits.values():
        load_erasure(pipe, edit, scale=1.0 if scale is None else scale)
    if edits:
        rows["after"] = _drawn(pipe, prompts, seeds, out, "after", sampler)
    if grid:
        titles = [f"{i:03d}-{number}\n{prompt}" for i, prompt in enumerate(prompts) for number in seeds]
        with writing(out / "grid.png") as file:
            sheet(rows, titles).save(file)
    count = sum(map(len, rows.values()))
    where = f", all of them in {out / 'grid.png'}" if grid else ""
    say(f"{count} picture{'s' * (count > 1)} -> {out}{where}", wrap=False)
    tried = " ".join(f"--erasure {shlex.quote(source)}" for source in erasure or [])
    erased = [concept["name"] for edit in edits.values() for concept in edit.config["concepts"]]
    suite = _suite_about(erased, base, config)
    follow(
        f"erasure evaluate --suite {suite} {tried}" if edits else f"erasure erase CONCEPT{base_options(base, config)}"
    )


def _drawn(
    pipe: Any, prompts: Sequence[str], seeds: Sequence[int], out: Path, arm: str, sampler: Mapping[str, Any]
) -> list[Any]:
    """The pictures of every prompt with every seed, each written as soon as its batch is drawn."""
    from erasure.eval import generate as draw
    from erasure.opening import quiet

    found, together = [], max(1, BATCH // len(seeds))  # prompts
    for start in range(0, len(prompts), together):
        part = prompts[start : start + together]
        with quiet():  # prompts that are too long were named before
            rows = draw(pipe, part, seeds=seeds, batch_size=BATCH, description=arm, **sampler)
        for i, row in enumerate(rows, start):
            for number, image in zip(seeds, row, strict=True):
                with writing(out / f"{i:03d}-{number}-{arm}.png") as file:
                    image.save(file)
                found.append(image)
    return found


def _concepts(name: str, suite: str | None, **more: Any) -> tuple[list[Any], tuple[str, ...]]:
    """The concepts and what to keep: all those of a suite, or the one of the command line."""
    from erasure.concept import Concept, Suite
    from erasure.wording import same

    given = {key: value for key, value in more.items() if value}
    if suite is None:
        return [Concept(name, **given)], ()
    if given:
        raise ValueError(f"the suite decides about {sorted(given)}; leave these options out, or leave --suite out")
    plan = Suite.load(suite)
    if not same(plan.concept.name, name):
        raise ValueError(f"the suite {suite!r} is about {plan.concept.name!r}, not {name!r}; name one or the other")
    return list(plan.concepts), plan.kept


def _asking(concept: Any) -> str:
    """A prompt that asks for a concept."""
    from erasure.wording import with_article

    return f"a painting by {concept.name}" if concept.kind == "style" else with_article(concept.name)


def _suite_about(names: Sequence[str], base: str, config: Path | None) -> str:
    """The shipped suite about a concept, with the options for this base; "SUITE" where there is none."""
    from erasure.concept import WORLD, Suite
    from erasure.wording import same

    for name in Suite.shipped():
        suite = Suite.load(name)
        if (suite.base == WORLD) == (base == WORLD) and len(names) == 1 and same(suite.target, names[0]):
            return name if suite.base == base else f"{name}{base_options(base, config)}"
    return f"SUITE{base_options(base, config)}"


def _settings(pairs: list[str] | None) -> dict[str, Any]:
    """``["lamb=0.1", "variant=u"]`` -> ``{"lamb": 0.1, "variant": "u"}``."""
    settings = {}
    for pair in pairs or []:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"--set needs key=value; got {pair!r}")
        settings[key.strip()] = parse_yaml(value)
    return settings
