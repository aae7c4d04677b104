"""A server of PostgreSQL for tests: made in a folder of its own, reached by a socket there, thrown away afterwards."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import psycopg
import pytest

NEEDED = (
    "needs a PostgreSQL server of its own: initdb on the PATH or in /usr/lib/postgresql/*/bin (Debian: apt-get install "
    "postgresql), and for root a user postgres or nobody to run it as"
)
PASSWORD = "p/w@h#1"
QUICK = ("fsync=off", "full_page_writes=off", "autovacuum=off", "listen_addresses=", "shared_buffers=16MB")


def programs() -> Path | None:
    """The folder of initdb and postgres, the newest there is."""
    found = [shutil.which("initdb"), *sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))[::-1]]
    return next((Path(path).resolve().parent for path in found if path), None)


def runner() -> dict[str, object] | None:
    """As whom the server runs: it refuses root. None where there is nobody else."""
    if os.getuid():
        return {}
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            user = pwd.getpwnam(name)
            return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    return None


class Server:
    """A running server.

    Attributes:
        folder: of its data and its socket.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def address(self, *, user: str = "postgres", password: str = "", **options: str) -> str:
        """Of its only database."""
        secret = f":{quote(password, safe='')}" if password else ""
        asked = "&".join(
            f"{key}={quote(value, safe='')}" for key, value in {"host": f"{self.folder}", **options}.items()
        )
        return f"postgresql://{user}{secret}@/postgres?{asked}"

    def schema(self, name: str, **options: str) -> str:
        """The address of a new schema."""
        self.run(f"CREATE SCHEMA {name}")
        return self.address(options=f"-csearch_path={name}", **options)

    def run(self, *statements: str, schema: str = "public") -> list[list[tuple]]:
        """What any other program can do; returns the rows of each statement."""
        with psycopg.connect(self.address(options=f"-csearch_path={schema}"), autocommit=True) as connection:
            cursors = [connection.execute(statement) for statement in statements]
            return [cursor.fetchall() if cursor.description else [] for cursor in cursors]

    def files(self) -> bytes:
        """All that tables and statistics hold on the disk; not the write-ahead log."""
        self.run("CHECKPOINT")
        files = (path for path in (self.folder / "data" / "base").rglob("*") if path.is_file())
        return b"".join(path.read_bytes() for path in files)


@contextlib.contextmanager
def server() -> Iterator[Server]:
    """Skips the test where none can be started."""
    bin, who = programs(), runner()
    if bin is None or who is None:
        pytest.skip(NEEDED)
    folder = Path(tempfile.mkdtemp(prefix="pg-"))  # a socket's path must be short
    process = None
    try:
        if who:
            os.chown(folder, who["user"], who["group"])  # type: ignore[arg-type]
        options = {"cwd": folder, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, **who}
        make = [
            bin / "initdb",
            "-D",
            "data",
            "-U",
            "postgres",
            "-A",
            "trust",
            "-E",
            "UTF8",
            "--locale=C.UTF-8",
            "--no-sync",
        ]
        subprocess.run(make, check=True, **options)  # type: ignore[call-overload]
        settings = [word for setting in QUICK for word in ("-c", setting)]
        process = subprocess.Popen([bin / "postgres", "-D", "data", "-k", folder, *settings], **options)  # type: ignore[call-overload]
        made = Server(folder)
        for _ in range(600):
            with contextlib.suppress(psycopg.OperationalError):
                made.run("SELECT 1")
                break
            assert process.poll() is None, "the server has ended"
            time.sleep(0.05)
        yield made
    finally:
        if process is not None:
            process.send_signal(signal.SIGINT)  # at once, without waiting for who is connected
            process.wait()
        shutil.rmtree(folder)
