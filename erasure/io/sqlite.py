"""A file of SQLite: a write-ahead log, one short connection for every operation, a version, migrations."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

WAIT = 0.02  # seconds between two tries where SQLite does not wait by itself


class SqliteFile:
    """A file of SQLite that belongs to this library.

    A connection is opened for every operation and closed after it, so threads share nothing, a fork is safe, and the
    last one to close empties the write-ahead log.

    Args:
        path: the file.
        noun: what it is, for messages: "register".
        application: its ``PRAGMA application_id``: it tells the file from those of other programs.
        tables: statements that make the tables of the newest version.
        migrations: statements that lead from version 1 to 2, from 2 to 3, and so on. A file of an older version is
            brought to the newest one when it is opened, in one transaction.
        timeout: seconds to wait for another writer. Raise it where many write at once.
        create: called with the connection in the transaction that makes the tables. None (default): there must be a
            file.

    Attributes:
        made: whether this call made the file.

    Raises:
        FileNotFoundError: there is no file, and none is to be made.
        ValueError: there is a file of another program, or of a newer version.
        OSError: it cannot be made, read or written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        noun: str,
        application: int,
        tables: Sequence[str],
        migrations: Sequence[Sequence[str]] = (),
        timeout: float = 30.0,
        create: Callable[[sqlite3.Connection], None] | None = None,
    ) -> None:
        self.path, self.noun, self.timeout = Path(path).absolute(), noun, timeout
        self._application, self._tables, self._migrations = application, tables, migrations
        self._newest = 1 + len(migrations)
        self.made = False
        if self.path.is_dir():
            raise ValueError(f"{self.path} is a folder; give the {noun}'s file")
        if create is None and not self.path.exists():
            raise FileNotFoundError(f"no {noun} at {self.path}; give its file, or make one first")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._connected(mode="rw" if create is None else "rwc") as connection:
            self._migrate(connection, create)

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
                "and run the command again, or call purge()"
            )

    @contextlib.contextmanager
    def _connected(self, *, mode: str = "rw") -> Iterator[sqlite3.Connection]:
        try:
            uri = f"{self.path.as_uri()}?mode={mode}"
            with contextlib.closing(
                sqlite3.connect(uri, uri=True, timeout=self.timeout, isolation_level=None)
            ) as connection:
                connection.execute("PRAGMA secure_delete = ON")
                connection.execute("PRAGMA synchronous = FULL")  # a change outlives a loss of power
                yield connection
        except sqlite3.OperationalError as error:
            raise self._meaning(error) from error
        except sqlite3.DatabaseError as error:
            if type(error) is not sqlite3.DatabaseError:  # not about the file
                raise
            raise ValueError(
                f"{self.path}: no {self.noun}, or a damaged one ({error}); give a {self.noun}'s file, or a new name"
            ) from error

    def _meaning(self, error: sqlite3.OperationalError) -> OSError:
        """What went wrong with the file, as the system's own kind of error."""
        code = (error.sqlite_errorcode or 0) & 0xFF
        if _busy(error):
            return TimeoutError(
                f"{self.path}: another process has been writing for {self.timeout:g} s; try again, or give a larger "
                "timeout"
            )
        if code == sqlite3.SQLITE_FULL:
            return OSError(errno.ENOSPC, "No space left on the disk; nothing was changed", str(self.path))
        if code == sqlite3.SQLITE_READONLY:
            return PermissionError(errno.EACCES, "May not be written to; nothing was changed", str(self.path))
        return OSError(
            f"{self.path}: the {self.noun} cannot be read or written ({error}); look whether the file is there, may be "
            "written to, and the disk has room"
        )

    def _migrate(
        self, connection: sqlite3.Connection, create: Callable[[sqlite3.Connection], None] | None = None
    ) -> None:
        """Make the tables, or bring those of an older version to the newest."""
        if self._version(connection) == self._newest:
            return
        self._log_ahead(connection)
        connection.execute("BEGIN IMMEDIATE")
        version = self._version(connection)  # somebody else may have been here meanwhile
        if not version and create is None:
            raise ValueError(f"{self.path}: an empty file and no {self.noun}; make one first")
        steps = self._migrations[version - 1 :] if version else [self._tables]
        for statement in itertools.chain(*steps):
            connection.execute(statement)
        connection.execute(f"PRAGMA application_id = {self._application}")
        connection.execute(f"PRAGMA user_version = {self._newest}")
        if not version and create is not None:
            create(connection)
            self.made = True
        connection.execute("COMMIT")

    def _version(self, connection: sqlite3.Connection) -> int:
        """The file's version; 0 for an empty file."""
        application, version = (
            connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")
        )
        if application == self._application and version > self._newest:
            raise ValueError(
                f"{self.path}: a {self.noun} of version {version}; this library reads up to {self._newest}; update the "
                "library"
            )
        if application == self._application and version >= 1:
            return int(version)
        if connection.execute("SELECT 1 FROM sqlite_master").fetchone():
            raise ValueError(
                f"{self.path}: an SQLite file of another program; give a {self.noun}'s file, or a new name"
            )
        return 0

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
                time.sleep(WAIT)
        if mode != "wal":
            raise OSError(
                f"{self.path}: this file system allows no write-ahead log; put the {self.noun} on a local disk"
            )


def _busy(error: sqlite3.Error) -> bool:
    return (error.sqlite_errorcode or 0) & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


__all__ = ["SqliteFile"]
