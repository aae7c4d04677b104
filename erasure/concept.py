"""What to erase and what must survive, in words.

A :class:`Concept` names one thing a model should stop drawing. A :class:`Suite` puts it among its neighbours and among
unrelated things, so that an evaluation can say what else changed. Both are plain data; suites live in YAML files.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, ConfigDict, Field, PositiveInt, model_validator
from pydantic.dataclasses import dataclass

from erasure.io import dump_yaml, in_one_line, load_yaml, meant, shown, write_atomically
from erasure.wording import folded, is_name, naming, nfc, same, with_article

Kind = Literal["object", "style", "identity", "nsfw", "other"]
Group = Literal["target", "neighbours", "unrelated"]

WORLD = "emoji-world"  # the default model, by name
SUITES = Path(__file__).parent / "suites"
WIDE = 24  # sentences of a report, one picture each: an interval is about sentences
MANY = 6  # names of targets; a suite with more asks for each in fewer sentences

STRICT = ConfigDict(extra="forbid", str_strip_whitespace=True)


def named(text: str) -> str:
    """The text in composed form, unless it is empty: an empty prompt names nothing."""
    if not (seen := nfc(text).strip()):
        what = "an empty string" if not text else f"nothing that can be seen, {shown(text)}"
        raise ValueError(f"{what}; a name or a prompt needs at least 1 character")
    return seen


def once(values: tuple[str, ...]) -> tuple[str, ...]:
    """Each text once: what is drawn and counted twice would look like more evidence."""
    return tuple(dict.fromkeys(values))


Phrase = Annotated[str, AfterValidator(nfc)]
Named = Annotated[str, AfterValidator(named)]
Several = Annotated[tuple[Named, ...], AfterValidator(once)]


@in_one_line
@dataclass(frozen=True, config=STRICT)
class Concept:
    """One thing to erase.

    Attributes:
        name: what prompts call it, "superhero" or "Van Gogh".
        kind: object | style | identity | nsfw | other. It chooses prompt templates, never the mathematics.
        synonyms: other words for the same thing. The ``recommended`` presets erase them too, the published ones
            (``official-2025``, ``paper`` ...) the name alone; evaluation always tries them.
        anchor: what to draw instead. ``""`` (default) is the empty prompt. Name a near, harmless neighbour
            ("ninja" for "superhero") when pictures should stay pictures of something.
        neighbours: close things that must survive; also the natural preserve list.
        templates: sentences with ``{}`` where the name goes, with its article ("a photo of {}").

    Raises:
        ValueError: the name is empty, the anchor or a neighbour is the concept itself, or a template has no ``{}``.
    """

    name: Phrase
    kind: Kind = "object"
    synonyms: Several = ()
    anchor: Phrase = ""
    neighbours: Several = ()
    templates: Annotated[tuple[Phrase, ...], Field(min_length=1)] = ("{}",)

    @model_validator(mode="after")
    def _check(self) -> Concept:
        if not self.name.strip():
            raise ValueError("a concept needs a name; got an empty string; say what to erase, e.g. 'superhero'")
        for phrase in self.phrases:
            if self.anchor and is_name(phrase, self.anchor):
                raise ValueError(
                    f"the anchor equals the target; got {self.anchor!r} for {self.name!r}, which would erase nothing; "
                    "choose a different concept as the anchor, or '' for the empty prompt"
                )
            if any(same(phrase, neighbour) for neighbour in self.neighbours):
                raise ValueError(
                    f"the target is among its own neighbours; got {phrase!r} in {shown(list(self.neighbours))}; "
                    "take it out"
                )
        for template in self.templates:
            if "{}" not in template:
                raise ValueError(f"a template needs {{}} where the name goes; got {template!r}")
        return self

    @property
    def phrases(self) -> tuple[str, ...]:
        """The name and its synonyms, each once."""
        return once((self.name, *self.synonyms))

    @classmethod
    def of(cls, value: str | Concept) -> Concept:
        """A concept from its name, or itself.

        Raises:
            ValueError: it is no name, in one line.
        """
        if isinstance(value, Concept):
            return value
        if not isinstance(value, str):
            raise ValueError(f"a concept is a name or a Concept; got {shown(value)}; write erase(pipe, 'superhero')")
        return cls(value)


def concepts_of(given: str | Concept | Sequence[str | Concept]) -> tuple[Concept, ...]:
    """What is to be erased, each once.

    Raises:
        ValueError: it is no name and no list of names, or two concepts of one name are not the same.
    """
    if not isinstance(given, str | Concept) and (isinstance(given, Mapping | bytes) or not isinstance(given, Iterable)):
        raise ValueError(f"a concept is a name, a Concept, or a list of them; got {shown(given)}")
    found: dict[str, Concept] = {}
    for concept in map(Concept.of, [given] if isinstance(given, str | Concept) else given):
        known = found.setdefault(folded(concept.name), concept)
        if known != concept and dataclasses.replace(concept, name=known.name) != known:
            raise ValueError(
                f"two concepts are called {known.name!r}, and differ in what else they say; give one, with the "
                "synonyms and neighbours of both"
            )
    return tuple(found.values())


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One line of an evaluation: what is asked, which group it belongs to, and the label that should be seen.

    ``template`` is the sentence with ``{}`` where ``phrase`` stands: what prompts share, and what intervals draw.
    """

    text: str
    group: Group
    label: str
    template: str = ""
    phrase: str = ""


@in_one_line
@dataclass(frozen=True, config=STRICT)
class Words:
    """How else the target may be asked for: what the probes of suppression beyond its name are made of.

    Attributes:
        paraphrases: nouns that mean the target in other words than its name and synonyms ("hero with a cape").
        misspellings: its name, written wrongly.
        descriptions: what it is, with the article and without ever naming it ("a caped defender of the city").
        superclasses: what it is a kind of, with the article ("a comic-book character").
        translations: language code to names in that language, ready to stand in a sentence.
        sentences: language code to sentences in that language with ``{}`` where the name goes. Without any, the
            translated names stand in the templates of the concept.
        beside: other things to ask for together with it, with the article ("a castle").
        scenes: kind ("style", "background") to further templates, for other settings than those of the concept.

    Raises:
        ValueError: sentences in a language without names, or a sentence or scene without ``{}``.
    """

    paraphrases: Several = ()
    misspellings: Several = ()
    descriptions: Several = ()
    superclasses: Several = ()
    translations: dict[Named, Several] = dataclasses.field(default_factory=dict)
    sentences: dict[Named, Several] = dataclasses.field(default_factory=dict)
    beside: Several = ()
    scenes: dict[Named, Several] = dataclasses.field(default_factory=dict)

    @model_validator(mode="after")
    def _check(self) -> Words:
        if unnamed := sorted(self.sentences.keys() - self.translations.keys()):
            raise ValueError(
                f"sentences in a language need names in it; got none for {unnamed}; add them under `translations`"
            )
        for text in (text for texts in (*self.sentences.values(), *self.scenes.values()) for text in texts):
            if "{}" not in text:
                raise ValueError(f"a sentence needs {{}} where the name goes; got {text!r}")
        return self


@in_one_line
@dataclass(frozen=True, config=STRICT)
class Suite:
    """A concept among the things that must survive its erasure.

    Attributes:
        version: format of the file; this library reads version 1.
        name: short name of the suite, used in reports and file names.
        base: model the suite was written for ("emoji-world", or a hub id).
        concept: the target with its neighbours.
        also: further concepts that are erased at the same time, with their neighbours; their prompts use the templates
            of ``concept``.
        unrelated: things far from the target.
        keep: what methods are told to keep beside the neighbours: a sample of everything else the model should go on
            drawing. Nothing in ``unrelated`` may stand here, or that group would only measure obedience.
        words: how else the target may be asked for.
        attribute: which question the detector answers: "concept" (what is it?) or "style" (how is it drawn?).
        information: what kind of thing is to go (Cooper et al. 2024): "higher-order", whatever many pictures share (a
            character, a style; the default); "observed", listed pictures that were trained on, so that telling them
            apart counts; "latent", what the training data never had, so that there is nothing to remove.
        subjects: for a style suite, the things drawn in each style; templates then use ``{subject}`` as well.
        further: more sentences like the concept's templates, for every name: ``erasure evaluate`` without a ``limit``
            and the presets from ``quick`` on spread their pictures over them. Without any, those of ``words.scenes``
            are taken.
        images_per_prompt: seeds per prompt, 1 to 10,000. Raise it when intervals are too wide; more prompts are better
            still.
        num_inference_steps, guidance_scale: sampler settings of every picture in the evaluation; 1 to 1000 steps,
            guidance of 0 to 100.

    Raises:
        ValueError: unknown keys, a number out of its range or not finite, an empty name, an unknown version, a name in
            more than one group, a description that names a target.
    """

    version: Literal[1]
    name: Named
    concept: Concept
    base: Named = WORLD
    also: tuple[Concept, ...] = ()
    unrelated: Several = ()
    keep: Several = ()
    words: Words = Words()
    attribute: Literal["concept", "style"] = "concept"
    information: Literal["higher-order", "observed", "latent"] = "higher-order"
    subjects: Several = ()
    further: Several = ()
    images_per_prompt: Annotated[PositiveInt, Field(le=10_000)] = 2
    num_inference_steps: Annotated[PositiveInt, Field(le=1000)] = 25
    guidance_scale: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] = 5.0

    @model_validator(mode="after")
    def _check(self) -> Suite:
        if not self.neighbours:
            raise ValueError(
                f"suite {self.name!r} has no neighbours; without them nothing says what else broke; list some"
            )
        for text in self.further:
            if "{}" not in text:
                raise ValueError(f"a further sentence needs {{}} where the name goes; got {text!r}")
        groups = {"target": self.phrases, "neighbours": self.neighbours, "unrelated": self.unrelated}
        owner: dict[str, str] = {}
        for group, names in groups.items():
            for name in names:
                if (other := owner.setdefault(folded(name), group)) != group:
                    raise ValueError(f"suite {self.name!r}: {name!r} is in both {other} and {group}; keep one")
        for prompt in self.keep:
            if taken := owner.get(folded(prompt)):
                raise ValueError(f"suite {self.name!r}: {prompt!r} is in both keep and {taken}; take it out of keep")
        for text in (*self.words.descriptions, *self.words.superclasses):
            for phrase in self.phrases:
                if naming([text], [phrase, f"{phrase}s", f"{phrase}es"]):
                    raise ValueError(
                        f"suite {self.name!r}: a description or superclass names the target; got {text!r} for "
                        f"{phrase!r}; say it without the name, or move it to `paraphrases`"
                    )
        if self.attribute == "style" and not self.subjects:
            raise ValueError(
                f"suite {self.name!r} asks about style but has no subjects to draw; list some under `subjects`"
            )
        return self

    @property
    def concepts(self) -> tuple[Concept, ...]:
        """Everything that is to be erased."""
        return (self.concept, *self.also)

    @property
    def target(self) -> str:
        """What is to be erased, in a few words."""
        return self.concept.name + (f" and {len(self.also)} more" if self.also else "")

    @property
    def phrases(self) -> tuple[str, ...]:
        """Every name of every target."""
        return once(tuple(phrase for concept in self.concepts for phrase in concept.phrases))

    @property
    def neighbours(self) -> tuple[str, ...]:
        """Close things that must survive."""
        return tuple(dict.fromkeys(name for concept in self.concepts for name in concept.neighbours))

    @property
    def kept(self) -> tuple[str, ...]:
        """What a method is told to keep: the neighbours and the ``keep`` list."""
        return (*self.neighbours, *self.keep)

    def frames(self, *, more: bool = False) -> tuple[str, ...]:
        """The sentences with ``{}`` where a name goes, each with every subject of a style suite; each once.

        Args:
            more: those of ``further`` too, or of ``words.scenes`` where there are none.
        """
        scenes = (text for texts in self.words.scenes.values() for text in texts)
        extra = (self.further or tuple(scenes)) if more else ()
        filled = (
            template.replace("{subject}", with_article(subject))
            for template in (*self.concept.templates, *extra)
            for subject in self.subjects or ("",)
        )
        return tuple(dict.fromkeys(filled))

    def prompts(self, *, wide: int | None = None, images: int | None = None) -> list[Prompt]:
        """Every prompt of the suite, in a fixed order: target names and synonyms, neighbours, unrelated.

        Args:
            wide: in this many sentences, or all there are, further ones included: each name of the target in
                all of them, each other name in as many as it would have pictures, beginning at another one each time.
                None: the suite's own sentences; so too where it has as many itself.
            images: pictures a prompt of its own sentences, the suite's number by default. :meth:`pictures` says how
                many a prompt has here.
        """
        own = self.frames()
        if not self._widens(wide):
            return [self._prompt(*named, frame) for named in self._named() for frame in own]
        every = self.frames(more=True)
        count = min(wide or 0, len(every))
        frames = [every[i * len(every) // count] for i in range(count)]
        pictures = min(count, len(own) * (images or self.images_per_prompt))
        many = len(self.phrases) > MANY
        found = []
        for start, named in enumerate(self._named()):
            share = count if named[1] == "target" and not many else pictures
            places = sorted({(start + i * count // share) % count for i in range(share)})
            found += [self._prompt(*named, frames[i]) for i in places]
        return found

    def pictures(self, *, wide: int | None = None, images: int | None = None) -> int:
        """Pictures a prompt: fewer in more sentences, so that a kept name has no more pictures than it would have."""
        images = images or self.images_per_prompt
        if not self._widens(wide):
            return images
        return max(1, len(self.frames()) * images // min(wide or 0, len(self.frames(more=True))))

    def _widens(self, wide: int | None) -> bool:
        """Whether more sentences than its own are wanted, and there are some."""
        own = self.frames()
        return wide is not None and wide > len(own) < len(self.frames(more=True))

    def _named(self) -> list[tuple[str, Group, str]]:
        """Every name with its group and its label."""
        named: list[tuple[str, Group, str]] = [(p, "target", c.name) for c in self.concepts for p in c.phrases]
        named = list({name: (name, group, label) for name, group, label in reversed(named)}.values())[::-1]
        named += [(name, "neighbours", name) for name in self.neighbours]
        return named + [(name, "unrelated", name) for name in self.unrelated]

    def _prompt(self, name: str, group: Group, label: str, frame: str) -> Prompt:
        noun = name if self.attribute == "style" else with_article(name)
        return Prompt(frame.replace("{}", noun), group, label, frame, name)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Suite:
        """Read a suite from a YAML file, or one of the suites that ship with the library by its name.

        Raises:
            FileNotFoundError: neither a file nor a shipped suite; the message lists those that ship.
            ValueError: the file is not a valid suite; the message names the key.
        """
        file = Path(path)
        if not file.suffix:
            file = SUITES / f"{path}.yaml"
            if not os.path.exists(file):  # false, too, where the name is too long
                names = cls.shipped()
                own = f"{path}.yaml"
                near = meant(path, names) or (f" (did you mean {own!r}?)" if os.path.isfile(own) else "")
                raise FileNotFoundError(
                    f"no suite called {shown(str(path))}{near}; give a .yaml file or one of {names}"
                )
        return load_yaml(cls, file)

    @staticmethod
    def folder() -> Path:
        """Where the suites that come with the library lie, to copy one."""
        return SUITES

    @staticmethod
    def shipped() -> list[str]:
        """Names of the suites that come with the library."""
        return sorted(file.stem for file in SUITES.glob("*.yaml"))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the suite as YAML, completely or not at all."""
        write_atomically(path, dump_yaml(dataclasses.asdict(self)))  # type: ignore[call-overload]
