"""What a form of the app asks for, checked, and the prompts and the suite that follow from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from erasure.concept import WORLD, Concept, Group, Kind, Prompt, Suite
from erasure.io import folder_name
from erasure.methods import available, method_class
from erasure.methods.closed_form import ClosedForm
from erasure.methods.finetune import FineTune
from erasure.pictures import usual_settings
from erasure.wording import folded, with_article

OWN_WORDS = "my own words"  # in the place of a suite's name
FRAMES = ("{}", "a picture of {}", "{} on a white background")
STYLE_FRAMES = ("{subject} in the style of {}", "a drawing of {subject}, {} style")
SUBJECTS = ("cat", "house", "tree")
UNRELATED = ("dog", "bicycle", "church", "violin", "sunflower", "hamburger")
SHOWN: dict[Group, int] = {"target": 2, "neighbours": 3, "unrelated": 3}  # prompts of a group that are drawn
NEIGHBOURS = 9  # of a keep list, that are judged; the others are kept


@dataclasses.dataclass(frozen=True)
class Order:
    """What is to be erased, from which base, and how.

    Attributes:
        base: as :func:`erasure.opening.load_base` takes it.
        suite: name of a shipped suite; "" where the fields below name the concept.
        concept, synonyms, anchor, kind: the concept in words of one's own.
        keep: what must stay; with a suite too, where the list may have been changed.
        method, preset: "" for the method's first preset.
    """

    base: str = WORLD
    suite: str = ""
    concept: str = ""
    synonyms: tuple[str, ...] = ()
    anchor: str = ""
    kind: Kind = "object"
    keep: tuple[str, ...] = ()
    method: str = "uce"
    preset: str = ""

    @property
    def concepts(self) -> tuple[Concept, ...]:
        """The concepts, checked.

        Raises:
            ValueError: nothing is named, or the anchor is the concept.
        """
        if self.suite:
            return Suite.load(self.suite).concepts
        if not self.concept.strip():
            raise ValueError("no concept: the field is empty; say what to erase, for example superhero")
        return (Concept(self.concept, kind=self.kind, synonyms=self.synonyms, anchor=self.anchor),)

    def prompts(self) -> dict[Group, list[str]]:
        """A few prompts of each group, for pictures before and after."""
        plan = self._plan()
        every = list(plan.prompts() if plan else self._loose())
        first = {one.phrase: one for one in reversed(every)}  # each name once, before a name comes twice
        ordered = sorted(every, key=lambda one: first[one.phrase] is not one)
        return {group: [one.text for one in ordered if one.group == group][:most] for group, most in SHOWN.items()}

    def to_judge(self) -> Suite:
        """The suite that an evaluation asks: the shipped one, or one of these words.

        Raises:
            ValueError: the keep list is empty, so that nothing would say what else broke.
        """
        if (plan := self._plan()) is None:
            raise ValueError(
                "an evaluation compares the concept with its neighbours; the keep list is empty; name some, and erase "
                "again"
            )
        return plan

    def _plan(self) -> Suite | None:
        """The suite, if there is one; None without neighbours."""
        if self.suite:
            return Suite.load(self.suite)
        if not self.keep:
            return None
        (concept,) = self.concepts
        style = self.kind == "style"
        frames = STYLE_FRAMES if style else FRAMES
        return Suite(
            version=1,
            name=folder_name(concept.name),
            base=self.base,
            concept=dataclasses.replace(concept, neighbours=self.keep[:NEIGHBOURS], templates=frames),
            unrelated=self._unrelated(),
            keep=self.keep[NEIGHBOURS:],
            attribute="style" if style else "concept",
            subjects=SUBJECTS if style else (),
            **usual_settings(self.base),
        )

    def _unrelated(self) -> tuple[str, ...]:
        """Things far from everything that is named; a style has none."""
        named = {folded(name) for name in (self.concept, *self.synonyms, self.anchor, *self.keep)}
        free = (one for one in UNRELATED if not {one, folded(with_article(one))} & named)
        return () if self.kind == "style" else tuple(free)

    def _loose(self) -> Iterator[Prompt]:
        """Prompts of a concept without neighbours."""
        for concept in self.concepts:
            style = self.kind == "style"
            for phrase in concept.phrases:
                for frame in STYLE_FRAMES if style else FRAMES:
                    words = frame.replace("{subject}", with_article(SUBJECTS[0]))
                    words = words.replace("{}", phrase if style else with_article(phrase))
                    yield Prompt(words, "target", phrase, phrase=phrase)
        for name in self._unrelated():
            yield Prompt(with_article(name), "unrelated", name, phrase=name)


def listed(text: str) -> tuple[str, ...]:
    """Names with commas or line ends between them, each once."""
    parts = (part.strip() for line in text.splitlines() for part in line.split(","))
    return tuple({folded(part): part for part in parts if part}.values())


def suites_for(base: str) -> list[str]:
    """Shipped suites that a base may be asked: Emoji World's are its own."""
    return [name for name in Suite.shipped() if (Suite.load(name).base == WORLD) == (base == WORLD)]


def methods_for(architecture: str) -> list[str]:
    """Methods that work on an architecture: closed forms, then what acts while drawing, then fine-tunes."""
    fitting = [
        name
        for name in available()
        if (kind := method_class(name)).architectures is None or architecture in kind.architectures
    ]
    return sorted(fitting, key=_effort)


def _effort(name: str) -> int:
    kind = method_class(name)
    return 0 if issubclass(kind, ClosedForm) else 2 if issubclass(kind, FineTune) else 1


def cost_of(method: str, preset: str = "") -> str:
    """What making an erasure takes, in a line."""
    kind = method_class(method)
    if issubclass(kind, FineTune):
        settings = kind.preset(preset or None)
        return (
            f"{kind.summary}. It trains {settings.iterations:,} steps of {settings.batch_size}: one to four minutes on "
            "Emoji World with a processor; real checkpoints want a GPU."
        )
    effort = "No training." if issubclass(kind, ClosedForm) else "No training; it adds to the time of each drawing."
    return f"{kind.summary}. {effort}"


def presets_of(method: str) -> Sequence[str]:
    """The presets of a method, the default first."""
    return list(method_class(method).presets)


__all__ = ["OWN_WORDS", "Order", "cost_of", "listed", "methods_for", "presets_of", "suites_for"]
