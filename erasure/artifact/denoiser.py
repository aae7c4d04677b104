"""The whole edited denoiser, or pipeline, as a folder of its own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from erasure.artifact.files import check_place
from erasure.artifact.provenance import records_of, write_beside
from erasure.artifact.stack import refuse_attached
from erasure.backbone import denoiser_of, parts_of
from erasure.io import check_writable, named, writing_folder


def _origin(pipe: Any) -> Path:
    """The folder or file that a pipeline was loaded from."""
    return Path(str(pipe.config.get("_name_or_path") or ".")).resolve()


def _in_origin(pipe: Any, path: str | os.PathLike[str]) -> bool:
    """Whether a path is, or is in, the folder a pipeline was loaded from. Links in it count: hub caches are such."""
    path, origin = Path(path), _origin(pipe)
    places = (path.resolve(), path.parent.resolve() / path.name)
    return (origin / "model_index.json").exists() and any(place.is_relative_to(origin) for place in places)


def refuse_origin(pipe: Any, folder: Path) -> None:
    """Refuse to write an edited model over the one it was loaded from, or into its folder."""
    if _in_origin(pipe, folder):
        raise ValueError(f"{folder} is, or is in, the folder that the base model was loaded from; give another folder")


def check_export(pipe: Any, path: str | os.PathLike[str]) -> None:
    """Refuse a file that cannot be written, or that an erasure or the base model would be lost to; before the work."""
    check_place(path)
    if Path(path).exists() and (Path(path).resolve() == _origin(pipe) or _in_origin(pipe, path)):
        raise ValueError(f"{path} is, or is a part of, what the base model was loaded from; give another name")


def check_denoiser(folder: Path) -> None:
    """Refuse a place where a denoiser cannot be written; before the work, if somebody asks."""
    check_writable(folder)
    if folder.exists() and any(folder.iterdir()) and not (folder / "config.json").exists():
        raise ValueError(f"{folder} is not empty and holds no model; give a new folder")


def save_denoiser(pipe: Any, folder: str | os.PathLike[str]) -> Path:
    """Write the whole denoiser as it is now, erasures included; plain diffusers opens it.

    ``UNet2DConditionModel.from_pretrained``, or the transformer's own class where the pipeline has one.

    Raises:
        ValueError: the folder holds something that is not a model, or the model this one was loaded from; or erasures
            are attached, which are in no weight. Nothing in the folder is touched.
    """
    folder = named(folder)
    refuse_attached(pipe)
    refuse_origin(pipe, folder)
    check_denoiser(folder)
    records = {part: entries for part, entries in records_of(pipe).items() if parts_of(pipe)[part] is denoiser_of(pipe)}
    with writing_folder(folder, last="config.json") as temporary:
        denoiser_of(pipe).save_pretrained(temporary)
        write_beside(temporary, records)
    return folder


def save_pipeline(pipe: Any, folder: str | os.PathLike[str]) -> Path:
    """Write a whole pipeline as it is now, erasures included, into a new folder; completely or not at all.

    Raises:
        ValueError: the folder is there and not empty, or erasures are attached, which are in no weight.
    """
    folder = named(folder)
    refuse_attached(pipe)
    refuse_origin(pipe, folder)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is there and not empty; give a new folder")
    with writing_folder(folder, last="model_index.json") as temporary:
        pipe.save_pretrained(temporary)
        write_beside(temporary, records_of(pipe))
    return folder


__all__ = ["save_denoiser", "save_pipeline"]
