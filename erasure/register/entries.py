"""One request of a register: what is in it, what is allowed in it, and how its 48 hours stand."""

from __future__ import annotations

import dataclasses
import datetime
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from pydantic import TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from erasure.concept import STRICT, Concept, Named
from erasure.io import fault_of, one_line, printable, sha256, sha256_json, shown
from erasure.wording import folded, listed, nfc

Status = Literal["received", "in force", "withdrawn", "refused"]
Requester = Literal[
    "rights-holder", "representative", "person-depicted", "authority", "trusted-flagger", "platform", "other"
]
STATUSES: tuple[str, ...] = get_args(Status)
LONGEST = 500  # characters of one line of text
LONGEST_REASON = 5_000
SLACK = datetime.timedelta(minutes=-1)  # a clock that is set back by less was only corrected
MOST = 200  # names, or kept prompts, of one request
LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]{2,8})*")
COLUMNS = (
    "id", "request", "basis", "requester", "received", "due", "served", "subject", "salt", "seal", "bases", "settings",
    "evidence", "reviewer", "status", "ended", "reason", "redacted",
)  # fmt: skip
PRIVATE = ("subject", "salt")  # what a redaction takes out; the log holds the seal of it


@dataclass(frozen=True, config=STRICT)
class Subject:
    """What a request is about. A redaction hides it.

    Attributes:
        concept: what to erase, with synonyms, neighbours and an anchor.
        languages: language code ("de", "pt-BR") to names in that language; they are erased with the others.
        keep: prompts that the requester, or the platform, wants to stay as they are.

    Raises:
        ValueError: a code that is no language, too many or too long names, or a name that is both kept and erased.
    """

    concept: Concept
    languages: dict[Named, tuple[Named, ...]] = dataclasses.field(default_factory=dict)
    keep: tuple[Named, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Subject:
        for code in self.languages:
            if not LANGUAGE.fullmatch(code):
                raise ValueError(f"a language is a code such as 'de' or 'pt-BR'; got {shown(code)}")
        every = [*self.phrases, *self.keep, *self.concept.neighbours, self.concept.anchor]
        if len(every) > MOST:
            raise ValueError(f"a request has at most {MOST} names and kept prompts; got {len(every)}; split it")
        for name in every:
            line_of("a name", name, empty=True)
        erased = {folded(phrase) for phrase in self.phrases}
        if both := [name for name in (*self.keep, *self.concept.neighbours) if folded(name) in erased]:
            raise ValueError(f"{shown(both[0])} is both to be erased and to be kept; take it out of one of the two")
        return self

    @property
    def phrases(self) -> tuple[str, ...]:
        """Every name, in every language, each once."""
        named = [*self.concept.phrases, *(name for names in self.languages.values() for name in names)]
        return tuple({folded(name): name for name in reversed(named)}[key] for key in dict.fromkeys(map(folded, named)))

    def to_json(self) -> str:
        """Plain text from which :meth:`from_json` makes the same subject."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False, sort_keys=True)  # type: ignore[call-overload]

    @classmethod
    def from_json(cls, text: str) -> Subject:
        return TypeAdapter(cls).validate_json(text)


@dataclasses.dataclass(frozen=True)
class Entry:
    """A request, as it stands in the register.

    Attributes:
        id: its number in the register; never used again.
        request: its own id, by which commands name it.
        basis: the legal basis, in the words of whoever entered it.
        requester: class of who asked.
        received, due: when it came in, and until when it is to be served.
        served: when the first erasure that has it was written for all its bases; None before.
        subject: what it is about; None once it was redacted and is over.
        seal: salted SHA-256 of the subject. It is what the log holds of it.
        bases: name of each base model to the hash of its fingerprints.
        settings: method, preset and settings that it is erased with; None before it is served.
        evidence: the latest evaluation: verdicts, path and SHA-256 of its report, and the erasure it is of; empty
            without one.
        reviewer: who decided.
        status: "received", "in force", "withdrawn" or "refused".
        ended, reason: when and why it was withdrawn or refused.
        redacted: since when its names are not shown.
    """

    id: int
    request: str
    basis: str
    requester: str
    received: datetime.datetime
    due: datetime.datetime
    served: datetime.datetime | None
    subject: Subject | None
    seal: str
    bases: dict[str, str]
    settings: dict[str, Any] | None
    evidence: dict[str, Any]
    reviewer: str
    status: Status
    ended: datetime.datetime | None
    reason: str
    redacted: datetime.datetime | None

    @property
    def name(self) -> str:
        """The concept's name, or the first digits of its seal where it was redacted."""
        if self.subject is None or self.redacted is not None:
            return f"redacted-{self.seal[:12]}"
        return self.subject.concept.name

    @property
    def wanted(self) -> bool:
        """Whether the next erasure has it."""
        return self.status in ("received", "in force")

    def clock(self, now: datetime.datetime) -> tuple[str, str]:
        """How it stands with the time it was due at: one word of :data:`CLOCK`, and a sentence.

        A request is closed by being served, refused, or withdrawn before it was served.
        """
        done = self.served or self.ended
        word = {None: "served", "refused": "refused", "withdrawn": "withdrawn before it was served"}
        how = word[None if self.served else self.status if self.ended else None]
        span = (done or now) - self.received
        took = duration(span)
        if done is not None and span < SLACK:
            return (
                "late",
                f"{how} before it was received, since the machine's clock was set back; not counted as in time",
            )
        if done is None and now <= self.due:
            return "open", f"open for {took}, {duration(self.due - now)} left"
        if done is None:
            return "overdue", f"open for {took}, overdue by {duration(now - self.due)}"
        if done <= self.due:
            return "in time", f"{how} in {took}, in time"
        return "late", f"{how} in {took}, late by {duration(done - self.due)}"


CLOCK = ("in time", "late", "open", "overdue")


def seal_of(subject: str, salt: str) -> str:
    """Salted SHA-256 of a subject's JSON."""
    return sha256(f"{salt}\n{subject}")


def digest_of(row: Mapping[str, Any]) -> str:
    """What the log holds of an entry's row: all of it but what a redaction takes out. Empty columns do not count."""
    return sha256_json({key: value for key, value in row.items() if value is not None and key not in PRIVATE})


def entry_of(row: Mapping[str, Any]) -> Entry:
    """An entry from its row.

    Raises:
        ValueError: the row was changed by something else than a register, and cannot be read.
    """
    try:
        return _entry(row)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"the entry {shown(row['request'])} cannot be read ({printable(one_line(error))}); it was changed by "
            "something else; `erasure register log --check` says what was"
        ) from None


def _entry(row: Mapping[str, Any]) -> Entry:
    facts = {key: value for key, value in row.items() if key not in PRIVATE}
    facts |= {key: datetime.datetime.fromisoformat(row[key]) for key in TIMES if row[key] is not None}
    facts |= {key: json.loads(row[key]) for key in ("bases", "settings", "evidence") if row[key] is not None}
    return Entry(**facts, subject=None if row["subject"] is None else Subject.from_json(row["subject"]))


TIMES = ("received", "due", "served", "ended", "redacted")


def subject_of(concept: str | Concept, languages: Mapping[str, Sequence[str]] | None, keep: Sequence[str]) -> Subject:
    """A checked subject.

    Raises:
        ValueError: what is wrong with it, in one line.
    """
    try:
        if not isinstance(languages or {}, Mapping):
            raise ValueError(f"languages map codes to names, {{'de': ['Katze']}}; got {shown(languages)}")
        named = {code: tuple(listed(names)) for code, names in (languages or {}).items()}
        return Subject(Concept.of(concept), named, tuple(listed(keep)))
    except ValidationError as error:
        raise ValueError(fault_of(error)) from None


def line_of(field: str, value: Any, *, empty: bool = False, longest: int = LONGEST) -> str:
    """A line of text in composed form.

    Raises:
        ValueError: it is no text, empty, too long, or not written in Unicode.
    """
    if not isinstance(value, str) or not (empty or value.strip()):
        raise ValueError(f"{field} must be text that says something; got {shown(value)}; write a few words")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{field} holds half a character; got {shown(value)}; write it in UTF-8") from None
    text = " ".join(nfc(value).split())
    if len(text) > longest:
        raise ValueError(f"{field} has {len(text):,} characters; got {shown(text)}; {longest:,} are allowed")
    return text


def requester_of(value: str) -> str:
    """A class of requesters.

    Raises:
        ValueError: it is unknown.
    """
    if value not in get_args(Requester):
        raise ValueError(f"unknown class of requester; got {shown(value)}; choose one of {list(get_args(Requester))}")
    return value


def now() -> datetime.datetime:
    """This moment in UTC."""
    return datetime.datetime.now(datetime.UTC)


def moment_of(field: str, value: str | datetime.datetime) -> datetime.datetime:
    """A moment in UTC, from text in ISO 8601 or a datetime, both with their zone.

    Raises:
        ValueError: it is no such text, or has no zone.
    """
    try:
        moment = datetime.datetime.fromisoformat(value) if isinstance(value, str) else value
        if moment.tzinfo is not None:
            return moment.astimezone(datetime.UTC)
    except (ValueError, TypeError, OverflowError):
        raise ValueError(
            f"{field} must be a time in ISO 8601; got {shown(value)}; write it like 2026-11-30T09:15:00Z"
        ) from None
    raise ValueError(f"{field} needs a zone; got {shown(str(value))}; end it with Z for UTC, or with +02:00")


def iso(moment: datetime.datetime) -> str:
    """As text that sorts by time."""
    return moment.astimezone(datetime.UTC).isoformat(timespec="milliseconds")


def duration(span: datetime.timedelta) -> str:
    """Hours and minutes, or days and hours from three days on."""
    minutes = max(int(span.total_seconds() // 60), 0)
    if minutes >= 3 * 24 * 60:
        return f"{minutes // 1440} d {minutes % 1440 // 60} h"
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"
