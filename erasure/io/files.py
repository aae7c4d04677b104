"""Files written whole: under a temporary name, brought onto the disk, then renamed."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from erasure.io.text import meant, shown

TOUCHED = ".touched"
TOKEN = 6  # random bytes in a temporary name
LONGEST = 255  # bytes of a name, on every file system in use
MOST_BESIDE = 1000  # entries of a folder that are looked through for the one that was meant


@contextlib.contextmanager
def writing(path: str | os.PathLike[str], *, durable: bool = True) -> Iterator[Path]:
    """A temporary path beside ``path``, renamed to it at the end; removed if anything fails.

    For writers that need a path (``torch.save``, ``save_file``). The suffix is kept: some writers go by it. The result
    is whole whenever the process is killed or the machine loses power.

    Args:
        durable: wait until the file is on the disk (some milliseconds) before it gets its name, and until its name is.
            Off for what can be made again and is checked when it is read, such as a cache of pictures.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem[:40]}.{secrets.token_hex(TOKEN)}{path.suffix[-20:]}")
    try:
        temporary.touch()
        usual = temporary.stat().st_mode
        with _system_errors(temporary):
            yield temporary
        temporary.chmod(usual)  # safetensors writes files that no other user may read, such as a server's
        if durable:
            _sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        _sync(path.parent)


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


def remove_partials(folder: Path) -> None:
    """The same for everything in a folder, temporary folders of :func:`writing_folder` too. Only with one writer."""
    for path in [*folder.rglob(".*")]:
        random = r"[a-z0-9_]{8}" if path.is_dir() else rf"[0-9a-f]{{{2 * TOKEN}}}(\.[^.]+)?"
        if not re.fullmatch(rf"\..+\.{random}", path.name):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def write_atomically(path: str | os.PathLike[str], content: str | bytes, *, durable: bool = True) -> None:
    """Write a file under a temporary name and rename it, so that no half-written file is ever seen.

    Args:
        durable: see :func:`writing`.
    """
    with writing(path, durable=durable) as temporary:
        temporary.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


def write_json(
    path: str | os.PathLike[str],
    value: Any,
    *,
    indent: int | None = 2,
    default: Any = None,
    durable: bool = True,
) -> None:
    """Write plain data as JSON with a newline at the end, whole or not at all.

    Args:
        durable: see :func:`writing`.
    """
    text = json.dumps(value, indent=indent, ensure_ascii=False, default=default)
    write_atomically(path, text + "\n", durable=durable)


def named(path: str | os.PathLike[str]) -> Path:
    """A path that somebody gave; an empty one would be the current folder.

    Raises:
        ValueError: it is empty, or no path, or a name in it is too long or no text.
    """
    if not isinstance(path, str | os.PathLike) or "\0" in os.fspath(path):
        raise ValueError(f"no path; got {shown(path)}; give a folder or file")
    if not os.fspath(path).strip():
        raise ValueError(f"an empty path; got {os.fspath(path)!r}; give a folder or file, '.' for the current folder")
    if any("\ud800" <= character <= "\udfff" for character in str(path)):  # which safetensors cannot open
        raise ValueError(f"a path of bytes that are no text; got {shown(str(path))}; rename it")
    if long := [name for name in Path(path).parts if len(os.fsencode(name)) > LONGEST]:
        raise ValueError(f"a name of more than {LONGEST} bytes; got {shown(long[0])}; give a shorter one")
    return Path(path)


def check_file(path: str | os.PathLike[str]) -> None:
    """Refuse a file that cannot be written; before the work.

    Raises:
        ValueError: it is a folder, or a part of its path is a file.
        PermissionError: its folder may not be written to.
    """
    path = named(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give a file")
    check_writable(path.parent)


def check_writable(folder: str | os.PathLike[str]) -> None:
    """Refuse a folder that cannot be made or written to; before hours of work.

    Raises:
        ValueError: it is empty, or it or a part of its path is a file.
        PermissionError: nothing can be made in it, which is tried.
        OSError: the same on a full or broken disk.
    """
    folder = named(folder)
    there = next(path for path in [folder, *folder.absolute().parents] if os.path.lexists(path))
    if not there.is_dir():
        raise ValueError(f"{there} is {'a file' if there.exists() else 'a link to nothing'}; give a folder")
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".erasure-", dir=there))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise
        raise PermissionError(f"{there} may not be written to; give another folder") from error  # /proc: no such file


def beside(path: str | os.PathLike[str]) -> str:
    """`` (did you mean 'superhero-uce'?)`` where a file or folder of nearly this name lies in its folder; else ""."""
    path = Path(path).expanduser()
    try:
        names = [e.name for e in itertools.islice(os.scandir(path.parent), MOST_BESIDE) if e.name != path.name]
    except (OSError, ValueError):
        return ""
    return meant(path.name, names) if path.name else ""


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
        probe = temporary / TOUCHED
        probe.touch()
        usual = probe.stat().st_mode
        probe.unlink()
        with _system_errors(temporary):
            yield temporary
        for part in sorted(temporary.rglob("*"), reverse=True):  # what is in a folder before the folder
            if part.is_file():
                part.chmod(usual)  # see writing()
            _sync(part)
        _sync(temporary)
        if not _renamed(temporary, folder):
            _move(temporary, folder, last)
            _sync(folder)
        _sync(folder.parent)


def _renamed(temporary: Path, folder: Path) -> bool:
    """Whether the new folder could take the place at once, where there was none."""
    if folder.exists():
        return False
    try:
        temporary.rename(folder)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.EACCES):  # somebody else made it meanwhile
            raise
        return False
    return True


def _move(source: Path, folder: Path, last: str | None) -> None:
    """Move files into a folder one by one, those of folders within it too."""
    folder.mkdir(exist_ok=True)
    for file in sorted(source.iterdir(), key=lambda file: file.name == last):
        if file.is_dir():
            _move(file, folder / file.name, None)
        else:
            os.replace(file, folder / file.name)


@contextlib.contextmanager
def _system_errors(path: Path) -> Iterator[None]:
    """The error of a full disk as Python has it, from safetensors too, which writes its number into a text."""
    try:
        yield
    except Exception as error:
        found = re.search(r"\(os error (\d+)\)", str(error)) if type(error).__name__ == "SafetensorError" else None
        if found is None:
            raise
        number = int(found[1])
        raise OSError(number, os.strerror(number), str(path)) from error


def _sync(path: Path) -> None:
    """Wait until the disk has a file, or the names in a folder."""
    if os.name == "nt" and path.is_dir():
        return  # a folder cannot be opened there
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that cannot
            raise
    finally:
        os.close(descriptor)


def cache_folder() -> Path | None:
    """Where the library keeps what it can make again: ``ERASURE_CACHE``, or ``erasure`` in the user's cache folder.

    Anything in it may be deleted at any time. None where ``ERASURE_CACHE`` is ``off``.

    Raises:
        RuntimeError: the user has no home folder.
    """
    chosen = os.environ.get("ERASURE_CACHE", "")
    if chosen:
        return None if chosen == "off" else Path(chosen).expanduser()
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path("~/.cache").expanduser()) / "erasure"


__all__ = [
    "cache_folder",
    "check_file",
    "check_writable",
    "named",
    "remove_partial",
    "remove_partials",
    "write_atomically",
    "write_json",
    "writing",
    "writing_folder",
]
