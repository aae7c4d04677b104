"""A schema of PostgreSQL: one short connection for every operation, writers that take turns, a version, migrations."""

from __future__ import annotations

import contextlib
import errno
import itertools
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

from erasure.io.text import printable

if TYPE_CHECKING:
    import psycopg

WAIT = 0.2  # seconds between two tries to delete old rows that others may still read
SERVER = re.compile(r"postgres(ql)?(\+\w+)?:/", re.IGNORECASE)
HOST = r"(?:[^\s:@/?#,\[\]]*|\[[0-9A-Fa-f:.]+\])(?::\d*)?"
ADDRESS = re.compile(
    r"postgres(?:ql)?(?:\+psycopg)?://(?:(?P<user>[^\s:@/?#]*)(?P<password>:[^\s@/?#]*)?@)?"
    rf"(?P<host>{HOST}(?:,{HOST})*)(?P<database>/[^\s@/?#]*)?(?P<query>\?[^\s@#]*)?"
)
UNREADABLE = (
    "no address of PostgreSQL that can be read, and not shown, since it may hold a password; write it as text, "
    "postgresql://USER@HOST/DATABASE, with signs such as @ / ? # in a password as %40 %2F %3F %23"
)
# Names are looked up in one schema alone. A change outlives a loss of power. Whoever waits for a lock gives up.
SESSION = """SELECT set_config('search_path', quote_ident(current_schema()) || ', pg_temp', false),
    set_config('synchronous_commit', CASE current_setting('synchronous_commit') WHEN 'off' THEN 'on'
        ELSE current_setting('synchronous_commit') END, false),
    set_config('lock_timeout', %s, false)"""
TURN = "SELECT pg_advisory_xact_lock(hashtext(%s), hashtext(current_schema()))"
HELD = "SELECT relname::text FROM pg_class WHERE relnamespace = to_regnamespace(quote_ident(current_schema()))"


class PostgresSchema:
    """A schema of PostgreSQL that belongs to this library, with the methods of :class:`~erasure.io.sqlite.SqliteFile`.

    It is the current schema of whoever connects: ``public``, if the user has no other one. A connection is opened for
    every operation and closed after it, so threads share nothing and a fork is safe. A process that is killed, or cut
    off, leaves an open transaction behind, which the server takes back.

    Args:
        address: ``postgresql://user@host:port/database``, as libpq has it. A password may stand in it, and is never
            shown; one in ``PGPASSWORD`` or ``~/.pgpass`` is safer.
        noun: what it is, for messages: "register". The table ``erasure_register`` says that the schema is one, and of
            which version.
        tables: statements that make the tables of the newest version.
        migrations: statements that lead from version 1 to 2, from 2 to 3, and so on.
        purged: the tables that :meth:`purge` writes anew.
        timeout: seconds to wait for the server, and for another writer.
        create: called with the connection in the transaction that makes the tables. None (default): they must be there.

    Attributes:
        name: the address without password and options, for messages.
        made: whether this call made the tables.

    Raises:
        FileNotFoundError: the schema is empty, and no tables are to be made.
        ImportError: psycopg is not installed.
        ValueError: the address cannot be read, or the schema holds tables of another program, or of a newer version.
        OSError: the server cannot be reached, or allows too little.
    """

    def __init__(
        self,
        address: str,
        *,
        noun: str,
        tables: Sequence[str],
        migrations: Sequence[Sequence[str]] = (),
        purged: Sequence[str] = (),
        timeout: float = 30.0,
        create: Callable[[psycopg.Connection], None] | None = None,
    ) -> None:
        self.name, self.noun, self.timeout = name_of(address), noun, timeout
        self._address = re.sub(r"^[^:]*", "postgresql", address)
        self._tables, self._migrations, self._purged = tables, migrations, purged
        self._newest = 1 + len(migrations)
        self.made = False
        with self._connected() as connection:
            if self._version(connection) != self._newest:
                self._migrate(connection, create)

    @contextlib.contextmanager
    def reading(self) -> Iterator[psycopg.Connection]:
        """The state of one moment, whatever others write meanwhile."""
        with self._connected() as connection:
            connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
            yield connection  # nothing was written, so there is nothing to commit

    @contextlib.contextmanager
    def writing(self) -> Iterator[psycopg.Connection]:
        """One change: all of it, or nothing where the block raises or the process is killed. Writers take turns."""
        with self._connected() as connection:
            self._begin(connection)
            yield connection
            connection.execute("COMMIT")

    def purge(self) -> None:
        """Write tables anew without rows as they were before a change; the server keeps those until then.

        Raises:
            TimeoutError: a transaction that may still read the old rows stayed open all the time.
            PermissionError: the user does not own the tables.
        """
        end = time.monotonic() + self.timeout
        for table in self._purged:
            while self._old_rows_after_vacuum(table):
                if time.monotonic() > end:
                    raise TimeoutError(
                        f"{self.name}: the change is made and every new request sees it, but a transaction of this "
                        f"database has been open for {self.timeout:g} s, so that rows as they were before are still in "
                        "its files; end that transaction and run the command again, or call purge()"
                    )
                time.sleep(WAIT)

    def _old_rows_after_vacuum(self, table: str) -> int:
        """Rewrite a table; returns how many rows that nobody should see any more had to stay, at least."""
        said: list[str] = []
        with self._connected() as connection:
            connection.add_notice_handler(lambda notice: said.append(notice.message_detail or ""))
            try:
                connection.execute(f"VACUUM (FULL, VERBOSE) {table}")
            except psycopg_module(self.noun).errors.LockNotAvailable:
                return 1  # somebody has been reading the table
        left = [int(number[0]) for detail in said if (number := re.match(r"\D*(\d+)", detail))]
        if not left:  # a mere warning
            raise PermissionError(
                errno.EACCES,
                "the change is made and every new request sees it, but only the owner of the tables can delete rows as "
                f"they were before; run the command again as the owner, or let it run VACUUM FULL {table}",
                self.name,
            )
        return left[0]

    def _begin(self, connection: psycopg.Connection) -> None:
        """Begin a change as soon as no other one is going on. What is read from here on is the state after that."""
        connection.execute("BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE")
        connection.execute(TURN, [self._mark])

    @property
    def _mark(self) -> str:
        return f"erasure_{self.noun}"

    def _connect(self) -> psycopg.Connection:
        psycopg = psycopg_module(self.noun)
        options = {"connect_timeout": max(2, math.ceil(self.timeout)), "application_name": "erasure"}
        try:
            options |= psycopg.conninfo.conninfo_to_dict(self._address) | {"client_encoding": "utf8"}
        except psycopg.Error:
            raise ValueError(UNREADABLE) from None  # the driver's message could show the password
        try:
            return psycopg.connect(**options, autocommit=True, prepare_threshold=None)  # type: ignore[no-any-return]
        except psycopg.Error as error:
            raise ConnectionError(
                f"{self.name}: no connection ({printable(error)}); look whether the server runs and lets this user in"
            ) from error

    @contextlib.contextmanager
    def _connected(self) -> Iterator[psycopg.Connection]:
        with contextlib.closing(self._connect()) as connection:
            try:
                connection.execute(SESSION, [f"{max(1, round(1000 * self.timeout))}"])
                yield connection
            except psycopg_module(self.noun).Error as error:
                if (meaning := self._meaning(error)) is None:
                    raise
                raise meaning from error

    def _meaning(self, error: psycopg.Error) -> Exception | None:
        """What went wrong, as the system's own kind of error; None where it is about a statement."""
        import psycopg

        state, said = error.sqlstate or "", printable(error.diag.message_primary or error)
        if state == "55P03":
            return TimeoutError(
                f"{self.name}: another process has been writing for {self.timeout:g} s; try again, or give a larger "
                "timeout"
            )
        if state in ("42501", "25006", "0A000"):  # rights, read-only, a replica
            return PermissionError(errno.EACCES, f"Not allowed; nothing was changed ({said})", self.name)
        if state == "53100":
            return OSError(errno.ENOSPC, "No space left on the server's disk; nothing was changed", self.name)
        if state in ("42P01", "42703", "42883"):
            return ValueError(f"{self.name}: a damaged {self.noun} ({said}); restore it from a backup")
        if isinstance(error, psycopg.OperationalError | psycopg.InterfaceError):
            return ConnectionError(
                f"{self.name}: the server broke off ({said}); look in the log whether the change was made, and run the "
                "command again"
            )
        return None

    def _migrate(
        self, connection: psycopg.Connection, create: Callable[[psycopg.Connection], None] | None = None
    ) -> None:
        """Make the tables, or bring those of an older version to the newest."""
        self._begin(connection)
        version = self._version(connection)  # somebody else may have been here meanwhile
        if not version and create is None:
            raise FileNotFoundError(f"no {self.noun} at {self.name}; give its address, or make one first")
        steps = self._migrations[version - 1 :] if version else [self._tables]
        for statement in itertools.chain(*steps):
            connection.execute(statement)
        if not version and create is not None:
            connection.execute(f"CREATE TABLE {self._mark} (version INTEGER NOT NULL)")
            connection.execute(f"INSERT INTO {self._mark} VALUES ({self._newest})")
            create(connection)
            self.made = True
        connection.execute(f"UPDATE {self._mark} SET version = {self._newest}")
        connection.execute("COMMIT")

    def _version(self, connection: psycopg.Connection) -> int:
        """The schema's version; 0 for an empty schema."""

        def one(statement: str) -> Any:
            return (connection.execute(statement).fetchone() or [None])[0]

        if one("SELECT current_schema()") is None:
            raise ValueError(f"{self.name}: the user's search_path names no schema that is there; make it first")
        if one("SHOW server_encoding") != "UTF8":
            raise ValueError(f"{self.name}: a database that is not in UTF8; make one with createdb --encoding UTF8")
        held = [name for (name,) in connection.execute(HELD)]
        if self._mark not in held:
            if held:
                raise ValueError(
                    f"{self.name}: its schema {one('SELECT current_schema()')!r} holds tables of another program; give "
                    f"the {self.noun} a database or a schema of its own"
                )
            return 0
        version = int(one(f"SELECT max(version) FROM {self._mark}") or 0)
        if not 1 <= version <= self._newest:
            raise ValueError(
                f"{self.name}: a {self.noun} of version {version}; this library reads up to {self._newest}; update the "
                "library"
            )
        return version


def is_server(where: str | os.PathLike[str]) -> bool:
    """Whether a place is an address of PostgreSQL, well-formed or not, and no file."""
    return SERVER.match(os.fspath(where)) is not None


def name_of(address: str | os.PathLike[str]) -> str:
    """An address without password and options, to be shown.

    Raises:
        ValueError: it cannot be told where the password ends. The message does not show it.
    """
    if (found := ADDRESS.fullmatch(os.fspath(address))) is None:
        raise ValueError(UNREADABLE)
    user = f"{found['user']}@" if found["user"] else ""
    return f"postgresql://{user}{found['host']}{found['database'] or ''}"


def holds_password(address: str | os.PathLike[str]) -> bool:
    """Whether a password stands in an address.

    Raises:
        ValueError: the address cannot be read.
    """
    if (found := ADDRESS.fullmatch(os.fspath(address))) is None:
        raise ValueError(UNREADABLE)
    options = parse_qs((found["query"] or "?")[1:], keep_blank_values=True)
    return bool(found["password"]) or any("password" in option for option in options)


def psycopg_module(noun: str) -> Any:
    """The package psycopg.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import psycopg
    except ImportError:
        raise ImportError(f"a {noun} on PostgreSQL needs psycopg: pip install 'diffusion-erasure[postgres]'") from None
    return psycopg


__all__ = ["PostgresSchema", "holds_password", "is_server", "name_of"]
