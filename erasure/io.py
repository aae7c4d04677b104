"""Files, hashes and foreign text: written whole, read within bounds, printed without effect.

Everything that this library writes goes through here, so that no half-written file is ever seen under its own name; and
everything that others wrote is read here, so that a file cannot cost more than its size or do more than hold data.
Only the standard library is imported at the top: ``erasure doctor`` prints through this module where little else works.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import reprlib
import secrets
import tempfile
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

Content = str | bytes | Iterable[bytes | memoryview]

JSON_DEPTH = 32  # of nesting; an erasure's config needs seven
LARGEST_JSON = 2**28  # bytes; the largest evaluation so far has 2**25
DIGITS = 300  # of one number; a float holds no more
YAML_DEPTH = 32
LARGEST_YAML = 2**20  # bytes, read in half a minute; a suite with fifty thousand names stays below
EXPANSION = 10  # how much larger than written a YAML file may become through its aliases
NAME = 100  # characters of a folder's name
NAME_BYTES = 200  # file systems end at 255, and temporary names add some
CHUNK = 2**22
TOKEN = 6  # random bytes in a temporary name


# --- writing --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside ``path``, renamed to it at the end; removed if anything fails.

    For writers that need a path (``torch.save``, ``save_file``). The suffix is kept: some writers go by it. The result
    is whole whenever the process is killed; after a loss of power the file system decides.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem[:40]}.{secrets.token_hex(TOKEN)}{path.suffix[-20:]}")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_partial(path: str | os.PathLike[str]) -> None:
    """Delete what :func:`writing` left of a file when its process was killed. Only for a file with one writer."""
    path = Path(path)
    begin, end = f".{path.stem[:40]}.", path.suffix[-20:]
    if not path.parent.is_dir():
        return
    for file in path.parent.iterdir():
        if file.name.startswith(begin) and file.name.endswith(end):
            if re.fullmatch(f"[0-9a-f]{{{2 * TOKEN}}}", file.name[len(begin) : len(file.name) - len(end)]):
                file.unlink(missing_ok=True)


def write_atomically(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write a file under a temporary name and rename it, so that no half-written file is ever seen."""
    with writing(path) as temporary:
        temporary.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


def write_json(path: str | os.PathLike[str], value: Any, *, indent: int | None = 2, default: Any = None) -> None:
    """Write plain data as JSON with a newline at the end, whole or not at all."""
    text = json.dumps(value, indent=indent, ensure_ascii=False, default=default)
    write_atomically(path, text + "\n")


@contextlib.contextmanager
def writing_folder(folder: str | os.PathLike[str], *, last: str | None = None) -> Iterator[Path]:
    """A temporary folder beside ``folder`` whose content becomes that of ``folder`` at the end; dropped on failure.

    A new folder appears at once. In one that exists, files are replaced one by one; files of other names stay.

    Args:
        last: the file that makes the rest valid (a config with hashes); it is replaced last.
    """
    folder = Path(folder).resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name[:40]}.") as outer:
        temporary = Path(outer) / "new"  # one further down: the outer one is closed to other users
        temporary.mkdir()
        yield temporary
        if not folder.exists():
            with contextlib.suppress(OSError):  # somebody else made it meanwhile
                temporary.rename(folder)
                return
        _move(temporary, folder, last)


def _move(source: Path, folder: Path, last: str | None) -> None:
    """Move files into a folder one by one, those of folders within it too."""
    folder.mkdir(exist_ok=True)
    for file in sorted(source.iterdir(), key=lambda file: file.name == last):
        if file.is_dir():
            _move(file, folder / file.name, None)
        else:
            os.replace(file, folder / file.name)


# --- hashes ---------------------------------------------------------------------------------------------------------


def sha256(content: Content) -> str:
    """SHA-256 in hexadecimal of bytes, of text in UTF-8, or of pieces one after the other."""
    return _digest(hashlib.sha256(), content).hexdigest()


def blake2b(content: Content, *, size: int) -> str:
    """BLAKE2b in hexadecimal, of ``size`` bytes: quicker than SHA-256 where gigabytes of weights are hashed."""
    return _digest(hashlib.blake2b(digest_size=size), content).hexdigest()


def sha256_file(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file, read in pieces: a file larger than the memory has one too."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any, *, default: Callable[[Any], Any] | None = None, spaced: bool = False) -> str:
    """SHA-256 of plain data as JSON with sorted keys: the same whatever the order and spacing it was written in.

    Args:
        default: how to write what is not plain data (``str``); by default it is a TypeError.
        spaced: with a space behind commas and colons. Caches and published results hold hashes of that form; choose
            the default for new ones.
    """
    separators = (", ", ": ") if spaced else (",", ":")
    return sha256(json.dumps(value, sort_keys=True, default=default, separators=separators))


def seed_of(text: str) -> int:
    """64 bits that depend on the text alone, to start a random generator with."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def tensor_bytes(name: str, tensor: Any, *, described: bool = True) -> Iterator[bytes | memoryview]:
    """The pieces of a tensor to hash: name, dtype and shape (``described``) or the name alone, and its bytes."""
    import torch

    yield f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode() if described else name.encode()
    yield memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def _digest(hasher: Any, content: Content) -> Any:
    if isinstance(content, str):
        content = content.encode("utf-8")
    for piece in [content] if isinstance(content, bytes) else content:
        hasher.update(piece)
    return hasher


# --- reading --------------------------------------------------------------------------------------------------------


def read_bytes(path: str | os.PathLike[str], *, largest: int = LARGEST_JSON) -> bytes:
    """The content of a regular file of at most ``largest`` bytes.

    Raises:
        FileNotFoundError: no such file, or a device, pipe or folder.
        ValueError: it is larger.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; check the path")
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
        raise ValueError(f"{path}: {error}") from None


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
        raise ValueError(f"{path}: expected keys and values, got {type(raw).__name__}; is the file complete?")
    try:
        return TypeAdapter(kind).validate_python(raw)
    except ValidationError as error:
        raise ValueError(f"{path}: {fault_of(error)}") from None


def read_yaml(path: str | os.PathLike[str]) -> Any:
    """Read a YAML file; see :func:`parse_yaml`."""
    raw = read_bytes(path, largest=LARGEST_YAML)
    try:
        return parse_yaml(raw)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


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
    """The first fault of a pydantic ``ValidationError`` in one line: ``key: what is wrong``."""
    first = error.errors()[0]
    fault = printable(first["msg"].removeprefix("Value error, "), limit=400)
    return f"{printable('.'.join(map(str, first['loc'])))}: {fault}" if first["loc"] else fault


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


def _loader() -> Any:
    """PyYAML's safe loader that stops at a depth and at a key given twice. Its C twin cannot be stopped on the way."""
    import yaml

    class Loader(yaml.SafeLoader):
        depth = nodes = 0

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


# --- names and printing ---------------------------------------------------------------------------------------------


def folder_name(text: str, *, longest: int = NAME) -> str:
    """A name for a file or folder that is safe on every system: no separators, no reserved names, not too long.

    Where it is cut, eight digits of a hash keep two long names apart.

    Args:
        longest: characters; fewer where something is put behind it.
    """
    text = unicodedata.normalize("NFC", text)
    name = re.sub(r'[/\\~<>:"|?*]|\.\.', "-", "".join(c if c.isprintable() else "-" for c in text)).strip(" .")
    if re.fullmatch(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?", name):
        name = f"-{name}"
    if len(name) > longest or len(name.encode()) > NAME_BYTES:
        cut = name[: longest - 9].encode()[: NAME_BYTES - 9].decode(errors="ignore").strip(" .")
        name = f"{cut}-{sha256(text.encode('utf-8', 'surrogatepass'))[:8]}"
    return name or "unnamed"


KEPT = frozenset("\u200c\u200d\n\t")  # joiners: emoji, Persian, Hindi
HARMFUL = ("Cc", "Cf", "Cs", "Zl", "Zp")  # controls, bidirectional and other formats, half characters, separators


def printable(text: Any, *, limit: int | None = 200) -> str:
    """Foreign text that does nothing where it is printed: one line, no terminal escapes, no bidirectional overrides.

    What cannot be seen is written out (``\\x1b``); spaces and line breaks become one space. For markup of its own,
    see :func:`markdown` and :func:`rich_text`.

    Args:
        limit: characters; the rest is replaced by an ellipsis. None for all of it.
    """
    text = text if isinstance(text, str) else str(text)
    if cut := limit is not None and len(text) > limit:
        text = text[:limit]
    text = " ".join(text.split())
    if not text.isprintable():
        text = visible(text)
        if limit is not None and len(text) > limit:
            text, cut = text[:limit], True
    return f"{text}…" if cut else text


def visible(text: str) -> str:
    """Foreign text of several lines with what harms written out, for places where spaces mean something (HTML)."""
    return "".join(c if c.isprintable() or c in KEPT else _written_out(c) for c in text)


def shown(value: Any, *, limit: int = 200) -> str:
    """A foreign value in a message: its ``repr``, short whatever its size."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 80
    short.maxlist = short.maxtuple = short.maxdict = short.maxset = 8
    return printable(short.repr(value), limit=limit)


def markdown(text: Any, *, limit: int | None = 200) -> str:
    """Foreign text as itself in Markdown, in a paragraph or the cell of a table: no emphasis, links, HTML or cells."""
    text = re.sub(r"([\\`*\[\]|~$]|(?<!\w)_|_(?!\w))", r"\\\1", printable(text, limit=limit))
    text = text.replace("&", "&amp;").replace("<", "&lt;")
    text = re.sub(r"^(?=>|(#+|[-+=]+)(\s|$))", r"\\", text)  # a quotation, a heading, a list
    return re.sub(r"^(\d+)(?=[.)](\s|$))", r"\1\\", text)


def rich_text(text: Any, *, limit: int | None = 200) -> Any:
    """Foreign text for a rich table or console: no markup, no emoji codes."""
    from rich.text import Text

    return Text(printable(text, limit=limit))


def first_line(error: BaseException, *, limit: int | None = None) -> str:
    """The first line of a foreign error, or its class where it says nothing.

    Args:
        limit: characters; the rest is cut off. None for all of it.
    """
    lines = str(error).strip().splitlines()
    return lines[0].strip()[:limit] if lines else type(error).__name__


def plain(value: Any) -> Any:
    """Plain JSON data; a number that is not finite becomes null."""
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _written_out(character: str) -> str:
    if unicodedata.category(character) not in HARMFUL:
        return character  # unassigned, private, or a space of another width
    code = ord(character)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}"
