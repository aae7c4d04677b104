"""A register on a PostgreSQL server: the same as in a file, with the same promises; and no password is ever shown."""

import concurrent.futures
import functools
import json
import os
import signal
import sys
import time

import psycopg
import pytest
from psycopg import errors

from erasure.batch import Recipe
from erasure.cli import main
from erasure.io.postgres import name_of
from erasure.register import Register
from erasure.register.applying import apply, folder_of
from erasure.register.page import card
from erasure.register.verifying import verify
from tests.faults import DIED, ended, fork, forked
from tests.postgres_server import PASSWORD
from tests.register_helpers import BASE, QUICK, add, made_up, pipe, prints
from tests.slow import first

DROP = tuple(f"DROP TRIGGER {name}" for name in ("log_stays ON log", "entries_stay ON entries"))
PRINTS = {"unet": {"layout": "x", "samples": [0.5]}}

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="writers are forks"),
    pytest.mark.filterwarnings("ignore:This process:DeprecationWarning"),
]


@pytest.fixture
def register(address):
    return made(address)


@pytest.fixture(params=["sqlite", "postgresql"])
def where(request, tmp_path):
    """A file, or a schema on the server."""
    return tmp_path / "register.sqlite" if request.param == "sqlite" else request.getfixturevalue("address")


@pytest.fixture
def either(where):
    return made(where)


def made(where):
    register = Register.create(where, QUICK)
    register.add_base(BASE, PRINTS)
    return register


def put(register):
    recipe = {"method": "uce", "preset": None, "settings": {}}
    facts = {"key": "k", "settings": recipe, "overruled": [], "hash": "", "files": {}, "folder": ""}
    return register.put_in_force(BASE, register.wanted(BASE), facts)


# --- the same in both -------------------------------------------------------------------------------------------------


def test_fifty_are_entered_served_listed_withdrawn_redacted_and_the_log_holds(either):
    for number in range(50):
        add(either, made_up(number), keep=["ninja"], languages={"de": [f"{made_up(number)} mann"]})
    assert [entry.request for entry in either.entries()] == [f"R{i + 1}" for i in range(50)]
    assert len(put(either)) == 50 and {entry.status for entry in either.entries()} == {"in force"}
    assert either.withdraw("r7", reason="settled").status == "withdrawn" and len(either.wanted(BASE)) == 49
    assert either.redact("R7").subject is None and either.redact("R8").subject is not None
    assert [entry.request for entry in either.entries(status="withdrawn")] == ["R7"]
    assert [event.action for event in either.log("R7")] == ["received", "in force", "withdrawn", "redacted"]
    rows = either.log()
    assert [event.id for event in rows] == list(range(1, 107)) and either.head() == rows[-1].hash
    assert not either.check() and not either.check(head=rows[20].hash)
    assert "no row has the hash" in either.check(head="0" * 64)[0]
    text = card(either)
    assert made_up(6) not in text and made_up(7) not in text and made_up(8) in text


def test_ids_differ_by_more_than_the_case_of_ascii_letters(either):
    add(either, "cat", request="Été")
    add(either, "dog", request="été")  # as SQLite has it, whose files there are
    add(either, "owl", request="ÉTÉ")
    with pytest.raises(ValueError, match="'ÉtÉ' already"):
        add(either, "ape", request="ÉtÉ")
    assert [either.entry(name).name for name in ("ÉTé", "éTé", "ÉtÉ")] == ["cat", "dog", "owl"]


def test_bases_stay_in_the_order_they_came_and_settings_can_be_changed(either):
    for name in ("zebra", "ape"):
        either.add_base(name, PRINTS)
    either.configure(type(QUICK)(hours=24, preset="official-2025"))
    assert list(either.bases()) == [BASE, "zebra", "ape"] and either.settings.hours == 24
    assert not either.check()


def test_two_writers_take_turns(register, address):
    def write(letter):
        for number in range(8):
            add(Register(address), f"{letter}{made_up(number)}")

    children = [fork(functools.partial(write, letter)) for letter in "ab"]
    assert [ended(child) for child in children] == [0, 0]
    assert [entry.request for entry in register.entries()] == [f"R{i + 1}" for i in range(16)] and not register.check()


# --- the log ----------------------------------------------------------------------------------------------------------


def test_rows_of_the_log_cannot_be_changed_by_mistake(register, postgres, schema):
    add(register, "spiderman")
    statements = ("DELETE FROM log", "UPDATE log SET action = 'nothing'", "TRUNCATE log", "DELETE FROM entries")
    for statement in (*statements, "TRUNCATE entries CASCADE"):
        with pytest.raises(errors.IntegrityConstraintViolation, match="rows of the log stay|entries are withdrawn"):
            postgres.run(statement, schema=schema)
    assert not register.check() and len(register.log()) == 3


def test_the_check_finds_what_was_changed_and_where(register, postgres, schema):
    for concept in ("spiderman", "batman", "ninja"):
        add(register, concept)
    head = register.head()
    change = functools.partial(postgres.run, schema=schema)
    change(*DROP, "UPDATE log SET detail = '{}' WHERE id = 4", "UPDATE entries SET due = '2099' WHERE id = 1")
    change("UPDATE bases SET prints = '{}'", "DELETE FROM log WHERE id = 5")
    text = "; ".join(register.check(head=head))
    for fault in ("row 4 was changed", "row 5 is missing", "'R1': not what row 3", "base 'tiny': not what row 2", head):
        assert fault in text


# --- redaction --------------------------------------------------------------------------------------------------------


def test_a_redacted_name_is_gone_from_tables_and_statistics_when_the_request_is_over(register, postgres, schema):
    postgres.run("ALTER TABLE entries ALTER COLUMN subject SET STORAGE EXTERNAL", schema=schema)  # not compressed
    for number in range(3):
        add(register, f"spiderman {number}", keep=[f"{made_up(i)}{number}" for i in range(150)])
    postgres.run("ANALYZE", schema=schema)
    register.redact("R2")
    register.withdraw("R2", reason="settled")
    left = postgres.files()
    assert b"spiderman 1" not in left and b"spiderman 0" in left and b"spiderman 2" in left
    assert not postgres.run(f"SELECT 1 FROM pg_stats WHERE schemaname = '{schema}' AND attname = 'subject'")[0]
    assert not register.check()


def test_who_still_reads_the_old_rows_is_waited_for_and_then_named(address, postgres, schema):
    made(address)
    register = Register(address, timeout=0.1)
    add(register, "octopus")
    register.withdraw("R1", reason="settled")
    with psycopg.connect(postgres.address()) as reader:
        reader.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        reader.execute("SELECT 1 FROM pg_class")  # another table of the database is enough
        with pytest.raises(TimeoutError, match="the change is made .* a transaction of this database has been open"):
            register.redact("R1")
        assert register.entry("R1").subject is None and b"octopus" in postgres.files()
    with pytest.raises(ValueError, match="names of the request 'R1' are gone"):
        register.redact("R1")  # deletes what had to stay
    assert b"octopus" not in postgres.files()


# --- who may, and who is somebody else --------------------------------------------------------------------------------


def test_databases_that_are_no_register_are_refused(postgres, schema, address):
    with pytest.raises(FileNotFoundError, match="no register at postgresql://postgres@/postgres"):
        Register(address)
    postgres.run("CREATE TABLE theirs (id INTEGER)", schema=schema)
    for opened in (Register, Register.create):
        with pytest.raises(ValueError, match="holds tables of another program"):
            opened(address)
    postgres.run("DROP TABLE theirs", schema=schema)
    register = made(address)
    with pytest.raises(ValueError, match="is a register already"):
        Register.create(address, QUICK)
    postgres.run("UPDATE erasure_register SET version = 9", schema=schema)
    with pytest.raises(ValueError, match="of version 9; this library reads up to 2"):
        Register(address)
    postgres.run("UPDATE erasure_register SET version = 2", "DROP TABLE facts", schema=schema)
    with pytest.raises(ValueError, match="a damaged register"):
        register.settings  # noqa: B018
    with pytest.raises(ValueError, match="search_path names no schema"):
        Register(postgres.address(options="-csearch_path=nowhere"))


def test_tables_of_version_1_are_brought_to_the_newest(register, postgres, schema, address):
    add(register, "spiderman")
    postgres.run("ALTER TABLE entries DROP COLUMN redacted", "UPDATE erasure_register SET version = 1", schema=schema)
    opened = Register(address)
    assert not opened.check() and opened.redact("R1").redacted is not None
    assert postgres.run("SELECT version FROM erasure_register", schema=schema) == [[(2,)]]


def test_a_change_waits_for_the_other_writer_and_is_lost_whole_with_its_connection(register, address, postgres, schema):
    waiting = "SELECT pid FROM pg_stat_activity WHERE application_name = 'erasure' AND wait_event_type = 'Lock'"
    with psycopg.connect(postgres.address(options=f"-csearch_path={schema}")) as other:
        other.execute("LOCK TABLE log IN EXCLUSIVE MODE")
        with pytest.raises(TimeoutError, match=r"another process has been writing for 0\.1 s"):
            add(Register(address, timeout=0.1), "spiderman")
        assert not register.entries()  # reading needs no turn
        with concurrent.futures.ThreadPoolExecutor() as threads:
            change = threads.submit(add, register, "spiderman")
            while not postgres.run(waiting)[0]:  # its entry is written, its row of the log is not
                time.sleep(0.01)
            postgres.run(f"SELECT pg_terminate_backend(pid) FROM ({waiting}) AS them")
            with pytest.raises(ConnectionError, match="the server broke off .* look in the log whether the change"):
                change.result()
    assert not register.entries() and not register.check() and add(register, "spiderman").request == "R1"


# --- addresses --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "address",
    [
        f"postgresql://ann:{PASSWORD}@host/db",
        "postgresql://ann:1@2@host/db",
        "postgresql:/ann:secret@host/db",  # what a Path makes of it
        "postgres://ann:secret@host:port/db",
        "mysql://ann:secret@host/db",
    ],
)
def test_an_address_that_cannot_be_read_is_not_shown(address):
    with pytest.raises(ValueError, match="write it as text|a register is a file or lies on PostgreSQL") as caught:
        Register(address)
    assert not any(part in str(caught.value) for part in (PASSWORD, "1@2", "secret", "p/w", "ann"))


def test_an_address_is_shown_without_password_and_options():
    for address, name in (
        ("postgresql+psycopg://ann:s%40c@db.example:5433/desk?sslmode=require&password=x", "ann@db.example:5433/desk"),
        ("postgres://[::1]:5432/desk", "[::1]:5432/desk"),
        ("postgresql://a:1@h1:1,h2:2/desk", "a@h1:1,h2:2/desk"),
        ("postgresql:///desk?user=ann", "/desk"),
    ):
        assert name_of(address) == f"postgresql://{name}"


def test_a_server_that_is_not_there_is_one_sentence(tmp_path):
    with pytest.raises(ConnectionError, match=r"no connection \(.*look whether the server runs") as caught:
        Register(f"postgresql://ann:secret@/db?host={tmp_path}&connect_timeout=2")
    assert "secret" not in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="no address of PostgreSQL that can be read") as caught:
        Register("postgresql://ann:secret@/db?passwort=secret")
    assert "secret" not in str(caught.value)


def test_without_psycopg_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(ImportError, match=r"a register on PostgreSQL needs psycopg: pip install .*\[postgres\]"):
        Register("postgresql://host/db")


# --- commands ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def erasure(tmp_path, monkeypatch, capsys, address):
    """The program: its exit code, and all that it prints, in which no password stands."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("ERASURE_REGISTER", address)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["erasure", "register", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
        found = capsys.readouterr()
        assert PASSWORD not in found.out + found.err and "%40" not in found.out + found.err
        return stopped.value.code or 0, found.out + found.err

    return run


def test_the_commands_take_the_address_of_a_server(erasure, address, postgres, tmp_path):
    code, text = erasure("list")
    assert code == 2 and "no register at postgresql://postgres@/postgres" in text
    assert "register -> postgresql://postgres@/postgres: due after 24 h" in erasure("init", "--hours", "24")[1]
    assert "due after 36 h" in erasure("init", "--hours", "36", "--register", address)[1]
    made = Register(address)
    made.add_base(BASE, PRINTS)
    assert erasure("add", "superhero", "--basis", "copyright", "--requester", "authority")[0] == 0
    assert "superhero" in erasure("list")[1] and json.loads(erasure("show", "R1")[1])["id"] == 1
    assert erasure("report")[0] == 0 and PASSWORD not in (tmp_path / "register.html").read_text("utf-8")
    assert "4 rows, each as it was written" in erasure("log", "--check")[1]
    code, text = erasure("show", "R9")
    assert code == 2 and "postgresql://postgres@/postgres has no request 'R9'" in text
    assert PASSWORD not in repr(made) and "%40" not in repr(made)


@pytest.mark.parametrize("together", first(["true", "false"], "true"))
def test_a_recipe_names_a_register_on_a_server_without_its_password(register, postgres, schema, tmp_path, together):
    add(register, "spiderman")
    recipe = tmp_path / "recipe.yaml"

    def cells(address):
        recipe.write_text(
            f"version: 1\nout: results\nmethods: [uce]\nbases: [emoji-world]\n"
            f"concepts: [{{register: '{address}', together: {together}}}]\n"
        )
        return Recipe.load(recipe).cells()

    assert [cell.target for cell in cells(postgres.address(options=f"-csearch_path={schema}"))] == ["spiderman"]
    for secret in (
        "postgresql://ann:secret@host/db",
        "postgresql://host/db?password=secret",
        "postgresql://a:secret@b@c",
    ):
        with pytest.raises(ValueError, match="got an address with a password|no address of PostgreSQL") as caught:
            cells(secret)
        assert "secret" not in str(caught.value)


# --- slow -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_apply_and_verify_with_folders_that_the_log_names_whole(address, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    register = Register.create(address, QUICK)
    register.add_base(BASE, prints())
    for number in range(3):
        add(register, made_up(number), keep=["ninja"])
    done = apply(register, pipe(), BASE)
    assert done.folder.parent == tmp_path / "register-erasures" / BASE and len(done.served) == 3
    monkeypatch.chdir("/")
    assert folder_of(register, register.applied(BASE).detail) == done.folder
    assert not verify(Register(address), pipe(), BASE).problems and apply(register, pipe(), BASE).hash != ""
    with pytest.raises(ValueError, match="is on a server and no file"):
        register.path  # noqa: B018


@pytest.mark.slow
@pytest.mark.parametrize("act", ["add", "put", "redact"])
def test_a_kill_at_any_statement_leaves_the_state_before_or_after(register, address, act):
    acts = {"add": lambda r: add(r, "batman"), "put": put, "redact": lambda r: r.redact("R1")}
    add(register, "spiderman")
    before = (register.log(), register.entries())

    def act_and_die(at):
        left, real = iter(range(at, -1, -1)), psycopg.Connection.execute

        def execute(*args, **options):
            if next(left, 1) == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **options)

        psycopg.Connection.execute = execute
        acts[act](Register(address))

    for at in range(100):
        status = forked(functools.partial(act_and_die, at))
        assert not register.check()
        if (register.log(), register.entries()) != before:
            assert len(register.log()) > len(before[0])
            break  # from here on it has happened
        assert status == -signal.SIGKILL
    else:
        pytest.fail("it never came to an end")
    assert at > 8


@pytest.mark.slow
def test_of_many_who_make_it_at_once_one_does(address):
    def make():
        try:
            Register.create(address, QUICK)
        except ValueError as error:
            assert "is a register already" in str(error)
            os._exit(DIED)

    assert sorted(ended(child) for child in [fork(make) for _ in range(6)]) == [0] + [DIED] * 5
    assert not Register(address).check() and len(Register(address).log()) == 1


@pytest.mark.slow
def test_a_user_may_be_allowed_to_enter_requests_and_not_to_change_the_log(register, postgres, schema):
    rights = (
        f"GRANT USAGE ON SCHEMA {schema} TO desk", f"GRANT SELECT ON ALL TABLES IN SCHEMA {schema} TO desk",
        "GRANT INSERT ON log, bases TO desk", "GRANT INSERT, UPDATE ON entries TO desk",
        "GRANT INSERT, DELETE ON facts TO desk",
    )  # fmt: skip
    postgres.run("DROP ROLE IF EXISTS desk", "CREATE ROLE desk LOGIN", *rights, schema=schema)
    desk = Register(postgres.address(user="desk", options=f"-csearch_path={schema}"))
    add(desk, "platypus")
    desk.withdraw("R1", reason="settled")
    with pytest.raises(PermissionError, match="the change is made .* only the owner"):
        desk.redact("R1")
    assert desk.entry("R1").subject is None and not desk.check() and b"platypus" in postgres.files()
    register.purge()
    assert b"platypus" not in postgres.files()
    with psycopg.connect(postgres.address(user="desk", options=f"-csearch_path={schema}")) as connection:
        with pytest.raises(errors.InsufficientPrivilege):
            connection.execute("UPDATE log SET action = 'nothing'")


@pytest.mark.slow
def test_a_user_without_any_rights_is_told(postgres, schema, address):
    postgres.run("DROP ROLE IF EXISTS nobody", "CREATE ROLE nobody LOGIN", f"GRANT USAGE ON SCHEMA {schema} TO nobody")
    theirs = postgres.address(user="nobody", options=f"-csearch_path={schema}")
    with pytest.raises(PermissionError, match="permission denied for schema"):
        Register.create(theirs, QUICK)
    made(address)
    with pytest.raises(PermissionError, match="permission denied for table"):
        Register(theirs)
