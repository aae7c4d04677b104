"""Where the tables of a register lie: in a file of SQLite, or in a schema of PostgreSQL. The statements are the same.

The statements are SQLAlchemy Core, compiled for either database. SQLAlchemy's engines and pools are not used: when a
connection is opened and closed, who takes turns, and what is left after a kill is settled in
:class:`~erasure.io.sqlite.SqliteFile`, which the store of pictures shares, and
:class:`~erasure.io.postgres.PostgresSchema`.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import Dialect, Table, insert
from sqlalchemy.sql.expression import Executable

from erasure.io.postgres import PostgresSchema, is_server
from erasure.io.sqlite import SqliteFile
from erasure.register.tables import APPLICATION, MIGRATIONS, creation

NOUN = "register"


class Connection:
    """Runs statements of SQLAlchemy Core on a driver's own connection. All columns are text or integers."""

    def __init__(self, driver: Any, dialect: Dialect) -> None:
        self._driver, self._dialect = driver, dialect

    @property
    def dialect(self) -> str:
        """sqlite or postgresql."""
        return self._dialect.name

    def execute(self, statement: Executable) -> Any:
        """The driver's cursor."""
        compiled = statement.compile(dialect=self._dialect, compile_kwargs={"render_postcompile": True})  # type: ignore[attr-defined]
        return self._driver.execute(str(compiled), compiled.params)

    def insert(self, table: Table, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add many rows, all with the same columns, by one statement."""
        if rows:
            statement = insert(table).inline().compile(dialect=self._dialect, column_keys=list(rows[0]))
            self._driver.cursor().executemany(str(statement), rows)


class Database:
    """The tables of a register.

    Args:
        where: a file, or ``postgresql://user@host/database``.
        timeout: seconds to wait for another writer.
        create: called with a connection in the transaction that makes the tables. None (default): they must be there.

    Attributes:
        name: the file, or the address without its password; for messages.
        path: the file; None on a server.
        made: whether this call made the tables.

    Raises:
        FileNotFoundError: there is no register, and none is to be made.
        ValueError: there is something else, or a register of a newer version.
        OSError: it cannot be made, read or written.
    """

    def __init__(
        self,
        where: str | os.PathLike[str],
        *,
        timeout: float = 30.0,
        create: Callable[[Connection], None] | None = None,
    ) -> None:
        self._dialect = _dialect("postgresql" if is_server(where) else "sqlite")
        tables = creation(self._dialect)
        begun = None if create is None else lambda driver: create(self._on(driver))
        self._kept: SqliteFile | PostgresSchema
        self.path: Path | None = None
        if is_server(where):
            self._kept = PostgresSchema(
                os.fspath(where), noun=NOUN, tables=tables, migrations=MIGRATIONS, purged=["entries"], timeout=timeout,
                create=begun,
            )  # fmt: skip
            self.name = self._kept.name
        else:
            if other := re.match(r"([A-Za-z][\w+.-]+)://", os.fspath(where)):
                raise ValueError(
                    f"a register is a file or lies on PostgreSQL; got an address of {other[1]!r}; give a file, or "
                    "postgresql://USER@HOST/DATABASE"
                )
            self._kept = SqliteFile(
                where, noun=NOUN, application=APPLICATION, tables=tables, migrations=MIGRATIONS, timeout=timeout,
                create=begun,
            )  # fmt: skip
            self.path = self._kept.path
            self.name = str(self.path)
        self.made = self._kept.made

    @contextlib.contextmanager
    def reading(self) -> Iterator[Connection]:
        """The state of one moment, whatever others write meanwhile."""
        with self._kept.reading() as driver:
            yield self._on(driver)

    @contextlib.contextmanager
    def writing(self) -> Iterator[Connection]:
        """One change: all of it, or nothing where the block raises or the process is killed. Writers take turns."""
        with self._kept.writing() as driver:
            yield self._on(driver)

    def purge(self) -> None:
        """Delete what the database keeps of rows as they were before a change.

        Raises:
            TimeoutError: somebody has been reading them all the time.
        """
        self._kept.purge()

    def _on(self, driver: Any) -> Connection:
        return Connection(driver, self._dialect)


def _dialect(name: str) -> Dialect:
    """How the statements are written, with values by name as the drivers take them; only one of the two is imported."""
    if name == "postgresql":
        from sqlalchemy.dialects import postgresql

        return postgresql.dialect()
    from sqlalchemy.dialects import sqlite

    return sqlite.dialect(paramstyle="named")
