"""The commands about finished erasures: what is in one, how two differ, and other programs' formats."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from erasure.cli.options import (
    HAND_ON,
    LOOK_UP,
    Config,
    Device,
    Dtype,
    OwnBase,
    Variant,
    base_of,
    base_options,
    follow,
    one_of,
    open_base,
    path,
)
from erasure.io import check_writable, sha256_file
from erasure.terminal import PlainTable, console, print_json, say

commands = typer.Typer()
FORMATS = ("lora", "peft", "kohya", "comfyui", "official", "unet", "pipeline", "single-file")
ENGINES = ("diffusers", "peft", "comfyui", "forge", "a1111", "vllm-omni", "sglang", "nunchaku", "fp8", "gguf")
LORAS = ("lora", "peft", "kohya", "comfyui")
ONE_FILE = ("kohya", "comfyui", "official", "single-file")
# How each is loaded.
LOADED = {
    "lora": 'pipe.load_lora_weights("{out}") on {base}',
    "peft": 'PeftModel.from_pretrained(denoiser, "{out}") on the denoiser of {base}',
    "comfyui": "put it among the LoRAs of ComfyUI, and check its log for names that were not found",
    "kohya": 'pipe.load_lora_weights("{out}") on {base}, or put it among the LoRAs of your web interface',
    "official": "load it with the script of the method's own repository",
    "unet": 'from_pretrained("{out}") of the denoiser\'s class, and give it to the pipeline of {base}',
    "pipeline": 'DiffusionPipeline.from_pretrained("{out}")',
    "single-file": 'from_single_file("{out}"), or put it among the checkpoints of your web interface',
}


@commands.command(
    rich_help_panel=HAND_ON,
    epilog="Examples:\n\n[bold]erasure export superhero-uce --for comfyui --out superhero.safetensors[/bold]\n\n"
    "[bold]erasure export superhero-uce --format kohya --out superhero-uce.safetensors[/bold]",
)
def export(
    erasure: Annotated[str, typer.Argument(help="Folder or hub id of the erasure.")],
    out: Annotated[
        Path,
        typer.Option(parser=path, help="Folder, or a .safetensors file for kohya, comfyui, official and single-file."),
    ],
    engine: Annotated[
        str | None,
        typer.Option(
            "--for",
            parser=one_of(*ENGINES),
            metavar="NAME",
            help=f"Write the form that this program can read, or say why none: {', '.join(ENGINES)}.",
        ),
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(
            parser=one_of(*FORMATS), metavar="NAME", help=f"What to write: {', '.join(FORMATS)}; lora by default."
        ),
    ] = None,
    base: OwnBase = "",
    variant: Variant = None,
    config: Config = None,
    rank: Annotated[int | None, typer.Option(min=1, help="LoRAs: cut a fine-tune to this rank.")] = None,
    scale: Annotated[
        float | None, typer.Option(help="official, unet, pipeline, single-file: how strongly; 1 by default.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cuda, mps or cpu; cpu by default.")] = "cpu",
    dtype: Dtype = None,
) -> None:
    """Write an erasure for other programs: LoRA, the official codes' files, or a whole model with it inside."""
    from erasure.artifact import Erasure
    from erasure.artifact.stack import check_scale

    edit = Erasure.from_pretrained(erasure)
    if format is None and engine is None:
        format = "lora"
    if engine is not None and format in ("official", "unet"):
        raise ValueError(f"--for chooses among {', '.join([*LORAS, 'pipeline', 'single-file'])}; got --format {format}")
    if scale is not None and format in LORAS:
        raise ValueError(f"{format} has no scale: set it where the file is used, or choose another format")
    if rank is not None and format is not None and format not in LORAS:
        raise ValueError(f"--rank is for {', '.join(LORAS)}; got it with {format}; leave it out")
    strength = check_scale(1.0 if scale is None else scale)
    if format is not None:
        _check_place(out, format)
    source = base_of(base, [edit])
    pipe = open_base(source, device, dtype, variant=variant, config=config)
    if engine is not None:
        _export_for(edit, pipe, out, engine, format, rank, strength)
        return
    chosen = format or "lora"
    written = _written(edit, pipe, out, chosen, rank, strength)
    say(f"{edit.name} as {chosen} -> {written}", wrap=False)
    follow(LOADED[chosen].format(out=written, base=source))


def _export_for(edit: Any, pipe: Any, out: Path, engine: str, format: Any, rank: int | None, strength: float) -> None:
    """Write the form that a program reads, and say which, and which others were no good."""
    from erasure.artifact.engines import LORAS as AS_LORA
    from erasure.artifact.engines import plan, write_form

    made = plan(edit, pipe, engine, form=format, rank=rank)
    _check_place(out, made.form)
    written = write_form(edit, pipe, out, made, scale=strength)
    for form, reason in made.passed_over.items():
        say(f"not {form}: {reason}")
    say(f"{edit.name} for {made.engine.title} as {made.form} -> {written}", wrap=False)
    if made.engine.note and made.form in AS_LORA:
        say(made.engine.note)
    follow(made.engine.load[made.form].format(out=written if made.form not in ("lora", "peft") else written.parent))


def _written(edit: Any, pipe: Any, out: Path, format: str, rank: int | None, strength: float) -> Path:
    """Write one format."""
    from erasure.artifact import export_lora, export_official, export_single_file, save_denoiser, save_pipeline
    from erasure.artifact.export import Layout

    if format in LORAS:
        layout: Layout = "diffusers" if format == "lora" else format  # type: ignore[assignment]
        return export_lora(edit, pipe, out, layout=layout, rank=rank)
    if format == "official":
        return export_official(edit, pipe, out, scale=strength)
    if format == "single-file":
        return export_single_file(pipe, out, edit, scale=strength)
    edit.apply(pipe, strength)
    return save_denoiser(pipe, out) if format == "unet" else save_pipeline(pipe, out)


@commands.command(
    rich_help_panel=LOOK_UP,
    epilog="Example: [bold]erasure gram captions.txt --base emoji-world --out captions.safetensors[/bold]",
)
def gram(
    captions: Annotated[list[Path], typer.Argument(parser=path, help="Text files, one caption a line; of any length.")],
    out: Annotated[
        Path, typer.Option(parser=path, help="The file to write; give it to a method with --set corpus=FILE.")
    ],
    base: Annotated[str, typer.Option(help="Whose text encoder: emoji-world, a folder, a checkpoint, or a hub id.")],
    variant: Variant = None,
    config: Config = None,
    span: Annotated[str, typer.Option(help="Which tokens count; all is what the layers see.")] = "all",
    add: Annotated[
        list[Path] | None, typer.Option(parser=path, help="A finished part to add; repeat for more.")
    ] = None,
    device: Device = None,
) -> None:
    """Sum up a corpus of captions that an erasure must not change, as one matrix. Parts made apart add up."""
    from tqdm.auto import tqdm

    from erasure.artifact.files import check_place
    from erasure.backbone import backbone_of
    from erasure.backbone.text import SPANS
    from erasure.methods.gram import Gram

    if span not in SPANS:
        raise ValueError(f"unknown token span; got {span!r}; choose one of {list(SPANS)}")
    if missing := [str(file) for file in [*captions, *(add or [])] if not file.is_file()]:
        raise FileNotFoundError(f"no file at {missing[0]}; give text files with a caption a line")
    check_place(out)
    if same := [str(file) for file in captions if out.exists() and file.samefile(out)]:
        raise ValueError(f"--out is {same[0]}, which holds captions; give another file")
    backbone = backbone_of(open_base(base, device, variant=variant, config=config))
    total = Gram.of(backbone, tqdm(_lines(captions), desc="captions", unit=""), span=span)  # type: ignore[arg-type]
    for file in add or []:
        total = total + Gram.load(file)
    if not any(total.counts.values()):
        raise ValueError(f"no caption in {', '.join(map(str, captions))}; give text files with a caption a line")
    total.save(out)
    counts = ", ".join(f"{count} ({part})" for part, count in total.counts.items())
    say(f"embeddings: {counts} -> {out}", wrap=False)
    follow(f"erasure erase CONCEPT{base_options(base, config)} --set {shlex.quote(f'corpus={out}')} --out FOLDER")


def _lines(paths: list[Path]) -> Iterator[str]:
    """Captions, one at a time; empty lines are left out."""
    for source in paths:
        try:
            with source.open(encoding="utf-8-sig") as file:
                yield from (line.strip() for line in file if line.strip())
        except UnicodeDecodeError:
            raise ValueError(f"{source} is not UTF-8 text; save it as UTF-8, a caption a line") from None


@commands.command(rich_help_panel=HAND_ON, epilog="Example: [bold]erasure inspect superhero-uce[/bold]")
def inspect(
    erasure: Annotated[str, typer.Argument(help="Folder or hub id of the erasure.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Say what is in an erasure: its base, method, settings, concepts, files and quick report."""
    from erasure.artifact import Erasure
    from erasure.artifact.card import facts, report_rows
    from erasure.concept import WORLD

    edit = Erasure.from_pretrained(erasure)  # checks every hash
    files = _files(Path(erasure))
    if as_json:
        tensors = {name: list(tensor.shape) for name, tensor in edit.tensors.items()}
        print_json({**edit.config, "name": edit.name, "kind": edit.kind, "files": files, "tensors": tensors})
        return
    table = PlainTable(title=edit.name, show_header=False)
    for key, value in facts(edit).items():
        table.add_row(key, value)
    table.add_row("settings", json.dumps(edit.config["settings"], ensure_ascii=False))
    for name, (size, sha256) in files.items():
        table.add_row(name, f"{size:,} bytes, sha256 {sha256[:16]}")
    table.add_row("can be solved again", "yes" if edit.system else "no system.safetensors in it")
    figures, groups = report_rows(edit.config.get("report") or {})
    for key, number in figures.items():
        table.add_row(*_figure(key, number))
    for group, moved, cosine in groups:
        table.add_row(f"moved: {group}", f"{100 * moved:.1f} %, cosine {cosine:.3f}")
    console.print(table)
    if groups:
        say(
            "moved: how far the embeddings of these words moved, in their own length; a cosine of 1 is the old "
            "direction. Far is right for the target, and for it alone. No picture was drawn for this."
        )
    if rows := edit.config.get("evaluation"):
        columns = list(dict.fromkeys(key for row in rows for key in row))
        evaluation = PlainTable(*columns, title="evaluation")
        for row in rows:
            evaluation.add_row(*(str(row.get(column, "")) for column in columns))
        console.print(evaluation)
    base, target = edit.config["base"]["name"], shlex.quote(f"a {edit.config['concepts'][0]['name']}")
    where = "" if base == WORLD else f" --base {shlex.quote(base)}"
    follow(f"erasure generate {target} --erasure {shlex.quote(erasure)}{where} --grid --out pictures")


@commands.command(
    rich_help_panel=HAND_ON, epilog="Example: [bold]erasure diff superhero-uce superhero-rece --json[/bold]"
)
def diff(
    a: Annotated[str, typer.Argument(help="An erasure, or a UNet's or pipeline's folder, or a safetensors file.")],
    b: Annotated[str, typer.Argument(help="Another of the same sort.")],
    limit: Annotated[
        int, typer.Option(min=1, help="How many sites or tensors to list, the most different first.")
    ] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Compare two erasures, or two models tensor by tensor."""
    from erasure.artifact import Erasure, compare_erasures, compare_models
    from erasure.artifact.compare import is_model

    models = [is_model(path) for path in (a, b)]
    if models[0] != models[1]:
        raise ValueError(
            f"{a if models[0] else b} is a model and the other an erasure; export the erasure with unet first"
        )
    if models[0]:
        result = compare_models(a, b)
        rows = {name: (_number(gap["relative"]), _number(gap["largest"])) for name, gap in result["different"].items()}
        order = sorted(rows, key=lambda name: -result["different"][name]["relative"])
        table = PlainTable("tensor", "relative", "largest")
        summary = {
            "equal tensors": result["same"],
            "different": len(rows),
            "of other shapes": len(result["reshaped"]),
            "only in the first": len(result["only_a"]),
            "only in the second": len(result["only_b"]),
        }
    else:
        result = compare_erasures(*map(Erasure.from_pretrained, (a, b)))
        rows = {site: (_number(s["distance"]), _number(s["cosine"])) for site, s in result["sites"].items()}
        order = sorted(rows, key=lambda site: -(result["sites"][site]["distance"] or 0))
        table = PlainTable("site", "distance", "cosine")
        summary = {
            "same base model": "yes" if result["same_base"] else "no",
            "same concepts": "yes" if result["same_concepts"] else f"only {result['only_a']}; only {result['only_b']}",
            "distance": _number(result["distance"]),
            "relative": _number(result["relative"]),
            "cosine": _number(result["cosine"]),
        }
    if as_json:
        print_json(result)
        return
    for key, value in summary.items():
        say(f"{key}: {value}")
    for name in order[:limit]:
        table.add_row(name, *rows[name])
    if rows:
        console.print(table)
    if len(rows) > limit:
        say(f"and {len(rows) - limit} more; --limit or --json shows them")
    if models[0]:
        say("relative: the difference over the first tensor, as norms. largest: the largest single difference.")
        follow("erasure evaluate --suite SUITE --model FOLDER")
    else:
        say(
            "distance: the norm of the difference of both edits; relative: that over the larger edit. cosine: 1 where "
            "both edit in one direction, 0 where they have nothing in common."
        )
        follow(f"erasure evaluate --suite SUITE --erasure {shlex.quote(a)} --erasure {shlex.quote(b)}")


def _check_place(out: Path, format: str) -> None:
    """Try the place of an export, before the base is opened."""
    from erasure.artifact.files import check_place

    if format in ONE_FILE:
        if out.suffix != ".safetensors":
            raise ValueError(f"{format} writes one file; got --out {out}; end it in .safetensors")
        check_place(out)
    else:
        if out.suffix == ".safetensors":
            file = ", or --format kohya for one file" if format == "lora" else ""
            raise ValueError(f"{format} writes a folder; got --out {out}; give one without .safetensors{file}")
        check_writable(out)
    if format == "pipeline" and out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is there and not empty; give a new folder")


def _files(folder: Path) -> dict[str, tuple[int, str]]:
    """Size and hash of the files of numbers and facts; none for an erasure on the hub."""
    from erasure.artifact.files import CONFIG, SYSTEM, WEIGHTS

    found = [folder / name for name in (CONFIG, WEIGHTS, SYSTEM) if (folder / name).is_file()]
    return {file.name: (file.stat().st_size, sha256_file(file)) for file in found}


def _figure(key: str, number: float) -> tuple[str, str]:
    """A figure of the quick report by its name and with what it is in."""
    name = key.replace("_", " ")
    if key.endswith("relative_change"):
        return name.replace("relative change", "weights moved by"), f"{number:.2g} times their size"
    return name, f"{number:.3g}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
