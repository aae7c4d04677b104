"""All requests in force as one request to one method: what is erased together, what is kept, and who was overruled.

Requests contradict each other: two name the same character, one keeps what another erases, one's anchor is another's
target. Erasing wins, since it is what the law gives a term for. What gave way is returned, so that it is written down.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from erasure.concept import Concept
from erasure.io import sha256_file, shown
from erasure.methods import method_class
from erasure.methods.closed_form import ClosedForm
from erasure.register.entries import Entry, Subject
from erasure.wording import folded, with_article

if TYPE_CHECKING:
    from erasure.register.rows import Settings


@dataclasses.dataclass(frozen=True)
class Overruled:
    """What one request wanted and another one's erasure did not allow.

    Attributes:
        word: the name. role: what the first request wanted it for: to be kept, or as an anchor.
        wanted_by, erased_by: the numbers of the two entries.
    """

    word: str
    role: Literal["keep", "anchor"]
    wanted_by: int
    erased_by: int

    def plain(self) -> list[Any]:
        """For the log: without the name, which either entry has."""
        return [self.role, self.wanted_by, self.erased_by]


@dataclasses.dataclass(frozen=True)
class Joint:
    """One request made of many.

    Attributes:
        concepts: what to erase. A name that several entries have is erased once.
        keep: what must not change, each once.
        overruled: what gave way.
        owners: for each concept the numbers of the entries whose names it has, in the order of ``concepts``.
    """

    concepts: tuple[Concept, ...]
    keep: tuple[str, ...]
    overruled: tuple[Overruled, ...]
    owners: tuple[tuple[int, ...], ...]


def joint(entries: Sequence[Entry]) -> Joint:
    """The joint request of entries; the same entries in the same order give the same one.

    Raises:
        ValueError: the names of an entry are gone.
    """
    subjects = [(entry.id, _subject(entry)) for entry in entries]
    erased_by: dict[str, int] = {}
    for id, subject in subjects:
        for phrase in subject.phrases:
            for form in (phrase, with_article(phrase)):
                erased_by.setdefault(folded(form), id)
    concepts: list[Concept] = []
    owners: list[tuple[int, ...]] = []
    overruled: list[Overruled] = []
    place: dict[str, int] = {}  # of the concept that has a phrase
    keep: dict[str, str] = {}
    for id, subject in subjects:
        own = [phrase for phrase in subject.phrases if folded(phrase) not in place]
        for shared in {place[folded(phrase)] for phrase in subject.phrases if folded(phrase) in place}:
            owners[shared] = (*owners[shared], id)
        concept, anchor = subject.concept, subject.concept.anchor
        if own:
            if folded(anchor) in erased_by:
                overruled.append(Overruled(anchor, "anchor", id, erased_by[folded(anchor)]))
                anchor = ""
            place |= {folded(phrase): len(concepts) for phrase in own}
            owners.append((id,))
            concepts.append(
                dataclasses.replace(  # type: ignore[type-var]
                    concept, name=own[0], synonyms=tuple(own[1:]), anchor=anchor, neighbours=()
                )
            )
        for word in dict.fromkeys((*subject.keep, *concept.neighbours)):
            if (by := erased_by.get(folded(word))) is not None:
                overruled.append(Overruled(word, "keep", id, by))
            else:
                keep.setdefault(folded(word), word)
    return Joint(tuple(concepts), tuple(keep.values()), tuple(overruled), tuple(owners))


def recipe_of(settings: Settings) -> dict[str, Any]:
    """``method``, ``preset`` and ``settings`` as :func:`erasure.erase` takes them, and ``files``: the SHA-256 of those
    that the settings name. Synonyms are always erased.

    Raises:
        ValueError: they do not exist, or the method cannot erase a whole set from the base within seconds.
        FileNotFoundError: a file that a setting names is not there.
    """
    kind = method_class(settings.method)
    if not issubclass(kind, ClosedForm):
        raise ValueError(
            f"a register solves everything in force again at every change; got {settings.method!r}, which trains or "
            "changes no weight; choose a closed form, such as uce"
        )
    if settings.settings.get("synonyms", True) is not True:
        raise ValueError("a register erases every alias; got synonyms=False; leave that setting out")
    changes = {**settings.settings, "synonyms": True}
    chosen = kind.preset(settings.preset, **changes)
    named = {name: getattr(chosen, name) for name in kind.files}
    files = {name: sha256_file(path) for name, path in named.items() if path}
    return {"method": settings.method, "preset": settings.preset, "settings": changes, "files": files}


def _subject(entry: Entry) -> Subject:
    if entry.subject is None:
        raise ValueError(f"the names of the request {shown(entry.request)} are gone; it cannot be erased again")
    return entry.subject
