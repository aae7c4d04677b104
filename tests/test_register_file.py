"""The file of a register: no change of the past stays unseen, and no kill, writer or full disk harms it."""

import contextlib
import errno
import functools
import json
import os
import signal
import sqlite3

import pytest

from erasure.io import sha256, sha256_json
from erasure.register import Register
from erasure.register.applying import apply
from erasure.register.entries import digest_of
from erasure.register.page import page
from erasure.register.tables import APPLICATION
from tests.register_helpers import BASE, QUICK, VERSION_1, add, made_up, new_register, pipe, raw
from tests.slow import first


@pytest.fixture
def register(tmp_path):
    return new_register(tmp_path)


# --- the log ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("statements", "fault"),
    [
        (["UPDATE log SET detail = '{}' WHERE id = 4"], "row 4 was changed"),
        (["UPDATE log SET time = '2001-01-01T00:00:00+00:00' WHERE id = 3"], "row 3 was changed"),
        (["DELETE FROM log WHERE id = 4"], "row 4 is missing"),
        (["DELETE FROM log WHERE id > 3"], "rows 4 to 5 are missing"),
        (
            [f"UPDATE log SET id = {new} WHERE id = {old}" for old, new in ((3, 99), (4, 3), (99, 4))],
            "row 3 does not follow row 2",
        ),
        (["UPDATE entries SET due = '2099-01-01T00:00:00+00:00' WHERE id = 1"], "'R1': not what row 3"),
        (["UPDATE entries SET subject = replace(subject, 'spiderman', 'cat')"], "'R1': not what row 3"),
        (["DELETE FROM entries WHERE id = 1"], "row 3 of the log is about an entry or a base that is gone"),
        (["UPDATE bases SET prints = '{}'"], "the base 'tiny': not what row 2"),
        (["UPDATE facts SET value = replace(value, '48', '480')"], "the settings: not what row 1"),
        (
            ["INSERT INTO entries SELECT 9, 'R9', basis, requester, received, due, served, subject, salt, seal, bases, "
             "settings, evidence, reviewer, status, ended, reason, redacted FROM entries WHERE id = 1"],
            "the entry 'R9': not in the log",
        ),
    ],
)  # fmt: skip
def test_the_check_finds_what_was_changed_and_where(register, statements, fault):
    for concept in ("spiderman", "batman", "ninja"):
        add(register, concept)
    assert not register.check()
    raw(register, *statements)
    assert any(fault in found for found in register.check()), register.check()


def test_a_noted_head_is_the_same_in_capitals_and_a_part_of_one_is_no_head(register):
    add(register, "spiderman")
    head = register.head()
    assert not register.check(head=f" {head.upper()}\n")
    for part in (head[:12], head[:-1], "5f0c...", ""):
        with pytest.raises(ValueError, match="64 hexadecimal digits"):
            register.check(head=part)


def test_rows_that_were_cut_off_cleanly_are_found_by_a_head_noted_before(register):
    add(register, "spiderman")
    head = register.head()
    raw(register, "DELETE FROM log WHERE id = 3", "DELETE FROM entries", "UPDATE sqlite_sequence SET seq = 2")
    assert not register.check()
    assert "no row has the hash" in register.check(head=head)[0]
    for same in (f" {head}\n", head.upper()):  # as it comes out of a mail
        assert "no row has the hash" in register.check(head=same)[0]
    raw(register, "UPDATE log SET detail = '{}' WHERE id = 1")
    assert "The log does not hold: row 1 was changed" in page(register)


def test_rows_of_the_log_cannot_be_changed_by_mistake(register):
    for statement in ("DELETE FROM log", "UPDATE log SET action = 'nothing'"):
        with contextlib.closing(sqlite3.connect(register.path)) as connection:
            with pytest.raises(sqlite3.IntegrityError, match="rows of the log stay"):
                connection.execute(statement)


# --- the file ---------------------------------------------------------------------------------------------------------


def version_1(path):
    """A register as version 1 of the tables had it, with one entry and a log that holds."""
    path.parent.mkdir(exist_ok=True)
    row = {
        "id": 1, "request": "old", "basis": "copyright", "requester": "authority", "bases": '{"tiny": "00"}',
        "received": "2026-01-01T00:00:00.000+00:00", "due": "2026-01-03T00:00:00.000+00:00", "salt": "5a",
        "subject": '{"concept": {"name": "superhero"}}', "evidence": "{}", "reviewer": "", "status": "received",
        "reason": "",
    }  # fmt: skip
    row["seal"] = sha256(f"5a\n{row['subject']}")
    settings = {"hours": 48.0, "method": "uce", "preset": None, "settings": {}}
    previous, log = "0" * 64, []
    for action, entry, digest in (
        ("settings", None, sha256_json(settings)), ("base", None, sha256_json({})), ("received", 1, digest_of(row)),
    ):  # fmt: skip
        detail = json.dumps({"base": BASE} if action == "base" else {})
        content = (len(log) + 1, "2026-01-01T00:00:00.000+00:00", action, entry, detail, digest, previous)
        previous = sha256_json(content)
        log.append((*content, previous))
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        for statement in VERSION_1:
            connection.execute(statement)
        connection.execute("INSERT INTO facts VALUES ('settings', ?)", (json.dumps(settings),))
        connection.execute("INSERT INTO bases VALUES ('tiny', ?, '{}')", (sha256_json({}),))
        connection.execute(
            f"INSERT INTO entries ({', '.join(row)}) VALUES ({', '.join('?' * len(row))})", (*row.values(),)
        )
        connection.executemany("INSERT INTO log VALUES (?, ?, ?, ?, ?, ?, ?, ?)", log)
        connection.execute(f"PRAGMA application_id = {APPLICATION}")
        connection.execute("PRAGMA user_version = 1")


def test_a_file_of_version_1_is_brought_to_the_newest(tmp_path):
    version_1(tmp_path / "old.sqlite")
    register = Register(tmp_path / "old.sqlite")
    assert not register.check()
    entry = register.entry("old")
    assert entry.name == "superhero" and entry.redacted is None
    register.redact("old")
    assert register.entry("old").redacted is not None and not Register(register.path).check()
    assert raw(register, "PRAGMA user_version") == [[(2,)]]


def test_files_that_are_no_register_are_refused(tmp_path, register):
    with pytest.raises(FileNotFoundError, match="no register at"):
        Register(tmp_path / "none.sqlite")
    with pytest.raises(ValueError, match="is a folder"):
        Register(tmp_path)
    (tmp_path / "text").write_text("this is no database, but it is long enough to look like one" * 20)
    with pytest.raises(ValueError, match="no register, or a damaged one"):
        Register(tmp_path / "text")
    (tmp_path / "empty").touch()
    with pytest.raises(ValueError, match="an empty file"):
        Register(tmp_path / "empty")
    with contextlib.closing(sqlite3.connect(tmp_path / "other")) as connection, connection:
        connection.execute("CREATE TABLE theirs (id)")
    for opened in (Register, Register.create):
        with pytest.raises(ValueError, match="of another program"):
            opened(tmp_path / "other")
    with pytest.raises(ValueError, match="is a register already"):
        Register.create(register.path)
    raw(register, "PRAGMA user_version = 3")
    with pytest.raises(ValueError, match="of version 3; this library reads up to 2"):
        Register(register.path)


def connecting(monkeypatch, *pragmas):
    """Every connection begins with these statements."""
    real = sqlite3.connect

    def connect(*args, **options):
        connection = real(*args, **options)
        for pragma in pragmas:
            connection.execute(pragma)
        return connection

    monkeypatch.setattr(sqlite3, "connect", connect)


def test_a_full_disk_changes_nothing(register, monkeypatch):
    add(register, "spiderman")
    (pages,) = raw(register, "PRAGMA page_count")[0][0]
    with monkeypatch.context() as patch:
        connecting(patch, f"PRAGMA max_page_count = {pages}")
        with pytest.raises(OSError, match="No space left") as full:
            for number in range(200):
                add(register, made_up(number), keep=[f"{made_up(i)} {i}" for i in range(100)])
    assert full.value.errno == errno.ENOSPC and not register.check()

    def no_room(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.write_bytes", no_room)
        with pytest.raises(OSError, match="No space"):
            apply(register, pipe(), BASE)
    assert register.applied(BASE) is None and register.entry("R1").status == "received"
    assert apply(register, pipe(), BASE).served


def test_a_file_that_may_only_be_read_is_read_and_not_written(register, monkeypatch):
    add(register, "spiderman")
    connecting(monkeypatch, "PRAGMA query_only = ON")
    with pytest.raises(PermissionError, match="May not be written to"):
        register.withdraw("R1", reason="a mistake")
    assert Register(register.path).entry("R1").status == "received" and "spiderman" in page(register)


def forked(work):
    """Do something in another process, and wait for it; its exit status."""
    if (child := os.fork()) == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return child


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_two_writers_take_turns(register):
    def write(letter):
        for number in range(15):
            add(Register(register.path), f"{letter}{made_up(number)}")

    children = [forked(functools.partial(write, letter)) for letter in "ab"]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    entries = register.entries()
    assert [entry.request for entry in entries] == [f"R{i + 1}" for i in range(30)]
    assert not register.check() and len({entry.name for entry in entries}) == 30


def act_and_die(register, act, at):
    """Do something to the register, and be killed before the given statement of it."""
    left = iter(range(at, -1, -1))
    real = sqlite3.connect

    def count(_):
        if next(left, 1) == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def connect(*args, **options):
        connection = real(*args, **options)
        connection.set_trace_callback(count)
        return connection

    sqlite3.connect = connect
    act(register)


def put(register):
    entries = register.wanted(BASE)
    register.put_in_force(
        BASE, entries, {"key": "k", "settings": {}, "overruled": [], "hash": "", "files": {}, "folder": ""}
    )


ACTS = {
    "add": lambda register: add(register, "batman"),
    "apply": put,
    "redact": lambda register: register.redact("R1"),
}


@pytest.mark.parametrize("act", first(ACTS, "apply"))
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_kill_at_any_statement_leaves_the_state_before_or_after(register, act):
    add(register, "spiderman")
    before = (register.log(), register.entries())
    for at in range(100):
        _, status = os.waitpid(forked(functools.partial(act_and_die, register, ACTS[act], at)), 0)
        assert not register.check()
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        if (register.log(), register.entries()) != before:
            assert len(register.log()) > len(before[0])
            break  # from here on it has happened
    else:
        pytest.fail("it never came to an end")
    assert at > 3


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_kill_while_the_file_is_made_leaves_nothing_or_all_of_it(tmp_path):
    path = tmp_path / "register.sqlite"
    for at in range(0, 100, 3):
        make = functools.partial(act_and_die, path, lambda path: Register.create(path, QUICK), at)
        _, status = os.waitpid(forked(make), 0)
        with contextlib.suppress(ValueError):
            assert not Register(path).check()
            break
        assert status
    assert at > 3 and Register(path).settings == QUICK


# --- what no number is, and rows that others changed ------------------------------------------------------------------


def test_numbers_that_are_none_do_not_make_the_register_unreadable(register):
    """JSON has no NaN: a row with one could never be read again, and with it nothing after it."""
    nan = float("nan")
    with pytest.raises(ValueError, match="no finite numbers; its weights hold NaN"):
        register.add_base("broken", {"unet": {"layout": "x", "samples": [nan]}})
    add(register, "spiderman")
    register.record_check({"base": BASE, "moved": {"R1": nan, "R2": float("inf")}})
    assert register.log()[-1].detail["moved"] == {"R1": None, "R2": None}
    assert list(register.bases()) == [BASE] and not register.check()


@pytest.mark.parametrize("value", ["subject = 'x'", "received = 'x'", "bases = '['", "subject = x'ff'"])
def test_an_entry_that_others_changed_is_named_in_one_line(register, value):
    add(register, "spiderman")
    raw(register, f"UPDATE entries SET {value} WHERE id = 1")
    with pytest.raises(ValueError, match="the entry 'R1' cannot be read .*log --check` says what was") as caught:
        register.entries()
    assert "\n" not in str(caught.value)
    assert any("the entry 'R1': not what row" in fault for fault in register.check())


def test_a_row_of_the_log_that_others_changed_is_named(register):
    raw(register, "UPDATE log SET time = 'x' WHERE id = 2")
    with pytest.raises(ValueError, match="row 2 of the log cannot be read"):
        register.log()
    assert any("row 2 was changed" in fault for fault in register.check())


@pytest.mark.parametrize("table", ["bases SET prints = 'x'", "facts SET value = 'x'"])
def test_the_check_goes_on_past_what_it_cannot_read(register, table):
    raw(register, f"UPDATE {table}")
    assert any("not what row" in fault for fault in register.check())
