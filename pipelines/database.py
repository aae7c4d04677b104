"""The file of a store: SQLite with a write-ahead log, one short connection for every operation."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

APPLICATION = 0x45525354  # "ERST": the file says that it is a store
VERSION = 1  # of the tables below

TABLES = (
    "CREATE TABLE facts (name TEXT PRIMARY KEY, value NOT NULL)",
    """CREATE TABLE entries (
        id INTEGER PRIMARY KEY AUTOINCREMENT, subject TEXT NOT NULL, licence TEXT NOT NULL, source TEXT NOT NULL,
        digest TEXT NOT NULL, added TEXT NOT NULL, until TEXT, withdrawn TEXT
    )""",
    "CREATE INDEX digests ON entries (digest)",
    "CREATE UNIQUE INDEX present ON entries (digest) WHERE withdrawn IS NULL",
    """CREATE TABLE contents (
        entry INTEGER PRIMARY KEY REFERENCES entries (id), caption TEXT NOT NULL, picture BLOB NOT NULL
    )""",
    """CREATE TABLE vectors (
        entry INTEGER PRIMARY KEY REFERENCES entries (id), caption BLOB NOT NULL, picture BLOB NOT NULL
    )""",
    """CREATE TABLE log (
        id INTEGER PRIMARY KEY AUTOINCREMENT, time TEXT NOT NULL, action TEXT NOT NULL, entry INTEGER, reason TEXT
    )""",
    # Against mistakes. Whoever may write to the file can drop a trigger.
    "CREATE TRIGGER log_stays BEFORE DELETE ON log BEGIN SELECT RAISE(ABORT, 'rows of the log stay'); END",
    "CREATE TRIGGER log_is_final BEFORE UPDATE ON log BEGIN SELECT RAISE(ABORT, 'rows of the log stay'); END",
    "CREATE TRIGGER entries_stay BEFORE DELETE ON entries BEGIN SELECT RAISE(ABORT, 'entries are withdrawn'); END",
)


class Database:
    """A store's file.

    A connection is opened for every operation and closed after it, so threads share nothing, a fork is safe, and the
    last one to close empties the write-ahead log.

    Args:
        path: the file, or a folder, in which it is ``store.sqlite``. It is made where there is none.
        timeout: seconds to wait for another writer.

    Raises:
        ValueError: there is a file that is no store, or one of a newer version.
        OSError: it cannot be made, read or written.
    """

    def __init__(self, path: str | os.PathLike[str], *, timeout: float) -> None:
        path = Path(path).absolute()
        self.path, self.timeout = path / "store.sqlite" if path.is_dir() else path, timeout
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._connected(mode="rwc") as connection:
            self._make(connection)

    @contextlib.contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """The state of one moment, whatever others write meanwhile."""
        with self._connected() as connection:
            connection.execute("BEGIN")
            yield connection  # nothing was written, so there is nothing to commit

    @contextlib.contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """One change: all of it, or nothing where the block raises or the process is killed. Writers take turns."""
        with self._connected() as connection:
            connection.execute("BEGIN IMMEDIATE")
            yield connection
            connection.execute("COMMIT")

    def purge(self) -> None:
        """Empty the write-ahead log, in which pages lie as they were before what they held was deleted.

        Raises:
            TimeoutError: somebody has been reading the file all the time.
        """
        with self._connected() as connection:
            (busy, *_) = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        if busy:
            raise TimeoutError(
                f"{self.path}: the change is made and every new request sees it, but somebody has been reading the "
                f"file for {self.timeout:g} s, so that deleted bytes are still in its write-ahead log; end that reader "
                "and call purge()"
            )

    @contextlib.contextmanager
    def _connected(self, *, mode: str = "rw") -> Iterator[sqlite3.Connection]:
        try:
            with contextlib.closing(
                sqlite3.connect(
                    f"{self.path.as_uri()}?mode={mode}", uri=True, timeout=self.timeout, isolation_level=None
                )
            ) as connection:
                connection.execute("PRAGMA secure_delete = ON")
                connection.execute("PRAGMA synchronous = FULL")  # a withdrawal outlives a loss of power
                yield connection
        except sqlite3.OperationalError as error:
            if _busy(error):
                raise TimeoutError(
                    f"{self.path}: another process has been writing for {self.timeout:g} s; try again, or give a "
                    "larger timeout"
                ) from error
            raise OSError(
                f"{self.path}: the store cannot be read or written ({error}); look whether the file is there, may be "
                "written to, and the disk has room"
            ) from error
        except sqlite3.DatabaseError as error:
            if type(error) is not sqlite3.DatabaseError:  # not about the file
                raise
            raise ValueError(
                f"{self.path}: no store, or a damaged one ({error}); give a store's file, or a new name"
            ) from error

    def _make(self, connection: sqlite3.Connection) -> None:
        """The tables, where there are none."""
        if self._is_store(connection):
            return
        self._log_ahead(connection)
        connection.execute("BEGIN IMMEDIATE")
        if not self._is_store(connection):  # somebody else made it meanwhile
            for statement in TABLES:
                connection.execute(statement)
            connection.execute(f"PRAGMA application_id = {APPLICATION}")
            connection.execute(f"PRAGMA user_version = {VERSION}")
        connection.execute("COMMIT")

    def _is_store(self, connection: sqlite3.Connection) -> bool:
        """Whether the file has a store's tables; False for an empty one."""
        application, version = (
            connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")
        )
        if application == APPLICATION and version == VERSION:
            return True
        if application == APPLICATION:
            raise ValueError(f"{self.path}: a store of version {version}, newer than this library; update the library")
        if connection.execute("SELECT 1 FROM sqlite_master").fetchone():
            raise ValueError(f"{self.path}: an SQLite file of another program; give a store's file, or a new name")
        return False

    def _log_ahead(self, connection: sqlite3.Connection) -> None:
        """Switch the write-ahead log on; SQLite does not wait for its turn here."""
        end = time.monotonic() + self.timeout
        while True:
            try:
                (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
                break
            except sqlite3.OperationalError as error:
                if not _busy(error) or time.monotonic() > end:
                    raise
                time.sleep(0.02)
        if mode != "wal":
            raise OSError(f"{self.path}: this file system allows no write-ahead log; put the store on a local disk")


def _busy(error: sqlite3.Error) -> bool:
    return (error.sqlite_errorcode or 0) & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


__all__ = ["Database"]
