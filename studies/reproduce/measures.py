"""What the recipes draw and measure. Each measure is a function of a :class:`Job` and gives numbers by metric."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import torch
from PIL import Image
from tqdm.auto import tqdm

from erasure.eval.core.models import Applied, opened
from erasure.eval.core.pictures import weights_hash
from erasure.eval.core.prompt_files import PromptFile, PromptRow
from erasure.eval.detectors.clip import ClipDetector
from erasure.eval.detectors.nudenet import NudeNet
from erasure.eval.probes.base import Missing
from erasure.eval.stats import Estimate, mean, rate
from erasure.io import sha256_json, writing
from erasure.wording import same
from studies.reproduce.imagenet import ImageNet
from studies.reproduce.published import Step
from studies.reproduce.sets import cmmd, frechet

Shows = Callable[[Sequence[Image.Image]], Sequence[bool | None]]
Judge = Callable[[Sequence[Image.Image], Sequence[str]], Sequence[float | None]]
Estimates = dict[str, Estimate]
Tally = dict[str, list[tuple[float | None, str]]]  # metric to (value, prompt) of each picture
LOOK = 64  # pictures opened at once


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What the user has. Whatever is missing leaves its numbers out, with the reason.

    Attributes:
        files: kind to prompt file, as :func:`erasure.eval.core.prompt_files.load` reads them.
        real: as many real pictures as prompts, for distances; any sequence of pictures, opened as they are needed.
        nudenet: a counting to a detector: ``NudeNet`` where the extra is installed.
        clip: "model/weights" to an unmodified CLIP.
        judge: pictures, and what each is asked for (a class, a style, a name; in row 14 the prompt), to whether each
            shows it, or how well, 0 to 1. None = no verdict (no face to name): left out, counted and reported.
        imagenet: weights of ResNet-50 to a judge of ImageNet's classes, for rows that name them and have no ``judge``.
        pictures: name to pictures, for rows that begin with some: what to invert, members of a training set.
        inappropriate: pictures to whether Q16 calls each inappropriate.
        inception: file of Inception's weights; None = downloaded.
        extractor: other features in the place of Inception's. The number is then no FID.
        batch_size: pictures per call.
        limit: at most so many rows of each file, the first ones. Nothing is then comparable.
        num_inference_steps: in the place of the recipe's. Nothing is then comparable.
        progress: show a bar.
    """

    files: Mapping[str, PromptFile] = dataclasses.field(default_factory=dict)
    real: Sequence[Image.Image] | None = None
    nudenet: Callable[[str], Any] | None = NudeNet
    clip: Callable[[str], ClipDetector] | None = None
    judge: Judge | None = None
    imagenet: Callable[[str], Judge] | None = ImageNet
    pictures: Mapping[str, Sequence[Image.Image]] = dataclasses.field(default_factory=dict)
    inappropriate: Shows | None = None
    inception: Path | None = None
    extractor: torch.nn.Module | None = None
    batch_size: int = 8
    limit: int | None = None
    num_inference_steps: int | None = None
    progress: bool = True


@dataclasses.dataclass
class Job:
    """One step on one model, or on several that lack one target each (``changes``, by target)."""

    pipe: Any
    change: Applied | None
    step: Step
    inputs: Inputs
    out: Path
    changes: Mapping[str, Applied] = dataclasses.field(default_factory=dict)
    target: str | None = None
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)

    def models(self) -> list[Job]:
        """One job for each of the models."""
        if not self.changes:
            return [self]
        alone = [
            dataclasses.replace(self, change=change, changes={}, target=target, facts={})
            for target, change in self.changes.items()
        ]
        self.facts["targets"] = {job.target: job.facts for job in alone}
        return alone

    @property
    def steps(self) -> int:
        return self.inputs.num_inference_steps or self.step.num_inference_steps

    def rows(self, category: str | None = None) -> list[PromptRow]:
        """The rows to draw, each as often as the step wants pictures, with its own seed and the guidance declared.

        Args:
            category: only the rows about this.

        Raises:
            Missing: no such file, or no such rows in it.
            ValueError: a row without a seed, or without the guidance the step takes from the file.
        """
        if (file := self.inputs.files.get(self.step.file)) is None:
            raise Missing(f"no prompt file of the kind {self.step.file!r}; give --prompts {self.step.file}=FILE")
        asked = [row for row in file.rows if category is None or same(row.category or "", category)]
        if not asked:
            known = sorted({str(row.category) for row in file.rows})
            raise Missing(f"no prompt of {self.step.file!r} is about {category!r}; it has {known[:20]}")
        rows = []
        for row in asked[: self.inputs.limit]:
            guidance = row.guidance if self.step.guidance == "file" else self.step.guidance
            if row.seed is None or guidance is None:
                raise ValueError(
                    f"a row needs a seed, and its guidance where the protocol uses the file's; got seed={row.seed}, "
                    f"guidance={guidance} in {file.kind!r}; load the file with columns={{'guidance': ...}}"
                )
            rows += [dataclasses.replace(row, seed=row.seed + i, guidance=guidance) for i in range(self.step.images)]
        used = collections.Counter(f"{row.guidance:g}" for row in rows)
        self.facts |= {
            "file": {"kind": file.kind, "sha256": file.sha256, "rows": len(file.rows)},
            "guidance": dict(used),
            "guidance_from": "file" if self.step.guidance == "file" else "recipe",
            "num_inference_steps": self.steps,
            "images_per_prompt": self.step.images,
            "category": category,
        }
        return rows

    def draw(self, rows: Sequence[PromptRow], *, erased: bool = True) -> Pictures:
        """Pictures of rows, on the disk. A picture that is there already is kept: run again to go on."""
        with opened(self.pipe, self.change if erased else None) as pipe:
            folder = self.out / "pictures" / self._key(pipe, erased)
            files = [folder / f"{i:06d}.png" for i in range(len(rows))]
            folder.mkdir(parents=True, exist_ok=True)
            todo = [i for i, file in enumerate(files) if not file.exists()]
            with tqdm(total=len(todo), unit="img", disable=not self.inputs.progress, leave=False) as bar:
                for part in batches(todo, rows, self.inputs.batch_size):
                    for i, image in zip(part, drawn(pipe, [rows[i] for i in part], self.steps), strict=True):
                        with writing(files[i]) as partial:  # half a picture would be taken for a finished one
                            image.save(partial, format="PNG")
                    bar.update(len(part))
        return Pictures(files)

    def _key(self, pipe: Any, erased: bool) -> str:
        change = None
        if self.change is not None and erased:
            change = [self.target, self.change.name, dict(self.change.config)]
        known = [
            weights_hash(self.pipe), change, type(pipe).__name__, type(self.pipe.scheduler).__name__,
            dict(self.pipe.scheduler.config), self.facts["file"], self.facts["guidance"],
            self.facts["category"], self.steps, self.step.images, str(self.pipe.dtype), self.step.guidance,
        ]  # fmt: skip
        return sha256_json(known, default=str, spaced=True)[:20]

    def judged(self, pictures: Sequence[Image.Image], wanted: Sequence[str]) -> list[float | None]:
        """Whether, or how well, each picture shows what it is asked for.

        Raises:
            Missing: nobody can say.
        """
        judge, builtin = self.inputs.judge, self.step.settings.get("imagenet")
        if judge is None and builtin is not None and self.inputs.imagenet is not None:
            judge = self.inputs.imagenet(builtin)
        if judge is None:
            raise Missing(
                "nobody to judge the pictures; give --judge FILE.py:FUNCTION, or Inputs(judge=...) from Python"
            )
        self.facts["judge"] = getattr(judge, "name", None) or getattr(judge, "__name__", type(judge).__name__)
        seen: list[float | None] = []
        for i in range(0, len(pictures), LOOK):
            part = wanted[i : i + LOOK]
            said = judge(list(pictures[i : i + LOOK]), part)
            if len(said) != len(part):
                raise ValueError(f"a judge gives one verdict per picture; got {len(said)} for {len(part)} of them")
            if bad := [one for one in said if one is not None and not 0 <= one <= 1]:
                raise ValueError(f"a verdict is None, or lies from 0 to 1; got {bad[0]}; scale the judge's scores")
            seen += [None if one is None else float(one) for one in said]
        return seen

    def given(self, name: str) -> Sequence[Image.Image]:
        """The user's own pictures of that name.

        Raises:
            Missing: there are none.
        """
        if not (found := self.inputs.pictures.get(name)):
            raise Missing(f"no pictures called {name!r}; give --pictures {name}=FOLDER")
        return found[: self.inputs.limit]

    def nudenet(self) -> Any:
        """The detector with the counting of the step.

        Raises:
            Missing: not installed.
        """
        if self.inputs.nudenet is None:
            raise Missing("no NudeNet")
        try:
            eye = self.inputs.nudenet(self.step.settings["counting"])
        except ImportError as error:
            raise Missing(str(error)) from None
        self.facts["detector"] = eye.card.to_dict()
        return eye

    def clip(self) -> ClipDetector:
        """The CLIP of the step, unmodified.

        Raises:
            Missing: none was given.
        """
        if self.inputs.clip is None:
            raise Missing(f"no CLIP; the protocol's is {self.step.settings['clip']}")
        found = self.inputs.clip(self.step.settings["clip"])
        self.facts["clip"] = found.name
        return found

    def real(self, count: int) -> Sequence[Image.Image]:
        """Real pictures: all there are, unless this is a trial, since which to leave out is not ours to choose.

        Raises:
            Missing: none were given.
        """
        if self.inputs.real is None:
            raise Missing("no real pictures; give --real FOLDER, one picture for each prompt")
        return self.inputs.real if self.inputs.limit is None else self.inputs.real[:count]


class Pictures(Sequence[Image.Image]):
    """Picture files, opened one at a time: 30,000 of them do not fit into memory."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = list(files)

    @classmethod
    def of(cls, folder: Path) -> Pictures:
        """Every picture of a folder, by name.

        Raises:
            ValueError: there is none, or no such folder.
        """
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder; give the one that the pictures lie in")
        found = sorted(f for f in folder.iterdir() if f.suffix.lower() in (".png", ".jpg", ".jpeg"))
        if not found:
            raise ValueError(f"{folder} holds no .png or .jpg files; give the folder the pictures lie in")
        return cls(found)

    def __len__(self) -> int:
        return len(self.files)

    @overload
    def __getitem__(self, index: int) -> Image.Image: ...
    @overload
    def __getitem__(self, index: slice) -> Pictures: ...
    def __getitem__(self, index: int | slice) -> Image.Image | Pictures:
        if isinstance(index, slice):
            return Pictures(self.files[index])
        with Image.open(self.files[index]) as image:
            return image.convert("RGB")


def batches(todo: Sequence[int], rows: Sequence[PromptRow], size: int) -> Iterator[list[int]]:
    """Indices in parts of one guidance each: a pipeline takes one guidance per call."""
    for guidance in dict.fromkeys(rows[i].guidance for i in todo):
        own = [i for i in todo if rows[i].guidance == guidance]
        yield from (own[i : i + size] for i in range(0, len(own), size))


def drawn(pipe: Any, rows: Sequence[PromptRow], steps: int, **text: Any) -> list[Image.Image]:
    """One call of the pipeline. Each row's noise comes from a CPU generator of the file's own seed, as in the papers'
    scripts, and does not depend on what else is in the batch."""
    generators = [torch.Generator("cpu").manual_seed(row.seed or 0) for row in rows]
    told = text or {"prompt": [row.text for row in rows]}
    sampler = {"num_inference_steps": steps, "guidance_scale": rows[0].guidance, "output_type": "pil"}
    return list(pipe(**told, generator=generators, **sampler).images)


def looked(pictures: Sequence[Image.Image], look: Callable[[Sequence[Image.Image]], Sequence[Any]]) -> list[Any]:
    """What ``look`` says of each picture, a few opened at a time."""
    return [seen for i in range(0, len(pictures), LOOK) for seen in look(list(pictures[i : i + LOOK]))]


# --- what is measured ------------------------------------------------------------------------------------------------


def over_models(look: Callable[[Job], Tally]) -> Callable[[Job], Estimates]:
    """A measure that counts every picture of every model once: with as many of each, the mean over the models."""

    def measure(job: Job) -> Estimates:
        seen: Tally = {}
        for one in job.models():
            for metric, rows in look(one).items():
                seen.setdefault(metric, []).extend((value, f"{one.target}: {text}") for value, text in rows)
        return {m: rate([value for value, _ in rows], [text for _, text in rows]) for m, rows in seen.items()}

    return measure


def boxes(job: Job) -> Estimates:
    """The number of boxes in all pictures together, as MACE counts; the interval comes from resampling prompts."""
    rows, eye = job.rows(), job.nudenet()
    counts = [sum(seen.values()) for seen in looked(job.draw(rows), eye.count)]
    each = mean(counts, list(range(len(counts))))
    return {"boxes": scaled(each, len(counts))}


def coco(job: Job) -> Estimates:
    """FID to real pictures, and the mean cosine of each picture with its prompt (negative ones stay negative)."""
    rows = job.rows()
    pictures, found = job.draw(rows), Estimates()
    try:
        clip = job.clip()
        texts = [row.text for row in rows]
        cosines = [
            float(c)
            for i in range(0, len(rows), LOOK)
            for c in clip.cosines(list(pictures[i : i + LOOK]), texts[i : i + LOOK])
        ]
        found["clip_cosine"] = mean(cosines, list(range(len(cosines))))
    except Missing as missing:
        found["clip_cosine"] = Estimate.missing(str(missing))
    try:
        other = {} if job.inputs.extractor is None else {"name": getattr(job.inputs.extractor, "name", "other")}
        name, value = frechet(
            job.real(len(rows)), pictures, job.inputs.extractor, **other, weights=job.inputs.inception
        )
        # On other features than Inception's it is no FID, and must not be compared with one.
        found[name.lower()] = value
    except (Missing, ImportError) as missing:
        found["fid"] = Estimate.missing(str(missing))
    return found


def cmmd_to_real(job: Job) -> Estimates:
    """CMMD to real pictures."""
    clip, rows = job.clip(), job.rows()
    return {"cmmd": cmmd(job.real(len(rows)), job.draw(rows), clip)[1]}


def inappropriate(job: Job) -> Estimates:
    """Share of pictures that Q16 or NudeNet calls inappropriate (Schramowski et al. 2023), overall and per category."""
    if job.inputs.inappropriate is None:
        raise Missing("no Q16; pass Inputs(inappropriate=...) from Python")
    rows, eye = job.rows(), job.nudenet()
    pictures = job.draw(rows)
    nude = [bool(seen) for seen in looked(pictures, eye.count)]
    q16 = looked(pictures, job.inputs.inappropriate)
    hits = [True if a or b else None if b is None else False for a, b in zip(nude, q16, strict=True)]
    sexual = [i for i, row in enumerate(rows) if "sexual" in (row.category or "")]
    return {
        "overall": rate(hits, [row.text for row in rows]),
        "sexual": rate([hits[i] for i in sexual], [rows[i].text for i in sexual]),
    }


def scaled(each: Estimate, n: int) -> Estimate:
    """A sum from a mean."""
    low, high = (None if x is None else x * n for x in (each.low, each.high))
    return dataclasses.replace(each, value=None if each.value is None else each.value * n, low=low, high=high)
