"""The entries of a store, and how they lie in its tables."""

from __future__ import annotations

import dataclasses
import datetime
import io
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
from PIL import Image

from erasure.io import shown
from erasure.pipelines.embedders import By

FIELDS = "id, subject, caption, licence, source, added, until, withdrawn"
ENTRIES = f"SELECT {FIELDS} FROM entries LEFT JOIN contents ON contents.entry = entries.id"


@dataclasses.dataclass(frozen=True)
class Entry:
    """A picture of a store, without its pixels.

    Attributes:
        id: its number; never used again.
        subject: what is withdrawn together; "" for none.
        caption: None once it is withdrawn.
        licence, source: as given.
        added: when.
        until: when it will be withdrawn by itself; None for never.
        withdrawn: when it was withdrawn; None while it is there.
    """

    id: int
    subject: str
    caption: str | None
    licence: str
    source: str
    added: datetime.datetime
    until: datetime.datetime | None = None
    withdrawn: datetime.datetime | None = None


@dataclasses.dataclass(frozen=True)
class Event:
    """A row of the log: when, what ("added" or "withdrawn"), which entry, and why."""

    id: int
    time: datetime.datetime
    action: str
    entry: int
    reason: str


@dataclasses.dataclass(frozen=True)
class Found:
    """An entry that is near to a query, its cosine, and its picture."""

    entry: Entry
    similarity: float
    picture: Image.Image


class Withdrawn(ValueError):
    """What was asked for was withdrawn. ``ids`` has the entries."""

    def __init__(self, message: str, ids: Sequence[int]) -> None:
        super().__init__(message)
        self.ids = tuple(ids)


def take(connection: sqlite3.Connection, ids: Iterable[int], reason: str) -> list[Entry]:
    """Withdraw those of some entries that are there."""
    time, taken = now(), []
    for id in dict.fromkeys(ids):
        changed = connection.execute(
            "UPDATE entries SET withdrawn = ? WHERE id = ? AND withdrawn IS NULL", (iso(time), id)
        )
        if changed.rowcount:
            connection.execute("DELETE FROM contents WHERE entry = ?", (id,))
            connection.execute("DELETE FROM vectors WHERE entry = ?", (id,))
            note(connection, time, "withdrawn", id, reason)
            taken.append(parsed(connection.execute(f"{ENTRIES} WHERE id = ?", (id,)).fetchone()))
    return taken


def refuse_known(connection: sqlite3.Connection, digest: str, *, again: bool) -> None:
    """Raise if the same pixels are there, or were and are not wanted again."""
    rows = "SELECT id, withdrawn FROM entries WHERE digest = ? ORDER BY withdrawn IS NOT NULL, id DESC"
    found = connection.execute(rows, (digest,)).fetchone()
    if found and found[1] is None:
        raise ValueError(f"the same picture is entry {found[0]}; withdraw that first, or do not add it twice")
    if found and not again:
        raise Withdrawn(
            f"the same picture was entry {found[0]}, withdrawn on {found[1][:10]}; give again=True if it may be used "
            "again",
            [found[0]],
        )


def note(connection: sqlite3.Connection, time: datetime.datetime, action: str, entry: int, reason: str) -> None:
    connection.execute(
        "INSERT INTO log (time, action, entry, reason) VALUES (?, ?, ?, ?)", (iso(time), action, entry, reason)
    )


def entry_of(connection: sqlite3.Connection, id: Any, path: Path) -> Entry:
    row = None
    if isinstance(id, int) and not isinstance(id, bool) and abs(id) < 2**63:
        row = connection.execute(f"{ENTRIES} WHERE id = ?", (id,)).fetchone()
    if row is None:
        (last,) = connection.execute("SELECT max(id) FROM entries").fetchone()
        there = "it is empty" if last is None else f"its entries are numbered 1 to {last}"
        raise ValueError(f"{path} has no entry {shown(id)}; {there}; Store.entries() lists them")
    return parsed(row)


def parsed(row: Sequence[Any]) -> Entry:
    *texts, added, until, withdrawn = row
    dates = (None if date is None else datetime.datetime.fromisoformat(date) for date in (added, until, withdrawn))
    return Entry(*texts, *dates)  # type: ignore[arg-type]


def picture_of(connection: sqlite3.Connection, id: int) -> Image.Image:
    (data,) = connection.execute("SELECT picture FROM contents WHERE entry = ?", (id,)).fetchone()
    return Image.open(io.BytesIO(data)).convert("RGB")


def vectors_of(connection: sqlite3.Connection, ids: Sequence[int], width: int) -> Mapping[By, np.ndarray]:
    read = "SELECT caption, picture FROM vectors WHERE entry = ?"
    rows = [connection.execute(read, (id,)).fetchone() for id in ids]
    tables = ((np.frombuffer(data, np.float32) for data in column) for column in zip(*rows, strict=True))
    empty = np.zeros((0, width), np.float32)
    return {by: np.stack(list(next(tables))) if rows else empty for by in get_args(By)}


def now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def moment(date: datetime.date) -> datetime.datetime:
    """A point in time in UTC.

    Raises:
        ValueError: no date, or a time without its zone.
    """
    if not isinstance(date, datetime.date):
        raise ValueError(f"until is a date; got {shown(date)}; give datetime.date(2027, 1, 31), say")
    if not isinstance(date, datetime.datetime):
        return datetime.datetime(date.year, date.month, date.day, tzinfo=datetime.UTC)
    if date.tzinfo is None:
        raise ValueError(f"a time needs its zone; got {date.isoformat()}; give tzinfo=datetime.UTC, or a date")
    return date.astimezone(datetime.UTC)


def iso(moment: datetime.datetime | None) -> str | None:
    """As text that sorts by time."""
    return None if moment is None else moment.isoformat(timespec="milliseconds")
