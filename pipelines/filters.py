"""Filters: what reads a prompt, or looks at a picture, and says whether it is of a concept.

They are put around a pipeline by :mod:`erasure.pipelines.guardrails`, and are of use without one.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from erasure.io import is_number
from erasure.wording import listed, same

Encode = Callable[[Sequence[str]], Tensor]  # texts -> (n, d)

LOOKALIKES = {
    "a": "a4@", "b": "b8", "e": "e3", "g": "g9", "i": "i1!|", "l": "l1|", "o": "o0", "s": "s5$", "t": "t7+", "z": "z2",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Match:
    """What a filter says about one prompt or picture.

    Attributes:
        score: how close it is to what is filtered, in the filter's own unit.
        threshold: from which score on it is stopped.
        phrase: what it came closest to: a phrase of the concept, or the label of the detector.
        span: where in the prompt, start and end of the characters; None for pictures.
    """

    score: float
    threshold: float
    phrase: str | None = None
    span: tuple[int, int] | None = None

    @property
    def margin(self) -> float:
        """Score above the threshold: comparable between filters of one kind, and what an operating curve ranks by."""
        return self.score - self.threshold

    @property
    def matched(self) -> bool:
        return not self.score < self.threshold  # what is no number is stopped


def strongest(matches: Iterable[Match]) -> Match:
    """The one that decides: a match that stops before any other, then the furthest above its threshold."""
    return max(matches, key=lambda match: (match.matched, match.margin))


class InputFilter(Protocol):
    """Anything that reads prompts."""

    @property
    def name(self) -> str: ...

    @property
    def config(self) -> Mapping[str, Any]:
        """Its settings, as JSON types."""
        ...

    def matches(self, prompts: Sequence[str], /) -> list[Match]:
        """One for each prompt."""
        ...


class Looks(Protocol):
    """What an output filter needs of a detector; those of :mod:`erasure.eval.detectors` have it."""

    name: str

    def labels(self, attribute: str) -> Sequence[str]: ...

    def scores(self, images: Sequence[Image.Image], attribute: str) -> np.ndarray:
        """Probabilities (images, labels)."""
        ...


class Thresholded(Protocol):
    """A filter whose threshold can be chosen: a frozen dataclass with ``threshold`` and ``matches``."""

    @property
    def threshold(self) -> float: ...

    def matches(self, samples: Any, /) -> list[Match]: ...


T = TypeVar("T", bound=Thresholded)


@dataclasses.dataclass(frozen=True)
class WordFilter:
    """Prompts that hold one of some phrases, whatever their case and accents, as whole words, singular or plural.

    Letters of other alphabets that look alike are not seen through, nor are languages written without spaces.

    Attributes:
        phrases: what to stop; one phrase, or several.
        leetspeak: also "sup3rher0". Turn it off where numbers and signs mean themselves.
        spacing: also "super hero", "super-hero", "s u p e r h e r o". Turn it off for phrases of few letters, which
            other words may spell together.
    """

    phrases: str | Sequence[str]
    leetspeak: bool = True
    spacing: bool = True

    name = "words"

    def __post_init__(self) -> None:
        object.__setattr__(self, "phrases", tuple(listed(self.phrases)))
        if not self.phrases or any(not re.search(r"[^\W_]", phrase) for phrase in self.phrases):
            raise ValueError(f"a word filter needs phrases with letters; got {list(self.phrases)}; name the concept")

    @property
    def config(self) -> dict[str, Any]:
        return {
            "filter": self.name, "phrases": list(self.phrases), "leetspeak": self.leetspeak, "spacing": self.spacing,
        }  # fmt: skip

    def matches(self, prompts: Sequence[str], /) -> list[Match]:
        """Score 1 where a phrase stands in the prompt, else 0."""
        return [self._match(prompt) for prompt in prompts]

    def _match(self, prompt: str) -> Match:
        text, at = _plain(prompt)
        for phrase, pattern in self._patterns.items():
            if found := pattern.search(text):
                return Match(1.0, 0.5, phrase, (at[found.start()], at[found.end() - 1] + 1))
        return Match(0.0, 0.5)

    @functools.cached_property
    def _patterns(self) -> dict[str, re.Pattern[str]]:
        return {phrase: self._pattern(phrase) for phrase in self.phrases}

    def _pattern(self, phrase: str) -> re.Pattern[str]:
        *first, last = re.findall(r"[^\W_]+", _plain(phrase)[0])
        words = [self._spelled(word) for word in first]
        words.append(f"(?:{'|'.join(self._spelled(form) for form in _forms(last))})")
        gap = r"[\W_]*" if self.spacing else r"[\W_]+"
        return re.compile(rf"(?<![^\W_]){gap.join(words)}(?![^\W_])")

    def _spelled(self, word: str) -> str:
        letters = [f"[{re.escape(LOOKALIKES.get(c, c))}]" if self.leetspeak else re.escape(c) for c in word]
        return (r"[\W_]?" if self.spacing else "").join(letters)


def _plain(text: str) -> tuple[str, list[int]]:
    """Text without case, accents and invisible characters, and where each of its characters stood."""
    letters, at = [], []
    for i, character in enumerate(text):
        for letter in unicodedata.normalize("NFKD", character).casefold():
            if unicodedata.category(letter) not in ("Mn", "Me", "Cf"):
                letters.append(letter)
                at.append(i)
    return "".join(letters), at


def _forms(word: str) -> list[str]:
    """A word and what its plural may be; longest first, since the first that fits is taken."""
    endings = {"y": "ies", "f": "ves", "fe": "ves", "man": "men"}
    irregular = [word.removesuffix(end) + plural for end, plural in endings.items() if word.endswith(end)]
    return [*irregular, f"{word}es", f"{word}s", word]


@dataclasses.dataclass(frozen=True)
class EmbeddingFilter:
    """Prompts of which a stretch of words means one of some phrases, by the cosine of their text embeddings.

    ``score = max over stretches w of the prompt and phrases c of <e(w), e(c)> / (|e(w)| |e(c)|)``, e: text -> (d,)

    Attributes:
        encode: texts to embeddings ``(n, d)``: :func:`text_embeddings` of a pipeline, or the text tower of an open_clip
            model (``lambda texts: model.encode_text(tokenizer(list(texts)))``).
        phrases: what to stop; one phrase, or several.
        threshold: depends on the encoder; let :func:`calibrated` choose it.
        window: the longest stretch of words that is looked at. Raise it to the length of the longest phrase.
        batch_size: texts per call of ``encode``.
    """

    encode: Encode
    phrases: str | Sequence[str]
    threshold: float = 0.9
    window: int = 4
    batch_size: int = 256

    name = "embedding"

    def __post_init__(self) -> None:
        object.__setattr__(self, "phrases", tuple(listed(self.phrases)))
        if not self.phrases or self.window < 1:
            raise ValueError(
                f"an embedding filter needs phrases and window >= 1; got {list(self.phrases)} and {self.window}; "
                "name the concept"
            )
        check_threshold(self.name, self.threshold)

    @property
    def config(self) -> dict[str, Any]:
        settings = {"phrases": list(self.phrases), "threshold": self.threshold, "window": self.window}
        return {"filter": self.name, **settings}

    def matches(self, prompts: Sequence[str], /) -> list[Match]:
        spans = [list(self._spans(prompt)) for prompt in prompts]
        parts = [[prompt[start:end] for start, end in own] for prompt, own in zip(prompts, spans, strict=True)]
        rows = {text: i for i, text in enumerate(dict.fromkeys(text for own in parts for text in own))}
        cosine = self._unit(list(rows)) @ self._phrases.T if rows else torch.zeros(0, len(self.phrases))
        best, nearest = cosine.max(dim=-1)
        found = []
        for own, texts in zip(spans, parts, strict=True):
            at = max(range(len(own)), key=lambda i: float(best[rows[texts[i]]]))
            row = rows[texts[at]]
            found.append(Match(float(best[row]), self.threshold, self.phrases[int(nearest[row])], own[at]))
        return found

    def _spans(self, prompt: str) -> Iterator[tuple[int, int]]:
        """Start and end of every stretch of one to ``window`` words; of the whole where there are none."""
        words = [word.span() for word in re.finditer(r"[\w'-]+", prompt)]
        if not words:
            yield 0, len(prompt)
        for i, (start, _) in enumerate(words):
            for _, end in words[i : i + self.window]:
                yield start, end

    @functools.cached_property
    def _phrases(self) -> Tensor:
        return self._unit(list(self.phrases))

    @torch.no_grad()
    def _unit(self, texts: list[str]) -> Tensor:
        batches = [texts[i : i + self.batch_size] for i in range(0, len(texts), self.batch_size)]
        embedded = torch.cat([self.encode(batch).float().cpu() for batch in batches])
        return torch.nn.functional.normalize(embedded, dim=-1)


def text_embeddings(pipe: Any) -> Encode:
    """Texts as a pipeline's first CLIP text encoder understands them: its last state at the end token, ``(n, d)``.

    The encoder is held, not copied: an edit of its weights is an edit of the filter. Make the filter of the unmodified
    pipeline. Texts longer than the encoder reads are cut.

    Raises:
        ValueError: the pipeline has no CLIP text encoder.
    """
    encoder: Any = getattr(pipe, "text_encoder", None)
    tokenizer: Any = getattr(pipe, "tokenizer", None)
    if "CLIPTextModel" not in type(encoder).__name__:
        raise ValueError(
            f"{type(pipe).__name__} has no CLIP text encoder; got {type(encoder).__name__}; give `encode` another one"
        )

    @torch.no_grad()
    def encode(texts: Sequence[str]) -> Tensor:
        length = tokenizer.model_max_length
        read = tokenizer(list(texts), padding=True, truncation=True, max_length=length, return_tensors="pt")
        ends = read.attention_mask.sum(dim=1) - 1
        hidden = encoder(read.input_ids.to(encoder.device)).last_hidden_state
        return hidden[torch.arange(len(hidden)), ends.to(hidden.device)]

    return encode


@dataclasses.dataclass(frozen=True)
class AnyOf:
    """Several input filters as one: a prompt is stopped if any of them stops it.

    Its match is that of the filter with the largest margin.
    """

    filters: Sequence[InputFilter]

    @property
    def name(self) -> str:
        return "+".join(one.name for one in self.filters)

    @property
    def config(self) -> dict[str, Any]:
        return {"filter": "any of", "filters": [dict(one.config) for one in self.filters]}

    def matches(self, prompts: Sequence[str], /) -> list[Match]:
        each = [one.matches(prompts) for one in self.filters]
        return [strongest(row) for row in zip(*each, strict=True)]


@dataclasses.dataclass(frozen=True)
class OutputFilter:
    """Pictures in which a detector sees a label.

    The detector must not be the one that judges an evaluation: it would find that nothing passes itself.

    Attributes:
        detector: anything with ``name``, ``labels(attribute)`` and ``scores(images, attribute)``.
        label: what to stop.
        threshold: of the label's probability. Raise it where too much else is stopped; :func:`calibrated` chooses it.
        attribute: which of the detector's questions the label answers.
    """

    detector: Looks
    label: str
    threshold: float = 0.5
    attribute: str = "concept"

    def __post_init__(self) -> None:
        if not any(same(label, self.label) for label in self.detector.labels(self.attribute)):
            raise ValueError(
                f"{self.detector.name} has no label {self.label!r} for {self.attribute}; "
                f"choose one of {sorted(self.detector.labels(self.attribute))}"
            )
        check_threshold(self.name, self.threshold)

    @property
    def name(self) -> str:
        return str(self.detector.name)

    @property
    def config(self) -> dict[str, Any]:
        return {
            "filter": "detector", "detector": self.name, "label": self.label, "threshold": self.threshold,
            "attribute": self.attribute,
        }  # fmt: skip

    def matches(self, images: Sequence[Image.Image], /) -> list[Match]:
        labels = self.detector.labels(self.attribute)
        column = next(i for i, label in enumerate(labels) if same(label, self.label))
        if not len(images):
            return []
        scores = self.detector.scores(list(images), self.attribute)[:, column]
        if len(scores) != len(images) or any(math.isnan(score) for score in scores):
            raise ValueError(
                f"{self.name} gave {len(scores)} scores for {len(images)} pictures, or NaN for one; nothing is "
                "delivered, since nobody looked at it; mend the detector"
            )
        return [Match(float(score), self.threshold, labels[column]) for score in scores]


def check_threshold(name: str, threshold: Any) -> None:
    """Refuse a threshold below which, or above which, everything would be.

    Raises:
        ValueError: it is no finite number: nothing is at least NaN, so everything would pass.
    """
    if not is_number(threshold):
        raise ValueError(f"the threshold of {name} must be a finite number; got {threshold!r}; 0.5 is a usual one")


def calibrated(filter: T, samples: Sequence[Any], *, false_positive_rate: float = 0.01) -> T:
    """A filter with the lowest threshold at which it stops no more than a share of samples that should pass.

    Args:
        filter: with a ``threshold`` (:class:`EmbeddingFilter`, :class:`OutputFilter`).
        samples: prompts, or pictures, that should pass; never those it is evaluated on.
        false_positive_rate: the share.

    Raises:
        ValueError: too few samples to tell such a rate.
    """
    if not 0 < false_positive_rate < 1 or len(samples) * false_positive_rate < 1:
        raise ValueError(
            f"a false positive rate of {false_positive_rate:g} cannot be set on {len(samples)} samples; "
            "the rate must be between 0 and 1, and 1 / rate samples are needed; give more samples or a larger rate"
        )
    scores = sorted((match.score for match in filter.matches(samples)), reverse=True)
    allowed = scores[math.floor(false_positive_rate * len(samples) + 1e-9)]  # the highest score that must still pass
    return dataclasses.replace(filter, threshold=math.nextafter(allowed, math.inf))  # type: ignore[type-var]


__all__ = [
    "AnyOf",
    "EmbeddingFilter",
    "Encode",
    "InputFilter",
    "Match",
    "OutputFilter",
    "WordFilter",
    "calibrated",
    "text_embeddings",
]
