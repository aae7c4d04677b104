"""Which attached erasures a call is drawn with: a choice of the call's context, never a state of the pipeline."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from erasure.artifact import Erasure
from erasure.artifact.stack import check_scale
from erasure.io import is_whole, shown

Names = Erasure | str | Sequence[Erasure | str] | Mapping[Any, float]  # to scales
Scales = dict[str, float]

# Predictions that guidance makes in one call of a denoiser: one, two, or three (perturbed attention, InstructPix2Pix).
PREDICTIONS = (1, 2, 3)


@dataclasses.dataclass(frozen=True)
class Choice:
    """Erasures for every prompt of a call, or for each.

    Attributes:
        rows: name to scale; one for all prompts, or one a prompt.
        each: whether there is one a prompt.
        images: pictures of each prompt; None where the call was not looked at.
        certain: ``images`` are those of the call, not what somebody said.
    """

    rows: tuple[Scales, ...]
    each: bool = False
    images: int | None = None
    certain: bool = False

    def scales(self, name: str) -> list[float]:
        """The scale of one erasure in every row."""
        return [row.get(name, 0.0) for row in self.rows]


def choice_of(
    known: Mapping[str, float], names: Names | None, rows: Sequence[Names] | None, images: int | None = None
) -> Choice:
    """A choice among erasures.

    Args:
        known: the erasures there are, and their scales where none is given.

    Raises:
        ValueError: a name that is not among them, one given twice, a scale that is none, names and rows at once.
    """
    if names is not None and rows is not None:
        raise ValueError("erasures for all prompts and for each were given at once; give names, or rows")
    if images is not None and not is_whole(images, 1):
        raise ValueError(f"num_images_per_prompt is a number from 1 on; got {images!r}; give the call's")
    if rows is None:
        return Choice((dict(known) if names is None else _scales(known, names),), images=images)
    if isinstance(rows, str | Erasure | Mapping):
        raise ValueError(f"rows has the erasures of each prompt; got {rows!r}; give a list with a list for each prompt")
    return Choice(tuple(_scales(known, row) for row in rows), each=True, images=images)


def _scales(known: Mapping[str, float], names: Names) -> Scales:
    given: list[tuple[Any, float | None]]
    if isinstance(names, Mapping):
        given = [(name, check_scale(scale)) for name, scale in names.items()]
    else:
        several = [names] if isinstance(names, str | Erasure) else names
        if not isinstance(several, Sequence) or not all(isinstance(name, str | Erasure) for name in several):
            raise ValueError(f"erasures are chosen by their names; got {shown(names)}; [] chooses none")
        given = [(name, None) for name in several]
    named = [(name.name if isinstance(name, Erasure) else name, scale) for name, scale in given]
    if unknown := [name for name, _ in named if name not in known]:
        raise ValueError(f"not attached: {unknown}; attached are {list(known)}; attach them first (attach_erasures)")
    scales = {name: known[name] if scale is None else scale for name, scale in named}
    if len(scales) < len(named):
        raise ValueError(f"an erasure is named twice; got {[name for name, _ in named]}; name each once")
    return scales


# --- the choice in force --------------------------------------------------------------------------------------------

Entry = tuple[tuple[Any, ...], Choice]  # handles, and their choice
CHOSEN: ContextVar[tuple[Entry, ...]] = ContextVar("erasures", default=())  # the innermost block comes last


def chosen(handle: Any) -> Choice | None:
    """The choice for a handle in this context; None where there is none."""
    return next((choice for handles, choice in reversed(CHOSEN.get()) if handle in handles), None)


def enter(entry: Entry) -> None:
    CHOSEN.set((*CHOSEN.get(), entry))


def leave(entry: Entry) -> None:
    """Take a choice out of this context; nothing happens where it is not in it."""
    there = CHOSEN.get()
    last = max((i for i, one in enumerate(there) if one is entry), default=len(there))
    CHOSEN.set((*there[:last], *there[last + 1 :]))


@contextlib.contextmanager
def choosing(entry: Entry) -> Iterator[None]:
    """A choice for the time of a block."""
    enter(entry)
    try:
        yield
    finally:
        leave(entry)


def by_row(handles: Iterable[Any]) -> bool:
    """Whether the erasures in force are chosen for each prompt."""
    return any((chosen(handle) or handle.default).each for handle in handles)


@contextlib.contextmanager
def narrowed(handles: Iterable[Any], prompts: Sequence[int], count: int, images: int) -> Iterator[None]:
    """For a block that draws some of the prompts of a call: rows in force are those of these prompts alone.

    Args:
        handles: what is attached.
        prompts: which of ``count``; one several times where it is repeated.
        images: pictures of each in the block.

    Raises:
        ValueError: there are not as many rows as prompts.
    """

    def narrow(choice: Choice) -> Choice:
        if len(choice.rows) != count:
            raise ValueError(f"rows for {len(choice.rows)} prompts, but the call has {count}; give one row a prompt")
        rows = tuple(choice.rows[i] for i in prompts)
        return dataclasses.replace(choice, rows=rows, images=images, certain=True)

    in_force = [(handle, chosen(handle) or handle.default) for handle in handles]
    own = [((handle,), narrow(choice)) for handle, choice in in_force if choice.each]
    token = CHOSEN.set((*CHOSEN.get(), *own))
    try:
        yield
    finally:
        CHOSEN.reset(token)


# --- which row of a batch is which prompt's -------------------------------------------------------------------------


def order(choice: Choice, latents: Any, text: Any, *, guidance_doubles: bool, guided: bool | None) -> tuple[int, ...]:
    """For each row of a denoiser's batch, which prompt it belongs to.

    Pipelines repeat each prompt for its pictures, and all of that for guidance: ``p1 p1 p2 p2 | p1 p1 p2 p2``. A batch
    of 4 rows for 2 prompts is two pictures each without guidance, or one each with it; the halves of a guided batch
    hold the same latents, and pictures of one prompt the same text. What remains open is refused, and so is what the
    texts contradict: a call of other prompts than there are rows for.

    Args:
        latents: of the call; a tensor, or one a row.
        text: a function that returns the rows of its text.
        guidance_doubles: whether guidance makes its predictions in one call.
        guided: what the pipeline says of the call it is in: True, or nothing certain.

    Raises:
        ValueError: rows and batch do not fit, or fit in two ways.
    """
    prompts, batch = len(choice.rows), len(latents)
    each = batch // prompts if prompts else 0
    found: dict[int, tuple[int, ...]] = {}  # by the number of pictures of a prompt
    for predictions in PREDICTIONS if guidance_doubles else (1,):
        images = each // predictions
        fits = images and images * predictions * prompts == batch and choice.images in (None, images)
        if fits and (choice.certain or _repeats(latents, predictions)):
            found[images] = tuple(i for i in range(prompts) for _ in range(images)) * predictions
    if not choice.certain:
        doubled = guidance_doubles and guided and any(_repeats(latents, n) for n in PREDICTIONS[1:] if not batch % n)
        if doubled:  # a part of this batch has no prompt, so a row for each of its rows is wrong
            found.pop(each, None)
        found = {images: plan for images, plan in found.items() if not _other_texts(text, batch, images)}
    plans = set(found.values())
    if len(plans) > 1:
        rows = text()
        plans = {plan for images, plan in found.items() if _constant(rows, batch, images)}
    if len(plans) > 1 and guided:
        plans.discard(found.get(each, ()))
    if len(plans) != 1:
        raise ValueError(
            f"rows for {prompts} prompts"
            + (f" with {choice.images} pictures each" if choice.images else "")
            + f", but the denoiser got a batch of {batch}, "
            + ("which fits in more than one way" if plans else "which does not fit")
            + "; give one row a prompt, and call what erasures(...) returns, or give it the call's "
            "num_images_per_prompt; models that read all prompts as one sequence take no rows"
        )
    return plans.pop()


def _repeats(latents: Any, times: int) -> bool:
    """Whether latents are one batch several times over."""
    n = len(latents) // times
    first, *others = (latents[k * n : (k + 1) * n] for k in range(times))
    return all(all(map(torch.equal, first, other)) for other in others)


def _other_texts(text: Any, batch: int, images: int) -> bool:
    """Whether a row for each of the texts is there, and what would be pictures of one prompt has several."""
    if images < 2:
        return False
    rows = text()
    return len(list(rows)[:: max(len(rows) // batch, 1)]) == batch and not _constant(rows, batch, images)


def _constant(text: Sequence[Tensor], batch: int, images: int) -> bool:
    """Whether each run of ``images`` rows has one text."""
    rows = list(text)[:: max(len(text) // batch, 1)]
    return len(rows) == batch and all(torch.equal(rows[i], rows[i - i % images]) for i in range(batch))


__all__ = ["Choice", "Names", "by_row", "choice_of", "choosing", "chosen", "enter", "leave", "narrowed", "order"]
