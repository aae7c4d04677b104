"""Filters around a pipeline: one reads prompts, one looks at pictures. Neither changes a weight.

What a filter stops does not reach the user. The model behind it still knows how to draw it, and whoever holds the
weights can leave the filter out: this suppresses at the level of a system and is no evidence about the model.

>>> from erasure.pipelines import GuardedPipeline, WordFilter
>>> guarded = GuardedPipeline(pipe, WordFilter(["superhero", "caped hero"]))  # doctest: +SKIP
>>> guarded("a photo of a sup3r-hero").guarded[0].action  # doctest: +SKIP
'blanked'
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Self, get_args

import numpy as np
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor

from erasure.pipelines.around import Around
from erasure.pipelines.calls import texts_of
from erasure.pipelines.filters import InputFilter, Match, OutputFilter, WordFilter, strongest

OnMatch = Literal["blank", "raise", "replace"]
Action = Literal["delivered", "replaced", "blanked"]

TEXTS = ("prompt", "prompt_2", "prompt_3")  # what pipelines call the texts they draw
GREY, LATENT_GREY = 0.5, 0.0  # pictures in arrays run from 0 to 1


@dataclasses.dataclass(frozen=True)
class Decision:
    """What was done about one picture, and why.

    Attributes:
        prompt: as it was given; None where embeddings were.
        action: "delivered", "replaced" (delivered, drawn from ``drawn``) or "blanked".
        by: which filter stepped in.
        input, output: what the filters said; None where there was none, or nothing for it to see.
        drawn: the prompt drawn in place of ``prompt``.
        note: what a filter could not see.
    """

    prompt: str | None
    action: Action = "delivered"
    by: Literal["input", "output"] | None = None
    input: Match | None = None
    output: Match | None = None
    drawn: str | None = None
    note: str = ""


class Stopped(RuntimeError):
    """A filter matched, and ``on_match="raise"``. ``decisions`` holds what was decided about each picture."""

    def __init__(self, decisions: Sequence[Decision]) -> None:
        self.decisions = list(decisions)
        first = next(one for one in decisions if one.by)
        match = first.output if first.by == "output" else first.input
        what = "picture" if first.by == "output" else "prompt"
        super().__init__(f"the {first.by} filter stopped a {what}; it came close to {match and match.phrase!r}")


class GuardedPipeline(Around):
    """A diffusers pipeline of pictures or videos between two filters, called as the pipeline is called.

    The answer is the pipeline's own output class, with :class:`Decision`s, one a picture, as its attribute ``guarded``.
    Everything else is handed on to the pipeline, which is not changed. ``save_pretrained`` saves the bare pipeline: a
    filter does not travel with weights.

    Args:
        pipe: the pipeline.
        input_filter: reads prompts; it cannot read ``prompt_embeds``, and the decisions say so.
        output_filter: looks at pictures; it cannot look at latents.
        on_match: "blank" puts plain grey in the picture's place. The empty prompt is drawn for a prompt that matches,
            so that the others of its batch stay what they are. "raise" raises :class:`Stopped`, for a prompt before
            anything is drawn. "replace" draws the prompt with the phrase replaced, and blanks what still matches.
        anchor: what "replace" puts in the place of the phrase; nothing by default.
        log: called with every decision.
    """

    _own = (*Around._own, "input_filter", "output_filter", "on_match", "anchor", "log")

    def __init__(
        self,
        pipe: Any,
        input_filter: InputFilter | None = None,
        output_filter: OutputFilter | None = None,
        *,
        on_match: OnMatch = "blank",
        anchor: str = "",
        log: Callable[[Decision], object] | None = None,
    ) -> None:
        if on_match not in get_args(OnMatch):
            raise ValueError(f"unknown on_match; got {on_match!r}; choose one of {list(get_args(OnMatch))}")
        if input_filter is None and output_filter is None:
            raise ValueError("a guarded pipeline needs a filter; got none; give input_filter or output_filter")
        super().__init__(pipe)
        self.input_filter, self.output_filter = input_filter, output_filter
        self.on_match, self.anchor, self.log = on_match, anchor, log

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Draw, with the arguments of the pipeline.

        Raises:
            Stopped: a filter matched, and ``on_match="raise"``.
            ValueError: latents are asked for, at which no output filter can look.
        """
        given = self.named(*args, **kwargs)
        kind = given.get("output_type")
        if kind == "latent" and self.output_filter is not None:
            raise ValueError(
                "the output filter looks at pictures; got output_type='latent'; ask for 'pil', 'np' or 'pt', or guard "
                "whatever decodes the latents"
            )
        texts = {name: texts_of(given[name], name) for name in self._texts(given)}
        counts = {name: len(rows) for name, rows in texts.items()}
        if len(set(counts.values())) > 1:
            raise ValueError(f"a call has as many texts of each kind; got {counts}; give one of each for every picture")
        decisions, drawn = self._read(texts)
        self._raise(decisions)
        given.update({name: rows[0] if isinstance(given[name], str) else rows for name, rows in drawn.items()})
        result = self.pipe(**given)
        field = "images" if hasattr(result, "images") else "frames"  # of videos
        images = result[0] if isinstance(result, tuple) else getattr(result, field)
        decisions = self._look(images, self._each(decisions, len(images)))
        self._raise(decisions)
        decisions = _stricter(decisions, getattr(result, "guarded", None) or decisions)
        images = _blanked(
            images, [one.action == "blanked" for one in decisions], LATENT_GREY if kind == "latent" else GREY
        )
        if self.log is not None:
            for decision in decisions:
                self.log(decision)
        if isinstance(result, tuple):
            return images, *result[1:]
        setattr(result, field, images)
        result.guarded = decisions
        return result

    def _texts(self, given: Mapping[str, Any]) -> list[str]:
        return [name for name in TEXTS if given.get(name) is not None]

    def _read(self, texts: dict[str, list[str]]) -> tuple[list[Decision], dict[str, list[str]]]:
        """What the input filter says of each prompt, and the prompts to draw."""
        rows = list(zip(*texts.values(), strict=True))
        if self.input_filter is None or not rows:
            return [Decision(row[0]) for row in rows], texts
        found = zip(*(self.input_filter.matches(column) for column in texts.values()), strict=True)
        decisions, drawn = [], []
        for row, matches in zip(rows, found, strict=True):
            worst = strongest(matches)
            instead = row if not worst.matched else self._instead(self.input_filter, row)
            drawn.append(instead or ("",) * len(row))
            acted: dict[str, Any] = {"by": "input", "drawn": drawn[-1][0]} if worst.matched else {}
            action: Action = "delivered" if not worst.matched else "replaced" if instead else "blanked"
            decisions.append(Decision(row[0], action, input=worst, **acted))
        return decisions, {name: list(column) for name, column in zip(texts, zip(*drawn, strict=True), strict=True)}

    def _instead(self, reader: InputFilter, texts: Sequence[str]) -> tuple[str, ...] | None:
        """The texts with every phrase replaced; None where that is not wanted, or what is left still matches."""
        if self.on_match != "replace":
            return None
        out = []
        for text in texts:
            for _ in range(len(text.split()) + 1):  # an anchor that matches itself would go on for ever
                (match,) = reader.matches([text])
                if not match.matched or match.span is None:
                    break
                start, end = match.span
                text = " ".join(f"{text[:start]}{self.anchor}{text[end:]}".split())
            out.append(text)
        return None if any(match.matched for match in reader.matches(out)) else tuple(out)

    def _each(self, decisions: list[Decision], count: int) -> list[Decision]:
        """One decision a picture: a prompt's pictures stand together. Embeddings were read by no one."""
        if decisions:
            return [one for one in decisions for _ in range(count // len(decisions))]
        unread = "the prompt came as embeddings, which the input filter cannot read" if self.input_filter else ""
        return [Decision(None, note=unread)] * count

    def _look(self, images: Any, decisions: list[Decision]) -> list[Decision]:
        """The decisions with what the output filter says of the pictures."""
        if self.output_filter is None:
            return decisions
        out = []
        for one, match in zip(decisions, self._matches(self.output_filter, images), strict=True):
            if one.action == "blanked":  # what was drawn is not of the prompt
                out.append(one)
            elif match.matched:
                out.append(dataclasses.replace(one, action="blanked", by="output", output=match))
            else:
                out.append(dataclasses.replace(one, output=match))
        return out

    def _matches(self, filter: OutputFilter, images: Any) -> list[Match]:
        """What the output filter says of each picture; of a video, what it says of its worst frame."""
        if isinstance(images[0], list) or getattr(images, "ndim", 4) > 4:
            return [strongest(filter.matches(_pictures(frames))) for frames in images]
        return filter.matches(_pictures(images))

    def _raise(self, decisions: Sequence[Decision]) -> None:
        if self.on_match == "raise" and any(one.by for one in decisions):
            raise Stopped(decisions)

    def __repr__(self) -> str:
        filters = [one.name for one in (self.input_filter, self.output_filter) if one is not None]
        return f"GuardedPipeline({type(self.pipe).__name__}, {', '.join(filters)}, on_match={self.on_match!r})"


def _stricter(mine: Sequence[Decision], inner: Sequence[Decision]) -> list[Decision]:
    """The decisions about pictures, with those of a guard inside where it did more."""
    order = get_args(Action)
    return [
        dataclasses.replace(theirs, prompt=one.prompt) if order.index(theirs.action) > order.index(one.action) else one
        for one, theirs in zip(mine, inner, strict=True)
    ]


def _pictures(images: Any) -> list[Image.Image]:
    """Pictures from whatever a pipeline gives."""
    images = VaeImageProcessor.pt_to_numpy(images) if isinstance(images, Tensor) else images
    return VaeImageProcessor.numpy_to_pil(images) if isinstance(images, np.ndarray) else list(images)


def _blanked(images: Any, rows: Sequence[bool], value: float) -> Any:
    """The same container with some pictures plain: grey, so that nobody takes one for a failure of the model."""
    if not any(rows):
        return images
    if isinstance(images, list):
        return [_grey(one, round(255 * value)) if blank else one for one, blank in zip(images, rows, strict=True)]
    out = copy.deepcopy(images)
    out[np.flatnonzero(rows)] = value
    return out


def _grey(one: Any, shade: int) -> Any:
    """A plain picture of the same size, or a plain video."""
    if isinstance(one, list):
        return [_grey(frame, shade) for frame in one]
    return Image.new("RGB", one.size, (shade,) * 3)


class Guard:
    """Filters as a change of a pipeline, for an evaluation: put on, looked at, taken off, and no weight touched.

    Args:
        input_filter, output_filter, on_match, anchor: as of :class:`GuardedPipeline`, but "raise".
        name: what tables call it.
    """

    intervention = "filter"

    def __init__(
        self,
        input_filter: InputFilter | None = None,
        output_filter: OutputFilter | None = None,
        *,
        name: str = "guardrail",
        on_match: OnMatch = "blank",
        anchor: str = "",
    ) -> None:
        if on_match == "raise":
            raise ValueError("an evaluation needs a picture for every prompt; got on_match='raise'; use 'blank'")
        self.name, self.input_filter, self.output_filter = name, input_filter, output_filter
        self.on_match, self.anchor = on_match, anchor

    @classmethod
    def of_words(cls, phrases: Sequence[str], *, name: str = "prompt filter", on_match: OnMatch = "replace") -> Self:
        """The simplest there is: phrases are taken out of prompts before they are drawn. No weight knows of it."""
        return cls(WordFilter(phrases), name=name, on_match=on_match)

    @property
    def config(self) -> dict[str, Any]:
        filters = {"input_filter": self.input_filter, "output_filter": self.output_filter}
        cards = {kind: None if one is None else dict(one.config) for kind, one in filters.items()}
        return {"method": "filter", **cards, "on_match": self.on_match, "anchor": self.anchor}

    def apply(self, pipe: Any) -> None:
        """Nothing: a filter stands around a pipeline."""

    def remove(self, pipe: Any) -> None:
        """Nothing."""

    def wrap(self, pipe: Any) -> GuardedPipeline:
        """The pipeline between the filters."""
        return GuardedPipeline(pipe, self.input_filter, self.output_filter, on_match=self.on_match, anchor=self.anchor)


__all__ = ["Decision", "Guard", "GuardedPipeline", "OnMatch", "Stopped"]
