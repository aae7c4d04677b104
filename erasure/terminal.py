"""What is printed for people: a console and tables on which foreign text does nothing but stand there."""

from __future__ import annotations

import json
import unicodedata
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from erasure.io import HARMFUL, rich_text

LONGEST = 2_000  # characters of one cell
console = Console()


class PlainTable(Table):
    """A table whose strings are text: no markup, no emoji codes, no escapes. Give a rich ``Text`` for colours."""

    def __init__(self, *headers: str, **settings: Any) -> None:
        title = settings.pop("title", None)
        super().__init__(title=_plain(title), **settings)
        for header in headers:
            self.add_column(_plain(header), overflow="fold")  # a name that is cut cannot be copied

    def add_row(self, *cells: Any, **settings: Any) -> None:
        super().add_row(*map(_plain, cells), **settings)


def say(text: str, *, on: Console | None = None, wrap: bool = True) -> None:
    """Print a line in which names and messages of others may stand.

    Args:
        wrap: break it between words where the terminal ends. Off for commands and paths, so that they can be copied.
    """
    (on or console).print(rich_text(text, limit=None), soft_wrap=not wrap)


def print_json(content: Any) -> None:
    """Print plain data as JSON: what is harmful on a terminal is written as an escape of JSON, which reads the same."""
    text = json.dumps(content, indent=2, ensure_ascii=False)
    harmful = {c for c in set(text) if c != "\n" and unicodedata.category(c) in HARMFUL}
    text = text.translate({ord(c): json.dumps(c)[1:-1] for c in harmful})
    console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)


def lines(*texts: str) -> Text:
    """Several lines in one cell."""
    return Text("\n").join(rich_text(text, limit=LONGEST) for text in texts)


def _plain(cell: Any) -> Any:
    return rich_text(cell, limit=LONGEST) if isinstance(cell, str) else cell
