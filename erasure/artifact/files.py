"""An erasure's folder on disk. What others wrote is checked before it is believed: every fault is one ValueError.

Three files of numbers and facts, and a card for people:

    erasure_config.json     what was done, to which model, and the SHA-256 of the other two and of itself
    erasure.safetensors     the numbers
    system.safetensors      optional: what they were solved from, so that they can be solved again with others
    README.md               the card; never read back

The hashes find damage, not malice: who can write the folder can write the hashes too.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from erasure.artifact.config import FORMAT, Config
from erasure.artifact.kinds import KINDS
from erasure.concept import Concept

CONFIG, WEIGHTS, SYSTEM, CARD = "erasure_config.json", "erasure.safetensors", "system.safetensors", "README.md"
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
DEPTH = 32  # of nested JSON; ours needs seven
LARGEST = 2**26  # bytes of a config; a keep list of a million words stays below


class _OnDisk(Config):
    """A config with what stands beside it in the file."""

    kind: str
    name: str
    sha256: dict[str, str]


REQUIRED = {name for name, field in _OnDisk.model_fields.items() if field.is_required()}


def pack(config: Mapping[str, Any], tensors: Mapping[str, Tensor], system: Mapping[str, Tensor]) -> dict[str, bytes]:
    """The files by name: weights, the system where there is one, and the config with the hashes of all."""
    blobs = {name: _save(part) for name, part in ((WEIGHTS, tensors), (SYSTEM, system)) if part}
    facts = _finite({key: value for key, value in config.items() if key != "sha256"})
    facts["sha256"] = {name: hashlib.sha256(raw).hexdigest() for name, raw in blobs.items()} | {CONFIG: digest(facts)}
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
        raise ValueError(f"{folder / CONFIG}: lists files no erasure has; got {sorted(unknown)}; get it again")
    tensors = read_tensors(folder, WEIGHTS, hashes.get(WEIGHTS))
    system = read_tensors(folder, SYSTEM, hashes[SYSTEM]) if SYSTEM in hashes else {}
    return config, tensors, system


def read_config(folder: Path) -> dict[str, Any]:
    """The config of a folder, its fields of the right types. Its hash is not checked here."""
    path = folder / CONFIG
    try:
        config = parse_json(_read(folder, CONFIG, largest=LARGEST))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        raise ValueError(f"{path}: not readable as JSON; the file is incomplete or was altered; get it again") from None
    missing = REQUIRED - set(config) if isinstance(config, dict) else REQUIRED
    if missing:
        raise ValueError(
            f"{path}: not an erasure's config; {sorted(missing)} missing; give a folder made by save_pretrained"
        )
    if config["format"] != FORMAT or config["format"] is True:
        raise ValueError(
            f"{path}: format {config['format']!r}; this library reads format {FORMAT}; upgrade diffusion-erasure"
        )
    known = sorted(KINDS.available())
    if not isinstance(config["kind"], str) or config["kind"] not in known:
        raise ValueError(f"{path}: unknown kind {config['kind']!r}; known are {known}; upgrade diffusion-erasure")
    try:
        _OnDisk.model_validate(config)
        TypeAdapter(list[Concept]).validate_python(config["concepts"])
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{path}: {where}: {first['msg']}; the file was altered; get it again") from None
    check_name(config["name"])
    return config


def parse_json(raw: bytes) -> Any:
    """JSON, less what its grammar leaves open: a key given twice, NaN, and nesting without end."""
    value = json.loads(raw.decode("utf-8"), object_pairs_hook=_once, parse_constant=_no_constant)
    level = [value]
    for _ in range(DEPTH):
        level = [v for part in level for v in (part.values() if isinstance(part, dict) else part)] if level else []
        level = [v for v in level if isinstance(v, dict | list)]
    if level:
        raise ValueError(f"JSON nested more than {DEPTH} deep; no erasure's config is; get it again")
    return value


def read_tensors(folder: Path, name: str, sha256: str | None) -> dict[str, Tensor]:
    """The tensors of one file: whole, floating-point, finite."""
    path, raw = folder / name, _read(folder, name)
    if hashlib.sha256(raw).hexdigest() != sha256:
        raise ValueError(f"{path}: does not match the hash in {CONFIG}; it is truncated or was altered; get it again")
    try:
        tensors = load(raw)
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError):
        raise ValueError(f"{path}: not a safetensors file; get it again (pickles are never read)") from None
    for key, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            raise ValueError(f"{path}: {key!r} is of dtype {tensor.dtype}; an erasure holds floats; get it again")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{path}: {key!r} holds NaN or infinity; the erasure is broken; make it again")
    return tensors


def check_name(name: str) -> None:
    """Refuse a name that, used as part of a path, would lead somewhere else."""
    absolute = PurePosixPath(name).is_absolute() or PureWindowsPath(name).anchor or name.startswith("~")
    if not name.strip() or absolute or ".." in name.replace("\\", "/").split("/") or not name.isprintable():
        raise ValueError(
            f"unsafe name of an erasure; got {name!r}; choose one that is no absolute path and has no '..'"
        )


def digest(config: Mapping[str, Any]) -> str:
    """SHA-256 of a config's content, whatever its spacing and order."""
    content = {key: value for key, value in config.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_folder(folder: Path, source: Path) -> None:
    """Move files into a folder one by one; the config, without which the rest is nothing, comes last.

    Raises:
        ValueError: the folder holds a README that is not a card.
    """
    check_folder(folder)
    if (folder / SYSTEM).exists() and not (source / SYSTEM).exists():
        (folder / SYSTEM).unlink()  # of an earlier save; it would not match
    move(source, folder, last=CONFIG)


def check_folder(folder: Path) -> None:
    """Refuse a place where an erasure cannot be written; before hours of work, if somebody asks."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give a folder")
    if (folder / CARD).exists() and not (folder / CONFIG).exists():
        raise ValueError(f"{folder} already holds a {CARD} that is not an erasure's card; give a new folder")


def move(source: Path, folder: Path, *, last: str) -> None:
    """Move files into a folder one by one, the one that completes it last."""
    folder.mkdir(exist_ok=True)
    for file in sorted(source.iterdir(), key=lambda f: f.name == last):
        os.replace(file, folder / file.name)


def download(repo_id: str, *, revision: str | None, token: str | None) -> Path:
    """The files of an erasure on the Hugging Face Hub, in its cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        wanted = [CONFIG, WEIGHTS, SYSTEM, CARD]
        return Path(snapshot_download(repo_id, revision=revision, token=token, allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"no folder {repo_id!r}, and the hub did not give it either ({type(error).__name__}); check the name"
        ) from None


def _read(folder: Path, name: str, *, largest: int | None = None) -> bytes:
    path = folder / name
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; an erasure's folder holds {CONFIG} and {WEIGHTS}; get it again")
    root = folder.resolve()
    if root.parent.name == "snapshots" and (root.parent.parent / "blobs").is_dir():
        root = root.parent.parent  # the hub's cache: a snapshot is links to blobs beside it
    if not path.resolve().is_relative_to(root):
        raise ValueError(f"{path}: a link out of the folder; an erasure's files lie in its folder; copy it there")
    if largest is not None and path.stat().st_size > largest:
        raise ValueError(f"{path}: {path.stat().st_size} bytes; no erasure's config is that long; get it again")
    return path.read_bytes()


def _save(tensors: Mapping[str, Tensor]) -> bytes:
    return save({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()})


def _finite(value: Any) -> Any:
    """Plain JSON data; a number that is not finite becomes null."""
    if isinstance(value, Mapping):
        return {str(key): _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        twice = next(key for key, _ in pairs if sum(key == other for other, _ in pairs) > 1)
        raise ValueError(f"the key {twice!r} stands twice in the config; it was altered; get it again")
    return content


def _no_constant(constant: str) -> Any:
    raise ValueError(f"{constant} in the config; it was altered; get it again")
