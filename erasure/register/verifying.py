"""Is what is in force what the register says, and does it do anything? Every fault in a sentence of its own."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from erasure.artifact import Erasure, OperatorErasure
from erasure.backbone import Backbone, backbone_of
from erasure.concept import Concept
from erasure.io import sha256_json
from erasure.methods.closed_form import rows
from erasure.methods.quick_report import quick_report
from erasure.methods.ridge import Solution
from erasure.register.applying import check_base, folder_of, hashes_of, key_of
from erasure.register.entries import Entry
from erasure.register.joint import joint, recipe_of
from erasure.register.register import Register
from erasure.wording import folded

FAINT = 0.05  # relative change of a name's embedding below which an entry is hardly touched
Judge = Callable[[Erasure], Sequence[str]]


@dataclasses.dataclass(frozen=True)
class Verification:
    """What was found.

    Attributes:
        base: its name.
        folder: of the erasure in force; None where there is none.
        problems: what is wrong; empty where everything is as the register says.
        notes: what to know beside that.
        report: the quick report of the whole erasure, space by space.
        moved: request to the relative change ``|Tx - x| / |x|`` of the last word of its names, the smallest of them.
    """

    base: str
    folder: Path | None
    problems: tuple[str, ...]
    notes: tuple[str, ...]
    report: dict[str, Any]
    moved: dict[str, float]


def verify(register: Register, pipe: Any, base: str, *, judge: Judge | None = None) -> Verification:
    """Check what is in force on a base, and record the check in the log.

    It reads the log and the tables, the folder and its hashes, compares concepts, keep list and base model with the
    register, and measures the edit on embeddings, which draws no picture.

    Args:
        pipe: the base model, without erasures.
        judge: evaluates the erasure, such as by pictures; returns what is wrong.

    Raises:
        ValueError: the base is unknown, or the pipeline is another model.
    """
    backbone = backbone_of(pipe)
    check_base(register, backbone, base)
    problems, notes = register.check(), list[str]()
    last, entries = register.applied(base), register.wanted(base)
    edit, folder = None, None
    report: dict[str, Any] = {}
    moved: dict[str, float] = {}
    if last is None:
        problems.append("nothing was applied to this base yet; run `erasure register apply`")
    else:
        problems += _stale(register, base, last.detail, entries)
        if last.detail["entries"]:
            folder = folder_of(register, last.detail)
            edit, wrong = _opened(folder, last.detail)
            problems += wrong
        else:
            notes.append("nothing is in force: the base is used as it is")
    if edit is not None and last is not None:
        problems += _other(register, edit, backbone, last.detail["entries"])
        report, remarks = _report(backbone, edit)
        problems += [r for r in remarks if r.startswith("the weights did not move")]
        notes += [r for r in remarks if not r.startswith("the weights did not move")]
        moved = _moved(register, backbone, edit)
        problems += [
            f"{request}: the embedding of a name moves by {100 * by:.1f} % only; the erasure hardly touches it"
            for request, by in moved.items()
            if by < FAINT
        ]
        if judge is not None:
            problems += judge(edit)
    detail = {
        "base": base,
        "hash": "" if last is None else last.detail["hash"],
        "problems": problems,
        "moved": {request: round(by, 4) for request, by in moved.items()},
        "groups": {space: _groups(found) for space, found in report.items()},
    }
    register.record_check(detail)
    return Verification(base, folder, tuple(problems), tuple(notes), report, moved)


def _groups(report: dict[str, Any]) -> dict[str, float]:
    """How far the layers' outputs move for target, neighbours and other prompts, of a quick report."""
    return {name: round(part["moved"], 4) for name, part in report.items() if isinstance(part, dict)}


def _stale(register: Register, base: str, detail: dict[str, Any], entries: Sequence[Entry]) -> list[str]:
    """What changed since the erasure was made."""
    every = {entry.id: entry for entry in register.entries()}
    present, wanted = set(detail["entries"]), {entry.id for entry in entries}
    gone = [every[id].request for id in detail["entries"] if id not in wanted and id in every]
    found = []
    if gone:
        found.append(f"withdrawn and still erased: {', '.join(gone)}; run `erasure register apply`")
    if missing := [entry.request for entry in entries if entry.id not in present]:
        found.append(f"not in force yet: {', '.join(missing)}; run `erasure register apply`")
    recipe = recipe_of(register.settings)
    if not found and key_of(entries, recipe, register.bases()[base].hash) != detail["key"]:
        found.append(
            "the method, its settings or files, or the library's version changed since it was made; run `erasure "
            "register apply`"
        )
    return found


def _opened(folder: Path, detail: dict[str, Any]) -> tuple[Erasure | None, list[str]]:
    """The erasure of a folder, and what is wrong with its files."""
    try:
        edit = Erasure.from_pretrained(folder)
    except (ValueError, OSError) as error:
        return None, [f"the erasure in force cannot be opened: {error}"]
    files = hashes_of(folder)
    changed = [name for name in {**files, **detail["files"]} if files.get(name) != detail["files"].get(name)]
    if changed or sha256_json(files) != detail["hash"]:
        return edit, [f"{folder}: {', '.join(changed) or 'the hash'} is not what the log recorded; run apply again"]
    return edit, []


def _other(register: Register, edit: Erasure, backbone: Backbone, ids: Sequence[int]) -> list[str]:
    """Where an erasure is not of the concepts and the base that the register says."""
    every = {entry.id: entry for entry in register.entries()}
    made_of = [every[id] for id in ids if id in every]
    found = []
    if len(made_of) == len(ids) and all(entry.subject is not None for entry in made_of):
        expected = joint(made_of)
        present = TypeAdapter(tuple[Concept, ...]).validate_python(edit.config.concepts)
        if present != expected.concepts:
            names = {c.name for c in present} ^ {c.name for c in expected.concepts}
            found.append(f"the erasure is of other concepts than the register says; they differ in {len(names)} names")
        if tuple(edit.config.keep) != expected.keep:
            found.append("the erasure keeps other prompts than the register says")
    try:
        edit.check_base(backbone)
    except ValueError as error:
        found.append(str(error))
    return found


def _report(backbone: Backbone, edit: Erasure) -> tuple[dict[str, Any], list[str]]:
    """The quick report of an erasure, and what it remarks."""
    if not isinstance(edit, OperatorErasure):
        return {}, [f"a {edit.kind} is not measured on embeddings; evaluate it by pictures (--suite)"]
    concepts = TypeAdapter(tuple[Concept, ...]).validate_python(edit.config.concepts)
    report: dict[str, Any] = {}
    remarks: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for space in backbone.spaces:
            if (facts := edit.spaces.get(space)) is None:
                continue
            own = {site: edit.factors(site)[1] for site in facts["sites"] if f"{site}.v" in edit.tensors}
            u, v = edit.factors(facts["sites"][0])
            solution = Solution(u.double(), v.double(), float("nan"), own)
            sites = {name: site for name, site in backbone.text_sites(space).items() if name in facts["sites"]}
            try:
                report[space] = quick_report(backbone, solution, sites, concepts, edit.config.keep, space)
            except ValueError as error:
                remarks.append(str(error))
    return report, [*remarks, *(str(w.message) for w in caught)]


@torch.no_grad()
def _moved(register: Register, backbone: Backbone, edit: Erasure) -> dict[str, float]:
    """How far the operator moves the last word of every request's names; empty where each layer has its own."""
    if not isinstance(edit, OperatorErasure) or any(f"{site}.v" in edit.tensors for site in edit.site_spaces):
        return {}
    names = (name for concept in edit.config.concepts for name in (concept["name"], *concept["synonyms"]))
    erased = {folded(name): name for name in names}
    mine = {
        entry.request: [erased[key] for phrase in entry.subject.phrases if (key := folded(phrase)) in erased]
        for entry in register.entries()
        if entry.wanted and entry.subject is not None
    }
    phrases = list(dict.fromkeys(phrase for own in mine.values() for phrase in own))
    by: dict[str, float] = {}
    for phrase, x in zip(phrases, rows(backbone, phrases, "last_subject"), strict=True):
        change = edit.map(x) - x
        by[phrase] = float((change.norm(dim=-1) / x.norm(dim=-1).clamp(min=1e-12)).min())
    return {request: min(by[phrase] for phrase in own) for request, own in mine.items() if own}
