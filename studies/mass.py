"""U14: many concepts, all together or one after another. What survives, and does the first come back?

>>> found = in_turn(pipe, Suite.load("twenty"), "uce", detectors=detectors(), counts=(1, 5, 20))  # doctest: +SKIP
>>> print(found.table())  # doctest: +SKIP
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from tqdm.auto import tqdm

from erasure.api import erase
from erasure.artifact import Erasure
from erasure.concept import Concept, Suite
from erasure.eval.core.models import Applied
from erasure.eval.core.records import BASE, Evaluation, Record
from erasure.eval.core.stacked import Stacked
from erasure.eval.detectors.base import Detector
from erasure.eval.run.drawing import paired_pictures
from erasure.eval.stats import Estimate, difference, rate
from erasure.io import markdown, write_atomically

Way = Literal["together", "in turn"]
ALONE = "1 alone"


@dataclasses.dataclass(frozen=True)
class Line:
    """One model, judged by one detector.

    Attributes:
        model: "base", "1 alone", or a count and its way, "together" (one erasure of all) or "in turn" (stacked ones).
        count: concepts suppressed, the first of the list; 0 for the base.
        detector: its name.
        suppressed: share of their pictures in which the concept is seen; for the base, of those of the whole list.
        first: the same of the first concept alone.
        back: paired change of ``first`` since it was suppressed alone. Above 0 it comes back.
        waiting: share in which the concepts of the list whose turn has not come are seen: they were to stay.
        kept, unrelated: share in which the asked-for label is seen, of what the method was told to keep and was not.
    """

    model: str
    count: int
    detector: str
    suppressed: Estimate
    first: Estimate
    back: Estimate
    waiting: Estimate
    kept: Estimate
    unrelated: Estimate


@dataclasses.dataclass(frozen=True)
class Mass:
    """What suppressing the first 1, 5, 20 ... concepts of a list did.

    Attributes:
        evaluation: the records of every picture. Its arms are called by count and way: "base", "1 alone", "5 in turn".
    """

    evaluation: Evaluation

    def lines(self) -> list[Line]:
        """One line per model and detector, from the records."""
        return [
            self._line(arm.name, detector) for arm in self.evaluation.arms for detector in self.evaluation.detectors
        ]

    def table(self) -> str:
        """The lines in Markdown."""
        head = ["concepts", "judged by", "suppressed ones seen", "the first seen", "the first since alone"]
        head += ["not yet suppressed seen", "kept right", "unrelated right"]
        out = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        for line in self.lines():
            values = line.suppressed, line.first, line.back, line.waiting, line.kept, line.unrelated
            cells = [
                markdown(line.model),
                markdown(line.detector),
                *("" if value.value is None else str(value) for value in values),
            ]
            out.append(f"| {' | '.join(cells)} |")
        return "\n".join(out)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write the table as ``mass.md``, and the evaluation, into a folder; ``Mass(Evaluation.from_json(folder))``."""
        write_atomically(Path(folder) / "mass.md", self.table() + "\n")
        return self.evaluation.save(folder)

    def _line(self, arm: str, detector: str) -> Line:
        count = 0 if arm == BASE else int(arm.split()[0])
        names = [concept.name for concept in self.evaluation.suite.concepts]
        target, alone = (self.evaluation.select(model, "target") for model in (arm, ALONE))

        def hits(records: Sequence[Record]) -> list[bool | None]:
            return [record.verdicts[detector].hit for record in records]

        def share(records: Sequence[Record]) -> Estimate:
            return rate(hits(records), [record.prompt for record in records])

        def of(labels: Sequence[str], records: Sequence[Record] = target) -> list[Record]:
            return [record for record in records if record.label in labels]

        first = of(names[:1])
        since = difference(hits(of(names[:1], alone)), hits(first), [record.prompt for record in first])
        return Line(
            arm,
            count,
            detector,
            suppressed=share(of(names[: count or len(names)])),
            first=share(first),
            back=since if count > 1 else Estimate.missing("nothing came after it"),
            waiting=share(of(names[count:])) if count else Estimate.missing("nothing is suppressed in the base"),
            kept=share(self.evaluation.select(arm, "neighbours")),
            unrelated=share(self.evaluation.select(arm, "unrelated")),
        )


def in_turn(
    pipe: Any,
    suite: Suite,
    method: str = "uce",
    *,
    detectors: Sequence[Detector],
    counts: Sequence[int] = (1, 5, 20, 50),
    ways: Sequence[Way] = ("together", "in turn"),
    preset: str | None = None,
    images_per_prompt: int | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    autocast: bool | None = None,
    cache_dir: str | Path | None = None,
    progress: bool = True,
    **settings: Any,
) -> Mass:
    """Suppress the first n concepts of a list for several n, all together and one after another, and look at the rest.

    Every model draws the whole suite, so that concepts whose turn has not come are one more group that must survive.
    At 2 pictures a second, 150 prompts and 8 models take ten minutes.

    Args:
        pipe: the unmodified pipeline; it is handed back unmodified.
        suite: ``suite.concepts`` in their order are the list, ``suite.kept`` is what the method is told to keep, for
            every erasure alike, and ``suite.unrelated`` what it is not told of.
        method, preset, **settings: as in :func:`erasure.erase`.
        counts: how many; 1 is always among them, as the others are compared with it.
        ways: "together": one erasure of all n. "in turn": n erasures of one concept each, made for the base and put on
            one after another, as somebody does who downloads them one by one.
        detectors, images_per_prompt, limit, batch_size, autocast: as in :func:`erasure.eval.evaluate`.
        cache_dir: folder for finished pictures and states of training; the same call again goes on from there.
        progress: show progress bars.

    Raises:
        ValueError: a count below 1 or above the number of concepts in the suite, or no such way.

    Source: 1, 5, 10 and 100 concepts at once as in MACE (Lu et al. 2024, arXiv 2403.06135).
    """
    if not counts or min(counts) < 1 or max(counts) > len(suite.concepts):
        raise ValueError(
            f"counts must lie between 1 and the number of concepts; got {list(counts)} for {len(suite.concepts)} "
            f"concepts in the suite {suite.name}; lower them, or list more under `also`"
        )
    if unknown := set(ways) - {*get_args(Way)}:
        raise ValueError(f"unknown ways; got {sorted(unknown)}; choose among {list(get_args(Way))}")
    training = None if cache_dir is None else Path(cache_dir) / "training"

    def make(name: str, concepts: Sequence[Concept]) -> Erasure:
        return erase(
            pipe,
            concepts,
            method,
            keep=suite.kept,
            preset=preset,
            name=name,
            checkpoint=None if training is None else training / f"{suite.name} {method} {name}",
            apply=False,
            progress=False,
            **settings,
        )

    evaluation = paired_pictures(
        pipe,
        _arms(make, suite.concepts, sorted({*counts} - {1}), ways, progress=progress),
        suite,
        detectors=detectors,
        images_per_prompt=images_per_prompt,
        limit=limit,
        batch_size=batch_size,
        autocast=autocast,
        cache_dir=cache_dir,
        progress=progress,
    )
    note = (
        "Each arm suppresses the first concepts of the list, as many as its name says; the group target is all of it."
    )
    return Mass(dataclasses.replace(evaluation, warnings=(note, *evaluation.warnings)))


def _arms(
    make: Callable[[str, Sequence[Concept]], Erasure],
    concepts: Sequence[Concept],
    counts: Sequence[int],
    ways: Sequence[Way],
    *,
    progress: bool,
) -> dict[str, Applied]:
    """The first concept alone, and for each count the erasure of all and the stack of single ones."""
    single = concepts[: max(counts, default=1) if "in turn" in ways else 1]
    jobs: dict[str, Sequence[Concept]] = {f"{i} {concept.name}": [concept] for i, concept in enumerate(single, 1)}
    jobs |= {f"{n} together": concepts[:n] for n in counts if "together" in ways}
    bar = tqdm(jobs.items(), desc="erasures", unit="erasure", disable=not progress, leave=False)
    made = {name: make(name, own) for name, own in bar}
    singles = [made[f"{i} {concept.name}"] for i, concept in enumerate(single, 1)]
    arms: dict[str, Applied] = {ALONE: singles[0]}
    for n in counts:
        for way in ways:
            name = f"{n} {way}"
            arms[name] = made[name] if way == "together" else Stacked(name, singles[:n])
    return arms
