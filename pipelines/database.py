"""The file of a store: its tables, and what keeps rows of its log from being changed by mistake."""

from __future__ import annotations

import os

from erasure.io import named
from erasure.io.sqlite import SqliteFile

APPLICATION = 0x45525354  # "ERST": the file says that it is a store

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


class Database(SqliteFile):
    """A store's file.

    Args:
        path: the file, or a folder, in which it is ``store.sqlite``. It is made where there is none.
        timeout: seconds to wait for another writer.

    Raises:
        ValueError: there is a file that is no store, or one of a newer version.
        OSError: it cannot be made, read or written.
    """

    def __init__(self, path: str | os.PathLike[str], *, timeout: float) -> None:
        path = named(path).absolute()
        super().__init__(
            path / "store.sqlite" if path.is_dir() else path,
            noun="store",
            application=APPLICATION,
            tables=TABLES,
            timeout=timeout,
            create=lambda connection: None,
        )


__all__ = ["Database"]
