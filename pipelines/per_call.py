"""The erasures of one call: chosen in its context, whatever other threads and tasks draw with at the same time."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Self

from erasure.artifact.stack import stack_of
from erasure.pipelines.around import Around
from erasure.pipelines.choices import Choice, Names, choice_of, choosing, enter, leave

PICTURES = ("num_images_per_prompt", "num_videos_per_prompt")


def erasures(
    pipe: Any,
    names: Names | None = None,
    *,
    rows: Sequence[Names] | None = None,
    num_images_per_prompt: int | None = None,
) -> Drawing:
    """Choose attached erasures for calls of a pipeline, in this thread or task alone.

    Two ways to use it. The block holds for every call inside it, blocks nest, and the innermost one decides:

    >>> attach_erasures(pipe, [hero, cat])  # doctest: +SKIP
    >>> with erasures(pipe, ["superhero-uce"]):  # doctest: +SKIP
    ...     pipe("a superhero")

    Or call what it returns, which is what a server does. It carries its choice to whichever thread calls it, and each
    call has its own scheduler and tokenizers, so that one pipeline may draw in several threads at once:

    >>> erasures(pipe, {"superhero-uce": 0.8})("a superhero")  # doctest: +SKIP
    >>> erasures(pipe, rows=[["superhero-uce"], []])(["a superhero", "a superhero"])  # doctest: +SKIP

    Args:
        pipe: a pipeline with attached erasures (:func:`~erasure.pipelines.attach_erasures`), or another one around the
            same denoiser.
        names: names of erasures, or the erasures: one, several, none (``[]``), or a mapping to scales. All by default.
        rows: instead, one such entry for each prompt of the call.
        num_images_per_prompt: beside ``rows``, for a call of the pipeline itself. It is found out where it can be, and
            a call that leaves it open is refused. What this function returns knows it from the call.

    Raises:
        ValueError: nothing is attached; an unknown name; a scale that is none.
    """
    handles = tuple(stack_of(pipe).attached)
    known = {name: scale for handle in handles for name, scale in handle.scales.items()}
    if not known:
        raise ValueError(
            "no erasure is attached to this pipeline, and those in its weights are the same for every call; call "
            "attach_erasures(pipe, [...]) once, before the first call"
        )
    return Drawing(pipe, handles, choice_of(known, names, rows, num_images_per_prompt))


class Drawing(Around):
    """A pipeline with a choice of its attached erasures; see :func:`erasures`."""

    _own = (*Around._own, "_handles", "_choice", "_entry")

    def __init__(self, pipe: Any, handles: tuple[Any, ...], choice: Choice) -> None:
        super().__init__(pipe)
        self._handles, self._choice, self._entry = handles, choice, (handles, choice)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Draw, with the arguments of the pipeline.

        Raises:
            ValueError: there are not as many rows as prompts.
        """
        choice = (
            self._of_call(self.__signature__.bind(*args, **kwargs).arguments) if self._choice.each else self._choice
        )
        with choosing((self._handles, choice)):
            return self._handles[0].copies.make(self.pipe)(*args, **kwargs)

    def __enter__(self) -> Self:
        enter(self._entry)
        return self

    def __exit__(self, *exception: object) -> None:
        leave(self._entry)

    def _of_call(self, given: Any) -> Choice:
        """The choice with the call's own numbers of prompts and pictures."""
        prompts, images = count(given), next((given[name] for name in PICTURES if given.get(name)), 1)
        if len(self._choice.rows) != prompts or self._choice.images not in (None, images):
            raise ValueError(
                f"rows for {len(self._choice.rows)} prompts, but the call has {prompts} with {images} pictures each; "
                "give one row a prompt"
            )
        return dataclasses.replace(self._choice, images=images, certain=True)


def count(given: Any) -> int:
    """How many prompts a call has."""
    found = next((given[name] for name in ("prompt", "prompt_embeds") if given.get(name) is not None), ())
    return 1 if isinstance(found, str) else len(found)


__all__ = ["Drawing", "erasures"]
