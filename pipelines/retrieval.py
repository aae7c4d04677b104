"""Retrieval instead of weights: what must be revocable is looked up in a store, and never trained in.

>>> from erasure.pipelines import Lookup, RetrievalPipeline, Store
>>> store = Store("pictures.sqlite", embedder)  # doctest: +SKIP
>>> store.add("1.png", caption="a superhero", licence="CC-BY-4.0", source="Ann", subject="hero")  # doctest: +SKIP
>>> drawing = RetrievalPipeline(pipe, Lookup(store, threshold=0.7))  # doctest: +SKIP
>>> drawing("a superhero").retrieved[0][0].entry.licence  # doctest: +SKIP
'CC-BY-4.0'
>>> store.withdraw("hero", reason="asked for by Ann")  # doctest: +SKIP
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from diffusers import DiffusionPipeline
from PIL import Image, ImageOps

from erasure.artifact.stack import stack_of
from erasure.io import is_number, is_whole, shown
from erasure.pipelines.around import Around
from erasure.pipelines.calls import Copies, image_to_image, is_default, ordered, rows_of, size_of, texts_of
from erasure.pipelines.choices import by_row, narrowed
from erasure.pipelines.embedders import By
from erasure.pipelines.filters import Match
from erasure.pipelines.reference import ReferenceAttention
from erasure.pipelines.store import Entry, Found, Store


@dataclasses.dataclass(frozen=True)
class Lookup:
    """Which entries of a store a prompt finds.

    Attributes:
        store: the store, with its embedder.
        threshold: cosine from which an entry is near. It depends on the embedder; let
            :func:`~erasure.pipelines.filters.calibrated` choose it on prompts that should find nothing.
        by: compare prompts with "caption" or with "picture". Choose pictures where captions are poor; cosines of text
            and picture are lower than those of two texts.
        count: how many entries at most.
    """

    store: Store
    threshold: float
    by: By = "caption"
    count: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.store, Store):
            raise ValueError(f"a lookup needs a store; got {shown(self.store)}; give Store(path, embedder)")
        near = is_number(self.threshold) and -1 <= self.threshold <= 1
        if self.by not in get_args(By) or not is_whole(self.count, 1) or not near:
            raise ValueError(
                f"a lookup needs by as one of {list(get_args(By))}, count of 1 or more and a threshold from -1 to 1; "
                f"got {shown(self.by)}, {shown(self.count)} and {shown(self.threshold)}"
            )

    def find(self, prompts: Sequence[str]) -> list[list[Found]]:
        """For each prompt the near entries, the nearest first, all from the state of one moment."""
        return self.store.nearest(prompts, by=self.by, count=self.count, threshold=self.threshold)

    def matches(self, prompts: Sequence[str], /) -> list[Match]:
        """For each prompt the cosine of the nearest entry; -1 where the store is empty."""
        nearest = self.store.nearest(prompts, by=self.by)
        return [
            Match(row[0].similarity, self.threshold, row[0].entry.caption) if row else Match(-1.0, self.threshold)
            for row in nearest
        ]


@dataclasses.dataclass(frozen=True)
class Used:
    """An entry from which a picture was drawn, and its cosine with the prompt."""

    entry: Entry
    similarity: float


class RetrievalPipeline(Around):
    """A diffusers pipeline of pictures that draws from the entries of a store that a prompt finds.

    Called as the pipeline is called. The answer is the pipeline's own output class, with the attribute ``retrieved``:
    for each picture the entries it was drawn from, as :class:`Used`; none where the prompt found nothing, and the
    pipeline itself drew it. Prompts given as embeddings find nothing. Several threads may draw at once. Weights are
    neither copied nor changed.

    A request reads the store once, before it draws. If an entry it draws from is withdrawn meanwhile, the pictures are
    dropped and the call ends in :class:`~erasure.pipelines.store.Withdrawn`.

    Args:
        pipe: a stock text-to-image pipeline. A guard stands around this one, not inside.
        lookup: which entries a prompt finds.
        strength: of image-to-image, from 0 to 1: the share of the steps that is drawn anew, from the noised picture of
            the entry on. Low values copy the picture, composition and all; high ones lose it. None to start from noise.
            With ``lookup.count`` above 1 the pictures of a prompt start from its entries in turn.
        attention: the weight of reference attention, None for none: each picture looks at all entries found, at
            the cost of another half pass a step for each. Alone it leaves the composition to the prompt; beside
            ``strength`` it keeps the subject at higher strengths. U-Nets only.

    Raises:
        ValueError: neither is given, diffusers has no image-to-image for the pipeline, or it has no U-Net.
    """

    _own = (*Around._own, "lookup", "strength", "attention", "reference", "_copies")

    def __init__(
        self, pipe: Any, lookup: Lookup, *, strength: float | None = 0.6, attention: float | None = None
    ) -> None:
        if not isinstance(pipe, DiffusionPipeline):
            raise ValueError(
                f"retrieval stands around a pipeline of diffusers; got {type(pipe).__name__}; put guards around the "
                "RetrievalPipeline"
            )
        if not isinstance(lookup, Lookup):
            raise ValueError(f"lookup says which entries are found; got {shown(lookup)}; give Lookup(store, 0.7), say")
        if strength is None and attention is None:
            raise ValueError("nothing found would be used; got no strength and no attention; give one of them, or both")
        if strength is not None and not (is_number(strength) and 0 < strength <= 1):
            raise ValueError(
                f"strength is a share of the steps, above 0 and up to 1; got {shown(strength)}; give 0.6, say"
            )
        if attention is not None and not (is_number(attention) and attention > 0):
            raise ValueError(f"attention is a weight above 0; got {shown(attention)}; give 4, say, or None for none")
        super().__init__(pipe)
        self.lookup, self.strength, self.attention, self._copies = lookup, strength, attention, Copies()
        if strength is not None:
            image_to_image(self._copies.make(pipe))
        self.reference = None if attention is None else ReferenceAttention(pipe, weight=attention)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Draw, with the arguments of the pipeline.

        With prompts of both kinds in a batch and one generator for all, those that found nothing are drawn first; with
        a generator for each picture it makes no difference. Image-to-image draws its noise from the generator, not from
        ``latents``.

        Raises:
            Withdrawn: an entry was withdrawn while it was drawn from.
            ValueError: an argument that image-to-image does not take, or ``return_dict=False``, which could not say
                what was used.
        """
        given = self.named(*args, **kwargs)
        if given.get("return_dict", True) is False:
            raise ValueError("the answer says which entries were used; got return_dict=False; leave it out")
        text = given.get("prompt")
        prompts = [] if text is None else texts_of(text)
        found = self.lookup.find(prompts)
        images = given.get("num_images_per_prompt") or 1
        near = [i for i, row in enumerate(found) if row]
        far = [i for i, row in enumerate(found) if not row]
        if near and self.reference is not None and by_row(stack_of(self.pipe).attached):
            raise ValueError(
                "reference attention draws all prompts of a call with the same erasures; got rows; draw one prompt a "
                "call, or give the RetrievalPipeline no attention"
            )
        if not near:
            result = self._copies.make(self.pipe)(**given)
            result.retrieved = [()] * len(result.images)
            return result
        parts = []
        if far:
            with self._rows_for(far, len(found), images):
                parts.append(self._copies.make(self.pipe)(**rows_of(given, far, len(found), images)))
        parts.append(self._draw(given, found, near, images))
        self.lookup.store.check_present({one.entry.id for row in found for one in row})
        return self._joined(parts, found, [*far, *near], images)

    def remove(self) -> None:
        """Take the hooks of reference attention off; afterwards nothing looks at references."""
        if self.reference is not None:
            self.reference.remove()

    def _used(self, found: Sequence[Found], picture: int) -> list[Found]:
        """Those of the entries found for a prompt that one of its pictures is drawn from."""
        return list(found) if self.attention is not None else [found[picture % len(found)]] if found else []

    def _draw(self, given: Mapping[str, Any], found: Sequence[Sequence[Found]], near: list[int], images: int) -> Any:
        """The pictures of the prompts that found something, each prompt's side by side."""
        size = size_of(self.pipe, given)
        rows = {**rows_of(given, near, len(found), images, repeated=True), "num_images_per_prompt": 1}
        each = [(found[i], j) for i in near for j in range(images)]
        fitted = [[ImageOps.fit(one.picture, size, Image.Resampling.LANCZOS) for one in row] for row, _ in each]
        engine = self._copies.make(self.pipe)
        if self.strength is not None:
            engine = image_to_image(engine)
            rows = self._image_arguments(engine, {**rows, "width": size[0], "height": size[1]})
            rows["image"] = [own[j % len(own)] for own, (_, j) in zip(fitted, each, strict=True)]
        looking = contextlib.nullcontext() if self.reference is None else self.reference.looking_at(fitted, size=size)
        with looking, self._rows_for([i for i in near for _ in range(images)], len(found), 1):
            return engine(**rows)

    def _rows_for(self, prompts: Sequence[int], count: int, images: int) -> Any:
        """Attached erasures chosen for each prompt are for each of these prompts."""
        return narrowed(stack_of(self.pipe).attached, prompts, count, images)

    def _image_arguments(self, engine: Any, rows: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of the pipeline's call as image-to-image takes them."""
        mine, theirs = self.__signature__.parameters, inspect.signature(engine.__call__).parameters
        own = {name: one.default for name, one in mine.items() if name in theirs and one.default is not one.empty}
        out = {**own, **{name: value for name, value in rows.items() if name in theirs}, "strength": self.strength}
        left = {name: value for name, value in rows.items() if name not in theirs and not is_default(mine, name, value)}
        if rows.get("latents") is not None:
            out.pop("latents", None)
            left.pop("latents", None)
            if rows.get("generator") is None:
                raise ValueError(
                    "image-to-image draws its noise from the generator; got latents alone; give a generator as well"
                )
        if unknown := sorted(left.keys() - {"height", "width"}):
            raise ValueError(
                f"{type(engine).__name__}, which draws from entries, does not take {unknown}; leave them out, or give "
                "strength=None and use reference attention"
            )
        steps = out.get("num_inference_steps")
        if steps is not None and int(steps * out["strength"]) < 1:
            raise ValueError(f"strength {self.strength} of {steps} steps is less than one; take more of either")
        return out

    def _joined(self, parts: Sequence[Any], found: Sequence[Sequence[Found]], order: Sequence[int], images: int) -> Any:
        """One answer with the pictures in the order of the prompts."""
        drawn = [i * images + j for i in order for j in range(images)]
        at = [drawn.index(i) for i in range(len(drawn))]
        result = parts[-1]
        result.images = ordered([part.images for part in parts], at)
        flags = [getattr(part, "nsfw_content_detected", None) for part in parts]
        if all(flag is not None for flag in flags):
            result.nsfw_content_detected = ordered(flags, at)
        result.retrieved = [
            tuple(Used(one.entry, one.similarity) for one in self._used(row, j)) for row in found for j in range(images)
        ]
        return result


class Retrieval:
    """A store as a change of a pipeline, for an evaluation: put on, looked at, taken off, and no weight touched.

    Args:
        lookup, strength, attention: as of :class:`RetrievalPipeline`.
        name: what tables call it.
    """

    intervention = "filter"  # stands around the pipeline

    def __init__(
        self,
        lookup: Lookup,
        *,
        strength: float | None = 0.6,
        attention: float | None = None,
        name: str = "retrieval",
    ) -> None:
        self.name, self.lookup, self.strength, self.attention = name, lookup, strength, attention
        self._made: list[RetrievalPipeline] = []

    @property
    def config(self) -> dict[str, Any]:
        found = {"threshold": self.lookup.threshold, "by": self.lookup.by, "count": self.lookup.count}
        return {"method": "retrieval", **found, "strength": self.strength, "attention": self.attention}

    def apply(self, pipe: Any) -> None:
        """Nothing: the store stands around a pipeline."""

    def remove(self, pipe: Any) -> None:
        """Take the hooks off."""
        while self._made:
            self._made.pop().remove()

    def wrap(self, pipe: Any) -> RetrievalPipeline:
        """The pipeline with the store."""
        self._made.append(RetrievalPipeline(pipe, self.lookup, strength=self.strength, attention=self.attention))
        return self._made[-1]


__all__ = ["Lookup", "Retrieval", "RetrievalPipeline", "Used"]
