"""Files of others read within bounds: none costs more than its size, or does more than hold data."""

from __future__ import annotations

import functools
import json
import math
import os
import re
from pathlib import Path
from typing import Any, TypeVar

from erasure.io.files import beside
from erasure.io.text import meant, printable, shown

T = TypeVar("T")

JSON_DEPTH = 32  # of nesting; an erasure's config needs seven
LARGEST_JSON = 2**28  # bytes; the largest evaluation so far has 2**25
DIGITS = 300  # of one number; a float holds no more
YAML_DEPTH = 32
LARGEST_YAML = 2**20  # bytes, read in half a minute; a suite with fifty thousand names stays below
UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")  # what pydantic calls a key that is not known
IN_YAML = {  # its other words, for whoever writes YAML
    **dict.fromkeys(UNKNOWN, "no such key"),
    **dict.fromkeys(("tuple_type", "list_type", "set_type"), "a list is needed"),
    **dict.fromkeys(("dict_type", "dataclass_type", "model_type"), "keys and values are needed"),
    "string_type": "a text is needed",
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "a whole number is needed"),
    **dict.fromkeys(("float_type", "float_parsing"), "a number is needed"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false is needed"),
}
EXPANSION = 10  # how much larger than written a YAML file may become through its aliases


def read_bytes(path: str | os.PathLike[str], *, largest: int = LARGEST_JSON) -> bytes:
    """The content of a regular file of at most ``largest`` bytes.

    Raises:
        FileNotFoundError: no such file, or a device, pipe or folder.
        ValueError: it is larger.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file{beside(path)}; check the path")
    if (size := path.stat().st_size) > largest:
        raise ValueError(f"{path}: {size:,} bytes; at most {largest:,} are read; is it the right file?")
    with path.open("rb") as file:
        return file.read(largest)


def read_json(path: str | os.PathLike[str], *, largest: int = LARGEST_JSON) -> Any:
    """Read a JSON file; see :func:`parse_json`. Every fault is one ValueError that names the file."""
    raw = read_bytes(path, largest=largest)
    try:
        return parse_json(raw)
    except ValueError as error:
        raise ValueError(f"{path}: {printable(error, limit=None)}") from None


def parse_json(raw: str | bytes, *, depth: int = JSON_DEPTH) -> Any:
    """JSON without what its grammar leaves open: a key given twice, NaN, infinity, nesting and numbers without end.

    Raises:
        ValueError: not JSON, or one of these; one line.
    """
    try:
        text = raw if isinstance(raw, str) else raw.decode("utf-8")
        value = json.loads(
            text,
            object_pairs_hook=_once,
            parse_constant=_no_constant,
            parse_int=_int,
            parse_float=_float,
        )
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"not readable as JSON ({error}); it is incomplete or was altered") from None
    except RecursionError:
        raise ValueError(f"JSON nested more than {depth} deep; it was altered") from None
    level = [value]
    for _ in range(depth + 1):
        level = [part for part in level if isinstance(part, dict | list)]
        level = [v for part in level for v in (part.values() if isinstance(part, dict) else part)]
    if level:
        raise ValueError(f"JSON nested more than {depth} deep; it was altered")
    _check_characters(text, value)
    return value


def load_yaml(kind: Any, path: str | os.PathLike[str]) -> Any:
    """Read a YAML file into a pydantic type; every fault is one line that names the file and the key.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not YAML within bounds (:func:`parse_yaml`), or not of the type.
    """
    from pydantic import TypeAdapter, ValidationError

    raw = read_yaml(path)
    if not isinstance(raw, dict):
        found = "nothing" if raw is None else shown(raw)
        raise ValueError(f"{path}: a file of keys and values is needed; got {found}; is it complete?")
    adapter = TypeAdapter(kind)
    try:
        return adapter.validate_python(raw)
    except ValidationError as error:
        fault = printable(f"{fault_of(error)}{_meant(adapter, error)}", limit=None)
        raise ValueError(f"{path}: {fault}") from None


def _meant(kind: Any, error: Any) -> str:
    """Which key was meant where one is not known, or which are known there."""
    first = _first(error)
    if first["type"] not in UNKNOWN:
        return ""
    *place, key = first["loc"]
    known = _keys_at(kind.json_schema(), place) - {key}  # it may be one of another form
    return meant(key, known) or (f"; known are {sorted(known)}" if known else "")


def _keys_at(schema: dict[str, Any], place: list[Any]) -> set[str]:
    """The keys that a JSON schema has at a place; of all forms that a value may take there."""
    nodes, known = [schema], set[str]()
    for step in [*place, None]:
        forms = [form for node in nodes for form in _forms(node, schema)]
        known = {name for form in forms for name in form.get("properties", {})} or known
        nodes = [part for form in forms for part in _within(form, step)] or nodes  # a form has a name, which is no key
    return known


def _forms(node: dict[str, Any], schema: dict[str, Any]) -> list[dict[str, Any]]:
    """A schema's alternatives, references followed."""
    if "$ref" in node:
        return _forms(schema["$defs"][node["$ref"].rpartition("/")[2]], schema)
    nested = [part for word in ("anyOf", "oneOf", "allOf") for part in node.get(word, ())]
    return [form for part in nested for form in _forms(part, schema)] or [node]


def _within(form: dict[str, Any], step: Any) -> list[dict[str, Any]]:
    """What a schema says of one of its keys or items."""
    inside = form.get("properties", {}).get(step) if isinstance(step, str) else form.get("items")
    more = form.get("additionalProperties")
    return [part for part in (inside, more) if isinstance(part, dict)][:1]


def _first(error: Any) -> Any:
    """The fault to tell: a key that is not known before one that is missing, which may be the same key."""
    every = error.errors()
    return next((one for one in every if one["type"] in UNKNOWN), every[0])


def read_yaml(path: str | os.PathLike[str]) -> Any:
    """Read a YAML file; see :func:`parse_yaml`."""
    raw = read_bytes(path, largest=LARGEST_YAML)
    try:
        return parse_yaml(raw)
    except ValueError as error:
        raise ValueError(f"{path}: {printable(error, limit=None)}") from None


def parse_yaml(text: str | bytes) -> Any:
    """YAML as plain data: no tags of Python, no key twice, no NaN, and no alias that makes little text large.

    Raises:
        ValueError: not YAML, or one of these; one line.
    """
    import yaml

    try:
        text = text if isinstance(text, str) else text.decode("utf-8-sig")
        loader = _loader()(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check_nodes(node, loader)
        value = loader.construct_document(node)
        _check_characters(text, value)
        return value
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, OverflowError, RecursionError) as error:
        fault = "nested too deeply" if isinstance(error, RecursionError) else printable(error, limit=300)
        raise ValueError(f"not readable as YAML ({fault}); is the file complete?") from None


def dump_yaml(value: Any) -> str:
    """Plain data as YAML, keys in their order."""
    import yaml

    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True)


def fault_of(error: Any) -> str:
    """The first fault of a pydantic ``ValidationError`` in one line: ``key: what is allowed; what was given``."""
    first = _first(error)
    fault = IN_YAML.get(first["type"]) or printable(first["msg"].removeprefix("Value error, "), limit=400)
    if isinstance(first["input"], str | int | float) and first["type"] not in ("value_error", *UNKNOWN):
        fault += f"; got {shown(first['input'])}"
    return f"{printable('.'.join(map(str, first['loc'])))}: {fault}" if first["loc"] else fault


def in_one_line(kind: type[T]) -> type[T]:
    """Have a pydantic dataclass raise a ValueError of one line when it is made in Python; see :func:`fault_of`."""
    from pydantic import ValidationError

    made, fields = kind.__init__, list(kind.__annotations__)

    @functools.wraps(made)
    def init(self: T, *args: Any, **settings: Any) -> None:
        try:
            made(self, *args, **settings)
        except ValidationError as error:
            first, fault = _first(error), one_line(error)
            if first["loc"] and isinstance(first["loc"][0], int):  # an argument without its name
                fault = f"{fields[first['loc'][0]]}{fault.removeprefix(str(first['loc'][0]))}"
            raise ValueError(f"{kind.__name__}: {fault}" if first["loc"] else fault) from None

    kind.__init__ = init  # type: ignore[method-assign, assignment]
    return kind


def one_line(error: Exception) -> str:
    """What went wrong, for people: the sentence of an error of ours, or one about somebody else's."""
    from pydantic import ValidationError

    if isinstance(error, ValidationError):
        first, fault = _first(error), fault_of(error)
        said = "; got " in fault or not first["loc"] or first["type"].startswith("missing")
        return fault if said else f"{fault}; got {shown(first['input'])}"
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror.lower()}"
    return f"not readable as JSON: {error}" if isinstance(error, json.JSONDecodeError) else str(error)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {shown(twice)} stands twice; it was altered")
    return content


def _no_constant(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON number; it was altered")


def _int(digits: str) -> int:
    if len(digits) > DIGITS:
        raise ValueError(f"a number of {len(digits):,} digits; it was altered")
    return int(digits)


def _float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{printable(digits, limit=20)} is no finite number; it was altered")
    return value


@functools.cache
def _loader() -> Any:
    """PyYAML's safe loader that stops at a depth.

    Where PyYAML has it, the text is scanned in C, five times as fast. The nodes are put together in Python all the
    same: the C loader cannot be stopped on the way.
    """
    import yaml
    from yaml.composer import Composer

    # the composer first: of two, Python takes the one that is named first
    kinds = (Composer, yaml.CSafeLoader) if yaml.__with_libyaml__ else (yaml.SafeLoader,)

    class Loader(*kinds):  # type: ignore[misc]
        def __init__(self, text: str) -> None:
            kinds[-1].__init__(self, text)
            Composer.__init__(self)
            self.depth = self.nodes = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            self.depth, self.nodes = self.depth + 1, self.nodes + 1
            if self.depth > YAML_DEPTH:
                raise ValueError(f"nested more than {YAML_DEPTH} deep")
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

        def construct_yaml_float(self, node: Any) -> float:
            value = super().construct_yaml_float(node)
            if not math.isfinite(value):
                raise ValueError(f"{node.value} is no finite number")
            return value

        def construct_yaml_int(self, node: Any) -> int:
            if len(node.value) > DIGITS:
                raise ValueError(f"a number of {len(node.value):,} digits")
            return super().construct_yaml_int(node)

    Loader.add_constructor("tag:yaml.org,2002:float", Loader.construct_yaml_float)
    Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_yaml_int)
    return Loader


def _check_nodes(root: Any, loader: Any) -> None:
    """Refuse keys given twice, and a tree that its aliases make endless or far larger than the file."""
    sizes: dict[int, float] = {}

    def size(node: Any, level: int) -> float:
        if level > YAML_DEPTH:
            raise ValueError(f"aliases nested more than {YAML_DEPTH} deep")
        if id(node) not in sizes:
            sizes[id(node)] = math.inf  # stands if the node is met again inside itself
            sizes[id(node)] = 1 + sum(size(part, level + 1) for part in _parts(node))
        return sizes[id(node)]

    if size(root, 0) > EXPANSION * loader.nodes + 1000:
        raise ValueError("aliases make it endless, or far larger than it is written; write them out")


def _parts(node: Any) -> list[Any]:
    """The nodes within a YAML node; of a mapping, keys and values."""
    if node.id != "mapping":
        return node.value if node.id == "sequence" else []
    seen: set[str] = set()
    for key in (key.value for key, _ in node.value if key.id == "scalar" and key.value != "<<"):
        if key in seen:
            raise ValueError(f"the key {shown(key)} stands twice")
        seen.add(key)
    return [part for pair in node.value for part in pair]


def _check_characters(text: str, value: Any) -> None:
    """Refuse half characters (lone surrogates), which no file can be written with. Only an escape makes one."""
    if re.search(r"\\[uU]0*[dD][89a-fA-F]", text):
        try:
            json.dumps(value, ensure_ascii=False, default=str).encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError("half a character (a lone surrogate); it was altered") from None


__all__ = [
    "DIGITS",
    "EXPANSION",
    "JSON_DEPTH",
    "LARGEST_JSON",
    "LARGEST_YAML",
    "YAML_DEPTH",
    "dump_yaml",
    "fault_of",
    "load_yaml",
    "parse_json",
    "parse_yaml",
    "read_bytes",
    "read_json",
    "read_yaml",
]
