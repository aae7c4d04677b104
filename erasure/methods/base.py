"""A method: a frozen dataclass of settings with named presets, ``validate`` and ``erase``."""

from __future__ import annotations

import abc
import dataclasses
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError

from erasure.artifact import Erasure
from erasure.artifact.config import Config
from erasure.artifact.record import new_config
from erasure.backbone import Backbone, architectures
from erasure.backbone.checks import refuse_computed, refuse_nan
from erasure.backbone.text import TooLong
from erasure.concept import Concept
from erasure.io import NAME, fault_of, folder_name, meant, shown
from erasure.wording import is_name, naming, with_article


@dataclasses.dataclass(frozen=True)
class Reference:
    """Where a method comes from."""

    title: str
    venue: str
    arxiv: str
    repository: str


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked for, whatever the method.

    Attributes:
        concepts: what to erase.
        keep: prompts whose pictures must not change.
        name: the erasure's name; from concepts and method by default.
        preset: the preset the method's settings come from, for the record.
        checkpoint: folder for the training state, from which the same request resumes. Closed forms have none to keep.
        progress: show progress bars.
    """

    concepts: tuple[Concept, ...]
    keep: tuple[str, ...] = ()
    name: str | None = None
    preset: str = ""
    checkpoint: Path | None = None
    progress: bool = True

    @property
    def phrases(self) -> list[str]:
        """Every name of every concept."""
        return self.names(synonyms=True)

    def names(self, *, synonyms: bool) -> list[str]:
        """The name of every concept, with its synonyms or without."""
        return [name for concept in self.concepts for name in (concept.phrases if synonyms else (concept.name,))]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method(abc.ABC):
    """Base of all methods. A subclass is a frozen dataclass whose fields are the method's settings.

    Class attributes:
        key: name in the registry and in files.
        summary: one line for ``erasure methods``.
        reference: paper and repository.
        presets: preset name to the settings in which it differs from the field defaults.
        files: settings that name a file; an erasure keeps its name, not the path.
        prompt_settings: settings that are prompts; they are checked as targets and anchors are.
        architectures: of the backbones it works on; None for all.
        part: what it changes, the denoiser or the text encoders.
        anchored: whether it draws a concept's anchor in its place; the others say that they do not use one.
        kind: of its erasures, where that is the same for all settings; see :meth:`leaves`.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(
        allow_inf_nan=False
    )  # every number of every method is finite

    key: ClassVar[str]
    summary: ClassVar[str]
    architectures: ClassVar[tuple[str, ...] | None] = None
    reference: ClassVar[Reference]
    presets: ClassVar[dict[str, dict[str, Any]]]
    files: ClassVar[tuple[str, ...]] = ()
    prompt_settings: ClassVar[tuple[str, ...]] = ()
    part: ClassVar[Literal["denoiser", "text encoder"]] = "denoiser"
    anchored: ClassVar[bool] = True
    kind: ClassVar[str | None] = None

    @classmethod
    def preset(cls, name: str | None = None, /, **changes: Any) -> Self:
        """Settings of a named preset (default: the first), with changes.

        Raises:
            ValueError: unknown preset or setting; the message lists the known ones.
        """
        name = name or next(iter(cls.presets))
        if name not in cls.presets:
            raise ValueError(
                f"{cls.key} has no preset {name!r}{meant(name, cls.presets)}; choose one of {list(cls.presets)}"
            )
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(changes) - set(known)):
            part = next((name for name in unknown if name in ("anchor", "synonyms", "neighbours", "templates")), None)
            option = {"anchor": " (--anchor)", "synonyms": " (--synonym)"}.get(part or "", " (or a suite)")
            hint = f"; {part} belongs to the concept: Concept({'name'!r}, {part}=...){option}" if part else ""
            hint = hint or meant(unknown[0], known)
            raise ValueError(
                f"{cls.key} has no setting {unknown[0]!r}{hint}; its settings are {known}; `erasure methods {cls.key}` "
                "explains them"
            )
        try:
            made = TypeAdapter(cls).validate_python({**cls.presets[name], **changes})
        except ValidationError as error:
            fault = fault_of(error)
            given = "" if "; got " in fault else f"; got {shown(error.errors()[0]['input'])}"
            raise ValueError(f"{cls.key}: {fault}{given}") from None
        for setting, value in changes.items():  # pydantic reads true as 1
            if isinstance(value, bool) and not isinstance(getattr(made, setting), bool):
                raise ValueError(f"{cls.key}: {setting} is a number; got {value}; give a number")
        made.check()
        return made

    def check(self) -> None:  # noqa: B027  # most have none
        """Refuse settings that no model could be erased with; so a recipe finds them before a model is opened.

        A method with settings that depend on each other extends this.

        Raises:
            ValueError: what, what was given, and what to do instead.
        """

    @property
    def needs_keep(self) -> bool:
        """Whether these settings damage neighbours unless there is a keep list."""
        return False

    def leaves(self, denoiser: str) -> str | None:
        """The kind of erasure that these settings make on a model with a "unet" or a "transformer".

        None where that is not known before: what depends on it is checked when the erasure is there.
        """
        return self.kind

    def validate(self, backbone: Backbone, request: Request) -> None:
        """Refuse, before any work, a request that contradicts itself or a model the method does not work on.

        A method with conditions of its own extends this.

        Raises:
            ValueError: what, what was given, and what to do instead.
        """
        check_supported(self, backbone)
        refuse_computed(backbone.components)
        refuse_nan(backbone.components)
        check_request(request.concepts, request.keep)
        check_read(backbone, request, also=[prompt for name in self.prompt_settings if (prompt := getattr(self, name))])
        anchor = next((concept.anchor for concept in request.concepts if concept.anchor), "")
        if anchor and not self.anchored:
            said = f"{self.key} draws nothing in a concept's place, so the anchor {anchor!r} is not used"
            warnings.warn(said, stacklevel=3)

    @abc.abstractmethod
    def erase(self, backbone: Backbone, request: Request) -> Erasure:
        """Make the erasure of a request that :meth:`validate` passed.

        The pipeline is left exactly as it was; ``Erasure.apply`` changes it.
        """

    def name_for(self, request: Request) -> str:
        """The name the request gives, or one of concepts and method, which may be a folder's."""
        named = "+".join(concept.name for concept in request.concepts)
        return request.name or f"{folder_name(named, longest=NAME - len(self.key) - 1)}-{self.key}"

    def record(self, backbone: Backbone, request: Request, **facts: Any) -> Config:
        """The config of the erasure it made, with facts of the method's own."""
        return new_config(
            backbone,
            method=self.key,
            settings=self.settings(),
            concepts=request.concepts,
            keep=request.keep,
            preset=request.preset,
            **({"encoding": backbone.encoding} if backbone.encoding else {}),
            **facts,
        )

    def settings(self) -> dict[str, Any]:
        """The settings as plain data, for the erasure's config."""
        return dataclasses.asdict(self)


def expanded(backbone: Backbone, phrases: Sequence[str], *, articles: bool) -> list[str]:
    """Phrases as every method takes them, targets and kept ones alike: with articles, "a ninja" beside "ninja".

    An article for which the text encoder has no room is left out.
    """
    added = backbone.fitting(map(with_article, phrases)) if articles else []
    return list(dict.fromkeys([*phrases, *added]))


def with_anchors(
    backbone: Backbone, concepts: Sequence[Concept], *, synonyms: bool, articles: bool, templates: bool = False
) -> list[tuple[str, str]]:
    """Every name of every concept, with and without an article as :func:`expanded` does, and its anchor likewise.

    Args:
        templates: put both into each of the concept's sentences.
    """
    found = []
    for concept in concepts:
        for phrase in concept.phrases if synonyms else (concept.name,):
            for template in concept.templates if templates else ("{}",):
                found.append((template.replace("{}", phrase), template.replace("{}", concept.anchor).strip()))
                articled = template.replace("{}", with_article(phrase))
                if articles and backbone.fitting([articled]):
                    anchor = with_article(concept.anchor) if concept.anchor else ""
                    found.append((articled, template.replace("{}", anchor).strip()))
    return list(dict.fromkeys(found))


def replacements(prompts: Sequence[str], concepts: Sequence[Concept], keep: Sequence[str]) -> list[list[str]]:
    """What each prompt may be drawn as: the anchor of the concept that it names or, without one, all that is kept.

    Args:
        prompts: names of the concepts, with or without an article.
    """
    own = {phrase: concept.anchor for concept in concepts for phrase in concept.phrases}
    own |= {with_article(phrase): anchor for phrase, anchor in own.items()}
    return [[own[prompt]] if own[prompt] else list(keep) for prompt in prompts]


def check_anchors(key: str, concepts: Sequence[Concept]) -> None:
    """Refuse concepts without an anchor, for a method that draws the anchor in their place."""
    if lacking := [concept.name for concept in concepts if not concept.anchor]:
        raise ValueError(
            f"{key} needs an anchor for every concept, which its prompt is drawn as; {lacking} have none; give one: "
            f"Concept({lacking[0]!r}, anchor='a person') (--anchor)"
        )


def check_supported(method: Method, backbone: Backbone) -> None:
    """Refuse a model the method does not work on, before any work."""
    if method.architectures is not None and backbone.architecture not in method.architectures:
        known = ", ".join(architectures()[name].pipelines for name in method.architectures)
        raise ValueError(
            f"{method.key} does not work on {backbone.pipelines}; it supports {known}; choose another, such as uce"
        )


def check_request(concepts: Sequence[Concept], keep: Sequence[str]) -> None:
    """Refuse a request that contradicts itself, before any work."""
    if not concepts:
        raise ValueError("nothing to erase; got no concepts; name at least one")
    phrases = [phrase for concept in concepts for phrase in concept.phrases]
    for prompt in keep:
        if not prompt.strip():
            raise ValueError("an empty prompt is in the keep list; take it out (the empty prompt is not a concept)")
        if clash := next((p for p in phrases if is_name(p, prompt)), None):
            raise ValueError(f"{clash!r} is both to be erased and to be kept; take it out of one of the two")
    if held := naming(keep, phrases):
        warnings.warn(
            f"{len(held)} of the prompts to keep name what is to be erased ({held[0]!r}), and hold on to it; take them "
            "out unless they mean something else",
            stacklevel=4,
        )
    for concept in concepts:
        if concept.anchor and any(is_name(phrase, concept.anchor) for phrase in phrases):
            raise ValueError(
                f"the anchor {concept.anchor!r} of {concept.name!r} is itself to be erased; choose another anchor"
            )


def check_read(backbone: Backbone, request: Request, *, also: Sequence[str] = ()) -> None:
    """Refuse prompts that the text encoders cut, and targets and anchors that they do not know, before any work.

    Raises:
        TooLong: a target, an anchor or a kept prompt does not fit.
        ValueError: a tokenizer knows no part of a word, which is one to it with every other such word.
    """
    named = [*request.phrases, *(concept.anchor for concept in request.concepts if concept.anchor), *also]
    backbone.check_lengths(named)
    try:
        backbone.check_lengths(request.keep)
    except TooLong as error:
        advice = "or take it out of the keep list (from a corpus file, captions like it are left out)"
        raise TooLong(f"{error}, {advice}", prompts=error.prompts) from None
    for phrase in named:
        if unknown := backbone.unknown_word(phrase):
            word, tokenizer = unknown
            raise ValueError(
                f"the model does not know {word!r}: its {tokenizer} writes one unknown token for it, as for every word "
                f"that it cannot spell; got {phrase!r}; name the concept in words it knows"
            )


def check_moved(changes: dict[str, torch.Tensor], weights: dict[str, torch.Tensor]) -> float:
    """Relative change of the weights, ``|dW| / |W|`` in Frobenius norm over all touched tensors.

    Raises:
        ValueError: it is below 1e-6: the method did nothing.
    """
    moved = math.hypot(*(change.float().norm().item() for change in changes.values()))
    size = math.hypot(*(weights[name].detach().float().norm().item() for name in changes))
    return check_change(moved / max(size, 1e-30))


def check_change(relative: float) -> float:
    """The relative change of the weights, if there is one.

    Raises:
        ValueError: it is not above 1e-6, or not finite.
    """
    if not math.isfinite(relative):
        raise ValueError(
            f"the weights did not stay finite (relative change {relative}); lower the scale or the learning rate"
        )
    if not relative > 1e-6:
        raise ValueError(
            f"the weights did not move (relative change {relative:.1e}); target and anchor may be the same to the text "
            "encoder, or the scale or learning rate is zero; change one of them"
        )
    return relative
