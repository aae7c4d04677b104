"""Which erasures are in the weights of a model: said in the config of each part, and beside the weights of a folder.

A model that is erased is no longer the base model, and an erasure made for the base would edit it twice. So its files
say what was done:

    <part>/config.json    under ``_erasures``, for every model with erasures in its weights, whoever saves it
    erasures.json         the same for the whole pipeline; in a single file the entry ``erasures`` of its metadata
    README.md             a card for people; never read back
"""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from erasure.backbone import parts_of
from erasure.io import markdown, parse_json, printable, read_bytes, shown, write_atomically, write_json

RECORD = "_erasures"  # key of a module's config
FILE, CARD, METADATA = "erasures.json", "README.md", "erasures"
MARK = "<!-- erased with diffusion-erasure -->"  # in cards that may be replaced
LARGEST = 2**22  # bytes of a record; thousands of erasures stay below
Entry = dict[str, Any]


def entry_of(erasure: Any, scale: float) -> Entry:
    """What is recorded of one erasure."""
    config = getattr(erasure, "config", None)
    if config is None:
        return {"name": erasure.name, "scale": scale}
    concepts = [concept["name"] for concept in config["concepts"]]
    base = config["base"]["name"]
    return {"name": erasure.name, "method": config["method"], "concepts": concepts, "base": base, "scale": scale}


def entries_in(module: Any) -> list[Entry]:
    """The record in the config of a module; nothing where there is none, or none of ours."""
    config = getattr(module, "config", None)
    found = config.get(RECORD) if isinstance(config, Mapping) else getattr(config, RECORD, None)
    return _checked(found)


def _checked(found: Any) -> list[Entry]:
    if not isinstance(found, list | tuple):
        return []
    return [dict(entry) for entry in found if isinstance(entry, dict) and isinstance(entry.get("name"), str)]


def record(module: Any, entries: list[Entry]) -> None:
    """Write the record into the config of a module, which its files keep."""
    if entries == entries_in(module):
        return
    if hasattr(module, "register_to_config"):  # diffusers
        module.register_to_config(**{RECORD: entries})
    elif hasattr(module, "config"):  # transformers; models made from one config share it
        module.config = copy.copy(module.config)
        setattr(module.config, RECORD, entries)


def records_of(pipe: Any) -> dict[str, list[Entry]]:
    """The record of every part of a pipeline that has one."""
    return {part: entries for part, module in parts_of(pipe).items() if (entries := entries_in(module))}


def names_in(records: Mapping[str, Iterable[Entry]]) -> list[str]:
    """The names of recorded erasures, each once."""
    return list(dict.fromkeys(entry["name"] for entries in records.values() for entry in entries))


# --- files -----------------------------------------------------------------------------------------------------------


def write_beside(folder: Path, records: Mapping[str, list[Entry]]) -> None:
    """Write ``erasures.json`` and a card into the folder of a model, or take away those of another one.

    A card of somebody else stays as it is.
    """
    card = folder / CARD
    ours = not card.exists() or MARK in card.read_text("utf-8", errors="replace")
    if not records:
        (folder / FILE).unlink(missing_ok=True)
        if ours:
            card.unlink(missing_ok=True)
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / FILE, content(records))
    if ours:
        write_atomically(card, _card(records))


def content(records: Mapping[str, list[Entry]]) -> dict[str, Any]:
    """A record as it stands in files."""
    from erasure import __version__

    return {"format": 1, "library_version": __version__, "parts": dict(records)}


def metadata_of(records: Mapping[str, list[Entry]]) -> dict[str, str]:
    """The record as metadata of a safetensors file; nothing where there is none."""
    return {METADATA: json.dumps(content(records), ensure_ascii=False)} if records else {}


def restore(pipe: Any, source: Path) -> list[str]:
    """Put the record of a folder or single file on a pipeline opened from it; the names of all erasures in its weights.

    The config of a part goes first: it is the one that follows the weights wherever they are copied.
    """
    found = _read(source)
    for part, module in parts_of(pipe).items():
        if (entries := _checked(found.get(part))) and not entries_in(module):
            record(module, entries)
    return names_in(records_of(pipe))


def _read(source: Path) -> dict[str, Any]:
    raw: str | bytes = b""
    with contextlib.suppress(Exception):  # no such file, or no such metadata; what is damaged says nothing
        if source.is_dir():
            raw = read_bytes(source / FILE, largest=LARGEST)
        else:
            from safetensors import safe_open

            with safe_open(source, "pt") as file:
                raw = (file.metadata() or {}).get(METADATA, "")
        facts = parse_json(raw) if raw else {}
        return facts["parts"] if isinstance(facts.get("parts"), dict) else {}
    return {}


def already(names: Iterable[str], source: Any) -> str:
    """The sentence about a model that is erased."""
    return (
        f"{printable(str(source))} is already erased with {shown(list(names))}, in its weights for good: it is not the "
        "base model any more; erasures made for that belong on the base model"
    )


def _card(records: Mapping[str, list[Entry]]) -> str:
    every = {json.dumps(entry): entry for entries in records.values() for entry in entries}.values()
    bases = list(dict.fromkeys(str(entry["base"]) for entry in every if entry.get("base")))
    known = f"base_model: {json.dumps(bases[0])}\n" if len(bases) == 1 and bases[0].count("/") == 1 else ""
    rows = "\n".join(
        f"| {markdown(e['name'])} | {markdown(', '.join(map(str, e.get('concepts') or [])))} | "
        f"{markdown(e.get('method', ''))} | {markdown(e.get('scale', ''))} |"
        for e in every
    )
    return f"""---
library_name: diffusers
{known}tags:
- concept-erasure
---

{MARK}
# Erased model

This is {markdown(", ".join(bases) or "a base model")} with erasures in its weights, made with
[diffusion-erasure](https://github.com/diffusion-erasure/erasure).

| erasure | concepts | method | scale |
|---|---|---|---|
{rows}

Changed parts: {", ".join(map(markdown, records))}. It *suppresses* pictures of these concepts when they are asked for
by name. Whether the information is removed from the weights is another question, which nothing in this folder answers.
Do not put these erasures on this model again: the edit would be made twice.
"""


__all__ = [
    "Entry",
    "already",
    "entries_in",
    "entry_of",
    "metadata_of",
    "names_in",
    "record",
    "records_of",
    "restore",
    "write_beside",
]
