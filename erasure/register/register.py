"""The register: requests, base models and a log to which rows can only be added, in one SQLite file or on PostgreSQL.

Writers take turns, readers see the state of one moment, and a process that is killed leaves the state before its change
or the one after it. A file must lie on a local disk: locks do not hold on network file systems.
"""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import insert

from erasure.concept import Concept
from erasure.io import plain, sha256_json, shown
from erasure.register import chain, tables
from erasure.register.chain import Event
from erasure.register.copying import copy_rows
from erasure.register.database import Database
from erasure.register.entries import (
    LONGEST_REASON,
    STATUSES,
    Entry,
    Status,
    iso,
    line_of,
    moment_of,
    now,
    subject_of,
)
from erasure.register.rows import (
    Base,
    Settings,
    applied_in,
    bases_of,
    change,
    chosen,
    configure,
    enter,
    entries_in,
    entry_at,
    faults_in,
    forget,
    id_of,
    known_id,
    named_row,
    new_row,
    next_request,
    row_of,
    settings_of,
    wanted_in,
)


class Register:
    """Requests to take concepts out, and what was done about each.

    May be used by several threads and processes at once.

    Args:
        where: a file, or ``postgresql://user@host/database``; :meth:`create` makes one.
        timeout: seconds to wait for another writer.

    Raises:
        FileNotFoundError: there is no such file, or no register in that database.
        ValueError: it is no register, or one of a newer version.
        OSError: it cannot be read, or the server cannot be reached.
    """

    def __init__(self, where: str | os.PathLike[str], *, timeout: float = 30.0) -> None:
        self._database = Database(where, timeout=timeout)

    @classmethod
    def create(cls, where: str | os.PathLike[str], settings: Settings | None = None) -> Register:
        """Make one.

        Raises:
            ValueError: there is a register already, or the settings are wrong.
        """
        settings = (settings or Settings()).checked()
        made = Database(where, create=lambda connection: configure(connection, settings))
        if not made.made:
            raise ValueError(f"{made.name} is a register already; open it, or give a new name")
        return cls(where)

    def copy(self, where: str | os.PathLike[str]) -> Register:
        """Copy every row to a place where nothing is yet, in one transaction; returns the register there.

        The log is the same row by row, so heads and signatures that were noted earlier hold for the copy. This one
        stays as it is. Use one of the two from then on: requests that are entered in both cannot be put together.

        Args:
            where: a new file, or the address of an empty schema on PostgreSQL.

        Raises:
            ValueError: there is something already, or the log of this one does not hold.
            OSError: it cannot be made or read; nothing was copied.
        """
        with self._database.reading() as connection:
            made = Database(where, create=lambda target: copy_rows(connection, target))
        if not made.made:
            raise ValueError(f"{made.name} is a register already; nothing was copied; give a new file or schema")
        return type(self)(where)

    @property
    def name(self) -> str:
        """The file, or the server's address without its password."""
        return self._database.name

    @property
    def path(self) -> Path:
        """The file.

        Raises:
            ValueError: it lies on a server.
        """
        if self._database.path is None:
            raise ValueError(f"{self.name} is on a server and no file; name the folder or file that is meant")
        return self._database.path

    @property
    def home(self) -> Path | None:
        """The file's folder, from which the log names other folders; None on a server, where it names them whole."""
        return None if self._database.path is None else self._database.path.parent

    def beside(self, what: str) -> Path:
        """The folder ``register-what`` beside the file ``register.sqlite``; in the current folder for a server's."""
        stem = "register" if self._database.path is None else self._database.path.stem
        return (self.home or Path.cwd()) / f"{stem}-{what}"

    # --- what holds for all ------------------------------------------------------------------------------------------

    @property
    def settings(self) -> Settings:
        """What holds for every request from now on."""
        with self._database.reading() as connection:
            return settings_of(connection)

    def configure(self, settings: Settings) -> None:
        """Change what holds from now on. Due times of earlier requests stay; the next erasure has the new method."""
        settings.checked()
        with self._database.writing() as connection:
            if settings != settings_of(connection):
                configure(connection, settings)

    def bases(self) -> dict[str, Base]:
        """The base models by name."""
        with self._database.reading() as connection:
            return bases_of(connection)

    def add_base(self, name: str, prints: Mapping[str, Mapping[str, Any]]) -> Base:
        """Add a base model.

        Args:
            name: by which it is opened again: "emoji-world", a folder, a file, a hub id.
            prints: fingerprints of its parts, from :func:`erasure.register.applying.prints_of`.

        Raises:
            ValueError: another model has this name.
        """
        name = line_of("the name of a base", name)
        facts = {part: dict(own) for part, own in prints.items()}
        try:
            text = json.dumps(facts, allow_nan=False)
        except (TypeError, ValueError):
            raise ValueError(
                f"the fingerprints of {shown(name)} are no finite numbers; its weights hold NaN or infinity; load the "
                "model again"
            ) from None
        base = Base(name, sha256_json(facts), facts)
        with self._database.writing() as connection:
            known = bases_of(connection).get(name)
            if known is not None and known.hash != base.hash:
                raise ValueError(
                    f"the base {shown(name)} is registered with other weights ({known.hash[:12]}); got "
                    f"{base.hash[:12]}; add it under another name, so that earlier entries stay true"
                )
            if known is None:
                connection.execute(insert(tables.bases).values(name=name, hash=base.hash, prints=text))
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
        moment = now()
        came = moment if received is None else moment_of("received", received)
        if came > moment:
            raise ValueError(f"received must not lie in the future; got {iso(came)}; it is {iso(moment)} now")
        row = new_row(subject_of(concept, languages, keep), basis=basis, requester=requester, reviewer=reviewer)
        named = None if request is None else line_of("the id of a request", request, longest=100)
        with self._database.writing() as connection:
            term = datetime.timedelta(hours=settings_of(connection).hours)
            end = came + term if due is None else moment_of("due", due)
            if end < came:
                raise ValueError(f"due must not lie before received; got {iso(end)} and {iso(came)}; correct one")
            row |= {"received": iso(came), "due": iso(end), "bases": json.dumps(chosen(connection, bases))}
            row["request"] = named or next_request(connection)
            if id_of(connection, row["request"]) is not None:
                raise ValueError(f"there is a request {shown(row['request'])} already; give another id")
            return enter(connection, row, moment)

    def entries(self, *, status: Status | None = None) -> list[Entry]:
        """The requests in the order they were entered, all or those of one status."""
        if status is not None and status not in STATUSES:
            raise ValueError(f"unknown status; got {shown(status)}; choose one of {list(STATUSES)}")
        with self._database.reading() as connection:
            return [one for one in entries_in(connection) if status in (None, one.status)]

    def entry(self, request: str) -> Entry:
        """A request by its id; case does not count.

        Raises:
            ValueError: there is none.
        """
        with self._database.reading() as connection:
            return entry_at(connection, known_id(connection, request, self.name))

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
        with self._database.reading() as connection:
            row = named_row(connection, known_id(connection, request, self.name))
            return {key: row[key] for key in ("request", "subject", "salt", "seal")}

    def redact(self, request: str) -> Entry:
        """Never show the names of a request again: lists and pages have its seal instead.

        A request that is over loses its names for good. One that is not keeps them until it is over, since the next
        erasure needs them. :meth:`names` gives them out before.

        Raises:
            ValueError: there is none, or its names are gone already.
            TimeoutError: the change is made, but somebody kept the old state open; see :meth:`purge`.
        """
        with self._database.writing() as connection:
            id = known_id(connection, request, self.name)
            gone = row_of(connection, id)["subject"] is None
            if entry_at(connection, id).redacted is None:
                change(connection, id, "redacted", redacted=iso(now()))
            forget(connection, id)
            entry = entry_at(connection, id)
        self.purge()  # where the names are gone, of what an earlier call had to leave
        if gone:
            self.names(request)  # which says so
        return entry

    def purge(self) -> None:
        """Delete what the database still holds of rows as they were before a redaction; redacting does so.

        Raises:
            TimeoutError: somebody has been reading them all the time.
        """
        self._database.purge()

    def _end(self, request: str, status: Status, reason: str, allowed: Sequence[str]) -> Entry:
        text = line_of("the reason", reason, longest=LONGEST_REASON)
        with self._database.writing() as connection:
            id = known_id(connection, request, self.name)
            entry = entry_at(connection, id)
            if entry.status not in allowed:
                hint = "withdraw it instead" if entry.status == "in force" else "nothing was changed"
                raise ValueError(f"the request {shown(entry.request)} is {entry.status}; {hint}")
            change(connection, id, status, status=status, ended=iso(now()), reason=text)
            forgotten = forget(connection, id)
            entry = entry_at(connection, id)
        if forgotten:
            self.purge()
        return entry

    # --- what is in force --------------------------------------------------------------------------------------------

    def wanted(self, base: str) -> list[Entry]:
        """What the next erasure of a base has: its requests that are received or in force, in their order.

        Raises:
            ValueError: the base is unknown.
        """
        with self._database.reading() as connection:
            chosen(connection, [base])
            return wanted_in(connection, base)

    def applied(self, base: str) -> Event | None:
        """The row of the log that says what is in force on a base; None before the first."""
        with self._database.reading() as connection:
            return applied_in(connection).get(base)

    def behind(self) -> list[str]:
        """The bases on which something else is in force than is wanted, so that :func:`apply` is due."""
        with self._database.reading() as connection:
            having = {name: event.detail["entries"] for name, event in applied_in(connection).items()}
            wanted = {name: [entry.id for entry in wanted_in(connection, name)] for name in bases_of(connection)}
        return [name for name, ids in wanted.items() if ids != having.get(name, [])]

    def put_in_force(self, base: str, entries: Sequence[Entry], detail: Mapping[str, Any]) -> list[Entry] | None:
        """Record an erasure that was made of a set; returns the requests that are served by it.

        A request is served when all its bases have it. None, and nothing is recorded, where the set is no longer what
        the register wants: somebody changed it while the erasure was made.
        """
        with self._database.writing() as connection:
            if [e.id for e in wanted_in(connection, base)] != [e.id for e in entries]:
                return None
            time = now()
            facts = {**detail, "base": base, "entries": [e.id for e in entries]}
            chain.append(connection, time, "applied", detail=facts)
            having = {name: set(event.detail["entries"]) for name, event in applied_in(connection).items()}
            served = []
            settings = json.dumps(detail["settings"], sort_keys=True)
            for entry in entries:
                complete = all(entry.id in having.get(name, ()) for name in entry.bases)
                if entry.status == "received" and complete:
                    change(
                        connection, entry.id, "in force", time=time, status="in force", served=iso(time),
                        settings=settings,
                    )  # fmt: skip
                    served.append(entry_at(connection, entry.id))
                elif entry.status == "in force" and json.dumps(entry.settings, sort_keys=True) != settings:
                    change(connection, entry.id, "settings changed", time=time, settings=settings)
            return served

    def record_check(self, detail: Mapping[str, Any]) -> None:
        """Record a verification of what is in force."""
        with self._database.writing() as connection:
            chain.append(connection, now(), "verified", detail=dict(detail))

    def record_evidence(self, requests: Sequence[str], base: str, evidence: Mapping[str, Any]) -> None:
        """Put an evaluation of what is in force on a base into entries. It replaces an earlier one there.

        Args:
            evidence: ``verdicts`` (question to ``verdict`` and ``number``), and ``report`` and ``sha256``, the path and
                hash of its report. The base, the erasure's hash and the time are added.

        Raises:
            ValueError: there is no such request, or nothing is in force on the base.
        """
        with self._database.writing() as connection:
            last, time = applied_in(connection).get(base), now()
            if last is None or not last.detail["hash"]:
                raise ValueError(f"nothing is in force on {shown(base)}; there is nothing to evaluate; run apply first")
            facts = {**evidence, "base": base, "erasure": last.detail["hash"], "time": iso(time)}
            text = json.dumps(plain(facts), ensure_ascii=False, sort_keys=True)
            for request in requests:
                change(connection, known_id(connection, request, self.name), "evaluated", time=time, evidence=text)

    # --- the log -----------------------------------------------------------------------------------------------------

    def log(self, request: str | None = None) -> list[Event]:
        """Every change, the oldest first, or those of one request."""
        with self._database.reading() as connection:
            return chain.events(connection, None if request is None else known_id(connection, request, self.name))

    def head(self) -> str:
        """The hash of the log's last row. Note it elsewhere: it shows later that nothing before it was changed."""
        with self._database.reading() as connection:
            return chain.head(connection)

    def check(self, *, head: str | None = None) -> list[str]:
        """What is wrong with the log, and where entries, bases and settings are not what it says; empty if nothing.

        Args:
            head: one that was noted earlier.
        """
        with self._database.reading() as connection:
            return faults_in(connection, head=head)
