"""What a recipe's cells leave beside the erasure: LoRA files, a plain difference, and whole models with it inside."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

from pydantic import AfterValidator, PositiveInt
from pydantic.dataclasses import dataclass

from erasure.artifact import DeltaErasure, Erasure, export_lora, export_single_file, save_denoiser, save_pipeline
from erasure.artifact.export import FOLDERS, Layout
from erasure.artifact.factors import base_weights
from erasure.artifact.kinds import weightless
from erasure.artifact.stack import applied
from erasure.backbone import backbone_of
from erasure.concept import STRICT, WORLD
from erasure.io import meant, read_json, sha256_file, shown
from erasure.opening import quiet

if TYPE_CHECKING:
    from erasure.batch.recipe import MethodChoice

WEIGHTS_KINDS = ("operator", "lora", "delta")  # of the library's own; the others change no weight
LORAS = {"lora" if layout == "diffusers" else layout: layout for layout in get_args(Layout)}


def _known(name: str) -> str:
    name = name.replace("_", "-")
    if name not in FORMATS:
        raise ValueError(
            f"unknown output {shown(name)}{meant(name, FORMATS)}; choose some of {list(FORMATS)} (the erasure itself, "
            "of whatever kind, is always there)"
        )
    return name


@dataclass(frozen=True, config=STRICT)
class Output:
    """One thing that every cell of a recipe leaves beside its erasure.

    Attributes:
        name: a key of :data:`FORMATS`.
        rank: of a LoRA where the erasure is a difference of whole weights: the rank that it is cut to. The error is in
            the file. Operators and LoRAs are written exactly, whatever is given here.
    """

    name: Annotated[str, AfterValidator(_known)]
    rank: PositiveInt | None = None

    @property
    def place(self) -> str:
        """File or folder within a cell's folder."""
        return self.name + FORMATS[self.name].suffix

    def plain(self) -> dict[str, Any]:
        """What another file would come of."""
        return {"name": self.name, "rank": self.rank}


@dataclasses.dataclass(frozen=True)
class Format:
    """How an output is written, and what it can hold.

    Attributes:
        write: ``write(edit, pipe, path, rank)``; the pipeline is left as it was.
        suffix: of a file; "" for a folder.
        refuse: ``refuse(kind, part, base, rank)``: why an erasure of a kind, of a part of a base, cannot be written;
            "" where it can.
    """

    write: Callable[[Erasure, Any, Path, int | None], Any]
    refuse: Callable[[str, str, Base, int | None], str]
    suffix: str = ""


@dataclasses.dataclass(frozen=True)
class Base:
    """What is known of a base before it is opened.

    Attributes:
        denoiser: "unet" or "transformer".
        original: whether it is Stable Diffusion 1.x, 2.x or XL, whose single files hold the text encoders too.
    """

    denoiser: str
    original: bool


def bases_of(base: str) -> list[Base]:
    """What a base may be: one thing where its folder says so, several for a file or a model on the hub."""
    from erasure import world

    index = (world.path() if base == WORLD else Path(base)) / "model_index.json"
    try:
        parts = read_json(index)
    except (OSError, ValueError):
        return [Base("unet", True), Base("unet", False), Base("transformer", False)]
    if not isinstance(parts, dict) or "unet" not in parts:
        return [Base("transformer", False)]
    return [Base("unet", str(parts.get("_class_name")).startswith("StableDiffusion"))]


def refusal(output: Output, method: MethodChoice, base: str) -> str:
    """Why the erasures of a method cannot be written as an output; "" where they can, or nothing is known yet."""
    chosen = method.chosen()
    reasons = []
    for one in bases_of(base):
        kind = chosen.leaves(one.denoiser)
        if kind is None:
            return ""
        reasons.append(FORMATS[output.name].refuse(kind, chosen.part, one, output.rank))
    return "" if "" in reasons else f"{method.name} cannot be written as {output.name}: {reasons[0]}"


# --- writing ----------------------------------------------------------------------------------------------------------


def write(output: Output, edit: Erasure, pipe: Any, folder: Path) -> dict[str, Any]:
    """Write an output of a cell; returns the hash and size of each of its files."""
    path = folder / output.place
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)  # damaged, or of another erasure
    with quiet():  # diffusers draws a bar for each model
        FORMATS[output.name].write(edit, pipe, path, output.rank)
    for file in _files(path):
        if file.suffix == ".safetensors":
            settle(file)
    return {str(file.relative_to(folder)): facts(file) for file in _files(path)}


def settle(file: Path) -> None:
    """Put the metadata of a safetensors file into the order of their names: its writer's is another one every time."""
    with file.open("r+b") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
        header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
        raw = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(header["__metadata__"]) > 1 and len(raw) <= length:
            opened.seek(8)
            opened.write(raw.ljust(length))


def facts(file: Path) -> dict[str, Any]:
    """Hash and size of a file."""
    return {"sha256": sha256_file(file), "bytes": file.stat().st_size}


def whole(folder: Path, files: Any) -> bool:
    """Whether the files of an output are those that were written."""
    if not isinstance(files, dict) or not files:
        return False
    found = [(folder / name, kept) for name, kept in files.items() if isinstance(kept, dict)]
    same_size = all(file.is_file() and file.stat().st_size == kept.get("bytes") for file, kept in found)
    return len(found) == len(files) and same_size and all(sha256_file(f) == kept.get("sha256") for f, kept in found)


def _files(path: Path) -> Iterator[Path]:
    yield from [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())


def _suffix(layout: str) -> str:
    return "" if layout in FOLDERS else ".safetensors"


def _lora(layout: Any) -> Callable[[Erasure, Any, Path, int | None], Any]:
    def write(edit: Erasure, pipe: Any, path: Path, rank: int | None) -> Path:
        return export_lora(edit, pipe, path, layout=layout, rank=rank if edit.kind == "delta" else None)

    return write


def as_delta(edit: Erasure, pipe: Any) -> DeltaErasure:
    """An erasure of weights as the difference it makes to each, in float32: what tools add to a checkpoint."""
    if isinstance(edit, DeltaErasure):
        return edit
    edit.check_base(backbone_of(pipe))
    base = base_weights(backbone_of(pipe))
    weights = {name: base[name].float() for name in edit.parameter_names}
    tensors = {name: (edit.edit(name, weight, 1.0) - weight).cpu() for name, weight in weights.items()}
    return DeltaErasure(edit.name, edit.config.with_facts(spaces=None, system=None, sites=list(tensors)), tensors)


def _delta(edit: Erasure, pipe: Any, path: Path, rank: int | None) -> None:
    as_delta(edit, pipe).save_pretrained(path)


def _inside(save: Callable[[Any, Path], Any]) -> Callable[[Erasure, Any, Path, int | None], Any]:
    def write(edit: Erasure, pipe: Any, path: Path, rank: int | None) -> None:
        with applied(edit, pipe):
            save(pipe, path)

    return write


# --- what can be written ----------------------------------------------------------------------------------------------


def _weights_only(kind: str) -> str:
    return "" if kind in WEIGHTS_KINDS else weightless(kind)


def _no_lora(kind: str, part: str, base: Base, rank: int | None) -> str:
    if reason := _weights_only(kind) or _elsewhere(kind, part, base, rank):
        return reason
    if kind == "delta" and rank is None:
        return (
            "it leaves a difference of whole weights, which is a LoRA only up to an error; give a rank, as in "
            "{name: lora, rank: 64}, or take `delta`"
        )
    return ""


def _elsewhere(kind: str, part: str, base: Base, rank: int | None) -> str:
    if part != "denoiser":
        return f"it changes the {part}, and this holds the denoiser alone; take `pipeline`"
    return _weights_only(kind)


def _no_delta(kind: str, part: str, base: Base, rank: int | None) -> str:
    return _weights_only(kind)


def _no_single_file(kind: str, part: str, base: Base, rank: int | None) -> str:
    return _weights_only(kind) if base.original else _elsewhere(kind, part, base, rank)


FORMATS: dict[str, Format] = {
    **{name: Format(_lora(layout), _no_lora, _suffix(layout)) for name, layout in LORAS.items()},
    "delta": Format(_delta, _no_delta),
    "denoiser": Format(_inside(save_denoiser), _elsewhere),
    "pipeline": Format(_inside(save_pipeline), _no_delta),
    "single-file": Format(_inside(export_single_file), _no_single_file, ".safetensors"),
}

__all__ = ["FORMATS", "Output", "as_delta", "facts", "refusal", "whole", "write"]
