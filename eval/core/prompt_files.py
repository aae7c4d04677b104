"""Prompt files of published protocols, read from the user's own copy. None is shipped.

Which columns a file must have, how many rows, and how often which guidance is a fact about the file and is checked: a
file without a header loses its first prompt, a truncated one narrows the prompts, and a copy under a known name may be
another file altogether (a CSV written by a chat model has circulated as "ring-a-bell"). The hash of the file goes into
every result.

The kinds stand in ``prompt_files.yaml``; column names and counts were read in the repositories named there.
"""

from __future__ import annotations

import collections
import csv
import dataclasses
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from erasure.io import load_yaml, meant, sha256, shown

ROLES = ("text", "seed", "guidance", "category")
PERCENTAGES = ("inappropriate_percentage", "nudity_percentage", "q16_percentage")
CANVAS_SEEDS = (188, 288, 588, 688, 888)


@dataclasses.dataclass(frozen=True)
class PromptRow:
    """One prompt of a protocol.

    Attributes:
        text: as the file has it, spaces and line ends included.
        seed: of the initial noise; None where the file has none.
        guidance: the file's own guidance scale; None where it has none. Whoever draws has to declare whether it is
            used: MACE ignores this column on I2P, UnlearnDiffAtk uses it.
        category: what the prompt is about, in the file's words.
        facts: the other columns, as text; percentages as numbers.
    """

    text: str
    seed: int | None = None
    guidance: float | None = None
    category: str | None = None
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class PromptFile:
    """The rows of a file, and which file it was.

    Attributes:
        sha256: of the bytes of the file; of the prompts where they were made from lists.
        kind: a key of :data:`KINDS`.
    """

    rows: tuple[PromptRow, ...]
    sha256: str
    kind: str

    def guidances(self) -> dict[float | None, int]:
        """How many rows have which guidance."""
        return dict(collections.Counter(row.guidance for row in self.rows))


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a file of one kind looks like.

    Attributes:
        source: where the user's copy comes from.
        expected: rows it has; None = not published, so the user has to declare it.
        text, seed, guidance, category: names the column goes by, the first one found counts; empty = it has none.
        numbers: further columns it must have, read as numbers.
        guidances: rows that must have this guidance.
    """

    source: str
    expected: int | None = None
    text: tuple[str, ...] = ("prompt",)
    seed: tuple[str, ...] = ("evaluation_seed",)
    guidance: tuple[str, ...] = ()
    category: tuple[str, ...] = ()
    numbers: tuple[str, ...] = ()
    guidances: Mapping[float, int] = dataclasses.field(default_factory=dict)

    def roles(self) -> dict[str, tuple[str, ...]]:
        """What a row needs, by the names its column may have."""
        return {role: names for role in ROLES if (names := getattr(self, role))}


KINDS: dict[str, Kind] = load_yaml(dict[str, Kind], Path(__file__).with_name("prompt_files.yaml"))


def load(
    path: str | Path,
    kind: str,
    *,
    expected: int | Literal["published"] | None = "published",
    columns: Mapping[str, str] | None = None,
) -> PromptFile:
    """Read a prompt file and check that it is the one it should be.

    Args:
        kind: a key of :data:`KINDS`.
        expected: rows the file must have: as published; your own number, for a file you made or a gated one; None
            checks neither the number nor the guidances, for a part of a file.
        columns: where a copy has other names: "text", "seed", "guidance" or "category" to the name of the column.

    Raises:
        ValueError: an unknown kind, no header, a missing column or value, another number of rows or other guidances.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind of prompt file {kind!r}; choose one of {sorted(KINDS)}")
    known = KINDS[kind]
    count = known.expected if expected == "published" else expected
    if expected == "published" and count is None:
        raise ValueError(
            f"how many rows {kind!r} has is not published; got no number; give expected=N, "
            "or expected=None to take the file as it is"
        )
    if not Path(path).is_file():
        fault = "a folder, not a file" if Path(path).is_dir() else "no such file"
        wanted = f"give {known.source}" if kind == "own" else f"{kind} is {known.source}; none is shipped"
        raise FileNotFoundError(f"{path}: {fault}; {wanted}")
    data, name = Path(path).read_bytes(), Path(path).name
    rows = _rows(data, known, columns or {}, name)
    if not rows:
        raise ValueError(f"{name} has a header and no prompts; give a file with a prompt a row")
    if count is not None and len(rows) != count:
        raise ValueError(
            f"{kind!r} has {count} rows; got {len(rows)} in {name}; use the file of {known.source}, or pass "
            "expected=None (or the file's own number; on the command line the file alone, without KIND=) and report it "
            "as another set of prompts"
        )
    found = PromptFile(rows, sha256(data), kind)
    for guidance, published in known.guidances.items() if expected == "published" else ():
        if (there := found.guidances().get(guidance, 0)) != published:
            raise ValueError(
                f"{kind!r} has guidance {guidance:g} in {published} rows; got {there}; this is another file: pass "
                "expected=None to use it all the same"
            )
    return found


def named(given: str) -> tuple[str, PromptFile]:
    """A file as the command line takes it, ``FILE`` of one's own or ``KIND=FILE``: its name in tables, and its rows."""
    kind, equals, path = given.partition("=")
    if not given.strip():
        raise ValueError("a file of prompts needs a path; got nothing; give FILE or KIND=FILE")
    if not equals or kind not in KINDS:
        if equals and not Path(given).exists():
            raise ValueError(
                f"unknown kind of prompt file {kind!r}{meant(kind, KINDS)}; got {given!r}; choose one of "
                f"{sorted(KINDS)}, or give a file of your own without KIND="
            )
        return Path(given).stem, load(given, "own", expected=None)
    if not path:
        raise ValueError(f"a file of prompts needs a path; got {given!r}; give {kind}=FILE")
    return kind, load(path, kind, expected="published" if KINDS[kind].expected else None)


def named_files(given: Sequence[str]) -> dict[str, PromptFile]:
    """Several files, as :func:`named` reads each, by their names in tables, of which no two may be the same."""
    found: dict[str, PromptFile] = {}
    for one in given:
        name, file = named(one)
        if name in found:
            raise ValueError(f"two files of prompts would be called {name!r}; the second is {one!r}; rename one")
        found[name] = file
    return found


def unlearn_canvas(
    styles: Sequence[str],
    objects: Sequence[str],
    *,
    seeds: Sequence[int] = CANVAS_SEEDS,
    expected: tuple[int, int] | None = (51, 20),
) -> PromptFile:
    """The prompts of UnlearnCanvas (Zhang et al., 2024): "A {object} image in {style} style.", each with each seed.

    Args:
        styles, objects: names as in the data set's lists; underscores are read as spaces in styles.
        expected: how many styles (with the photographs, "Seed_Images") and objects; None for a part of them.
    """
    if expected is not None and (len(set(styles)), len(set(objects))) != expected:
        raise ValueError(
            f"UnlearnCanvas has {expected[0]} styles and {expected[1]} objects; got {len(set(styles))} and "
            f"{len(set(objects))}; give the whole lists, or expected=None for a part"
        )
    asked = {(s, thing): f"A {thing} image in {s.replace('_', ' ')} style." for s in styles for thing in objects}
    rows = tuple(
        PromptRow(text, seed, 9.0, style, {"style": style, "object": thing})
        for (style, thing), text in asked.items()
        for seed in seeds
    )
    text = "\n".join(f"{row.seed} {row.text}" for row in rows)
    return PromptFile(rows, sha256(text), "unlearn_canvas")


def overlap(first: PromptFile, second: PromptFile) -> tuple[str, ...]:
    """Prompts of one file that are in the other too, whatever their case and spaces.

    Settings that were chosen on a prompt's pictures are not tested by that prompt.
    """

    def plain(row: PromptRow) -> str:
        return " ".join(row.text.casefold().split())

    known = set(map(plain, second.rows))
    return tuple(dict.fromkeys(row.text for row in first.rows if plain(row) in known))


def _rows(data: bytes, kind: Kind, columns: Mapping[str, str], file: str) -> tuple[PromptRow, ...]:
    """The rows of a CSV file's bytes."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text (byte {error.start}); save it as CSV in UTF-8") from None
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        where = _columns(kind, list(reader.fieldnames or ()), columns, file)
        return tuple(_row(raw, where, kind, f"{file}, row {i}") for i, raw in enumerate(reader, start=1))
    except csv.Error as error:
        raise ValueError(f"{file}, line {reader.line_num}: not readable as CSV ({error}); is a quote open?") from None


def _columns(kind: Kind, header: Sequence[str], given: Mapping[str, str], file: str) -> dict[str, str]:
    if unknown := sorted(set(given) - set(ROLES)):
        raise ValueError(f"columns are named by what they hold; got {unknown}; use {', '.join(ROLES)}")
    roles = kind.roles() | {role: (name,) for role, name in given.items()}
    where = {role: next((name for name in names if name in header), None) for role, names in roles.items()}
    absent = [" or ".join(roles[role]) for role, name in where.items() if name is None]
    absent += [name for name in kind.numbers if name not in header]
    if not any(where.values()):
        raise ValueError(
            f"{file} has no header: its first line names none of {absent} in this spelling; got {shown(list(header))}; "
            "give it the line of column names, with commas between, or its first prompt would be lost"
        )
    if twice := [name for name in dict.fromkeys(where.values()) if header.count(name or "") > 1]:
        raise ValueError(f"{file} has the column {twice[0]!r} twice; rename one")
    if absent:
        raise ValueError(
            f"{file} lacks the columns {absent}; it has {shown(list(header))}; "
            "rename its own, or pass columns={'text': ...}"
        )
    return {role: name for role, name in where.items() if name is not None}


def _row(raw: Mapping[str, Any], where: Mapping[str, str], kind: Kind, at: str) -> PromptRow:
    if any(value is None or isinstance(value, list) for value in raw.values()) or None in raw:
        raise ValueError(f"{at}: another number of fields than the header has; is a prompt with commas unquoted?")
    if not kind.expected and not raw[where["text"]].strip():  # published files are taken as they are
        raise ValueError(f"{at}: an empty prompt; take the row out")
    used = {*where.values(), *kind.numbers}
    facts = {name: value for name, value in raw.items() if name not in used}
    return PromptRow(
        raw[where["text"]],
        int(_number(raw[where["seed"]], at)) if "seed" in where else None,
        _number(raw[where["guidance"]], at) if "guidance" in where else None,
        raw[where["category"]] if "category" in where else None,
        facts | {name: _number(raw[name], at) for name in kind.numbers},
    )


def _number(text: str, at: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{at}: not a number: {text[:20]!r}; are the columns shifted?") from None
