"""The work behind the app: one model in memory, everything with it in turn, and nothing of a browser."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import tempfile
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from erasure.api import erase
from erasure.artifact import Erasure
from erasure.artifact.stack import applied
from erasure.backbone import backbone_of
from erasure.concept import Concept, Group
from erasure.methods import method_class
from erasure.methods.neighbours import suggest_neighbours
from erasure.pictures import usual_settings
from erasure.pipelines.app.orders import Order

TOGETHER = 4  # pictures of one call of the pipeline
SIZES: dict[str, int | None] = {"trial": 3, "whole suite": None}  # prompts of a group that are judged
Drawn = dict[Group, list[tuple[str, Image.Image, Image.Image]]]  # prompt, before, after


@dataclasses.dataclass(frozen=True)
class Base:
    """A model that is open."""

    name: str
    architecture: str
    pipelines: str
    device: str


@dataclasses.dataclass(frozen=True)
class Made:
    """An erasure that somebody made, with its files. Nothing of it stays on the model."""

    order: Order
    edit: Erasure
    folder: Path
    notes: tuple[str, ...] = ()

    @property
    def archive(self) -> Path:
        """The erasure's folder as one file."""
        return self.folder / f"{self.edit.name}.zip"


class Answers(NamedTuple):
    """What an evaluation says: heading, answer and number for each question; sentences; the report's file."""

    rows: list[tuple[str, str, str]]
    sentences: list[str]
    report: Path


class Studio:
    """One base model at a time, and what is done with it.

    Every piece of work holds the lock from opening its base to the last picture, and takes its erasure off again. So
    work of two browser tabs comes one after the other, and no picture is drawn with another tab's erasure.

    Args:
        device, dtype, variant: as :func:`erasure.opening.load_base` takes them.
        config: for every base that is a single file, as there.
        folder: for erasures and reports; a temporary one by default, which :meth:`close` removes.
    """

    def __init__(
        self,
        *,
        device: str | None = None,
        dtype: str | None = None,
        variant: str | None = None,
        config: str | Path | None = None,
        folder: Path | None = None,
    ) -> None:
        self._settings = {"device": device, "dtype": dtype, "variant": variant}
        self._config = config
        self._own = folder is None
        self.folder = Path(tempfile.mkdtemp(prefix="erasure-app-")) if folder is None else folder
        self._lock = threading.RLock()
        self._name, self._pipe = "", None

    def close(self, *, wait: float = 30.0) -> None:
        """Wait for the piece of work that is going on, and remove the files, if the folder was a temporary one.

        A process that ends while one of its threads is inside the model is aborted, with a message of C++.

        Args:
            wait: seconds. Drawing ends within them; a fine-tune may not, and is cut off.
        """
        if self._lock.acquire(timeout=wait):
            self._lock.release()
        if self._own:
            shutil.rmtree(self.folder, ignore_errors=True)

    @contextlib.contextmanager
    def opened(self, base: str) -> Iterator[Any]:
        """The pipeline of a base, for this thread alone. Another one that was open is closed.

        Raises:
            ValueError: no base is named. FileNotFoundError: there is none of that name.
        """
        from erasure.opening import load_base

        base = base.strip()
        if not base:
            raise ValueError("no base model: the field is empty; give emoji-world, a folder, a file, or a hub id")
        with self._lock:
            if self._name != base:
                self._name, self._pipe = "", None
                self._pipe = load_base(
                    base, config=self._config if Path(base).expanduser().is_file() else None, **self._settings
                )
                self._name = base
            yield self._pipe

    def open(self, base: str) -> Base:
        """Open a base, and say what it is."""
        with self.opened(base) as pipe:
            backbone = backbone_of(pipe)
            return Base(base.strip(), backbone.architecture, backbone.pipelines, str(pipe.device))

    def suggest(self, base: str, concept: Concept) -> list[str]:
        """What is close to a concept for a base."""
        with self.opened(base) as pipe:
            return suggest_neighbours(pipe, concept)

    def make(self, order: Order) -> Made:
        """Make an erasure and write its files. The model is left as it was.

        Raises:
            ValueError: the order contradicts itself, or the method does not work on the base.
        """
        concepts = order.concepts  # slips are found before a model is opened
        method_class(order.method).preset(order.preset or None)
        with self.opened(order.base) as pipe, _noted() as notes:
            edit = erase(
                pipe, concepts, order.method, keep=order.keep, preset=order.preset or None, apply=False
            )  # fmt: skip
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        made = Made(order, edit, folder, tuple(dict.fromkeys(notes)))
        edit.save_pretrained(folder / edit.name)
        shutil.make_archive(str(made.archive.with_suffix("")), "zip", folder, edit.name)
        return made

    def draw(
        self,
        made: Made,
        prompts: Mapping[Group, Sequence[str]],
        *,
        scale: float = 1.0,
        seed: int = 0,
        steps: int | None = None,
    ) -> Drawn:
        """Prompts before and after an erasure, from the same noise.

        Raises:
            ValueError: nothing to draw; a scale, a seed or a number of steps that is none.
        """
        from erasure.eval import generate

        flat = [(group, text) for group, texts in prompts.items() for text in texts]
        if not flat:
            raise ValueError("nothing to draw: all prompts are empty; give at least one")
        texts = [text for _, text in flat]
        with self.opened(made.order.base) as pipe:
            settings: dict[str, Any] = {**usual_settings(made.order.base.strip(), pipe), "batch_size": TOGETHER}
            if steps is not None:
                settings["num_inference_steps"] = steps
            before = generate(pipe, texts, seeds=[seed], description="before", **settings)
            with applied(made.edit, pipe, scale):
                after = generate(pipe, texts, seeds=[seed], description="after", **settings)
        found: Drawn = {group: [] for group in prompts}
        for (group, text), [old], [new] in zip(flat, before, after, strict=True):
            found[group].append((text, old, new))
        return found

    def evaluate(self, made: Made, size: str = "trial") -> Answers:
        """Judge an erasure by detectors, and write the report.

        Args:
            size: a key of :data:`SIZES`. A trial looks at a few prompts, and makes no claim.

        Raises:
            ValueError: an unknown size, or nothing to compare the concept with. FileNotFoundError: no detector.
        """
        from erasure.eval import evaluate, write_report
        from erasure.eval.detectors.choice import detectors_for
        from erasure.eval.judge import QUESTIONS, plainly

        if size not in SIZES:
            raise ValueError(f"unknown size of an evaluation; got {size!r}; choose one of {list(SIZES)}")
        plan, limit = made.order.to_judge(), SIZES[size]
        with self.opened(made.order.base) as pipe, _noted():
            detectors, judge = detectors_for(plan, device=str(pipe.device))
            found = evaluate(
                pipe, {made.edit.name: made.edit}, plan, detectors=detectors, clip=judge, limit=limit,
                cache_dir=made.folder / "pictures", extractors=() if limit else None,
            )  # fmt: skip
        report = write_report(found, made.folder / f"{made.edit.name}-{size.replace(' ', '-')}.html")
        (claims,) = found.claims()
        rows = [(QUESTIONS[name].heading, one.word, one.number) for name, one in claims.answers.items()]
        return Answers(rows, [plainly(claims.answers, found.facts()), *claims.banners], report)


@contextlib.contextmanager
def _noted() -> Iterator[list[str]]:
    """Collect warnings as text. The lock is held, so they are of one piece of work."""
    found: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield found
    found += [str(one.message) for one in caught if one.category is UserWarning]


__all__ = ["SIZES", "Answers", "Base", "Drawn", "Made", "Studio"]
