"""The rows of a register's tables, read and changed within the caller's transaction."""

from __future__ import annotations

import dataclasses
import datetime
import json
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Select, delete, func, insert, select, update

from erasure.io import meant, parse_json, sha256_json, shown
from erasure.register import chain, tables
from erasure.register.chain import Event
from erasure.register.database import Connection
from erasure.register.entries import (
    COLUMNS,
    Entry,
    Subject,
    digest_of,
    entry_of,
    line_of,
    now,
    requester_of,
    seal_of,
)
from erasure.wording import listed, nfc

LONGEST_TERM = 24 * 366  # hours
ENTRIES = select(*(tables.entries.c[name] for name in COLUMNS)).order_by(tables.entries.c.id)
BASES = select(tables.bases.c.name, tables.bases.c.hash, tables.bases.c.prints).order_by(tables.bases.c.rowid)
SETTINGS = "settings"  # the one fact there is


@dataclasses.dataclass(frozen=True)
class Settings:
    """What holds for every request.

    Attributes:
        hours: from the receipt of a request until it is due; 48 is the term of the US TAKE IT DOWN Act.
        method, preset, settings: of the closed form that erases everything in force together.
    """

    hours: float = 48.0
    method: str = "uce"
    preset: str | None = None
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)

    def checked(self) -> Settings:
        """Itself.

        Raises:
            ValueError: hours out of range, or a method, preset or setting that does not exist or cannot be used.
        """
        from erasure.register.joint import recipe_of  # torch: not needed to add an entry

        if not isinstance(self.hours, int | float) or self.hours is True or not 0 < self.hours <= LONGEST_TERM:
            raise ValueError(
                f"hours must be above 0 and at most {LONGEST_TERM:,}; got {shown(self.hours)}; 48 is usual"
            )
        if not isinstance(self.method, str) or not isinstance(self.preset, str | None):
            raise ValueError(f"a method and its preset are names; got {shown(self.method)} and {shown(self.preset)}")
        if not isinstance(self.settings, dict):
            raise ValueError(f"the settings of a method are a mapping; got {shown(self.settings)}; {{}} for its own")
        recipe_of(self)
        return self


@dataclasses.dataclass(frozen=True)
class Base:
    """A base model: its name, the fingerprints of its parts, and their hash."""

    name: str
    hash: str
    prints: dict[str, dict[str, Any]]


def settings_of(connection: Connection) -> Settings:
    (text,) = connection.execute(_fact(SETTINGS)).fetchone()
    return Settings(**parse_json(text))


def _fact(name: str) -> Select[str]:
    return select(tables.facts.c.value).where(tables.facts.c.name == name)


def configure(connection: Connection, settings: Settings) -> None:
    plain = dataclasses.asdict(settings)
    text = json.dumps(plain, sort_keys=True)
    connection.execute(delete(tables.facts).where(tables.facts.c.name == SETTINGS))
    connection.execute(insert(tables.facts).values(name=SETTINGS, value=text))
    chain.append(connection, now(), "settings", detail=plain, digest=sha256_json(plain))


def bases_of(connection: Connection) -> dict[str, Base]:
    return {name: Base(name, hash, parse_json(prints)) for name, hash, prints in connection.execute(BASES)}


def chosen(connection: Connection, names: Sequence[str]) -> dict[str, str]:
    """Base to hash: those named, or all."""
    known = bases_of(connection)
    for name in listed(names):
        if name not in known:
            raise ValueError(
                f"unknown base; got {shown(name)}{meant(name, known)}; registered are {list(known)}; add it with "
                "`erasure register init --base`"
            )
    if not known:
        raise ValueError("the register has no base model; got none; add one with `erasure register init --base`")
    return {name: known[name].hash for name in dict.fromkeys(listed(names) or known)}


def id_of(connection: Connection, request: str) -> int | None:
    """The number of the entry that has this id; the case of ASCII letters does not count, as NOCASE has it."""
    same = func.lower(tables.entries.c.request) == request.encode().lower().decode()
    row = connection.execute(select(tables.entries.c.id).where(same)).fetchone()
    return None if row is None else int(row[0])


def known_id(connection: Connection, request: Any, where: str) -> int:
    """The number of the entry that somebody asks for.

    Raises:
        ValueError: there is none.
    """
    id = None
    if isinstance(request, str):
        for name in (request.strip(), " ".join(nfc(request).split())):  # as it is entered
            id = id_of(connection, name) if id is None else id
    if id is None:
        latest = select(tables.entries.c.request).order_by(tables.entries.c.id.desc()).limit(1000)
        known = [name for (name,) in connection.execute(latest)]
        raise ValueError(
            f"{where} has no request {shown(request)}{meant(request, known)}; `erasure register list` shows them"
        )
    return id


def next_request(connection: Connection) -> str:
    (number,) = connection.execute(select(func.count()).select_from(tables.entries)).fetchone()
    while True:
        number += 1
        if id_of(connection, f"R{number}") is None:
            return f"R{number}"


def new_row(subject: Subject, *, basis: str, requester: str, reviewer: str) -> dict[str, Any]:
    """The columns of a new entry that need no other row; checked."""
    text, salt = subject.to_json(), secrets.token_hex(16)
    return {
        "basis": line_of("the legal basis", basis),
        "requester": requester_of(requester),
        "subject": text,
        "salt": salt,
        "seal": seal_of(text, salt),
        "evidence": "{}",
        "reviewer": line_of("the reviewer", reviewer, empty=True),
        "status": "received",
        "reason": "",
    }


def enter(connection: Connection, row: Mapping[str, Any], time: datetime.datetime) -> Entry:
    connection.execute(insert(tables.entries).inline().values(row))
    id = id_of(connection, row["request"])
    assert id is not None
    note(connection, "received", id, time=time)
    return entry_at(connection, id)


def row_of(connection: Connection, id: int) -> dict[str, Any]:
    row = connection.execute(ENTRIES.where(tables.entries.c.id == id)).fetchone()
    return dict(zip(COLUMNS, row, strict=True))


def entry_at(connection: Connection, id: int) -> Entry:
    return entry_of(row_of(connection, id))


def named_row(connection: Connection, id: int) -> dict[str, Any]:
    """The row of an entry whose names are still there."""
    row = row_of(connection, id)
    if row["subject"] is None:
        raise ValueError(f"the names of the request {shown(row['request'])} are gone; it was redacted and is over")
    return row


def entries_in(connection: Connection) -> list[Entry]:
    return [entry_of(dict(zip(COLUMNS, row, strict=True))) for row in connection.execute(ENTRIES)]


def wanted_in(connection: Connection, base: str) -> list[Entry]:
    return [entry for entry in entries_in(connection) if entry.wanted and base in entry.bases]


def applied_in(connection: Connection) -> dict[str, Event]:
    """Base to the last row that says what is in force on it."""
    return {event.detail["base"]: event for event in chain.events(connection, action="applied")}


def change(
    connection: Connection, id: int, action: str, *, time: datetime.datetime | None = None, **columns: Any
) -> None:
    connection.execute(update(tables.entries).where(tables.entries.c.id == id).values(columns))
    note(connection, action, id, time=time)


def note(connection: Connection, action: str, id: int, *, time: datetime.datetime | None = None) -> None:
    row = row_of(connection, id)
    facts = {"request": row["request"], "status": row["status"]}
    chain.append(connection, time or now(), action, entry=id, detail=facts, digest=digest_of(row))


def forget(connection: Connection, id: int) -> bool:
    """Delete the names of a redacted entry that no erasure will need again."""
    row = tables.entries.c
    over = row.id == id, row.redacted.is_not(None), row.status.in_(["withdrawn", "refused"])
    gone: int = connection.execute(update(tables.entries).where(*over).values(subject=None, salt=None)).rowcount
    return gone > 0


def faults_in(connection: Connection, *, head: str | None = None) -> list[str]:
    """What is wrong with the log, and where the tables are not what it says.

    Args:
        head: one that was noted earlier.
    """
    found = chain.faults(connection, expected=head)
    last: dict[Any, tuple[int, str]] = {}
    rows = connection.execute(chain.ROWS.where(tables.log.c.digest != ""))
    for id, _, action, entry, detail, digest, *_ in rows:
        last[entry if entry is not None else (action, base_in(detail))] = id, digest
    return [*found, *altered(connection, last)]


def base_in(detail: str) -> Any:
    try:
        return parse_json(detail).get("base")
    except (ValueError, AttributeError):
        return None  # a changed row, which is reported as such


def _json_hash(text: Any) -> str:
    """The hash of JSON; "" of what is none, which no row of the log has."""
    try:
        return sha256_json(parse_json(text))
    except (ValueError, TypeError, AttributeError):
        return ""


def altered(connection: Connection, last: Mapping[Any, tuple[int, str]]) -> list[str]:
    """Where the tables are not what the log says."""
    nothing = (0, "")
    found, seen = [], set()
    (text,) = connection.execute(_fact(SETTINGS)).fetchone() or ("null",)
    present: list[tuple[Any, str, str]] = [(("settings", None), "the settings", _json_hash(text))]
    for name, hash, prints in connection.execute(BASES):
        whole = hash if _json_hash(prints) == hash else ""
        present.append((("base", name), f"the base {shown(name)}", whole))
    for row in connection.execute(ENTRIES):
        facts = dict(zip(COLUMNS, row, strict=True))
        sealed = facts["subject"] is None or seal_of(facts["subject"], facts["salt"]) == facts["seal"]
        present.append((facts["id"], f"the entry {shown(facts['request'])}", digest_of(facts) if sealed else ""))
    for key, what, digest in present:
        seen.add(key)
        number, expected = last.get(key, nothing)
        if digest != expected:
            found.append(f"{what}: {f'not what row {number} of the log recorded' if number else 'not in the log'}")
    gone = {key: number for key, (number, _) in last.items() if key not in seen}
    return found + [f"row {number} of the log is about an entry or a base that is gone" for number in gone.values()]
