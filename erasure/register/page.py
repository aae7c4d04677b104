"""A register on paper: one HTML page without anything from elsewhere, and a block of Markdown for a model card."""

from __future__ import annotations

import datetime
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from erasure.io import markdown, shown, visible
from erasure.register.chain import Event
from erasure.register.entries import CLOCK, Entry, now
from erasure.register.register import Register
from erasure.wording import counted

TEMPLATES = Path(__file__).parent
GROUPS = {"target": "targets", "neighbours": "kept prompts", "generic": "other prompts"}  # of a quick report
LIMITS = (
    "An erasure suppresses: prompts that name the concept are led elsewhere. Whether the model still holds what it "
    "learnt is another question, which nothing here answers.",
    "Served means that the erasure was written and recorded here. When servers loaded it is not recorded.",
    "The register holds what was entered. It cannot show that every notice was.",
    "A redaction hides names here. An erasure's file that was published can still tell what was erased, and so can "
    "copies of this register from before.",
    "This is a record and no legal advice.",
)


def page(
    register: Register,
    *,
    month: str | None = None,
    request: str | None = None,
    time: datetime.datetime | None = None,
) -> str:
    """The page of a register, of the requests received in one month, or of one request.

    Args:
        month: "2026-11", in UTC.
        request: the id of a request; its page has its part of the log.
        time: the moment that open requests are measured at; now by default.

    Raises:
        ValueError: a malformed month, both month and request, or no such request.
    """
    time = time or now()
    if month is not None and request is not None:
        raise ValueError("a page is of a month or of a request; got both; leave one out")
    if month is not None and not re.fullmatch(r"\d{4}-(0[1-9]|1[0-2])", month):
        raise ValueError(f"a month is written 2026-11; got {shown(month)}")
    every = register.entries()
    chosen = every if request is None else [register.entry(request)]
    chosen = [entry for entry in chosen if month in (None, _month(entry.received))]
    log = register.log()
    last = {event.detail["base"]: event for event in log if event.action == "applied"}
    facts = {
        "title": f"Request {chosen[0].request}" if request else f"Requests of {month}" if month else "All requests",
        "time": time,
        "hours": register.settings.hours,
        "months": [(name, _counts(rows, time)) for name, rows in _by_month(chosen)],
        "rows": [_row(entry, time, every, last) for entry in chosen],
        "bases": [(base, *_in_force(base, last, log)) for base in register.bases()],
        "events": register.log(request) if request else [],
        "faults": register.check(),
        "head": log[-1].hash,
        "count": len(log),
        "card": card(register, time=time),
        "sheet": sheet(chosen, last, log, time),
        "limits": LIMITS,
        "redacted": any(entry.redacted for entry in chosen),
    }
    return _environment().get_template("page.html.j2").render(facts)


def card(register: Register, *, time: datetime.datetime | None = None) -> str:
    """Markdown for the card of a model that the register's erasures are in: what is suppressed, and what that means."""
    time = time or now()
    log = register.log()
    last = {event.detail["base"]: event for event in log if event.action == "applied"}
    every = {entry.id: entry for entry in register.entries()}
    lines = ["## Concepts suppressed on request", "", f"As of {_utc(time)}, by a take-down register.", ""]
    for base, event in last.items():
        entries = [every[id] for id in event.detail["entries"] if id in every]
        recipe = event.detail["settings"]
        how = f"{recipe['method']}, preset {recipe['preset'] or 'recommended'}"
        lines.append(f"**{markdown(base)}**: {counted(len(entries), 'request')}, erased together ({markdown(how)}).")
        if entries:
            lines += [f"SHA-256 of the erasure: `{event.detail['hash']}`", ""]
            lines += ["| concept | request | since | evaluated |", "|---|---|---|---|"]
            for entry in entries:
                since = _utc(entry.served) if entry.served else "not on all bases yet"
                cells = (entry.name, entry.request, since, _verdicts(entry, last) or "not by pictures")
                lines.append(f"| {' | '.join(markdown(cell) for cell in cells)} |")
        lines.append("")
    if not last:
        lines += ["Nothing was applied yet.", ""]
    lines += [f"- {limit}" for limit in LIMITS]
    return "\n".join(lines) + "\n"


def sheet(
    entries: Sequence[Entry], last: Mapping[str, Event], log: Sequence[Event], time: datetime.datetime
) -> list[dict[str, Any]]:
    """Measures 1.4 and 1.5 of the copyright chapter of the GPAI Code of Practice: what is shown, what is not claimed.

    The measures are those of 10 July 2025, in our words; the Code's own text decides. docs/register.md has all five.
    """
    count = _counts(entries, time)
    checks = [event for event in log if event.action == "verified"]
    clean = [event for event in checks if not event.detail["problems"]]
    evaluated = [entry for entry in entries if _is_current(entry, last)]
    kept_out = [e for e in evaluated if e.evidence.get("verdicts", {}).get("asked", {}).get("verdict") == "shown"]
    in_force = sum(entry.status == "in force" for entry in entries)
    return [
        {
            "measure": "1.4",
            "asks": "Technical safeguards, appropriate and proportionate, against outputs that reproduce protected "
            "training content in an infringing way. Terms of use that forbid infringing uses; for open-source models, "
            "a notice in their documentation. Both whether the provider uses the model or hands it to others.",
            "shown": [
                f"In force: {in_force} of {len(entries)} requests. Their names are suppressed on {_named(last)}, in "
                "one erasure made from the base.",
                f"Verifications recorded: {len(checks)}, without a fault: {len(clean)}, the last one: "
                f"{_utc(checks[-1].time) if checks else 'never'}.",
                f"Evaluated by pictures, with what is in force now: {len(evaluated)} requests. Shown to be kept out "
                f"when asked for by name: {len(kept_out)} of them.",
            ],
            "not_claimed": [
                "That no output infringes: an evaluation has limits and error bars, and most requests may have none.",
                "That prompts which describe a concept without its names are covered, or attacks, unless an evaluation "
                "says so.",
                "That works are removed from the weights, or that they were ever among the training data.",
                "That these requests are about copyright: those of every legal basis are counted.",
                "Terms of use and notices in the documentation: they are not in this register.",
            ],
        },
        {
            "measure": "1.5",
            "asks": "A point of contact for rightsholders, and a way to complain electronically that a commitment of "
            "the chapter was not kept, for them and for who acts for them; both easy to find. Complaints are handled "
            "diligently, without arbitrariness and within a reasonable time.",
            "shown": [
                f"Requests with receipt, term and outcome: {len(entries)}. Closed in time: {count['in time']}, closed "
                f"late: {count['late']}, open: {count['open']}, overdue: {count['overdue']}.",
                f"Refused: {sum(e.status == 'refused' for e in entries)}, withdrawn: "
                f"{sum(e.status == 'withdrawn' for e in entries)}, each with its reason.",
                "Every step is a row of a log whose rows hold the hash of the row before.",
            ],
            "not_claimed": [
                "That a request is a complaint in the sense of the Code: a request is about a work, a complaint is "
                "about a commitment.",
                "That this register is a point of contact, or that every complaint was entered.",
                "That a refusal was right: it has the reviewer's reason and no more.",
                "That servers used the erasure from the recorded time on.",
            ],
        },
    ]


def _environment() -> jinja2.Environment:
    """Templates that escape their values; what is harmful in a name is written out."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        finalize=lambda value: visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters.update(utc=_utc)
    return made


def _row(entry: Entry, time: datetime.datetime, every: Sequence[Entry], last: Mapping[str, Event]) -> dict[str, Any]:
    word, sentence = entry.clock(time)
    subject = entry.subject if entry.redacted is None else None
    return {
        "entry": entry,
        "word": word,
        "clock": sentence,
        "aliases": "" if subject is None else ", ".join(subject.concept.synonyms),
        "languages": {} if subject is None else {code: ", ".join(names) for code, names in subject.languages.items()},
        "anchor": "" if subject is None else subject.concept.anchor,
        "keep": "" if subject is None else ", ".join((*subject.keep, *subject.concept.neighbours)),
        "overruled": _overruled(entry, every, last),
        "verdicts": _verdicts(entry, last),
        "method": "" if entry.settings is None else _method(entry.settings),
    }


def _overruled(entry: Entry, every: Sequence[Entry], last: Mapping[str, Event]) -> list[str]:
    """What another request's erasure took from this one, by the log. A redacted one is not named: its name is here."""
    requests = {one.id: "another request" if one.redacted else one.request for one in every}
    words = {"keep": "a name that it keeps is erased by", "anchor": "its anchor is erased by"}
    found = [one for event in last.values() for one in event.detail["overruled"]]
    return list(dict.fromkeys(f"{words[role]} {requests[by]}" for role, wanted, by in found if wanted == entry.id))


def _method(recipe: Mapping[str, Any]) -> str:
    changes = ", ".join(f"{key}={value}" for key, value in recipe["settings"].items())
    return f"{recipe['method']}, preset {recipe['preset'] or 'recommended'}, {changes}"


def _verdicts(entry: Entry, last: Mapping[str, Event]) -> str:
    """The verdicts of its evaluation in a line, with a remark if another erasure is in force now; "" without one."""
    found = entry.evidence.get("verdicts", {})
    parts = [f"{key}: {one['verdict']}" + f" ({one['number']})" * bool(one["number"]) for key, one in found.items()]
    return "; ".join(parts) + "; of an earlier erasure" * bool(parts and not _is_current(entry, last))


def _is_current(entry: Entry, last: Mapping[str, Event]) -> bool:
    """Whether an entry's evaluation is of what is in force."""
    event = last.get(entry.evidence.get("base", ""))
    return event is not None and event.detail["hash"] == entry.evidence["erasure"]


def _in_force(base: str, last: Mapping[str, Event], log: Sequence[Event]) -> tuple[str, str]:
    """In words: what is in force on a base, and when it was checked."""
    if (event := last.get(base)) is None:
        return "nothing was applied yet", "not verified"
    checks = [e for e in log if e.action == "verified" and e.detail["base"] == base and e.id > event.id]
    what = f"{len(event.detail['entries'])} requests since {_utc(event.time)}; SHA-256 {event.detail['hash'] or 'none'}"
    if not checks:
        return what, "not verified since"
    detail = checks[-1].detail
    wrong = len(detail["problems"])
    found = f"verified {_utc(checks[-1].time)}: {f'{wrong} faults' if wrong else 'no fault'}"
    groups = detail["groups"].get("hidden", {})
    moved = ", ".join(f"{named} {100 * groups[name]:.0f} %" for name, named in GROUPS.items() if name in groups)
    return what, found + f"; on embeddings, without pictures, the layers' outputs move: {moved}" * bool(moved)


def _by_month(entries: Sequence[Entry]) -> list[tuple[str, list[Entry]]]:
    months: dict[str, list[Entry]] = {}
    for entry in entries:
        months.setdefault(_month(entry.received), []).append(entry)
    return sorted(months.items(), reverse=True)


def _counts(entries: Sequence[Entry], time: datetime.datetime) -> dict[str, int]:
    count = Counter(entry.clock(time)[0] for entry in entries)
    return {"all": len(entries), **{word: count[word] for word in CLOCK}}


def _named(last: Mapping[str, Event]) -> str:
    return ", ".join(last) or "no base yet"


def _month(moment: datetime.datetime) -> str:
    return f"{moment:%Y-%m}"


def _utc(moment: datetime.datetime | None) -> str:
    return "" if moment is None else f"{moment:%Y-%m-%d %H:%M} UTC"
