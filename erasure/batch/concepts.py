"""What a recipe erases: suites, concepts written out, rows of a CSV file, entries of a take-down register."""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from erasure.concept import STRICT, Concept, Suite
from erasure.io import fault_of, meant, printable, read_bytes, shown
from erasure.io.postgres import holds_password, is_server
from erasure.wording import folded

if TYPE_CHECKING:
    from erasure.register import Entry

LARGEST = 2**26  # bytes of a CSV file; a hundred thousand concepts stay below
BETWEEN = "|"  # between several values in one field
DELIMITERS = (",", ";", "\t")
LISTS = ("synonyms", "neighbours", "templates", "keep")
COLUMNS = ("name", "kind", "anchor", *LISTS)


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What one cell erases, and what it keeps.

    Attributes:
        concepts: together in one erasure.
        keep: prompts that must not change; None leaves them to the neighbours of the concepts.
        suite: it is evaluated on; None for concepts by themselves.
        title: what folders and tables call it where that is not the concepts' names.
        hidden: whether a name in it was redacted, and must not be published.
    """

    concepts: tuple[Concept, ...]
    keep: tuple[str, ...] | None = None
    suite: Suite | None = None
    title: str = ""
    hidden: bool = False

    @property
    def target(self) -> str:
        """What is erased, in a few words."""
        more = f" and {len(self.concepts) - 1} more" if len(self.concepts) > 1 else ""
        return self.title or self.concepts[0].name + more


@dataclass(frozen=True, config=STRICT)
class Csv:
    """The rows of a CSV file, see :func:`read_csv`.

    Attributes:
        csv: the file, relative to the recipe.
        together: all rows in one erasure, and not an erasure for each.
    """

    csv: Path
    together: bool = False

    def beside(self, folder: Path) -> Csv:
        return dataclasses.replace(self, csv=folder / self.csv)

    def wanted(self, base: str) -> list[Wanted]:
        return joined(read_csv(self.csv), self.csv.stem) if self.together else read_csv(self.csv)


@dataclass(frozen=True, config=STRICT)
class FromRegister:
    """The active requests of a take-down register: received or in force. Withdrawn and refused ones are left out.

    Attributes:
        register: its file, relative to the recipe, or its address on PostgreSQL, without a password.
        together: all of them in one erasure, as `erasure register apply` makes it, and not an erasure for each.
    """

    register: Path | str
    together: bool = False

    @model_validator(mode="after")
    def _check(self) -> FromRegister:
        if is_server(self.register) and holds_password(self.register):
            raise ValueError(
                "a recipe is kept and handed on; got an address with a password; take it out, and set PGPASSWORD or "
                "write ~/.pgpass"
            )
        return self

    def beside(self, folder: Path) -> FromRegister:
        return self if is_server(self.register) else dataclasses.replace(self, register=folder / self.register)

    def wanted(self, base: str) -> list[Wanted]:
        """Of a base that the register knows by this name its own requests, of any other base all of them."""
        from erasure.register import Register
        from erasure.register.joint import joint

        register = Register(self.register)
        known = base in register.bases()
        entries = register.wanted(base) if known else [entry for entry in register.entries() if entry.wanted]
        if not entries:
            raise ValueError(
                f"{register.name} has no active request{f' for {base}' if known else ''}; add one, or take it out of "
                "the recipe"
            )
        if not self.together:
            return [_of_entry(entry) for entry in entries]
        whole = joint(entries)
        hidden = any(entry.redacted is not None for entry in entries)
        title = "register" if is_server(self.register) else Path(self.register).stem
        return [Wanted(whole.concepts, whole.keep, title=title if hidden else "", hidden=hidden)]


Source = Csv | FromRegister


def wanted_of(given: str | Concept | Source, base: str) -> list[Wanted]:
    """What one line under `concepts` stands for on a base."""
    if isinstance(given, Source):
        return given.wanted(base)
    if isinstance(given, Concept):
        return [Wanted((given,))]
    suite = Suite.load(given)
    return [Wanted(suite.concepts, suite.kept, suite, suite.target)]


def _of_entry(entry: Entry) -> Wanted:
    """A request by itself: every name in every language, what it keeps, its own anchor."""
    subject = entry.subject
    assert subject is not None  # only what is over loses its names
    first, *others = subject.phrases
    concept = dataclasses.replace(subject.concept, name=first, synonyms=tuple(others))  # type: ignore[type-var]
    keep = tuple(dict.fromkeys((*concept.neighbours, *subject.keep)))
    hidden = entry.redacted is not None
    return Wanted((concept,), keep or None, title=entry.name if hidden else "", hidden=hidden)


def joined(parts: Sequence[Wanted], title: str) -> list[Wanted]:
    """Several in one erasure. What one of them erases, none of them keeps."""
    concepts = tuple(itertools.chain(*(part.concepts for part in parts)))
    erased = {folded(phrase) for concept in concepts for phrase in concept.phrases}
    kept = (word for part in parts for word in part.keep or part.concepts[0].neighbours)
    return [Wanted(concepts, tuple(dict.fromkeys(word for word in kept if folded(word) not in erased)), title=title)]


# --- CSV --------------------------------------------------------------------------------------------------------------


def read_csv(path: Path) -> list[Wanted]:
    """Concepts from a CSV file with a header: one a row.

    Columns are `name` and, as needed, `kind`, `anchor`, `synonyms`, `neighbours`, `templates`, `keep`; the last four
    hold several values with ``|`` between. Fields are separated by commas, semicolons or tabs, as the header has them;
    the text is UTF-8. Empty lines are passed over.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a column is unknown or twice, or a row is broken, names its concept wrongly or a second time; the
            message has its line.
    """
    try:
        text = read_bytes(path, largest=LARGEST).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error.reason} at byte {error.start:,}); save it as UTF-8") from None
    rows = _rows(path, text)
    _, header = next(rows, (1, []))
    columns = _header(path, header)
    found: list[Wanted] = []
    lines: dict[str, int] = {}
    for line, row in rows:
        if len(row) != len(columns):
            raise ValueError(
                f"{path}, line {line}: {len(row)} fields, and the header has {len(columns)}; quote fields that hold "
                "the separator"
            )
        one = _wanted(f"{path}, line {line}", dict(zip(columns, row, strict=True)))
        name = one.concepts[0].name
        if (before := lines.setdefault(folded(name), line)) != line:
            raise ValueError(f"{path}, line {line}: {shown(name)} stands in line {before} already; keep one of them")
        found.append(one)
    if not found:
        raise ValueError(f"{path}: no concept below the header; add a row, or take the file out of the recipe")
    return found


def _rows(path: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    """The rows that are not empty, each with the line it begins in."""
    first = text.partition("\n")[0]
    delimiter = max(DELIMITERS, key=first.count)  # the comma where there is but one column
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise ValueError(f"{path}, line {line}: not readable as CSV ({printable(error)}); mend the row") from None
        if row is None:
            return
        if any(field.strip() for field in row):
            yield line, row


def _header(path: Path, header: Sequence[str]) -> list[str]:
    columns = [name.strip().lower() for name in header]
    for name in columns:
        if name not in COLUMNS:
            near = meant(name, COLUMNS)
            raise ValueError(f"{path}, line 1: unknown column {shown(name)}{near}; known are {list(COLUMNS)}")
        if columns.count(name) > 1:
            raise ValueError(f"{path}, line 1: the column {name!r} stands twice; keep one")
    if "name" not in columns:
        raise ValueError(f"{path}, line 1: no column 'name'; got {shown(columns)}; the first line names the columns")
    return columns


def _wanted(place: str, row: dict[str, str]) -> Wanted:
    facts: dict[str, Any] = {name: field.strip() for name, field in row.items() if field.strip()}
    facts |= {
        name: tuple(part for value in facts[name].split(BETWEEN) if (part := value.strip()))
        for name in LISTS
        if name in facts
    }
    for name, field in row.items():
        if not field.strip().isprintable():
            raise ValueError(f"{place}: {name} holds what cannot be printed; got {shown(field)}; take it out")
    keep = facts.pop("keep", ())
    try:
        concept = TypeAdapter(Concept).validate_python({"name": "", **facts})
    except ValidationError as error:
        raise ValueError(f"{place}: {fault_of(error)}") from None
    erased = {folded(phrase) for phrase in concept.phrases}
    if both := [word for word in keep if folded(word) in erased]:
        raise ValueError(
            f"{place}: {shown(both[0])} is both to be erased and to be kept; take it out of one of the two"
        )
    return Wanted((concept,), tuple(dict.fromkeys((*concept.neighbours, *keep))) if keep else None)


__all__ = ["BETWEEN", "COLUMNS", "Csv", "FromRegister", "Source", "Wanted", "joined", "read_csv", "wanted_of"]
