"""The tables of a register, once for SQLite and PostgreSQL, in SQLAlchemy Core.

Times and JSON are text, so that a row has the same hash in both. SQLite keeps by itself in which order rows came
(``rowid``) and the highest number that the log ever had (``sqlite_sequence``). On PostgreSQL both are made, under the
same names, so that the statements are the same.
"""

from __future__ import annotations

from sqlalchemy import Column, Dialect, Identity, Index, Integer, MetaData, Table, column, table
from sqlalchemy import Text as AnyText
from sqlalchemy.schema import CreateIndex, CreateTable, ExecutableDDLElement

APPLICATION = 0x45525247  # "ERRG": an SQLite file says that it is a register

METADATA = MetaData()
Text = AnyText().with_variant(AnyText(collation="C"), "postgresql")  # byte by byte, as SQLite compares
Name = Text.with_variant(AnyText(collation="NOCASE"), "sqlite")

facts = Table(
    "facts", METADATA,
    Column("name", Text, primary_key=True),
    Column("value", Text, nullable=False),
)  # fmt: skip
bases = Table(
    "bases", METADATA,
    Column("name", Text, primary_key=True),
    Column("hash", Text, nullable=False),
    Column("prints", Text, nullable=False),
    Column("rowid", Integer, system=True),
)  # fmt: skip
entries = Table(
    "entries", METADATA,
    Column("id", Integer, Identity(), primary_key=True),
    Column("request", Name, nullable=False, unique=True),
    Column("basis", Text, nullable=False),
    Column("requester", Text, nullable=False),
    Column("received", Text, nullable=False),
    Column("due", Text, nullable=False),
    Column("served", Text),
    Column("subject", Text),
    Column("salt", Text),
    Column("seal", Text, nullable=False),
    Column("bases", Text, nullable=False),
    Column("settings", Text),
    Column("evidence", Text, nullable=False),
    Column("reviewer", Text, nullable=False),
    Column("status", Text, nullable=False),
    Column("ended", Text),
    Column("reason", Text, nullable=False),
    Column("redacted", Text),  # since when names are not shown; from version 2 on
    sqlite_autoincrement=True,
)  # fmt: skip
log = Table(
    "log", METADATA,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("time", Text, nullable=False),
    Column("action", Text, nullable=False),
    Column("entry", Integer),
    Column("detail", Text, nullable=False),
    Column("digest", Text, nullable=False),
    Column("previous", Text, nullable=False),
    Column("hash", Text, nullable=False),
    Index("actions", "action"),
    sqlite_autoincrement=True,
)  # fmt: skip
numbers = table("sqlite_sequence", column("name"), column("seq"))

# Against mistakes. Whoever owns the tables can drop a trigger; `erasure register log --check` finds out.
SQLITE = (
    "CREATE TRIGGER log_stays BEFORE DELETE ON log BEGIN SELECT RAISE(ABORT, 'rows of the log stay'); END",
    "CREATE TRIGGER log_is_final BEFORE UPDATE ON log BEGIN SELECT RAISE(ABORT, 'rows of the log stay'); END",
    "CREATE TRIGGER entries_stay BEFORE DELETE ON entries BEGIN SELECT RAISE(ABORT, 'entries are withdrawn'); END",
)
POSTGRESQL = (
    "ALTER TABLE bases ADD COLUMN rowid INTEGER GENERATED ALWAYS AS IDENTITY",
    "CREATE UNIQUE INDEX requests ON entries (lower(request))",
    # No samples of names in the planner's statistics, which a redaction would not reach.
    "ALTER TABLE entries ALTER COLUMN subject SET STATISTICS 0, ALTER COLUMN salt SET STATISTICS 0",
    "CREATE TABLE sqlite_sequence (name TEXT PRIMARY KEY, seq INTEGER NOT NULL)",
    "INSERT INTO sqlite_sequence VALUES ('log', 0)",
    """CREATE FUNCTION count_row() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path FROM CURRENT AS
        'BEGIN UPDATE sqlite_sequence SET seq = greatest(seq, NEW.id) WHERE name = TG_TABLE_NAME; RETURN NULL; END'""",
    "CREATE TRIGGER log_is_counted AFTER INSERT ON log FOR EACH ROW EXECUTE FUNCTION count_row()",
    """CREATE FUNCTION stay() RETURNS trigger LANGUAGE plpgsql AS
        'BEGIN RAISE integrity_constraint_violation USING MESSAGE = TG_ARGV[0]; END'""",
    """CREATE TRIGGER log_stays BEFORE UPDATE OR DELETE OR TRUNCATE ON log
        EXECUTE FUNCTION stay('rows of the log stay')""",
    """CREATE TRIGGER entries_stay BEFORE DELETE OR TRUNCATE ON entries
        EXECUTE FUNCTION stay('entries are withdrawn')""",
)

# From version 1 on. They run on both.
MIGRATIONS = (("ALTER TABLE entries ADD COLUMN redacted TEXT",),)


def creation(dialect: Dialect) -> tuple[str, ...]:
    """The statements that make the tables of the newest version."""
    made: list[ExecutableDDLElement] = []
    for one in METADATA.sorted_tables:
        made += [CreateTable(one), *map(CreateIndex, one.indexes)]
    own = {"sqlite": SQLITE, "postgresql": POSTGRESQL}[dialect.name]
    return (*(str(statement.compile(dialect=dialect)) for statement in made), *own)
