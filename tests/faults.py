"""Failures that tests put into a process: at one of its changes of the file system it raises, or dies.

Changes are seen by Python's audit events (a file opened for writing, a folder made, something renamed or deleted), by
``os.fsync``, and by the writes of ``pathlib``, which fail half-way. What C code writes by itself (SQLite) is not seen.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
NEEDS_ROOM = ("open", "mkdir", "write", "fsync")  # what fails on a full disk; deleting and renaming do not
DIED = 9


class Faults:
    """What happens to changes below a folder.

    Args:
        kind: ``count`` (nothing), ``error`` (one change raises EIO), ``full`` (from one change on nothing has room),
            ``read-only`` (no change is allowed from the beginning), ``interrupt`` (Ctrl-C at one change, and again at
            the next one, which is that of whoever cleans up), or ``kill`` (the process dies before one change, or
            half-way through a write).
        at: which change, from 0.

    Attributes:
        seen: the changes so far.
    """

    def __init__(self, folder: Path, kind: str, at: int = 0) -> None:
        self.folder, self.kind, self.at, self.seen = os.path.realpath(folder), kind, at, list[str]()

    def __call__(self, what: str, path: Any, *, half: Callable[[], Any] = lambda: None) -> None:
        if not isinstance(path, str | bytes | os.PathLike):
            return
        where = os.path.abspath(os.fsdecode(path))
        if not where.startswith(self.folder) or os.path.basename(where) == ".lock":
            return
        self.seen.append(what)
        now = len(self.seen) - 1
        if self.kind == "kill" and now == self.at:
            half()
            os._exit(DIED)
        if self.kind == "error" and now == self.at:
            half()
            raise OSError(errno.EIO, "Input/output error", where)
        if self.kind == "interrupt" and now in (self.at, self.at + 1):
            half()
            raise KeyboardInterrupt
        if self.kind == "full" and now >= self.at and what in NEEDS_ROOM:
            half()
            raise OSError(errno.ENOSPC, "No space left on device", where)
        if self.kind == "read-only":
            raise PermissionError(errno.EACCES, "Permission denied", where)


_active: Faults | None = None
_hooked = False


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _active is None:
        return
    if event == "open":
        path, mode, flags = arguments
        if (isinstance(flags, int) and flags & WRITES) or (isinstance(mode, str) and set(mode) & set("wax+")):
            _active("open", path)
    elif event in ("os.rename", "os.mkdir", "os.rmdir", "os.remove"):
        path = arguments[0]
        if (
            event in ("os.rmdir", "os.remove") and arguments[-1] != -1
        ):  # relative to a folder that is open, as rmtree does
            path = os.path.join(os.readlink(f"/proc/self/fd/{arguments[-1]}"), path)
        _active(event.removeprefix("os."), path)


@contextlib.contextmanager
def _unseen() -> Iterator[None]:
    global _active
    before, _active = _active, None
    try:
        yield
    finally:
        _active = before


@contextlib.contextmanager
def put(faults: Faults) -> Iterator[Faults]:
    """The block's changes go through the faults. Only for a process of its own: an audit hook stays."""
    global _active, _hooked
    if not _hooked:
        sys.addaudithook(_audit)
        _hooked = True
    fsync, write = os.fsync, Path.write_bytes

    def synced(descriptor: int) -> None:
        faults("fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def written(path: Path, content: bytes) -> int:
        with _unseen():  # it is the write that counts, and not that the file is opened for it
            faults("write", path, half=lambda: write(path, content[: len(content) // 2]))
            return write(path, content)

    os.fsync, Path.write_bytes = synced, written  # type: ignore[assignment,method-assign]
    _active = faults
    try:
        yield faults
    finally:
        _active = None
        os.fsync, Path.write_bytes = fsync, write  # type: ignore[method-assign]


def fork(work: Callable[[], Any]) -> int:
    """Do something in a fork of this process; its number. It ends with status 0, or 1 where it raised."""
    if (child := os.fork()) == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            with contextlib.suppress(BaseException):
                traceback.print_exc()
                sys.stderr.flush()
        finally:
            os._exit(status)
    return child


def ended(child: int) -> int:
    """Wait for a fork: its exit status."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def forked(work: Callable[[], Any]) -> int:
    """Do something in a fork of this process, and wait for it: its exit status."""
    return ended(fork(work))
