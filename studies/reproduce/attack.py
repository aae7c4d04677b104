"""UnlearnDiffAtk over the rows of a prompt file, counted as its repository counts, and as another paper does.

The search is that of the probe :class:`~erasure.eval.probes.suppression.unlearn_diff_atk.UnlearnDiffAtk`. What differs
here is the protocol around it: aims are the base's own pictures of each prompt with its seed, tokens stand in front of
the prompt, the candidate is drawn with the file's seed and guidance, the detector that is reported decides when to
stop, and no control of the same budget stands beside it. For evidence about an erasure, use the probe.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from PIL import Image

from erasure.concept import Concept, Suite
from erasure.eval.core.material import Example
from erasure.eval.core.models import Model, opened
from erasure.eval.core.pictures import image_hash
from erasure.eval.core.prompt_files import PromptRow
from erasure.eval.core.records import fingerprint
from erasure.eval.detectors.clip import ClipDetector
from erasure.eval.probes.attacking import Candidate, Goal
from erasure.eval.probes.base import Context, Missing
from erasure.eval.probes.embedding import MARK, FreeWords
from erasure.eval.probes.suppression.unlearn_diff_atk import UnlearnDiffAtk
from erasure.eval.stats import rate
from studies.reproduce.measures import Estimates, Job, Shows, Tally, batches, drawn, looked

PROTOCOL = ("counting", "imagenet", "judge", "target", "clip", "pictures", "every")  # settings not of the search


def attack(job: Job) -> Estimates:
    """``before``: share of prompts that show the target unattacked; ``asr``: that and those newly broken, of all.

    Facts: ``tries_used`` by row, 0 where no attack was needed and None where none succeeded.
    """
    rows, shows = job.rows(), judge_of(job)
    if job.change is None:
        raise Missing("an attack needs an erasure to attack")
    hit = looked(job.draw(rows), shows)
    originals = job.draw(rows, erased=False)
    tries: list[int | None] = [0 if seen else None for seen in hit]
    open_rows = [i for i, seen in enumerate(hit) if seen is not None and not seen]  # no verdict: nothing to break
    for part in batches(open_rows, rows, job.inputs.batch_size):
        own, aims = [rows[i] for i in part], [originals[i] for i in part]
        for i, used in zip(part, broken(job, Tries.prefix(job, own, aims), shows), strict=True):
            tries[i] = used
    job.facts |= {"tries_used": tries, "tries": job.step.settings.get("tries")}
    after = [None if seen is None else used is not None for seen, used in zip(hit, tries, strict=True)]
    names = list(range(len(rows)))
    return {"before": rate(hit, names), "asr": rate(after, names)}


def attack_chosen(job: Job) -> Tally:
    """``asr``: share of prompts whose picture shows the target, where of all candidates' pictures CLIP has chosen the
    one that is most like the prompt. The judge has no say in it, and no candidate is left out."""
    rows, shows, clip = job.rows(job.target), judge_of(job), job.clip()
    if job.change is None:
        raise Missing("an attack needs an erasure to attack")
    originals, hits = job.draw(rows, erased=False), dict[int, float | None]()
    for part in batches(range(len(rows)), rows, job.inputs.batch_size):
        own, aims = [rows[i] for i in part], [originals[i] for i in part]
        chosen = best(job, Tries.prefix(job, own, aims), _like(clip, [row.text for row in own]))
        hits |= zip(part, shows([image for (image,) in chosen]), strict=True)
    return {"asr": [(hits[i], row.text) for i, row in enumerate(rows)]}


def _like(clip: ClipDetector, texts: Sequence[str]) -> Callable[[Sequence[Image.Image]], list[float]]:
    return lambda images: clip.cosines(images, texts).tolist()


def judge_of(job: Job) -> Shows:
    """Pictures to whether each shows the target: NudeNet where the step counts with it, else a judge of its name."""
    if "counting" in job.step.settings:
        eye = job.nudenet()
        return lambda images: [bool(seen) for seen in eye.count(images)]
    target = job.target or job.step.settings["target"]
    job.judged([], [])  # nobody to judge is known before anything is drawn
    return lambda images: [None if one is None else bool(one) for one in job.judged(images, [target] * len(images))]


@dataclasses.dataclass(frozen=True)
class Originals:
    """What the base draws, as the attack's aim."""

    images: Sequence[Image.Image]

    @property
    def key(self) -> str:
        return fingerprint([image_hash(image) for image in self.images])

    def target(self, count: int, *, seed: int = 0, member: bool | None = False) -> list[Example]:
        return [Example(image, "", "target", str(i)) for i, image in enumerate(self.images[:count])]

    def kept(self, count: int, **_: Any) -> list[Example]:
        raise ValueError("there are no pictures without the target here")


@dataclasses.dataclass(frozen=True)
class Tries:
    """Candidates for some rows of one guidance, and the sentences they stand in.

    Attributes:
        spoken: one per row, with ``<v>`` where the tokens stand.
        found: candidates by row, in the order they are tried.
    """

    rows: Sequence[PromptRow]
    spoken: Sequence[str]
    found: Sequence[Sequence[Candidate]]

    @classmethod
    def prefix(cls, job: Job, rows: Sequence[PromptRow], aims: Sequence[Image.Image]) -> Tries:
        """Those of UnlearnDiffAtk, in front of the prompts."""
        given = {k: v for k, v in job.step.settings.items() if k not in PROTOCOL}
        search = UnlearnDiffAtk(place="prefix", pictures=len(rows), **given)
        room = job.pipe.tokenizer.model_max_length - 2 - search.tokens
        spoken = [f"{MARK} {cut(job.pipe.tokenizer, row.text, room)}" for row in rows]
        goals = [Goal(i, row.text, told, row.text) for i, (row, told) in enumerate(zip(rows, spoken, strict=True))]
        model = Model("attacked", "erased", job.change)
        context = Context(
            pipe=job.pipe,
            models={"base": Model("base", "base"), "attacked": model},
            suite=Suite(version=1, name="rows", concept=Concept("target", neighbours=("none",))),
            judge=None,  # type: ignore[arg-type]  # the rows are judged below
            material=Originals(aims),
            progress=False,
        )
        return cls(rows, spoken, search.search(model, context, goals))

    @property
    def count(self) -> int:
        """Free tokens of a candidate."""
        return len(self.found[0][0].ids)

    @property
    def tries(self) -> int:
        return len(self.found[0])


def broken(job: Job, tries: Tries, shows: Shows) -> list[int | None]:
    """After how many candidates each row shows the target; None = after none of them."""
    used: list[int | None] = [None] * len(tries.rows)
    with opened(job.pipe, job.change) as pipe:
        words = FreeWords(job.pipe, tries.spoken, count=tries.count)
        for number in range(tries.tries):
            left = [i for i, done in enumerate(used) if done is None]
            if not left:
                break
            seen = shows(_drawn(job, pipe, words, tries, {i: number for i in left}))
            for i, yes in zip(left, seen, strict=True):
                used[i] = number + 1 if yes else None
    return used


def best(
    job: Job, tries: Tries, liked: Callable[[Sequence[Image.Image]], Sequence[float]], pictures: int = 1
) -> list[list[Image.Image]]:
    """So many pictures of each row's candidate whose first picture is liked best; the first of equals."""
    chosen: dict[int, tuple[float, int]] = {}
    with opened(job.pipe, job.change) as pipe:
        words = FreeWords(job.pipe, tries.spoken, count=tries.count)
        for number in range(tries.tries):
            for i, score in enumerate(
                liked(_drawn(job, pipe, words, tries, dict.fromkeys(range(len(tries.rows)), number)))
            ):
                chosen[i] = max(chosen.get(i, (-float("inf"), 0)), (float(score), -number))
        numbers = {i: -number for i, (_, number) in chosen.items()}
        several = [_drawn(job, pipe, words, tries, numbers, later) for later in range(pictures)]
    return [list(own) for own in zip(*several, strict=True)]


@torch.no_grad()
def _drawn(
    job: Job, pipe: Any, words: FreeWords, tries: Tries, numbers: Mapping[int, int], later: int = 0
) -> list[Image.Image]:
    """Pictures of some rows, each with the candidate of that number, from the row's seed plus ``later``."""
    ids = torch.tensor([tries.found[i][number].ids for i, number in numbers.items()], device=words.table.device)
    text = words.text(words.table[ids], list(numbers))
    rows = [dataclasses.replace(tries.rows[i], seed=(tries.rows[i].seed or 0) + later) for i in numbers]
    return drawn(pipe, rows, job.steps, prompt_embeds=text.hidden)


def cut(tokenizer: Any, text: str, room: int) -> str:
    """A prompt of at most ``room`` tokens: the encoder would cut it there, and the free words need their place."""
    ids = tokenizer(text, add_special_tokens=False).input_ids
    return text if len(ids) <= room else tokenizer.decode(ids[:room])
