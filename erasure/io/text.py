"""Foreign text printed without effect, and as the name of a folder."""

from __future__ import annotations

import difflib
import math
import re
import reprlib
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any

from erasure.io.hashes import sha256

NAME = 100  # characters of a folder's name
NAME_BYTES = 200  # file systems end at 255, and temporary names add some
KEPT = frozenset("\u200c\u200d\n\t")  # joiners: emoji, Persian, Hindi
# Controls, bidirectional and other formats, half characters, unassigned and private ones, separators of lines.
HARMFUL = ("Cc", "Cf", "Cs", "Cn", "Co", "Zl", "Zp")


def folder_name(text: str, *, longest: int = NAME) -> str:
    """A name for a file or folder that is safe on every system: no separators, no reserved names, not too long.

    Where it is cut, eight digits of a hash keep two long names apart.

    Args:
        longest: characters; fewer where something is put behind it.
    """
    text = unicodedata.normalize("NFC", text)
    name = re.sub(r'[/\\~<>:"|?*]|\.\.', "-", "".join(c if c.isprintable() else "-" for c in text)).strip(" .")
    if re.fullmatch(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?", name):
        name = f"-{name}"
    if len(name) > longest or len(name.encode()) > NAME_BYTES:
        cut = name[: longest - 9].encode()[: NAME_BYTES - 9].decode(errors="ignore").strip(" .")
        name = f"{cut}-{sha256(text.encode('utf-8', 'surrogatepass'))[:8]}"
    return name or "unnamed"


def printable(text: Any, *, limit: int | None = 200) -> str:
    """Foreign text that does nothing where it is printed: one line, no terminal escapes, no bidirectional overrides.

    What cannot be seen is written out (``\\x1b``); spaces and line breaks become one space. For markup of its own,
    see :func:`markdown` and :func:`rich_text`.

    Args:
        limit: characters; the rest is replaced by an ellipsis. None for all of it.
    """
    text = text if isinstance(text, str) else str(text)
    if cut := limit is not None and len(text) > limit:
        text = text[:limit]
    text = " ".join(text.split())
    if not text.isprintable():
        text = visible(text)
        if limit is not None and len(text) > limit:
            text, cut = text[:limit], True
    return f"{text}…" if cut else text


def visible(text: str) -> str:
    """Foreign text of several lines with what harms written out, for places where spaces mean something (HTML)."""
    return "".join(c if c.isprintable() or c in KEPT else _written_out(c) for c in text)


def meant(given: Any, known: Iterable[str], *, cutoff: float = 0.6) -> str:
    """`` (did you mean 'uce'?)`` where a known name is close to what was given; "" where none is.

    Args:
        cutoff: how alike, up to 1. Raise it where a slip is rarer than a name that is new.
    """
    plain_names = {name.casefold(): name for name in known}
    near = difflib.get_close_matches(str(given).casefold(), plain_names, n=1, cutoff=cutoff)
    return f" (did you mean {plain_names[near[0]]!r}?)" if near else ""


def shown(value: Any, *, limit: int = 200) -> str:
    """A foreign value in a message: its ``repr``, short whatever its size."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 80
    short.maxlist = short.maxtuple = short.maxdict = short.maxset = 8
    return printable(short.repr(value), limit=limit)


def markdown(text: Any, *, limit: int | None = 200) -> str:
    """Foreign text as itself in Markdown, in a paragraph or the cell of a table: no emphasis, links, HTML or cells."""
    text = re.sub(r"([\\`*\[\]|~$]|(?<!\w)_|_(?!\w))", r"\\\1", printable(text, limit=limit))
    text = text.replace("&", "&amp;").replace("<", "&lt;")
    text = re.sub(r"^(?=>|(#+|[-+=]+)(\s|$))", r"\\", text)  # a quotation, a heading, a list
    return re.sub(r"^(\d+)(?=[.)](\s|$))", r"\1\\", text)


def rich_text(text: Any, *, limit: int | None = 200) -> Any:
    """Foreign text for a rich table or console: no markup, no emoji codes."""
    from rich.text import Text

    return Text(printable(text, limit=limit))


def first_line(error: BaseException, *, limit: int | None = None) -> str:
    """The first line of a foreign error, or its class where it says nothing.

    Args:
        limit: characters; the rest is cut off. None for all of it.
    """
    lines = str(error).strip().splitlines()
    return lines[0].strip()[:limit] if lines else type(error).__name__


def plain(value: Any) -> Any:
    """Plain JSON data; a number that is not finite becomes null."""
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _written_out(character: str) -> str:
    if unicodedata.category(character) not in HARMFUL:
        return character  # a space of another width
    code = ord(character)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}"


__all__ = [
    "HARMFUL",
    "KEPT",
    "NAME",
    "NAME_BYTES",
    "first_line",
    "folder_name",
    "markdown",
    "plain",
    "printable",
    "rich_text",
    "shown",
    "visible",
]
