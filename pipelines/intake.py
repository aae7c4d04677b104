"""What may go into a store: pictures that can be read, texts that say something, times with a zone."""

from __future__ import annotations

import io
import os
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from erasure.io import printable, shown

Picture = Image.Image | str | os.PathLike[str] | bytes


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


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def text_of(name: str, text: Any, *, empty: bool = False) -> str:
    """A text that can be kept.

    Raises:
        ValueError: it is none, or says nothing.
    """
    if not isinstance(text, str) or not (empty or text.strip()):
        why = {"licence": "no picture is used without one", "source": "whoever asks is told where it is from"}
        reason = why.get(name, "requests are compared with it" if name == "caption" else "it is a text")
        raise ValueError(f"an entry needs a {name}, {reason}; got {shown(text)}; give it as text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the {name} holds half a character; got {shown(text)}; give whole ones") from error
    return text.strip()
