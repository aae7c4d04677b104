"""A register that moves: from its file to PostgreSQL and back, every row as it was, whole or not at all."""

import contextlib
import functools
import os
import sqlite3
import sys

import pytest

import erasure.register.copying
from erasure.cli import main
from erasure.register import Register
from tests.faults import DIED, forked
from tests.postgres_server import PASSWORD
from tests.register_helpers import add, made_up, new_register, raw

TABLES = ("facts", "bases", "entries", "log")

pytestmark = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")


@pytest.fixture
def register(tmp_path):
    """With every kind of entry: received, withdrawn, redacted, and settings that were changed."""
    made = new_register(tmp_path)
    made.add_base("another", {"unet": {"layout": "x", "samples": [0.5]}})
    for number in range(6):
        add(made, made_up(number), keep=["ninja"], languages={"de": [f"{made_up(number)} mann"]}, bases=["another"])
    add(made, "Étoile", request="Été")
    made.withdraw("R2", reason="settled")
    made.redact("R2")
    made.redact("R3")
    made.configure(type(made.settings)(hours=24, preset="official-2025"))
    return made


@pytest.fixture(params=["file", "server"])
def where(request, tmp_path):
    return tmp_path / "copy.sqlite" if request.param == "file" else request.getfixturevalue("address")


def content(register):
    return register.entries(), register.log(), register.bases(), list(register.bases()), register.settings


def rows(path):
    """Every row of a file, byte by byte."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        return {table: connection.execute(f"SELECT * FROM {table} ORDER BY rowid").fetchall() for table in TABLES}


def test_a_copy_has_the_same_rows_and_goes_on_from_there(register, where):
    before, head = rows(register.path), register.head()
    copy = register.copy(where)
    assert content(copy) == content(register) and not copy.check(head=head) and copy.head() == head
    assert rows(register.path) == before
    assert add(copy, "octopus").id == len(register.entries()) + 1 and copy.entry("r3").redacted is not None
    copy.withdraw("R3", reason="settled")
    assert copy.entry("R3").subject is None and not copy.check(head=head)
    assert register.entry("R3").subject is not None


def test_from_a_file_to_a_server_and_back_is_the_same_file(register, address, tmp_path):
    back = register.copy(address).copy(tmp_path / "back.sqlite")
    assert rows(back.path) == rows(register.path) and not back.check(head=register.head())
    with pytest.raises(sqlite3.IntegrityError, match="rows of the log stay"):
        sqlite3.connect(back.path).execute("DELETE FROM log")


def test_a_register_without_requests_can_move(tmp_path, where):
    (tmp_path / "new").mkdir()
    empty = new_register(tmp_path / "new")
    assert add(empty.copy(where), "octopus").id == 1


def test_only_an_empty_place_is_copied_to(register, where, tmp_path):
    copy = register.copy(where)
    add(copy, "octopus")
    kept = content(copy)
    for target in (where, register.path):
        with pytest.raises(ValueError, match="is a register already; nothing was copied"):
            register.copy(target)
    assert content(copy) == kept
    with contextlib.closing(sqlite3.connect(tmp_path / "theirs.sqlite")) as theirs:
        theirs.execute("CREATE TABLE theirs (id INTEGER)")
    with pytest.raises(ValueError, match="of another program"):
        register.copy(tmp_path / "theirs.sqlite")


def test_a_log_that_does_not_hold_is_not_copied(register, where):
    raw(register, "DELETE FROM log WHERE id = (SELECT max(id) FROM log)")
    with pytest.raises(ValueError, match=r"its log does not hold \(row \d+ is missing\); nothing was copied"):
        register.copy(where)
    with pytest.raises((FileNotFoundError, ValueError), match="no register"):
        Register(where)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the one that is killed is a fork")
@pytest.mark.parametrize("at", [1, 2])  # before the rows are written; when all are, before they count
def test_a_kill_leaves_nothing_and_the_next_copy_is_whole(register, where, at, monkeypatch):
    left = iter(range(at, 0, -1))
    real = erasure.register.copying.faults_in

    def faults_in(*args, **options):
        if next(left) == 1:
            os._exit(DIED)
        return real(*args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(erasure.register.copying, "faults_in", faults_in)
        assert forked(functools.partial(register.copy, where)) == DIED
    with pytest.raises((FileNotFoundError, ValueError), match="no register"):
        Register(where)
    assert content(register.copy(where)) == content(register)


def test_the_command_copies_and_shows_no_password(register, address, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["erasure", "register", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        found = capsys.readouterr()
        assert PASSWORD not in found.out + found.err and "%40" not in found.out + found.err
        return stopped.value.code or 0, found.out + found.err

    code, text = run("copy", address, "--register", register.path)
    assert code == 0 and "7 requests" in text and "-> postgresql://postgres@/postgres" in text
    assert register.head() in text
    assert run("log", "--check", "--register", address)[0] == 0
    code, text = run("copy", address, "--register", register.path)
    assert code == 2 and "is a register already" in text
    code, text = run("copy", "", "--register", register.path)
    assert code == 2 and "TO is empty" in text
