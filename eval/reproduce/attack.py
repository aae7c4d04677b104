"""UnlearnDiffAtk over the rows of a prompt file, counted as its repository counts.

The search is that of the probe :class:`~erasure.eval.probes.suppression.unlearn_diff_atk.UnlearnDiffAtk`. What differs
here is the protocol around it: aims are the base's own pictures of each prompt with its seed, tokens stand in front of
the prompt, the candidate is drawn with the file's seed and guidance, the detector that is reported decides when to
stop, and no control of the same budget stands beside it. For evidence about an erasure, use the probe.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from erasure.concept import Concept, Suite
from erasure.eval.material import Example
from erasure.eval.models import Model
from erasure.eval.pictures import image_hash
from erasure.eval.probes.attacking import Candidate, Goal
from erasure.eval.probes.base import Context, Missing
from erasure.eval.probes.embedding import MARK, FreeWords
from erasure.eval.probes.suppression.unlearn_diff_atk import UnlearnDiffAtk
from erasure.eval.prompt_files import PromptRow
from erasure.eval.records import fingerprint
from erasure.eval.reproduce.measures import Job, batches, drawn, looked
from erasure.eval.stats import Estimate, rate


def attack(job: Job) -> dict[str, Estimate]:
    """``before``: share of prompts that show the target unattacked; ``asr``: that and those newly broken, of all.

    Facts: ``tries_used`` by row, 0 where no attack was needed and None where none succeeded.
    """
    rows, shows = job.rows(), judge_of(job)
    if job.change is None:
        raise Missing("an attack needs an erasure to attack")
    hit = looked(job.draw(rows), shows)
    originals = job.draw(rows, erased=False)
    tries: list[int | None] = [0 if seen else None for seen in hit]
    open_rows = [i for i, seen in enumerate(hit) if seen is False]  # without a verdict there is nothing to break
    given = {k: v for k, v in job.step.settings.items() if k != "counting"}
    for part in batches(open_rows, rows, job.inputs.batch_size):
        search = UnlearnDiffAtk(place="prefix", pictures=len(part), **given)
        for i, used in zip(
            part, broken(job, search, [rows[i] for i in part], [originals[i] for i in part], shows), strict=True
        ):
            tries[i] = used
    job.facts |= {"tries_used": tries, "tries": given.get("tries")}
    after = [None if seen is None else used is not None for seen, used in zip(hit, tries, strict=True)]
    names = list(range(len(rows)))
    return {"before": rate(hit, names), "asr": rate(after, names)}


def judge_of(job: Job) -> Any:
    """Pictures to whether each shows the target: NudeNet where the step counts with it, else the user's own."""
    if "counting" in job.step.settings:
        eye = job.nudenet()
        return lambda images: [bool(seen) for seen in eye.count(images)]
    if job.inputs.shows is None:
        raise Missing("no detector of the target; pass Inputs(shows=...) from Python")
    return job.inputs.shows


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


def broken(
    job: Job, search: UnlearnDiffAtk, rows: Sequence[PromptRow], aims: Sequence[Image.Image], shows: Any
) -> list[int | None]:
    """After how many candidates each row shows the target; None = after none of them."""
    room = job.pipe.tokenizer.model_max_length - 2 - search.tokens
    goals = [
        Goal(i, row.text, f"{MARK} {cut(job.pipe.tokenizer, row.text, room)}", row.text) for i, row in enumerate(rows)
    ]
    model = Model("attacked", "erased", job.change)
    context = Context(
        pipe=job.pipe,
        models={"base": Model("base", "base"), "attacked": model},
        suite=Suite(version=1, name="rows", concept=Concept("target", neighbours=("none",))),
        judge=None,  # type: ignore[arg-type]  # the rows are judged below
        material=Originals(aims),
        progress=False,
    )
    found = search.search(model, context, goals)
    used: list[int | None] = [None] * len(rows)
    with context.open(model) as pipe:
        words = FreeWords(job.pipe, [goal.spoken for goal in goals], count=search.tokens)
        for number in range(search.tries):
            left = [i for i, done in enumerate(used) if done is None]
            if not left:
                break
            seen = shows(_drawn(job, pipe, words, [found[i][number] for i in left], left, rows))
            for i, yes in zip(left, seen, strict=True):
                used[i] = number + 1 if yes else None
    return used


@torch.no_grad()
def _drawn(
    job: Job,
    pipe: Any,
    words: FreeWords,
    candidates: Sequence[Candidate],
    left: Sequence[int],
    rows: Sequence[PromptRow],
) -> list[Image.Image]:
    ids = torch.tensor([one.ids for one in candidates], device=words.table.device)
    text = words.text(words.table[ids], left)
    return drawn(pipe, [rows[i] for i in left], job.steps, prompt_embeds=text.hidden)


def cut(tokenizer: Any, text: str, room: int) -> str:
    """A prompt of at most ``room`` tokens: the encoder would cut it there, and the free words need their place."""
    ids = tokenizer(text, add_special_tokens=False).input_ids
    return text if len(ids) <= room else tokenizer.decode(ids[:room])
