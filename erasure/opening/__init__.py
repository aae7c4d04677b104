"""Opening a base model: a diffusers folder, a hub repository or one file, each whole or refused for its reason.

Models are opened one by one before the pipeline is, because diffusers and transformers leave a tensor that no file
holds at random values and say so in a log line.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from erasure.artifact.provenance import already, restore
from erasure.concept import WORLD
from erasure.io import beside
from erasure.opening.faults import UNREACHED, fault, unreached
from erasure.opening.folder import open_folder, read_index
from erasure.opening.single_file import open_file
from erasure.runtime import pick_device, pick_dtype


def load_base(
    base: str | Path = WORLD,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    variant: str | None = None,
    config: str | Path | None = None,
) -> Any:
    """A pipeline by name: "emoji-world", a diffusers folder, a hub id, or a single .safetensors file.

    Only safetensors are opened, never pickles. Every tensor a model needs must be in its files, whatever wrapper's
    prefix its name carries; nothing is left at random values.

    Args:
        device: cuda, mps or cpu; the best one here by default.
        dtype: float32 (default), float16 or bfloat16. Change it when memory is short.
        variant: "fp16" for the files of that name. By default the plain ones, or those there are.
        config: for a single file, the diffusers folder whose configs (and, where the file holds the denoiser alone,
            whose other components) go with it. By default the folder around the file, the one beside it under the
            same name, or the hub repository that diffusers names for this architecture.

    Raises:
        FileNotFoundError: neither a folder or file nor a model the hub gives.
        ValueError: unknown device or dtype; or what is there cannot be opened, for the reason given.
    """
    from erasure import world  # only the world's own pipeline needs it

    device, dtype = pick_device(device), pick_dtype(dtype)
    base = str(base)
    source = world.path() if base == WORLD else Path(base).expanduser()
    configs_of([base], config)
    with quiet():
        if source.is_file():
            if variant is not None:
                raise ValueError(f"variant= chooses among a folder's files; {base!r} is one file; leave it out")
            pipe = open_file(source, dtype, config=config)
        elif source.is_dir():
            pipe = open_folder(source, dtype, variant=variant)
        else:
            source = download(base, variant)
            pipe = open_folder(source, dtype, variant=variant)
            pipe.register_to_config(_name_or_path=base)  # not the cache's folder
        pipe.set_progress_bar_config(disable=True)
        pipe.to(device)
    if erased := restore(pipe, source):
        warnings.warn(already(erased, base), stacklevel=2)
    return pipe


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """diffusers and transformers without bars and tables: what they report is checked here, or of no use."""
    import diffusers.utils.logging
    import transformers.utils.logging

    libraries = [library.utils.logging for library in (diffusers, transformers)]
    before = [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, (verbosity, bar) in zip(libraries, before, strict=True):
            library.set_verbosity(verbosity)
            if bar:
                library.enable_progress_bar()


def check_there(base: str | Path) -> None:
    """Raise where a name is neither a file or folder nor can be a hub id: before minutes of other work.

    Raises:
        FileNotFoundError: for the reason given.
    """
    base = str(base)
    if base == WORLD or Path(base).expanduser().exists():
        return
    if address := re.match(r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/([^/]+/[^/?#]+)", base):
        raise FileNotFoundError(f"{base!r} is a web address; give the hub id {address[1]!r}, or a downloaded file")
    if base.count("/") != 1 or base.startswith((".", "/", "~")) or Path(base).suffix in (".safetensors", ".ckpt"):
        raise FileNotFoundError(
            f"no model at {base!r}{beside(base)}; give {WORLD!r}, a diffusers folder, a .safetensors file, or a hub id "
            "('CompVis/stable-diffusion-v1-4')"
        )


def configs_of(bases: Sequence[str | Path], config: str | Path | None) -> list[str | Path | None]:
    """The ``config`` of :func:`load_base` for each of several bases: the folder for single files, None for others.

    Raises:
        FileNotFoundError: there is no such base.
        ValueError: a folder was given and none of the bases is a single file: before minutes of other work.
    """
    files = [Path(base).expanduser().is_file() for base in bases]
    if config is not None and bases and not any(files):
        check_there(bases[0])
        what = "a folder" if str(bases[0]) == WORLD or Path(bases[0]).expanduser().is_dir() else "a hub id"
        raise ValueError(
            f"a folder of configs goes with a single file; {str(bases[0])!r} is {what} with its own; leave it out"
        )
    return [config if is_file else None for is_file in files]


def declared_parts(base: str | Path) -> dict[str, str]:
    """The class of each denoiser, text encoder and autoencoder by a folder's ``model_index.json``; {} elsewhere."""
    from erasure import world

    folder = world.path() if str(base) == WORLD else Path(base).expanduser()
    if not (folder / "model_index.json").is_file():
        return {}
    listed = {name: entry for name, entry in read_index(folder).items() if isinstance(entry, list)}
    drawn_with = re.compile(r"(unet|transformer|text_encoder|vae)(_\d)?")
    return {name: str(entry[-1]) for name, entry in listed.items() if any(entry) and drawn_with.fullmatch(name)}


def download(base: str, variant: str | None) -> Path:
    """The folder of a hub repository in the local cache."""
    import diffusers

    check_there(base)
    errors: list[Exception] = []
    for files in (variant, "fp16") if variant is None else (variant,):
        try:
            return Path(diffusers.DiffusionPipeline.download(base, variant=files, use_safetensors=True))
        except (OSError, ValueError) as failure:  # no plain safetensors there: a ValueError or OSError by version
            errors.append(failure)
    error = errors[0]
    kinds = {type(e).__name__ for e in (error, error.__cause__, error.__context__)}
    reason = fault(error)
    if "GatedRepoError" in kinds:
        reason = f"it is gated: accept its terms on https://huggingface.co/{base}, then run `hf auth login`"
    elif "RepositoryNotFoundError" in kinds:
        reason = "the hub has no such repository, or it is private (`hf auth login`)"
    elif unreached(error):
        reason = f"{UNREACHED}; connect, or give a folder or a file"
    raise FileNotFoundError(f"could not load {base!r}: {reason}") from None


__all__ = ["check_there", "configs_of", "download", "load_base", "open_file", "open_folder", "quiet"]
