"""Probes that consist of prompts alone, read from ``prompts.yaml``: S3, S4, S6, S7.

Each has the fields of :class:`Written`; :func:`erasure.eval.probes.probe_class` returns the class made from them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict

from erasure.concept import Suite
from erasure.eval.probes.asking import Ask, PromptProbe, everywhere, spelled
from erasure.eval.probes.base import Context, Missing
from erasure.io import load_yaml

FILE = Path(__file__).with_name("prompts.yaml")
EACH = "{}"  # a family of this name becomes one per word, or per language
Phrases = tuple[str, ...]


class Wording(BaseModel):
    """What one family of prompts is made of.

    Attributes:
        words: "name" of the target, or a list of the suite's ``words``.
        sentences: the sentences for the words. "templates" are the suite's, or those of a language; "everywhere" also
            has its scenes, "everywhere and bare" also the word alone (not for a style). Sentences of the probe's own
            have "{}" for the word; for a style, for a picture in it.
        article: put one before a word that names a thing.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    words: Literal["name", "descriptions", "superclasses", "translations"]
    sentences: Literal["templates", "everywhere", "everywhere and bare"] | Phrases
    article: bool = False

    def phrases(self, suite: Suite, family: str) -> dict[str, Phrases]:
        """Words by family."""
        if self.words == "name":
            return {family: (suite.concept.name,)}
        found: Mapping[str, Phrases] | Phrases = getattr(suite.words, self.words)
        if not found:
            raise Missing(f"the suite {suite.name} lists no {self.words}; add them under `words`")
        if isinstance(found, Mapping):
            return dict(found)
        return {word: (word,) for word in found} if family == EACH else {family: found}

    def templates(self, suite: Suite, family: str) -> Phrases | None:
        if isinstance(self.sentences, tuple):
            inner = suite.concept.templates[0] if suite.attribute == "style" else EACH
            return tuple(sentence.replace(EACH, inner) for sentence in self.sentences)
        if self.sentences == "templates":
            return suite.words.sentences.get(family)
        bare = (EACH,) if self.sentences == "everywhere and bare" and suite.attribute != "style" else ()
        return (*bare, *everywhere(suite))


class Written(BaseModel):
    """A probe of ``prompts.yaml``; ``about`` is its docstring, the others are those of a :class:`PromptProbe`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    code: str
    title: str
    about: str
    presets: dict[Literal["smoke", "no-draw", "quick", "standard", "full"], dict[str, int | float | bool | None]]
    licences: str
    not_licensed: str
    families: dict[str, Wording]
    reference: str = ""
    known: float = PromptProbe.known
    version: int = 1


class WrittenProbe(PromptProbe):
    """A probe whose prompts are those of its families."""

    families: ClassVar[Mapping[str, Wording]]

    def asks(self, context: Context) -> list[Ask]:
        suite = context.suite
        return [
            one.ask(name)
            for family, wording in self.families.items()
            for name, phrases in wording.phrases(suite, family).items()
            for one in spelled(
                context, phrases, article=wording.article, templates=wording.templates(suite, name)
            )
        ]  # fmt: skip


def made(key: str, given: Written) -> type[WrittenProbe]:
    """The class of a probe."""
    shown = {name: getattr(given, name) for name in type(given).model_fields if name != "about"}
    kind: type[WrittenProbe] = type(
        key, (WrittenProbe,), {"__module__": __name__, "__doc__": given.about, "key": key, **shown}
    )
    for name, settings in kind.presets.items():
        try:
            kind(**settings)
        except TypeError as error:
            raise ValueError(f"{FILE.name}: {key}: preset {name}: {error}") from None
    return kind


PROBES = {key: made(key, given) for key, given in load_yaml(dict[str, Written], FILE).items()}


def __getattr__(key: str) -> Any:
    """A probe as an attribute of the module, for the registry."""
    if key in PROBES:
        return PROBES[key]
    raise AttributeError(f"{FILE.name} has no probe {key!r}; it has {sorted(PROBES)}")
