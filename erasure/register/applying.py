"""Everything in force, erased together from the base: one closed form, one folder, one row of the log.

Nothing is put on top of an earlier erasure, so nothing drifts, and a withdrawn concept is back as if it had never been
asked for. Every set has a folder of its own, and the log names the one in force: a process that is killed leaves either
the old one in force or the new one.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from erasure.api import erase
from erasure.artifact import Erasure
from erasure.artifact.files import CONFIG, SYSTEM, WEIGHTS
from erasure.artifact.record import component_prints
from erasure.backbone import Backbone, backbone_of
from erasure.backbone.fingerprint import matches
from erasure.io import folder_name, sha256_file, sha256_json, shown
from erasure.register.entries import Entry
from erasure.register.joint import Joint, Overruled, joint, recipe_of
from erasure.register.register import Register

NAME = "register"  # of every erasure it makes: a new one takes the place of the old one
TRIES = 5  # times that a set is solved again because somebody changed it meanwhile
DIGITS = 16  # of a set's key, in the name of its folder


@dataclasses.dataclass(frozen=True)
class Applied:
    """What is in force on a base after :func:`apply`.

    Attributes:
        base: its name.
        folder: of the erasure; None where nothing is in force.
        hash: SHA-256 of the erasure's files together; "" where nothing is in force.
        entries: everything that is in force, in its order.
        served: the requests that were served by it for the first time.
        overruled: what gave way to an erasure.
        seconds: that the solution took; 0 where the folder was there already.
    """

    base: str
    folder: Path | None
    hash: str
    entries: tuple[Entry, ...]
    served: tuple[Entry, ...]
    overruled: tuple[Overruled, ...]
    seconds: float


def prints_of(pipe: Any) -> dict[str, dict[str, Any]]:
    """Fingerprints of a pipeline's parts, for :meth:`~erasure.register.Register.add_base`."""
    return component_prints(backbone_of(pipe))


def apply(register: Register, pipe: Any, base: str, *, folder: Path | None = None) -> Applied:
    """Erase everything that is received or in force for a base, together, and record it.

    Args:
        pipe: the base model, without erasures. It is left as it was.
        base: its name in the register.
        folder: where folders of sets are made; one beside the register's file by default, named after it, or in the
            current folder where it lies on a server.

    Raises:
        ValueError: the pipeline is not the base, or an entry cannot be erased; the message names it.
        TimeoutError: the register was changed again and again while the set was solved.
        OSError: no room or no right to write; what was in force stays in force.
    """
    backbone = backbone_of(pipe)
    check_base(register, backbone, base)
    root = (folder or register.beside("erasures")) / folder_name(base)
    for _ in range(TRIES):
        entries = register.wanted(base)
        recipe = recipe_of(register.settings)
        key = key_of(entries, recipe, register.bases()[base].hash)
        whole, start = joint(entries), time.perf_counter()
        detail: dict[str, Any] = {"key": key, "settings": recipe, "folder": "", "files": {}, "hash": ""}
        seconds = 0.0
        if entries:
            there = root / key
            if not _is_made(register, base, key, there):
                check_readable(backbone, entries)
                _make(pipe, whole, recipe, there)
                seconds = time.perf_counter() - start
            files = hashes_of(there)
            detail |= {"folder": _recorded(there, register), "files": files, "hash": sha256_json(files)}
        detail["overruled"] = [one.plain() for one in whole.overruled]
        served = register.put_in_force(base, entries, detail)
        if served is not None:
            made = root / key if entries else None
            return Applied(base, made, detail["hash"], tuple(entries), tuple(served), whole.overruled, seconds)
    raise TimeoutError(f"{register.name} was changed {TRIES} times while the set was solved; run apply again")


def key_of(entries: Sequence[Entry], recipe: dict[str, Any], base: str) -> str:
    """What a set is made of, as a few digits: entries, method and base. Names go in by their seals alone."""
    from erasure import __version__

    made_of = {"entries": [[e.id, e.seal] for e in entries], "recipe": recipe, "base": base, "version": __version__}
    return sha256_json(made_of)[:DIGITS]


def hashes_of(folder: Path) -> dict[str, str]:
    """SHA-256 of the files of an erasure's folder that are read back."""
    return {name: sha256_file(folder / name) for name in (CONFIG, WEIGHTS, SYSTEM) if (folder / name).exists()}


def folder_of(register: Register, detail: dict[str, Any]) -> Path:
    """The folder that a row of the log names."""
    return (register.home or Path()) / str(detail["folder"])


def check_base(register: Register, backbone: Backbone, base: str) -> None:
    """Raise ValueError unless a pipeline is the base model that is registered under a name."""
    if (known := register.bases().get(base)) is None:
        register.wanted(base)  # which says that it is unknown
        return
    found = component_prints(backbone)
    wrong = [p for p in {**known.prints, **found} if not matches(known.prints.get(p, {}), found.get(p, {"layout": ""}))]
    if wrong:
        raise ValueError(
            f"this pipeline is not the base {shown(base)} of the register; its {wrong[0]} differs; open the model that "
            "was registered, or register this one under a name of its own"
        )


def check_readable(backbone: Backbone, entries: Sequence[Entry]) -> None:
    """Raise ValueError, naming the request, unless the model's text encoders can read all its names."""
    for entry in entries:
        subject = entry.subject
        names = (
            [] if subject is None else [*subject.phrases, *([subject.concept.anchor] * bool(subject.concept.anchor))]
        )
        try:
            backbone.check_lengths(names)
        except ValueError as error:
            raise ValueError(f"the request {shown(entry.request)}: {error}") from None
        for name in names:
            if unknown := backbone.unknown_word(name):
                raise ValueError(
                    f"the request {shown(entry.request)}: the model does not know {shown(unknown[0])} in "
                    f"{shown(name)}; withdraw it and enter it with names that the model knows"
                )


def _make(pipe: Any, whole: Joint, recipe: dict[str, Any], folder: Path) -> None:
    chosen = {"preset": recipe["preset"], **recipe["settings"]}
    edit = erase(
        pipe, whole.concepts, recipe["method"], keep=whole.keep, name=NAME, apply=False, progress=False, **chosen
    )
    edit.save_pretrained(folder)


def _is_made(register: Register, base: str, key: str, folder: Path) -> bool:
    """Whether the set in force is this one, and its folder is as it was written."""
    last = register.applied(base)
    if last is None or last.detail["key"] != key or not folder.is_dir():
        return False
    try:
        Erasure.from_pretrained(folder)
    except (ValueError, FileNotFoundError):
        return False
    return hashes_of(folder) == last.detail["files"]


def _recorded(folder: Path, register: Register) -> str:
    """The folder as the log has it: from that of the register's file, if it lies there; else all of it."""
    folder, home = folder.absolute(), register.home
    return folder.relative_to(home).as_posix() if home and folder.is_relative_to(home) else folder.as_posix()
