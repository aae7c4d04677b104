"""Parts of the register's commands: the judge by pictures, the check of the log, entries as JSON, key=value options."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from erasure.cli.options import follow
from erasure.io import check_writable
from erasure.terminal import say

if TYPE_CHECKING:
    from erasure.register import Entry, Register


def judge_of(
    register: Register, base: str, pipe: Any, suite: str, draw: int | None, out: Path
) -> Callable[[Any], Sequence[str]]:
    """Evaluates an erasure by the pictures of a suite, and puts the verdicts into the entries of its target."""
    from erasure.concept import Suite
    from erasure.eval import evaluate, write_report
    from erasure.eval.detectors.choice import detectors_for
    from erasure.io import sha256_file
    from erasure.wording import folded

    plan = Suite.load(suite)
    targets = {folded(phrase) for phrase in plan.phrases}
    entries = [
        e for e in register.entries(status="in force") if e.subject and targets & {*map(folded, e.subject.phrases)}
    ]
    if not entries:
        raise ValueError(f"no request in force is about the target of the suite {suite!r}; choose another suite")
    check_writable(out)
    detectors, clip = detectors_for(plan, device=str(pipe.device))

    def judge(edit: Any) -> list[str]:
        found = evaluate(pipe, {edit.name: edit}, plan, detectors=detectors, clip=clip, limit=draw)
        found.save(out)
        path = write_report(found, out / "report.html", records=out)
        answers = next(c for c in found.claims() if c.model == edit.name).answers
        verdicts = {key: {"verdict": a.verdict, "number": a.number} for key, a in answers.items()}
        record = {"verdicts": verdicts, "report": str(path), "sha256": sha256_file(path)}
        register.record_evidence([entry.request for entry in entries], base, record)
        for key, answer in answers.items():
            say(f"- {key}: {answer.word} {answer.number}".rstrip())
        say(f"report -> {path.resolve()}", wrap=False)
        drawn = answers["asked"].verdict == "shown not"
        return [
            f"{e.request}: the evaluation shows that it is still drawn when asked for by name" for e in entries * drawn
        ]

    return judge


def check_log(register: Register, head: str | None, signatures: Sequence[Path], signers: Path | None) -> None:
    """Say what is wrong with a log and exit with 1, or say that it holds, and which of its rows are signed."""
    from erasure.register import signing

    signed: tuple[signing.Signature, ...] = ()
    if signers is None:
        faults = register.check(head=head)
    else:
        found = signing.check(register, signatures, signers, head=head)
        signed, faults = found.signatures, [*found.problems]
    for one in signed:
        said = one.statement
        say(f"- row {said.row} is as {one.signer} signed it, {said.time:%Y-%m-%d %H:%M} UTC: {one.path}", wrap=False)
    for fault in faults:
        say(f"! {fault}")
    if faults:
        raise typer.Exit(1)
    rows = len(register.log())
    say(f"{rows} rows, each as it was written; head {register.head()}", wrap=False)
    if not signed:
        follow("note the head; --head compares with it later")
    elif (last := signed[-1].statement.row) < rows:
        say(f"no signature covers the rows after {last}")
        follow("erasure register sign --key FILE")


def plain_entry(entry: Entry) -> dict[str, Any]:
    """An entry as JSON; without its names where it was redacted."""
    from erasure.register.entries import now

    plain = {**dataclasses.asdict(entry), "name": entry.name, "clock": entry.clock(now())[1]}
    if entry.redacted is not None:
        plain["subject"] = None
    return json.loads(json.dumps(plain, default=str))  # type: ignore[no-any-return]


def by_language(texts: Sequence[str] | None) -> dict[str, list[str]]:
    """``["de=Held"]`` -> ``{"de": ["Held"]}``."""
    found: dict[str, list[str]] = {}
    for code, name in pairs(texts or (), "--language"):
        found.setdefault(code, []).append(name)
    return found


def pairs(texts: Sequence[str], option: str) -> list[tuple[str, str]]:
    """``["de=Held"]`` -> ``[("de", "Held")]``."""
    found = []
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"{option} needs key=value; got {text!r}")
        found.append((key.strip(), value))
    return found
