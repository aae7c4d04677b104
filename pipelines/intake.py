"""What may go into a store: texts that say something, times with a zone."""

from __future__ import annotations

from typing import Any

from erasure.io import shown


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
