"""The register: one SQLite file with requests, base models and a log to which rows can only be added.

Writers take turns, readers see the state of one moment, and a process that is killed leaves the state before its change
or the one after it. The file must lie on a local disk: locks do not hold on network file systems.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import secrets
import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from erasure.concept import Concept
from erasure.io import meant, parse_json, sha256_json, shown
from erasure.io.sqlite import SqliteFile
from erasure.register import chain
from erasure.register.chain import Event
from erasure.register.entries import (
    COLUMNS,
    LONGEST_REASON,
    Entry,
    Status,
    digest_of,
    entry_of,
    iso,
    line_of,
    moment_of,
    now,
    requester_of,
    seal_of,
    subject_of,
)
from erasure.register.tables import APPLICATION, MIGRATIONS

LONGEST_TERM = 24 * 366  # hours
ENTRIES = f"SELECT {', '.join(COLUMNS)} FROM entries"


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

        if (
            isinstance(self.hours, bool)
            or not isinstance(self.hours, int | float)
            or not 0 < self.hours <= LONGEST_TERM
        ):
            raise ValueError(
                f"hours must be above 0 and at most {LONGEST_TERM:,}; got {shown(self.hours)}; 48 is usual"
            )
        recipe_of(self)
        return self


@dataclasses.dataclass(frozen=True)
class Base:
    """A base model: its name, the fingerprints of its parts, and their hash."""

    name: str
    hash: str
    prints: dict[str, dict[str, Any]]


class Register:
    """Requests to take concepts out, and what was done about each.

    May be used by several threads and processes at once.

    Args:
        path: the file; :meth:`create` makes one.
        timeout: seconds to wait for another writer.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no register, or one of a newer version.
    """

    def __init__(self, path: str | os.PathLike[str], *, timeout: float = 30.0) -> None:
        self._file = SqliteFile(path, noun="register", application=APPLICATION, migrations=MIGRATIONS, timeout=timeout)

    @classmethod
    def create(cls, path: str | os.PathLike[str], settings: Settings | None = None) -> Register:
        """Make the file.

        Raises:
            ValueError: there is a register already, or the settings are wrong.
        """
        settings = (settings or Settings()).checked()
        file = SqliteFile(
            path,
            noun="register",
            application=APPLICATION,
            migrations=MIGRATIONS,
            create=lambda connection: _configure(connection, settings),
        )
        if not file.made:
            raise ValueError(f"{file.path} is a register already; open it, or give a new name")
        return cls(path)

    @property
    def path(self) -> Path:
        """The file."""
        return self._file.path

    # --- what holds for all ------------------------------------------------------------------------------------------

    @property
    def settings(self) -> Settings:
        """What holds for every request from now on."""
        with self._file.reading() as connection:
            return _settings(connection)

    def configure(self, settings: Settings) -> None:
        """Change what holds from now on. Due times of earlier requests stay; the next erasure has the new method."""
        settings.checked()
        with self._file.writing() as connection:
            if settings != _settings(connection):
                _configure(connection, settings)

    def bases(self) -> dict[str, Base]:
        """The base models by name."""
        with self._file.reading() as connection:
            return _bases(connection)

    def add_base(self, name: str, prints: Mapping[str, Mapping[str, Any]]) -> Base:
        """Add a base model.

        Args:
            name: by which it is opened again: "emoji-world", a folder, a file, a hub id.
            prints: fingerprints of its parts, from :func:`erasure.register.applying.prints_of`.

        Raises:
            ValueError: another model has this name.
        """
        name = line_of("the name of a base", name)
        plain = {part: dict(facts) for part, facts in prints.items()}
        base = Base(name, sha256_json(plain), plain)
        with self._file.writing() as connection:
            known = _bases(connection).get(name)
            if known is not None and known.hash != base.hash:
                raise ValueError(
                    f"the base {shown(name)} is registered with other weights ({known.hash[:12]}); got "
                    f"{base.hash[:12]}; add it under another name, so that earlier entries stay true"
                )
            if known is None:
                connection.execute("INSERT INTO bases VALUES (?, ?, ?)", (name, base.hash, json.dumps(plain)))
                chain.append(connection, now(), "base", detail={"base": name}, digest=base.hash)
        return base

    # --- requests ----------------------------------------------------------------------------------------------------

    def add(
        self,
        concept: str | Concept,
        *,
        basis: str,
        requester: str,
        languages: Mapping[str, Sequence[str]] | None = None,
        keep: Sequence[str] = (),
        request: str | None = None,
        received: str | datetime.datetime | None = None,
        due: str | datetime.datetime | None = None,
        bases: Sequence[str] = (),
        reviewer: str = "",
    ) -> Entry:
        """Enter a request.

        Args:
            concept: a name, or a :class:`~erasure.Concept` with synonyms, neighbours and an anchor.
            basis: legal basis, in your words.
            requester: class of who asks; see :data:`erasure.register.entries.Requester`.
            languages: language code to names in that language.
            keep: prompts that must not change.
            request: its id; the next of R1, R2 ... by default.
            received: now by default. due: so many hours later as the register says, by default.
            bases: names of base models; all of the register's by default.
            reviewer: who decided.

        Raises:
            ValueError: a field is wrong, the id is taken, or a base is unknown.
        """
        subject = subject_of(concept, languages, keep).to_json()
        moment = now()
        came = moment if received is None else moment_of("received", received)
        if came > moment:
            raise ValueError(f"received must not lie in the future; got {iso(came)}; it is {iso(moment)} now")
        salt = secrets.token_hex(16)
        row: dict[str, Any] = {
            "basis": line_of("the legal basis", basis),
            "requester": requester_of(requester),
            "received": iso(came),
            "subject": subject,
            "salt": salt,
            "seal": seal_of(subject, salt),
            "evidence": "{}",
            "reviewer": line_of("the reviewer", reviewer, empty=True),
            "status": "received",
            "reason": "",
        }
        named = None if request is None else line_of("the id of a request", request, longest=100)
        with self._file.writing() as connection:
            term = datetime.timedelta(hours=_settings(connection).hours)
            end = came + term if due is None else moment_of("due", due)
            if end < came:
                raise ValueError(f"due must not lie before received; got {iso(end)} and {iso(came)}; correct one")
            row |= {"due": iso(end), "bases": json.dumps(_chosen(connection, bases))}
            row["request"] = named or _next_request(connection)
            if connection.execute("SELECT 1 FROM entries WHERE request = ?", (row["request"],)).fetchone():
                raise ValueError(f"there is a request {shown(row['request'])} already; give another id")
            marks = ", ".join("?" * len(row))
            found = connection.execute(f"INSERT INTO entries ({', '.join(row)}) VALUES ({marks})", (*row.values(),))
            id = int(found.lastrowid or 0)
            _note(connection, "received", id, time=moment)
            return _entry(connection, id)

    def entries(self, *, status: Status | None = None) -> list[Entry]:
        """The requests in the order they were entered, all or those of one status."""
        with self._file.reading() as connection:
            return [one for one in _entries(connection) if status in (None, one.status)]

    def entry(self, request: str) -> Entry:
        """A request by its id; case does not count.

        Raises:
            ValueError: there is none.
        """
        with self._file.reading() as connection:
            return _entry(connection, self._id(connection, request))

    def withdraw(self, request: str, *, reason: str) -> Entry:
        """Take a request back. It stays in the register; the next erasure is made without it.

        Raises:
            ValueError: there is none, it is over already, or there is no reason.
        """
        return self._end(request, "withdrawn", reason, ("received", "in force"))

    def refuse(self, request: str, *, reason: str) -> Entry:
        """Refuse a request that was not served.

        Raises:
            ValueError: there is none, it was served or is over already, or there is no reason.
        """
        return self._end(request, "refused", reason, ("received",))

    def names(self, request: str) -> dict[str, str]:
        """The id, subject, salt and seal of a request, for whoever must be able to prove later what it was about.

        The seal, which stays in the register and in its log, is the SHA-256 of salt, line break and subject.

        Raises:
            ValueError: there is none, or its names are gone.
        """
        with self._file.reading() as connection:
            row = _named(connection, self._id(connection, request))
            return {key: row[key] for key in ("request", "subject", "salt", "seal")}

    def redact(self, request: str) -> Entry:
        """Never show the names of a request again: lists and pages have its seal instead.

        A request that is over loses its names for good. One that is not keeps them in the file until it is over, since
        the next erasure needs them. :meth:`names` gives them out before.

        Raises:
            ValueError: there is none, or its names are gone already.
        """
        with self._file.writing() as connection:
            id = _named(connection, self._id(connection, request))["id"]
            if _entry(connection, id).redacted is None:
                _change(connection, id, "redacted", redacted=iso(now()))
            _forget(connection, id)
            entry = _entry(connection, id)
        self._file.purge()
        return entry

    def _end(self, request: str, status: Status, reason: str, allowed: Sequence[str]) -> Entry:
        text = line_of("the reason", reason, longest=LONGEST_REASON)
        with self._file.writing() as connection:
            id = self._id(connection, request)
            entry = _entry(connection, id)
            if entry.status not in allowed:
                hint = "withdraw it instead" if entry.status == "in force" else "nothing was changed"
                raise ValueError(f"the request {shown(entry.request)} is {entry.status}; {hint}")
            _change(connection, id, status, status=status, ended=iso(now()), reason=text)
            forgotten = _forget(connection, id)
            entry = _entry(connection, id)
        if forgotten:
            self._file.purge()
        return entry

    # --- what is in force --------------------------------------------------------------------------------------------

    def wanted(self, base: str) -> list[Entry]:
        """What the next erasure of a base has: its requests that are received or in force, in their order.

        Raises:
            ValueError: the base is unknown.
        """
        with self._file.reading() as connection:
            _chosen(connection, [base])
            return _wanted(connection, base)

    def applied(self, base: str) -> Event | None:
        """The row of the log that says what is in force on a base; None before the first."""
        with self._file.reading() as connection:
            return _applied(connection).get(base)

    def put_in_force(self, base: str, entries: Sequence[Entry], detail: Mapping[str, Any]) -> list[Entry] | None:
        """Record an erasure that was made of a set; returns the requests that are served by it.

        A request is served when all its bases have it. None, and nothing is recorded, where the set is no longer what
        the register wants: somebody changed it while the erasure was made.
        """
        with self._file.writing() as connection:
            if [e.id for e in _wanted(connection, base)] != [e.id for e in entries]:
                return None
            time = now()
            facts = {**detail, "base": base, "entries": [e.id for e in entries]}
            chain.append(connection, time, "applied", detail=facts)
            having = {name: set(event.detail["entries"]) for name, event in _applied(connection).items()}
            served = []
            settings = json.dumps(detail["settings"], sort_keys=True)
            for entry in entries:
                complete = all(entry.id in having.get(name, ()) for name in entry.bases)
                if entry.status == "received" and complete:
                    _change(
                        connection, entry.id, "in force", time=time, status="in force", served=iso(time),
                        settings=settings,
                    )  # fmt: skip
                    served.append(_entry(connection, entry.id))
                elif entry.status == "in force" and json.dumps(entry.settings, sort_keys=True) != settings:
                    _change(connection, entry.id, "settings changed", time=time, settings=settings)
            return served

    def record_check(self, detail: Mapping[str, Any]) -> None:
        """Record a verification of what is in force."""
        with self._file.writing() as connection:
            chain.append(connection, now(), "verified", detail=dict(detail))

    def record_evidence(self, requests: Sequence[str], evidence: Mapping[str, Any]) -> None:
        """Put an evaluation into entries: verdicts, path and SHA-256 of its report. It replaces an earlier one there.

        Raises:
            ValueError: there is no such request.
        """
        text = json.dumps(dict(evidence), ensure_ascii=False, sort_keys=True)
        with self._file.writing() as connection:
            for request in requests:
                _change(connection, self._id(connection, request), "evaluated", evidence=text)

    # --- the log -----------------------------------------------------------------------------------------------------

    def log(self, request: str | None = None) -> list[Event]:
        """Every change, the oldest first, or those of one request."""
        with self._file.reading() as connection:
            return chain.events(connection, None if request is None else self._id(connection, request))

    def head(self) -> str:
        """The hash of the log's last row. Note it elsewhere: it shows later that nothing before it was changed."""
        with self._file.reading() as connection:
            return chain.head(connection)

    def check(self, *, head: str | None = None) -> list[str]:
        """What is wrong with the log, and where entries, bases and settings are not what it says; empty if nothing.

        Args:
            head: one that was noted earlier.
        """
        with self._file.reading() as connection:
            found = chain.faults(connection, expected=head)
            last: dict[Any, tuple[int, str]] = {}
            rows = connection.execute(
                "SELECT id, action, entry, detail, digest FROM log WHERE digest <> '' ORDER BY id"
            )
            for id, action, entry, detail, digest in rows:
                last[entry if entry is not None else (action, _base_in(detail))] = id, digest
            return [*found, *_altered(connection, last)]

    def _id(self, connection: sqlite3.Connection, request: Any) -> int:
        row = None
        if isinstance(request, str):
            row = connection.execute("SELECT id FROM entries WHERE request = ?", (request.strip(),)).fetchone()
        if row is None:
            known = [name for (name,) in connection.execute("SELECT request FROM entries ORDER BY id DESC LIMIT 1000")]
            raise ValueError(
                f"{self.path} has no request {shown(request)}{meant(request, known)}; `erasure register list` shows "
                "them"
            )
        return int(row[0])


# --- rows ------------------------------------------------------------------------------------------------------------


def _settings(connection: sqlite3.Connection) -> Settings:
    (text,) = connection.execute("SELECT value FROM facts WHERE name = 'settings'").fetchone()
    return Settings(**parse_json(text))


def _configure(connection: sqlite3.Connection, settings: Settings) -> None:
    plain = dataclasses.asdict(settings)
    text = json.dumps(plain, sort_keys=True)
    connection.execute("INSERT OR REPLACE INTO facts VALUES ('settings', ?)", (text,))
    chain.append(connection, now(), "settings", detail=plain, digest=sha256_json(plain))


def _bases(connection: sqlite3.Connection) -> dict[str, Base]:
    rows = connection.execute("SELECT name, hash, prints FROM bases ORDER BY rowid")
    return {name: Base(name, hash, parse_json(prints)) for name, hash, prints in rows}


def _chosen(connection: sqlite3.Connection, names: Sequence[str]) -> dict[str, str]:
    """Base to hash: those named, or all."""
    known = _bases(connection)
    for name in names:
        if name not in known:
            raise ValueError(
                f"unknown base; got {shown(name)}{meant(name, known)}; registered are {list(known)}; add it with "
                "`erasure register init --base`"
            )
    if not known:
        raise ValueError("the register has no base model; got none; add one with `erasure register init --base`")
    return {name: known[name].hash for name in dict.fromkeys(names or known)}


def _next_request(connection: sqlite3.Connection) -> str:
    (number,) = connection.execute("SELECT count(*) FROM entries").fetchone()
    while True:
        number += 1
        if not connection.execute("SELECT 1 FROM entries WHERE request = ?", (f"R{number}",)).fetchone():
            return f"R{number}"


def _row(connection: sqlite3.Connection, id: int) -> dict[str, Any]:
    row = connection.execute(f"{ENTRIES} WHERE id = ?", (id,)).fetchone()
    return dict(zip(COLUMNS, row, strict=True))


def _entry(connection: sqlite3.Connection, id: int) -> Entry:
    return entry_of(_row(connection, id))


def _named(connection: sqlite3.Connection, id: int) -> dict[str, Any]:
    """The row of an entry whose names are still there."""
    row = _row(connection, id)
    if row["subject"] is None:
        raise ValueError(f"the names of the request {shown(row['request'])} are gone; it was redacted and is over")
    return row


def _entries(connection: sqlite3.Connection) -> list[Entry]:
    return [entry_of(dict(zip(COLUMNS, row, strict=True))) for row in connection.execute(f"{ENTRIES} ORDER BY id")]


def _wanted(connection: sqlite3.Connection, base: str) -> list[Entry]:
    return [entry for entry in _entries(connection) if entry.wanted and base in entry.bases]


def _applied(connection: sqlite3.Connection) -> dict[str, Event]:
    """Base to the last row that says what is in force on it."""
    return {event.detail["base"]: event for event in chain.events(connection, action="applied")}


def _change(
    connection: sqlite3.Connection, id: int, action: str, *, time: datetime.datetime | None = None, **columns: Any
) -> None:
    connection.execute(f"UPDATE entries SET {' = ?, '.join(columns)} = ? WHERE id = ?", (*columns.values(), id))
    _note(connection, action, id, time=time)


def _note(connection: sqlite3.Connection, action: str, id: int, *, time: datetime.datetime | None = None) -> None:
    row = _row(connection, id)
    facts = {"request": row["request"], "status": row["status"]}
    chain.append(connection, time or now(), action, entry=id, detail=facts, digest=digest_of(row))


def _forget(connection: sqlite3.Connection, id: int) -> bool:
    """Delete the names of a redacted entry that no erasure will need again."""
    over = "id = ? AND redacted IS NOT NULL AND status IN ('withdrawn', 'refused')"
    return connection.execute(f"UPDATE entries SET subject = NULL, salt = NULL WHERE {over}", (id,)).rowcount > 0


def _base_in(detail: str) -> Any:
    try:
        return parse_json(detail).get("base")
    except (ValueError, AttributeError):
        return None  # a changed row, which is reported as such


def _altered(connection: sqlite3.Connection, last: Mapping[Any, tuple[int, str]]) -> list[str]:
    """Where the tables are not what the log says."""
    nothing = (0, "")
    found, seen = [], set()
    (text,) = connection.execute("SELECT value FROM facts WHERE name = 'settings'").fetchone() or ("null",)
    present: list[tuple[Any, str, str]] = [(("settings", None), "the settings", sha256_json(parse_json(text)))]
    for name, hash, prints in connection.execute("SELECT name, hash, prints FROM bases"):
        whole = hash if sha256_json(parse_json(prints)) == hash else ""
        present.append((("base", name), f"the base {shown(name)}", whole))
    for row in connection.execute(f"{ENTRIES} ORDER BY id"):
        facts = dict(zip(COLUMNS, row, strict=True))
        sealed = facts["subject"] is None or seal_of(facts["subject"], facts["salt"]) == facts["seal"]
        present.append((facts["id"], f"the entry {shown(facts['request'])}", digest_of(facts) if sealed else ""))
    for key, what, digest in present:
        seen.add(key)
        number, expected = last.get(key, nothing)
        if digest != expected:
            where = f"row {number} of the log recorded" if number else "the log has no row of it"
            found.append(f"{what} is not what {where}" if number else f"{what}: {where}")
    gone = {key: number for key, (number, _) in last.items() if key not in seen}
    return found + [f"row {number} of the log is about an entry or a base that is gone" for number in gone.values()]
