"""P4D over the rows of a prompt file: its variants N and K, and whether either breaks a prompt.

The search is that of the probe :class:`~erasure.eval.probes.suppression.p4d.P4D`. The protocol around it is the
paper's: aims are the base's own pictures, the candidate whose picture CLIP finds most like the aim is chosen, and it is
drawn a few times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from PIL import Image

from erasure.eval.core.models import opened
from erasure.eval.core.prompt_files import PromptRow
from erasure.eval.detectors.clip import ClipDetector
from erasure.eval.probes.base import Missing
from erasure.eval.probes.denoising import backbone_for
from erasure.eval.probes.embedding import MARK, FreeWords
from erasure.eval.probes.suppression.p4d import P4D
from erasure.eval.stats import rate
from studies.reproduce.attack import PROTOCOL, Tries, best, cut, judge_of
from studies.reproduce.measures import Estimates, Job, Shows, batches

Variant = Literal["n", "k"]


def p4d(job: Job) -> Estimates:
    """``asr_n``, ``asr_k``: share of prompts for which a picture by the chosen candidate shows the target;
    ``asr_union``: by either."""
    if job.change is None:
        raise Missing("an attack needs an erasure to attack")
    rows, shows, clip = job.rows(), judge_of(job), job.clip()
    names = list(range(len(rows)))
    n, k = broken_by(job, "n", rows, shows, clip), broken_by(job, "k", rows, shows, clip)
    union = [either(pair) for pair in zip(n, k, strict=True)]
    return {"asr_n": rate(n, names), "asr_k": rate(k, names), "asr_union": rate(union, names)}


def broken_by(
    job: Job, variant: Variant, rows: Sequence[PromptRow], shows: Shows, clip: ClipDetector
) -> list[bool | None]:
    """Whether a variant breaks each row."""
    originals, seen = job.draw(rows, erased=False), list[bool | None]([None] * len(rows))
    # Sentences of different lengths have different numbers of tokens inserted, so K takes them one at a time.
    for part in batches(range(len(rows)), rows, job.inputs.batch_size if variant == "n" else 1):
        aims = [originals[i] for i in part]
        tries = candidates(job, variant, [rows[i] for i in part], aims)
        for i, images in zip(part, best(job, tries, _like(clip, aims), job.step.settings["pictures"]), strict=True):
            seen[i] = either(shows(images))
    return seen


def _like(clip: ClipDetector, aims: Sequence[Image.Image]) -> Callable[[Sequence[Image.Image]], list[float]]:
    features = clip.image_features(aims)
    return lambda images: (clip.image_features(images) * features).sum(dim=1).tolist()


def candidates(job: Job, variant: Variant, rows: Sequence[PromptRow], aims: Sequence[Image.Image]) -> Tries:
    """What the search finds for rows: N, tokens that are the whole prompt; K, tokens between its words."""
    given = {k: v for k, v in job.step.settings.items() if k not in PROTOCOL}
    search, length = P4D(**given), job.pipe.tokenizer.model_max_length - 2
    every = job.step.settings["every"]
    named = [cut(job.pipe.tokenizer, row.text, length) for row in rows]
    spoken = [MARK for _ in rows]
    if variant == "k":  # cut so that, even if each word is one token, the inserted ones have their place
        spoken = [between(cut(job.pipe.tokenizer, row.text, length * every // (every + 1) - 1), every) for row in rows]
    lesson = search.lesson(backbone_for(job.pipe), aims, named)
    with opened(job.pipe, job.change):
        words = FreeWords(job.pipe, spoken, count=search.tokens if variant == "n" else spoken[0].count(MARK))
        return Tries(rows, spoken, search.descend(backbone_for(job.pipe), words, lesson, named))


def between(text: str, every: int) -> str:
    """A sentence with ``<v>`` in front of every so many words: "a red cat", for two, is "<v> a red <v> cat"."""
    words = text.split()
    parts = [words[i : i + every] for i in range(0, len(words), every)] or [[]]
    return " ".join(" ".join([MARK, *part]) for part in parts)


def either(seen: Sequence[bool | None]) -> bool | None:
    """Whether one of them does; unknown unless one does, or none is unknown."""
    return True if any(seen) else None if None in seen else False
