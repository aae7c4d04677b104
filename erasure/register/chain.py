"""The log of a register: rows that hold the hash of the row before, so that no change of an old one stays unseen.

A chain shows that rows were not changed one by one. Whoever may write the file can write the whole chain anew, so keep
the last hash (the *head*) elsewhere as well: on paper, in a mail to the requester, in another system.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import re
from typing import Any

from sqlalchemy import insert, select

from erasure.io import parse_json, plain, printable, sha256_json, shown
from erasure.register.database import Connection
from erasure.register.entries import iso
from erasure.register.tables import log, numbers

START = "0" * 64  # stands before the first row
ROWS = select(log).order_by(log.c.id)
LAST = select(log.c.id, log.c.hash).order_by(log.c.id.desc()).limit(1)


@dataclasses.dataclass(frozen=True)
class Event:
    """A row of the log.

    Attributes:
        id: its number, from 1 on.
        time, action: when, and what was done.
        entry: number of the entry it was done to; None where it was done to all, or to the register.
        detail: further facts. No names: a redaction must not need to change a row.
        digest: SHA-256 of what it was done to, as that stands afterwards; "" where nothing changed.
        previous, hash: of the row before, and its own.
    """

    id: int
    time: datetime.datetime
    action: str
    entry: int | None
    detail: dict[str, Any]
    digest: str
    previous: str
    hash: str


def append(
    connection: Connection,
    time: datetime.datetime,
    action: str,
    *,
    entry: int | None = None,
    detail: dict[str, Any] | None = None,
    digest: str = "",
) -> str:
    """Add a row within the caller's transaction; returns its hash."""
    last = connection.execute(LAST).fetchone()
    id, previous = (last[0] + 1, last[1]) if last else (1, START)
    text = json.dumps(plain(detail or {}), ensure_ascii=False, sort_keys=True)
    row = (id, iso(time), action, entry, text, digest, previous)
    hash = sha256_json(row)
    connection.execute(insert(log).values((*row, hash)))
    return hash


def events(connection: Connection, entry: int | None = None, *, action: str | None = None) -> list[Event]:
    """The rows in their order: all, those of one entry, or those of one action."""
    wanted = {log.c.entry: entry, log.c.action: action}
    rows = ROWS.where(*(column == value for column, value in wanted.items() if value is not None))
    return [_event(*row) for row in connection.execute(rows)]


def _event(id: int, time: str, action: str, entry: int | None, detail: str, *hashes: str) -> Event:
    try:
        return Event(id, datetime.datetime.fromisoformat(time), action, entry, parse_json(detail), *hashes)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"row {id} of the log cannot be read ({printable(error)}); it was changed; `erasure register log --check` "
            "says what else was"
        ) from None


def head(connection: Connection) -> str:
    """The hash of the last row."""
    last = connection.execute(LAST).fetchone()
    return str(last[1]) if last else START


def faults(connection: Connection, *, expected: str | None = None) -> list[str]:
    """What is wrong with the rows, by their numbers; empty where they are as they were written.

    Args:
        expected: a head that was noted earlier; one of the rows must have it. Capitals and spaces do not count.

    Raises:
        ValueError: ``expected`` is no whole hash.
    """
    if expected is not None:
        expected = _noted(expected)
    found: list[str] = []
    before, hashes = START, set()
    rows = connection.execute(ROWS).fetchall()
    number = 0
    for row in rows:
        *content, previous, hash = row
        if content[0] != number + 1:
            found.append(_missing(number + 1, content[0] - 1))
        elif previous != before:
            found.append(f"row {content[0]} does not follow row {number}: one of the two was changed or moved")
        if sha256_json((*content, previous)) != hash or not _is_json(content[4]):
            found.append(f"row {content[0]} was changed: its hash is not that of its content")
        number, before = content[0], hash
        hashes.add(hash)
    last = connection.execute(select(numbers.c.seq).where(numbers.c.name == log.name)).fetchone()
    if last and last[0] > number:
        found.append(_missing(number + 1, last[0]))
    if expected is not None and expected not in hashes:
        found.append(f"no row has the hash {shown(expected)}: rows were cut off or the log was written anew")
    return found


def _noted(hash: str) -> str:
    """A hash that somebody kept elsewhere, as the log writes it."""
    noted = hash.strip().lower()
    if not re.fullmatch("[0-9a-f]{64}", noted):
        raise ValueError(f"a hash has 64 hexadecimal digits; got {shown(hash)}; give the whole hash that was noted")
    return noted


def _missing(first: int, last: int) -> str:
    return f"row {first} is missing" if first >= last else f"rows {first} to {last} are missing"


def _is_json(text: Any) -> bool:
    try:
        return isinstance(parse_json(text), dict)
    except (ValueError, TypeError):
        return False
