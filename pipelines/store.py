"""A store of pictures that a pipeline looks up instead of having learnt them: what is in it can be taken out again.

One SQLite file. A picture lies in it as PNG beside its caption and the embeddings of both; licence, source and dates
lie in a second table, and every change is a row of a log to which rows can only be added.

Withdrawing an entry deletes picture, caption and embeddings in one transaction, overwrites their place in the file with
zeros (``PRAGMA secure_delete``) and empties the write-ahead log, where pages lie as they were before. ``VACUUM`` is not
needed for that: it makes the file smaller, and takes the longer the more is left. The row with licence, source and
dates stays, so that the withdrawal can be shown, and so does the SHA-256 of the pixels, so that the same picture is not
added again by mistake. What a library cannot reach: backups and copies of the file, blocks that a file system or a disk
has set free, pictures that were drawn before.

Writers take turns, readers see the state of one moment, and a process that is killed leaves the state before its change
or the one after it. The file must lie on a local disk: locks do not hold on network file systems.
"""

from __future__ import annotations

import datetime
import os
import sqlite3
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
from PIL import Image

from erasure.captioned import Picture, opened
from erasure.io import is_whole, meant, printable, sha256, shown
from erasure.pictures import png
from erasure.pipelines.database import Database
from erasure.pipelines.embedders import ALIKE, By, Embedder, Query, signature, vectors
from erasure.pipelines.entries import (
    ENTRIES,
    Entry,
    Event,
    Found,
    Withdrawn,
    entry_of,
    iso,
    moment,
    note,
    now,
    parsed,
    picture_of,
    refuse_known,
    take,
    vectors_of,
)
from erasure.pipelines.index import Index, IndexKind, faiss_module
from erasure.pipelines.intake import text_of
from erasure.wording import same

DUE = "the date set when it was added"  # reason in the log


class Store:
    """Pictures with captions, licences and sources, found by meaning, and withdrawn for good.

    May be used by several threads and processes at once.

    Args:
        path: the file, or a folder, in which it is ``store.sqlite``; it is made where there is none.
        embedder: what puts captions and pictures into one space; needed to add and to find. A store belongs to the
            first one that added to it.
        index: "exact", or "faiss" beyond 100,000 entries (see :class:`~erasure.pipelines.index.Index`).
        timeout: seconds to wait for another writer.

    Raises:
        ValueError: there is a file that is no store, or its embedder is another one.
        ImportError: faiss is not installed.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        embedder: Embedder | None = None,
        *,
        index: IndexKind = "exact",
        timeout: float = 30.0,
    ) -> None:
        if index not in get_args(IndexKind):
            raise ValueError(f"unknown index; got {shown(index)}; choose one of {list(get_args(IndexKind))}")
        if index == "faiss":
            faiss_module()
        self.embedder, self._kind = embedder, index
        self._signature = None if embedder is None else signature(embedder)
        self._index: Index | None = None
        self._lock = threading.Lock()
        self._database = Database(path, timeout=timeout)
        with self._database.reading() as connection:
            self._check_embedder(connection)

    @property
    def path(self) -> Path:
        """The file."""
        return self._database.path

    def add(
        self,
        picture: Picture,
        *,
        caption: str,
        licence: str,
        source: str,
        subject: str = "",
        until: datetime.date | None = None,
        again: bool = False,
    ) -> int:
        """Add a picture; returns the number of its entry.

        Args:
            picture: a picture, a file, or the bytes of one. It is kept without loss, and without EXIF data.
            caption: what it shows, as a prompt would say it: requests are compared with it.
            licence: under which it may be used, and ``source``: where it is from. Both are handed on with every
                picture that is drawn from it.
            subject: what it is withdrawn with, such as a concept or a person.
            until: withdraw it by itself at this time; a date means its first moment in UTC.
            again: add a picture though the same one was withdrawn before.

        Raises:
            ValueError: a text is empty, the picture cannot be read or has transparent parts, it is there already or
                was withdrawn, ``until`` has passed, or the embeddings are no numbers.
        """
        texts = {"caption": caption, "licence": licence, "source": source}
        texts = {name: text_of(name, text) for name, text in texts.items()}
        image, time = opened(picture), now()
        end = None if until is None else moment(until)
        if end is not None and end <= time:
            raise ValueError(f"until must lie ahead; got {end.isoformat()}; leave it out, or do not add the picture")
        rows = self._embedded([texts["caption"]])[0], self._embedded([image])[0]
        digest = sha256([repr(image.size).encode(), image.tobytes()])
        with self._database.writing() as connection:
            self._check_embedder(connection, claim=True)
            refuse_known(connection, digest, again=again)
            found = connection.execute(
                "INSERT INTO entries (subject, licence, source, digest, added, until) VALUES (?, ?, ?, ?, ?, ?)",
                (
                    text_of("subject", subject, empty=True),
                    texts["licence"],
                    texts["source"],
                    digest,
                    iso(time),
                    iso(end),
                ),
            )
            entry = int(found.lastrowid or 0)
            connection.execute("INSERT INTO contents VALUES (?, ?, ?)", (entry, texts["caption"], png(image)))
            connection.execute("INSERT INTO vectors VALUES (?, ?, ?)", (entry, *(row.tobytes() for row in rows)))
            note(connection, time, "added", entry, "")
        return entry

    def get(self, id: int) -> Entry:
        """An entry, withdrawn or not.

        Raises:
            ValueError: there is none of that number.
        """
        with self._database.reading() as connection:
            return entry_of(connection, id, self.path)

    def picture(self, id: int) -> Image.Image:
        """The picture of an entry.

        Raises:
            Withdrawn: it was withdrawn.
            ValueError: there is none of that number.
        """
        with self._database.reading() as connection:
            self._check_present(connection, [id])
            return picture_of(connection, id)

    def entries(self, *, subject: str | None = None, withdrawn: bool = False) -> list[Entry]:
        """The entries in the order they were added.

        Args:
            subject: of this one alone; case does not count.
            withdrawn: those that were withdrawn as well.
        """
        where = "" if withdrawn else " WHERE withdrawn IS NULL"
        with self._database.reading() as connection:
            found = [parsed(row) for row in connection.execute(f"{ENTRIES}{where} ORDER BY id")]
        return [one for one in found if subject is None or same(one.subject, subject)]

    def withdraw(self, which: int | str | Iterable[int], *, reason: str = "") -> list[Entry]:
        """Delete pictures, captions and embeddings, in one change; returns the entries that it took.

        From its return on no request finds them, and a request that was drawing from one of them ends in
        :class:`Withdrawn`. Entries that were withdrawn before stay as they are, so calling it again does no
        harm, and finishes what a kill cut short.

        Args:
            which: the number of an entry, several of them, or a subject: all its entries.
            reason: for the log.

        Raises:
            ValueError: there is no such entry or subject. Nothing is withdrawn then.
            TimeoutError: they are withdrawn, but another program kept the old state open; see :meth:`purge`.
        """
        reason = text_of("reason", reason, empty=True)
        with self._database.writing() as connection:
            ids = self._chosen(connection, which)
            taken = take(connection, ids, reason)
        self.purge()
        return taken

    def withdraw_due(self) -> list[Entry]:
        """Withdraw what has reached its date; every request does so first. Returns the entries that it took."""
        due = "SELECT id FROM entries WHERE withdrawn IS NULL AND until <= ? ORDER BY id"
        with self._database.reading() as connection:
            if not connection.execute(due, (iso(now()),)).fetchone():
                return []
        with self._database.writing() as connection:
            taken = take(connection, [id for (id,) in connection.execute(due, (iso(now()),))], DUE)
        self.purge()
        return taken

    def purge(self) -> None:
        """Empty the write-ahead log, in which deleted bytes may lie; withdrawing does so.

        Raises:
            TimeoutError: another program has been reading the file all the time.
        """
        self._database.purge()

    def log(self) -> list[Event]:
        """Every change, the oldest first."""
        with self._database.reading() as connection:
            rows = connection.execute("SELECT id, time, action, entry, reason FROM log ORDER BY id").fetchall()
        return [Event(id, datetime.datetime.fromisoformat(time), *rest) for id, time, *rest in rows]

    def nearest(
        self, queries: Sequence[Query], *, by: By = "caption", count: int = 1, threshold: float = -1.0
    ) -> list[list[Found]]:
        """For each query the entries nearest to it, the nearest first, all from the state of one moment.

        Args:
            queries: texts, or pictures.
            by: what they are compared with: captions, or pictures.
            count: how many entries at most.
            threshold: cosine below which an entry is left out.
        """
        if by not in get_args(By) or not is_whole(count, 1):
            raise ValueError(
                f"by is one of {list(get_args(By))} and count 1 or more; got {shown(by)} and {shown(count)}"
            )
        if isinstance(queries, str):
            raise ValueError(f"queries is a list; got {shown(queries)}; give [{shown(queries)}]")
        if not queries:
            return []
        wanted = self._embedded(queries)
        self.withdraw_due()
        with self._database.reading() as connection:
            self._check_embedder(connection)
            near = self._read(connection, wanted.shape[1]).nearest(wanted, by, count)
            return [
                [
                    Found(entry_of(connection, id, self.path), cosine, picture_of(connection, id))
                    for id, cosine in row
                    if cosine >= threshold
                ]
                for row in near
            ]

    def check_present(self, ids: Iterable[int]) -> None:
        """Raise unless all these entries are there.

        Raises:
            Withdrawn: some were withdrawn; it names them.
            ValueError: there are no such entries.
        """
        with self._database.reading() as connection:
            self._check_present(connection, ids)

    def _check_present(self, connection: sqlite3.Connection, ids: Iterable[int]) -> None:
        gone = [one for id in ids if (one := entry_of(connection, id, self.path)).withdrawn is not None]
        if gone:
            when = gone[0].withdrawn
            raise Withdrawn(
                f"entry {gone[0].id} was withdrawn on {when:%Y-%m-%d at %H:%M:%S} UTC and its picture deleted; ask "
                "again for what is there now",
                [one.id for one in gone],
            )

    def _chosen(self, connection: sqlite3.Connection, which: Any) -> list[int]:
        """The numbers of entries that ``which`` means."""
        if not isinstance(which, str):
            ids = [which] if isinstance(which, int) else list(which)
            return [entry_of(connection, id, self.path).id for id in ids]
        rows = connection.execute("SELECT id, subject FROM entries WHERE subject <> '' ORDER BY id").fetchall()
        ids = [id for id, subject in rows if same(subject, which)]
        if not ids:
            known = list(dict.fromkeys(subject for _, subject in rows))
            raise ValueError(
                f"no entry of {self.path} has the subject {shown(which)}{meant(which, known)}; the subjects are "
                f"{shown(known)}; give one of them, or the number of an entry"
            )
        return ids

    def _read(self, connection: sqlite3.Connection, width: int) -> Index:
        """The index of the state that a connection sees."""
        (version,) = connection.execute("SELECT coalesce(max(id), 0) FROM log").fetchone()
        index = self._index or Index.empty(width, self._kind)
        if index.version != version:
            present = [id for (id,) in connection.execute("SELECT id FROM entries WHERE withdrawn IS NULL ORDER BY id")]
            index = self._index = index.updated(version, present, lambda ids: vectors_of(connection, ids, width))
        return index

    def _embedded(self, queries: Sequence[Query]) -> np.ndarray:
        """Unit vectors ``(n, d)``; one thread at a time, since tokenizers bear no more."""
        if self.embedder is None:
            raise ValueError(
                f"{self.path} was opened without an embedder, by which pictures are added and found; give Store(path, "
                "embedder)"
            )
        with self._lock:
            return vectors(self.embedder, queries)

    def _check_embedder(self, connection: sqlite3.Connection, *, claim: bool = False) -> None:
        """Raise unless the store's embeddings are this embedder's; with ``claim``, a new store becomes its."""
        if self.embedder is None or self._signature is None:
            return
        facts = dict(connection.execute("SELECT name, value FROM facts").fetchall())
        if not facts:
            if claim:
                mine = {"embedder": self.embedder.name, "signature": self._signature.tobytes()}
                connection.executemany("INSERT INTO facts VALUES (?, ?)", mine.items())
            return
        theirs = np.frombuffer(facts["signature"], np.float32).reshape(2, -1)
        fits = theirs.shape == self._signature.shape and ((theirs * self._signature).sum(1) > ALIKE).all()
        if facts["embedder"] != self.embedder.name or not fits:
            raise ValueError(
                f"{self.path} was made with the embedder {printable(facts['embedder'])!r} ({theirs.shape[1]} numbers); "
                f"got {printable(self.embedder.name)!r} ({self._signature.shape[1]} numbers), which "
                f"{'is another model' if facts['embedder'] != self.embedder.name else 'has other weights'}; open it "
                "with its own, or add its pictures to a new store"
            )


__all__ = ["Entry", "Event", "Found", "Picture", "Store", "Withdrawn"]
