"""A tiny base, and a register of it."""

from __future__ import annotations

import contextlib
import datetime
import functools
import sqlite3
import tempfile

from erasure.register import Register, Settings
from erasure.register.applying import prints_of
from tests.tiny import tiny_pipeline

BASE = "tiny"
FACTS = {"basis": "copyright", "requester": "rights-holder"}
QUICK = Settings(preset="official-2025")  # the names alone, without sentences and everyday words
SYLLABLES = ("ka", "lo", "mi", "ren", "tu", "vas", "zor", "bel")

# The tables as the first files had them.
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


@functools.cache
def pipe():
    return tiny_pipeline()


@functools.cache
def prints():
    return prints_of(pipe())


@functools.cache
def new_file():
    """The bytes of a register of the tiny base."""
    with tempfile.TemporaryDirectory() as folder:
        made = Register.create(f"{folder}/register.sqlite", QUICK)
        made.add_base(BASE, prints())
        return made.path.read_bytes()


def new_register(folder):
    path = folder / "register.sqlite"
    path.write_bytes(new_file())
    return Register(path)


def made_up(number):
    return "".join(SYLLABLES[number // 8**i % 8] for i in range(3)).title()


def add(register, concept, **facts):
    return register.add(concept, **{**FACTS, **facts})


def ago(hours):
    return datetime.datetime.now(datetime.UTC) - datetime.timedelta(hours=hours)


def raw(register, *statements):
    """What any other program can do to the file, its triggers dropped."""
    with contextlib.closing(sqlite3.connect(register.path)) as connection, connection:
        for trigger in ("log_stays", "log_is_final", "entries_stay"):
            connection.execute(f"DROP TRIGGER IF EXISTS {trigger}")
        return [connection.execute(statement).fetchall() for statement in statements]
