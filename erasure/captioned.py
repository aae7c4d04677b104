"""Pictures that a user brings: one of them, and a folder of them with captions."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from erasure.io import parse_json, printable, shown

Picture = Image.Image | str | os.PathLike[str] | bytes
METADATA = "metadata.jsonl"


def opened(picture: Picture) -> Image.Image:
    """A picture in RGB, the right way up.

    Raises:
        ValueError: it cannot be read to its end, or has transparent parts.
    """
    given = "the picture" if isinstance(picture, Image.Image | bytes) else os.fspath(picture)
    try:
        source = io.BytesIO(picture) if isinstance(picture, bytes) else picture
        image = source if isinstance(source, Image.Image) else Image.open(source)
        image = ImageOps.exif_transpose(image)
        image.load()
    except FileNotFoundError:
        raise
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{given} cannot be read ({printable(error)}); give a whole picture in a format that Pillow reads"
        ) from error
    if image.has_transparency_data and np.asarray(image.convert("RGBA"))[..., 3].min() < 255:
        raise ValueError(f"{given} has transparent parts; put it on the background it is to be drawn with")
    return image.convert("RGB")


def rows_of(folder: str | os.PathLike[str], *needed: str) -> list[dict[str, Any]]:
    """The lines of a folder's ``metadata.jsonl``, an image folder of the datasets library.

    One line per picture: ``{"file_name": "1.png", "text": "a photo of ..."}``, and whatever else it says of it.

    Args:
        needed: further keys that each line has as a text.

    Raises:
        FileNotFoundError: no such folder, no metadata, or a picture that it names is not there.
        ValueError: a line without one of the keys, or a ``member`` that is neither true nor false; the message has its
            number.
    """
    folder, keys = Path(folder), ("file_name", "text", *needed)
    file, wanted = folder / METADATA, f"{', '.join(keys[:-1])} and {keys[-1]}"
    if not file.exists():
        raise FileNotFoundError(f"{file}: no such file; give a folder of pictures with a {METADATA} of {wanted}")
    found = []
    for number, line in enumerate(file.read_text("utf-8").splitlines(), 1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            row = parse_json(line)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{where}: keys and values are needed; got {shown(row)}")
        if row.get("member") not in (True, False, None):
            raise ValueError(f"{where}: member is {row['member']!r}; write true or false, or leave it out")
        if missing := [key for key in keys if not isinstance(row.get(key), str)]:
            raise ValueError(f"{where}: lacks {missing}; each line needs {wanted}")
        if not (folder / row["file_name"]).exists():
            raise FileNotFoundError(f"{where}: {row['file_name']} is not in the folder")
        found.append(row)
    return found


__all__ = ["METADATA", "Picture", "opened", "rows_of"]
