"""The tables of a register's file, version by version."""

from __future__ import annotations

APPLICATION = 0x45525247  # "ERRG": the file says that it is a register

VERSION_1 = (
    "CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL)",
    "CREATE TABLE bases (name TEXT PRIMARY KEY, hash TEXT NOT NULL, prints TEXT NOT NULL)",
    """CREATE TABLE entries (
        id INTEGER PRIMARY KEY AUTOINCREMENT, request TEXT NOT NULL UNIQUE COLLATE NOCASE, basis TEXT NOT NULL,
        requester TEXT NOT NULL, received TEXT NOT NULL, due TEXT NOT NULL, served TEXT, subject TEXT, salt TEXT,
        seal TEXT NOT NULL, bases TEXT NOT NULL, settings TEXT, evidence TEXT NOT NULL, reviewer TEXT NOT NULL,
        status TEXT NOT NULL, ended TEXT, reason TEXT NOT NULL
    )""",
    """CREATE TABLE log (
        id INTEGER PRIMARY KEY AUTOINCREMENT, time TEXT NOT NULL, action TEXT NOT NULL, entry INTEGER,
        detail TEXT NOT NULL, digest TEXT NOT NULL, previous TEXT NOT NULL, hash TEXT NOT NULL
    )""",
    "CREATE INDEX actions ON log (action)",
    # Against mistakes. Whoever may write to the file can drop a trigger; `erasure register log --check` finds out.
    "CREATE TRIGGER log_stays BEFORE DELETE ON log BEGIN SELECT RAISE(ABORT, 'rows of the log stay'); END",
    "CREATE TRIGGER log_is_final BEFORE UPDATE ON log BEGIN SELECT RAISE(ABORT, 'rows of the log stay'); END",
    "CREATE TRIGGER entries_stay BEFORE DELETE ON entries BEGIN SELECT RAISE(ABORT, 'entries are withdrawn'); END",
)
VERSION_2 = ("ALTER TABLE entries ADD COLUMN redacted TEXT",)  # since when names are not shown

MIGRATIONS = (VERSION_1, VERSION_2)
