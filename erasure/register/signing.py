"""The end of a register's log, signed with a key that its user has already.

A chain of hashes shows that rows were not changed one by one. Whoever may write the file can write the whole chain
anew, and the new one holds as well. An older signature shows it: it names a row and its hash, and cannot be made anew
without the key. :func:`sign` writes one file for each signature, beside the register and not in it: whoever can write
the register could drop a row of signatures, but not the copy that somebody else keeps.

Keys belong to OpenSSH (PROTOCOL.sshsig): ``ssh-keygen -Y sign`` reads the key, asks for its passphrase, or has
ssh-agent or a hardware key sign. Ed25519, RSA, ECDSA and their FIDO forms work. This module reads no key.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from erasure.io import (
    beside,
    check_writable,
    named,
    parse_json,
    printable,
    read_bytes,
    sha256,
    shown,
    write_atomically,
)
from erasure.register.chain import Event
from erasure.register.entries import iso, moment_of, now
from erasure.register.register import Register

NAMESPACE = "register@diffusion-erasure.github.io"  # a signature made for anything else does not count here
WHAT = "end of the log of a take-down register, version 1"
SUFFIX = ".signature"
ARMOR = b"-----BEGIN SSH SIGNATURE-----\n"  # what stands before it in the file is what was signed
LARGEST = 2**16  # bytes of a file; one of RSA with 4096 bits has 2**11
DIGITS = 8  # of a hash in the name of a file
PATH = str | os.PathLike[str]


@dataclasses.dataclass(frozen=True)
class Statement:
    """What is signed: how the log of a register ended at a time.

    Attributes:
        register: hash of the log's first row, which tells registers apart.
        row: number of its last row.
        hash: hash of that row, which depends on every row before.
        time: when it was signed, by the signer's clock.
    """

    register: str
    row: int
    hash: str
    time: datetime.datetime

    def to_bytes(self) -> bytes:
        """Text from which :meth:`from_bytes` makes the same statement."""
        facts = {"what": WHAT, **dataclasses.asdict(self), "time": iso(self.time)}
        return f"{json.dumps(facts, indent=2)}\n".encode()

    @classmethod
    def from_bytes(cls, text: bytes) -> Statement:
        """A statement that was read.

        Raises:
            ValueError: it is another kind of text, or a value in it is impossible.
        """
        facts: Any = parse_json(text)
        if not isinstance(facts, dict) or facts.pop("what", None) != WHAT or facts.keys() != TYPES.keys():
            raise ValueError("it says nothing about a register's log, or is of a newer version; give another file")
        if wrong := [key for key, value in facts.items() if type(value) is not TYPES[key]]:
            raise ValueError(f"{wrong[0]} cannot be {shown(facts[wrong[0]])}; it was changed; ask for the first file")
        time = moment_of("the time of a signature", facts["time"])
        if not 2000 <= time.year <= 9000:
            raise ValueError(f"nothing was signed in {time.year}; it was changed; ask for the first file")
        return cls(**{**facts, "time": time})


TYPES = {"register": str, "row": int, "hash": str, "time": str}  # of a statement, as JSON has it


@dataclasses.dataclass(frozen=True)
class Signature:
    """A signature that holds: its file, what was signed, and by whom (a name in the file of allowed signers)."""

    path: Path
    statement: Statement
    signer: str


@dataclasses.dataclass(frozen=True)
class Checked:
    """What a check found.

    Attributes:
        signatures: those that hold, in the order of their rows.
        problems: what is wrong with the log, then with each other signature; empty where all is well.
    """

    signatures: tuple[Signature, ...]
    problems: tuple[str, ...]


def sign(register: Register, key: PATH, *, out: PATH | None = None) -> Path:
    """Sign how the log ends now. Returns the new file, of which somebody else should keep a copy.

    ssh-keygen asks for a passphrase, or for a touch of a hardware key, on the terminal.

    Args:
        key: file of a private key; or of a public one, whose private key is in ssh-agent.
        out: folder of the file. By default it lies beside the register and is named after it: "register-signatures".

    Raises:
        ValueError: the log is empty or does not hold, so that there is nothing to stand for; or ssh-keygen refused.
        FileNotFoundError: no such key, or no ssh-keygen on this machine.
        OSError: the file cannot be written.
    """
    own = _existing("key", key)
    folder = register.beside("signatures") if out is None else named(out).expanduser()
    check_writable(folder)  # before somebody types a passphrase
    problems, rows = register.check(), register.log()
    if not rows:
        raise ValueError("the log is empty; nothing was signed; make a register with `erasure register init`")
    if problems:
        raise ValueError(
            f"the log does not hold: {problems[0]}; nothing was signed; see `erasure register log --check`"
        )
    text = Statement(rows[0].hash, rows[-1].id, rows[-1].hash, now()).to_bytes()
    content = text + _signed(text, own)
    path = folder / f"row-{rows[-1].id}-{sha256(content)[:DIGITS]}{SUFFIX}"
    write_atomically(path, content)
    return path


def check(register: Register, signatures: PATH | Sequence[PATH], signers: PATH, *, head: str | None = None) -> Checked:
    """Check that the log holds, and that it still has every row that was signed, by somebody who may sign.

    Args:
        signatures: files of :func:`sign`, or folders of them.
        signers: who may sign, in OpenSSH's format of allowed signers: on each line a name and a public key. Take it
            from where the register's keeper cannot write. Where a line limits the time of its key, the time in the
            statement counts, so that a key that was replaced still stands for what it signed before.
        head: a hash that was noted earlier; see :meth:`Register.check`.

    Raises:
        FileNotFoundError: no such file, no file in a folder, or no ssh-keygen on this machine.
    """
    allowed, files = _existing("file of allowed signers", signers), _files(signatures)
    problems = register.check(head=head)
    try:
        rows = register.log()
    except ValueError as error:
        return Checked((), (*problems, f"{error}; no signature was compared"))
    found = []
    for path in files:
        try:
            signature = _read(path, allowed)
            _compare(signature.statement, rows)
            found.append(signature)
        except ValueError as error:
            problems.append(f"{path}: {error}")
    found.sort(key=lambda one: (one.statement.row, one.statement.time))
    return Checked(tuple(found), tuple(problems))


def _compare(statement: Statement, rows: Sequence[Event]) -> None:
    """Raise ValueError unless the log still has the row that was signed."""
    hashes = {row.id: row.hash for row in rows}
    signed = f"row {statement.row}, signed on {statement.time:%Y-%m-%d %H:%M} UTC,"
    if not rows:
        raise ValueError(f"the log is empty; {signed} was cut off")
    if statement.register != rows[0].hash:
        raise ValueError(f"{signed} is of another register, or this log was written anew from its first row on")
    if statement.row not in hashes:
        raise ValueError(f"{signed} is not in the log: rows were cut off")
    if statement.hash != hashes[statement.row]:
        raise ValueError(f"{signed} is another one in the log: rows were written anew")


# --- files ------------------------------------------------------------------------------------------------------------


def _existing(noun: str, path: PATH) -> Path:
    file = named(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"no {noun} at {file}{beside(file)}; check the path")
    return file


def _files(paths: PATH | Sequence[PATH]) -> list[Path]:
    """Every signature of files and folders, each once."""
    found: dict[Path, None] = {}
    for given in [paths] if isinstance(paths, str | os.PathLike) else paths:
        path = named(given).expanduser()
        own = sorted(path.glob(f"*{SUFFIX}")) if path.is_dir() else [_existing("signature", path)]
        if not own:
            raise FileNotFoundError(f"no signature in {path}; their names end in {SUFFIX}; give another folder")
        found |= dict.fromkeys(own)
    return list(found)


def _read(path: Path, signers: Path) -> Signature:
    """A file whose signature is by one of the allowed signers; ValueError where it is not."""
    content = read_bytes(path, largest=LARGEST).replace(b"\r\n", b"\n")  # git and mail may have changed line ends
    text, mark, rest = content.partition(ARMOR)
    if not mark:
        raise ValueError("there is no signature in it; it is incomplete or was changed")
    statement = Statement.from_bytes(text)
    return Signature(path, statement, _signer(text, mark + rest, signers, statement.time))


# --- ssh-keygen -------------------------------------------------------------------------------------------------------


def _signed(text: bytes, key: Path) -> bytes:
    """The signature of a text. It is given as a file: only then does ssh-keygen ask for passphrases on the terminal."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "statement")
        write_atomically(file, text, durable=False)
        command = [_ssh_keygen(), "-q", "-Y", "sign", "-f", str(key), "-n", NAMESPACE, str(file)]
        if subprocess.run(command, check=False).returncode != 0:
            raise ValueError(
                f"ssh-keygen did not sign with {key}, and said why above; nothing was written; check the key and its "
                "passphrase, or whether ssh-agent has it"
            )
        return file.with_suffix(".sig").read_bytes()


def _signer(text: bytes, armor: bytes, signers: Path, time: datetime.datetime) -> str:
    """The name of the allowed signer who signed a text; ValueError where nobody of them did."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "statement.sig")
        write_atomically(file, armor, durable=False)
        local = f"{time.astimezone():%Y%m%d%H%M%S}"  # of this machine's zone, as are the times in the file
        common = ["-s", str(file), "-f", str(signers), f"-Overify-time={local}"]
        names, said = _asked("find-principals", *common)
        if names is None:
            raise ValueError(f"none of the keys in {signers} signed it, or may sign registers ({said})")
        for name in names.replace(",", "\n").splitlines():
            answer, said = _asked("verify", *common, "-I", name, "-n", NAMESPACE, text=text)
            if answer is not None:
                return name
        raise ValueError(f"what was signed is not what it says now, or the signature was changed ({said})")


def _asked(action: str, *arguments: str, text: bytes = b"") -> tuple[str | None, str]:
    """What ssh-keygen answers, None where it says no; and the first line of what it says about that."""
    done = subprocess.run([_ssh_keygen(), "-Y", action, *arguments], input=text, capture_output=True, check=False)
    said = printable((done.stderr.decode("utf-8", "replace").strip().splitlines() or ["no reason"])[0].strip(" ."))
    return (os.fsdecode(done.stdout) if done.returncode == 0 else None), said


def _ssh_keygen() -> str:
    if (program := shutil.which("ssh-keygen")) is None:
        raise FileNotFoundError(
            "signatures are made and checked by ssh-keygen, which is not on this machine; install OpenSSH 8.8 or newer"
        )
    return program
