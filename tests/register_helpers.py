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
