"""A register moved to another place: every row as it stands, in one transaction, checked before it counts."""

from __future__ import annotations

from sqlalchemy import select, text

from erasure.register import chain, tables
from erasure.register.database import Connection
from erasure.register.rows import faults_in

COPIED = (tables.facts, tables.bases, tables.entries, tables.log)
# Rows that bring their numbers do not move the counter on PostgreSQL; SQLite counts by itself.
COUNT_ON = text(
    "SELECT setval(pg_get_serial_sequence('entries', 'id'), max(id)) FROM entries HAVING max(id) IS NOT NULL"
)


def copy_rows(source: Connection, target: Connection) -> None:
    """Write every row of a register into another one's empty tables, within the transactions of both.

    Raises:
        ValueError: the log of the source does not hold, or the copy is another one.
    """
    if faults := faults_in(source):
        raise ValueError(
            f"its log does not hold ({faults[0]}); nothing was copied; `erasure register log --check` says what else "
            "is wrong, and a backup may be whole"
        )
    for table in COPIED:
        columns = [column for column in table.columns if not column.system]
        order = next(iter(table.primary_key)) if table is not tables.bases else table.c.rowid
        rows = source.execute(select(*columns).order_by(order)).fetchall()
        target.insert(table, [dict(zip([column.name for column in columns], row, strict=True)) for row in rows])
    if target.dialect == "postgresql":
        target.execute(COUNT_ON)
    if faults := faults_in(target, head=chain.head(source)):
        raise ValueError(f"the copy is not what was read ({faults[0]}); nothing was copied; try again")


__all__ = ["copy_rows"]
