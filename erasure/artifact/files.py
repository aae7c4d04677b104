"""An erasure's folder on disk. What others wrote is checked before it is believed: every fault is one ValueError.

Three files of numbers and facts, and a card for people:

    erasure_config.json     what was done, to which model, and the SHA-256 of the other two and of itself
    erasure.safetensors     the numbers
    system.safetensors      optional: what they were solved from, so that they can be solved again with others
    README.md               the card; never read back

The hashes find damage, not malice: who can write the folder can write the hashes too.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from erasure.artifact.config import FORMAT, Config
from erasure.artifact.kinds import KINDS
from erasure.concept import Concept
from erasure.io import (
    check_file,
    check_writable,
    fault_of,
    parse_json,
    plain,
    read_bytes,
    sha256,
    sha256_file,
    sha256_json,
    shown,
    writing_folder,
)

CONFIG, WEIGHTS, SYSTEM, CARD = "erasure_config.json", "erasure.safetensors", "system.safetensors", "README.md"
PIPELINE = "model_index.json"  # of a whole model
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
LARGEST = 2**26  # bytes of a config; a keep list of a million words stays below
LARGEST_HEADER = 2**24  # bytes of a safetensors header; a hundred thousand tensors stay below
LARGEST_TENSORS = 2**37  # bytes; every weight of the largest transformers in float32 stays below
LONGEST_NAME = 10_000  # characters; hundreds of concepts stay below


class _OnDisk(Config):
    """A config with what stands beside it in the file."""

    kind: str
    name: str
    sha256: dict[str, str]


REQUIRED = {name for name, field in _OnDisk.model_fields.items() if field.is_required()}


def pack(config: Mapping[str, Any], tensors: Mapping[str, Tensor], system: Mapping[str, Tensor]) -> dict[str, bytes]:
    """The files by name: weights, the system where there is one, and the config with the hashes of all."""
    blobs = {name: _save(part) for name, part in ((WEIGHTS, tensors), (SYSTEM, system)) if part}
    facts = plain({key: value for key, value in config.items() if key != "sha256"})
    facts["sha256"] = {name: sha256(raw) for name, raw in blobs.items()} | {CONFIG: digest(facts)}
    return {**blobs, CONFIG: json.dumps(facts, indent=2, ensure_ascii=False, allow_nan=False).encode()}


def unpack(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """Config, tensors and system of a folder; see :func:`pack`.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is truncated, altered, of a newer format, of wrong types, or holds NaN.
    """
    config = read_config(folder)
    hashes = config.pop("sha256")
    if digest(config) != hashes.get(CONFIG):
        raise ValueError(f"{folder / CONFIG}: does not match its own hash; it was altered; get it again")
    if (folder / SYSTEM).exists() and SYSTEM not in hashes:
        raise ValueError(f"{folder / SYSTEM}: does not belong to this erasure; {CONFIG} has no hash of it; delete it")
    if unknown := set(hashes) - {CONFIG, WEIGHTS, SYSTEM}:
        raise ValueError(f"{folder / CONFIG}: lists files no erasure has; got {shown(sorted(unknown))}; get it again")
    tensors = read_tensors(folder, WEIGHTS, hashes.get(WEIGHTS))
    system = read_tensors(folder, SYSTEM, hashes[SYSTEM]) if SYSTEM in hashes else {}
    return config, tensors, system


def read_config(folder: Path) -> dict[str, Any]:
    """The config of a folder, its fields of the right types. Its hash is not checked here."""
    path = folder / CONFIG
    try:
        config = parse_json(read_bytes(_file(folder, CONFIG), largest=LARGEST))
    except ValueError as error:
        raise ValueError(f"{path}: {error}; get it again") from None
    missing = REQUIRED - set(config) if isinstance(config, dict) else REQUIRED
    if missing:
        raise ValueError(
            f"{path}: not an erasure's config; {sorted(missing)} missing; give a folder made by save_pretrained"
        )
    if config["format"] != FORMAT or config["format"] is True:
        raise ValueError(
            f"{path}: format {shown(config['format'])}; this library reads format {FORMAT}; upgrade diffusion-erasure"
        )
    known = sorted(KINDS.available())
    if not isinstance(config["kind"], str) or config["kind"] not in known:
        raise ValueError(
            f"{path}: unknown kind {shown(config['kind'])}; known are {known}; install the package that made it, or "
            "upgrade diffusion-erasure"
        )
    try:
        _OnDisk.model_validate(config)
        TypeAdapter(list[Concept]).validate_python(config["concepts"])
    except ValidationError as error:
        raise ValueError(f"{path}: {fault_of(error)}; the file was altered; get it again") from None
    check_name(config["name"])
    return config


def read_tensors(folder: Path, name: str, expected: str | None) -> dict[str, Tensor]:
    """The tensors of one file: whole, floating-point, finite; ``expected`` is its SHA-256.

    Size and header are compared before anything of that size is read.
    """
    path = _file(folder, name)
    _check_size(path)
    if sha256_file(path) != expected:
        raise ValueError(f"{path}: does not match the hash in {CONFIG}; it is truncated or was altered; get it again")
    try:
        mapped = load_file(path)
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError, OSError):
        raise _no_safetensors(path) from None
    tensors = {}
    for key in list(mapped):
        tensor = mapped.pop(key)
        if tensor.dtype not in FLOATS:
            raise ValueError(f"{path}: {shown(key)} is of dtype {tensor.dtype}; an erasure holds floats; get it again")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{path}: {shown(key)} holds NaN or infinity; the erasure is broken; make it again")
        tensors[key] = tensor.clone()  # it was the file's own memory: who overwrites the file would change it
    return tensors


def _check_size(path: Path) -> None:
    """Refuse a safetensors file whose size is not the one that its header adds up to."""
    size = path.stat().st_size
    if size > LARGEST_TENSORS:
        raise ValueError(f"{path}: {size:,} bytes; no erasure is that large; get it again")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, LARGEST_HEADER):
            raise _no_safetensors(path)
        try:
            header = parse_json(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            held = max(ends, default=0)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            raise _no_safetensors(path) from None
    if not isinstance(held, int) or 8 + length + held != size:
        raise ValueError(
            f"{path}: {size:,} bytes, and its header adds up to {shown(held)} beside itself; it is truncated or was "
            "altered; get it again"
        )


def _no_safetensors(path: Path) -> ValueError:
    return ValueError(f"{path}: not a safetensors file, or truncated or altered; get it again (pickles are never read)")


def check_name(name: str) -> None:
    """Refuse a name that, used as part of a path, would lead somewhere else."""
    if len(name) > LONGEST_NAME:
        raise ValueError(f"a name of {len(name):,} characters; got {shown(name)}; choose a shorter one")
    absolute = PurePosixPath(name).is_absolute() or PureWindowsPath(name).anchor or name.startswith("~")
    if not name.strip() or absolute or ".." in name.replace("\\", "/").split("/") or not name.isprintable():
        raise ValueError(
            f"unsafe name of an erasure; got {shown(name)}; choose one that is no absolute path and has no '..'"
        )


def digest(config: Mapping[str, Any]) -> str:
    """SHA-256 of a config's content, whatever its spacing and order."""
    return sha256_json({key: value for key, value in config.items() if key != "sha256"})


def write(folder: Path, blobs: Mapping[str, bytes]) -> None:
    """Write an erasure's files; in a folder that holds one already, the config, without which they are nothing, last.

    Raises:
        ValueError: the folder holds a whole model, or a README that is not a card.
    """
    check_folder(folder)
    with writing_folder(folder, last=CONFIG) as temporary:
        for name, raw in blobs.items():
            (temporary / name).write_bytes(raw)
        if SYSTEM not in blobs:
            (folder / SYSTEM).unlink(missing_ok=True)  # of an earlier save; it would not match


def check_folder(folder: Path) -> None:
    """Refuse a place where an erasure cannot be written; before hours of work, if somebody asks."""
    check_writable(folder)
    if (folder / CONFIG).exists():
        return
    if (folder / PIPELINE).exists():
        raise ValueError(f"{folder} holds a whole model; an erasure in it would pass for that model; give a new folder")
    if (folder / CARD).exists():
        raise ValueError(f"{folder} already holds a {CARD} that is not an erasure's card; give a new folder")


def check_place(path: str | os.PathLike[str]) -> None:
    """Refuse a file that cannot be written, or that an erasure would be lost to; before the work."""
    check_file(path)
    path = Path(path)
    if path.name in (CONFIG, WEIGHTS, SYSTEM) and (path.parent / CONFIG).exists():
        raise ValueError(f"{path} is a part of the erasure in {path.parent}; give another name")


def _file(folder: Path, name: str) -> Path:
    """A regular file of a folder, or of the hub's cache that the folder links to."""
    path = folder / name
    if not path.is_file():
        if name == CONFIG and (folder / PIPELINE).is_file():
            raise FileNotFoundError(
                f"{folder} is a whole model, not an erasure; give a folder that holds {CONFIG}, or judge the model "
                f"with `erasure evaluate --suite NAME --model {folder}`"
            )
        raise FileNotFoundError(f"{path}: missing; an erasure's folder holds {CONFIG} and {WEIGHTS}; get it again")
    root = folder.resolve()
    if root.parent.name == "snapshots" and (root.parent.parent / "blobs").is_dir():
        root = root.parent.parent  # the hub's cache: a snapshot is links to blobs beside it
    if not path.resolve().is_relative_to(root):
        raise ValueError(f"{path}: a link out of the folder; an erasure's files lie in its folder; copy it there")
    return path


def _save(tensors: Mapping[str, Tensor]) -> bytes:
    return save({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()})
