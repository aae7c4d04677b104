"""Published numbers, measured again: by whoever has the weights, the prompt files and a GPU.

A recipe (:mod:`studies.reproduce.published`) names pictures to draw and what to measure on them. The result is the
number, its interval, the published one with its band, and a verdict. Base rows come first: where the base is off,
something about the installation, the detector or the files differs, and what the same set-up says of an erasure is not
read. Nothing here is tuned to match.

A number inside its band says that this set-up gives what the paper's gave; nothing about the weights of a model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from erasure.artifact.base import base_name
from erasure.eval.core.models import Applied, check_restored, randomised
from erasure.eval.core.pictures import weights_hash
from erasure.eval.core.prompt_files import KINDS, overlap
from erasure.eval.probes.base import Missing
from erasure.eval.stats import Estimate
from erasure.io import parse_json, printable, read_bytes, write_json
from erasure.wording import same
from studies.reproduce.attack import attack, attack_chosen
from studies.reproduce.inside import inversion, noise, secmi
from studies.reproduce.judged import canvas, classes, compositional, erasing
from studies.reproduce.measures import (
    Estimates,
    Inputs,
    Job,
    Pictures,
    boxes,
    cmmd_to_real,
    coco,
    inappropriate,
    over_models,
)
from studies.reproduce.p4d import p4d
from studies.reproduce.published import ORIGINAL, RANDOM, RECIPES, Published, Recipe, Step

__all__ = [
    "ORIGINAL", "RANDOM", "RECIPES", "Inputs", "Outcome", "Pictures", "Published", "Recipe", "Result", "Step",
    "reproduce",
]  # fmt: skip

Verdict = Literal["inside", "outside", "base row first", "not comparable", "not measured"]

MEASURES: dict[str, Callable[[Job], Estimates]] = {
    "boxes": boxes,
    "coco": coco,
    "cmmd": cmmd_to_real,
    "inappropriate": inappropriate,
    "attack": attack,
    "attack_chosen": over_models(attack_chosen),
    "p4d": p4d,
    "classes": over_models(classes),
    "erasing": over_models(erasing),
    "canvas": over_models(canvas),
    "compositional": compositional,
    "inversion": over_models(inversion),
    "noise": noise,
    "secmi": secmi,
}


@dataclasses.dataclass(frozen=True)
class Result:
    """One metric against its published value."""

    metric: str
    estimate: Estimate
    published: float
    band: tuple[float, float]
    verdict: Verdict


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came out of one row.

    Attributes:
        base: name of the pipeline. weights: hash of its weights, without the erasure.
        facts: by measure: hashes of prompt files, guidance by rows, detectors, tries of attacks; by target where there
            are several models.
        warnings: what makes the numbers differ from the published setting.
    """

    row: str
    arm: str
    base: str
    weights: str
    results: tuple[Result, ...]
    facts: Mapping[str, Any]
    warnings: tuple[str, ...]

    def save(self, out: Path) -> Path:
        file = _file(out, self.row, self.arm)
        write_json(file, dataclasses.asdict(self))
        return file

    @classmethod
    def load(cls, file: Path) -> Outcome:
        """Read a result.

        Raises:
            ValueError: not one, or of another version.
        """
        try:
            raw = parse_json(read_bytes(file))
            results = tuple(
                Result(**{**r, "estimate": Estimate(**r["estimate"]), "band": tuple(r["band"])}) for r in raw["results"]
            )
            return cls(**{**raw, "results": results, "warnings": tuple(raw["warnings"])})
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{file}: not a result of a row ({printable(error)}); delete it and run that row again"
            ) from None


def reproduce(
    recipe: str | Recipe,
    pipe: Any,
    inputs: Inputs,
    out: str | Path,
    *,
    arm: str = ORIGINAL,
    change: Applied | Mapping[str, Applied] | None = None,
) -> Outcome:
    """Measure one row again and compare it with what was published. The result is written into ``out``.

    Args:
        recipe: a key of :data:`RECIPES`, or a recipe.
        pipe: the unmodified base, safety checker off. It is given back as it was.
        out: folder for pictures and results. Results of base rows are looked for here.
        arm: which of the published models this is.
        change: what makes it of the base; None for the original alone, and for a random denoiser, which is made here.
            Target to change where the published numbers are means over models that lack one target each.

    Raises:
        ValueError: an unknown row or arm, an erasure for the original, or none for another arm; one where the row is
            about several, or several where it is about one; a damaged result of a base row in ``out``.
        RuntimeError: the erasure did not give the weights back.
    """
    if isinstance(recipe, str):
        if recipe not in RECIPES:
            raise ValueError(f"unknown row {recipe!r}; choose one of {list(RECIPES)}")
        recipe = RECIPES[recipe]
    if arm not in recipe.arms:
        raise ValueError(f"row {recipe.row} has no published model {arm!r}; choose one of {list(recipe.arms)}")
    if change is None and arm.startswith(RANDOM):
        change = randomised(pipe)
    if (arm == ORIGINAL) != (change is None):
        raise ValueError(
            f"{ORIGINAL!r} is the base alone and every other model is an edit of it; got {arm!r}, {change}"
        )
    several = dict(change) if isinstance(change, Mapping) else {}
    if change is not None and (recipe.models == 1) == bool(several):
        about = "one model; give change=ERASURE"
        if recipe.models != 1:
            about = "models that lack one target each; give change={TARGET: ERASURE}"
        raise ValueError(f"got {sorted(several) or 'one erasure'}; row {recipe.row} is about {about}")
    single = None if isinstance(change, Mapping) else change
    out, before = Path(out), weights_hash(pipe)
    bases = {row: Outcome.load(file) for row in _base_rows(recipe, arm) if (file := _file(out, row, ORIGINAL)).exists()}
    found: Estimates = {}
    names = {target: one.name for target, one in several.items()} or (None if single is None else single.name)
    facts: dict[str, Any] = {"confidence": recipe.confidence, "erasure": names}
    for step in recipe.steps:
        job, name = Job(pipe, single, step, inputs, out, several), recipe.name_of(step)
        try:
            found |= MEASURES[step.measure](job)
        except Missing as missing:
            found |= {f"{name}:reason": Estimate.missing(str(missing))}
        facts[name] = job.facts
    if change is not None:
        check_restored(pipe, before, str(names))
    warnings, comparable = _warnings(recipe, pipe, inputs, None if change is None else max(1, len(several)))
    results: list[Result] = []
    off: dict[str, None] = {}
    for name, known in recipe.arms[arm].items():
        first = [row for row in _base_rows(recipe, arm) if not _passed(bases.get(row), name, before)]
        off |= dict.fromkeys(first)
        value = _value(name, found, recipe)
        results.append(Result(name, value, known.value, known.band, _verdict(value, known.band, comparable, first)))
    warnings += [_left_out(result) for result in results if result.estimate.excluded]
    warnings += [f"Base row {row} is not inside its band with these weights yet; run it first." for row in off]
    outcome = Outcome(recipe.row, arm, base_name(pipe), before, tuple(results), facts, tuple(warnings))
    outcome.save(out)
    return outcome


def _value(name: str, found: Mapping[str, Estimate], recipe: Recipe) -> Estimate:
    """The estimate of a metric, or why there is none. Never 0 for unknown."""
    if name in found:
        return found[name]
    reasons = [value.reason for key, value in found.items() if key.endswith(":reason") and value.reason]
    lacking = [*reasons, recipe.lacks] if recipe.lacks else reasons
    return Estimate.missing("; ".join(lacking) or f"not measured; what was: {sorted(found)}")


def _verdict(value: Estimate, band: tuple[float, float], comparable: bool, first: Sequence[str]) -> Verdict:
    if value.value is None:
        return "not measured"
    if not comparable:
        return "not comparable"
    if first:
        return "base row first"
    return "inside" if band[0] <= value.value <= band[1] else "outside"


def _left_out(result: Result) -> str:
    """A judge that gives no verdict on destroyed pictures makes an erasure look harmless, so their share is told."""
    seen, total = result.estimate.n, result.estimate.n + result.estimate.excluded
    return (
        f"{result.metric}: {seen} of {total} pictures had a verdict ({seen / total:.1%}). The others, without a face "
        "for instance, are in no denominator: read both numbers."
    )


def _warnings(recipe: Recipe, pipe: Any, inputs: Inputs, models: int | None) -> tuple[list[str], bool]:
    """What differs from the published setting, and whether the numbers may be compared all the same."""
    grave, light = [], []
    if getattr(pipe, "safety_checker", None) is not None:
        grave.append(
            "The pipeline's safety checker was on: it blacks pictures out, which would count as suppression. "
            "Load it with safety_checker=None."
        )
    if inputs.limit is not None:
        grave.append(f"Limited to {inputs.limit} rows per file: for trying things out.")
    if inputs.num_inference_steps is not None:
        grave.append(f"Drawn with {inputs.num_inference_steps} steps in the place of the recipe's.")
    for kind in recipe.files:
        file, count = inputs.files.get(kind), KINDS[kind].expected
        if file is not None and count is not None and len(file.rows) != count:
            grave.append(f"The file of {kind} has {len(file.rows)} rows; the published one {count}.")
        if file is not None and count is None:
            light.append(f"How many rows of {kind} the paper used is not known; these are {len(file.rows)}.")
        if file is not None and "tuned_on" in inputs.files:
            if common := overlap(file, inputs.files["tuned_on"]):
                grave.append(f"Settings were chosen on {len(common)} of the prompts of {kind}; they test nothing.")
    if models is not None and recipe.models is None:
        light.append(f"How many models the published numbers are means of is not known; these are {models}.")
    elif models is not None and models != recipe.models:
        grave.append(f"The published numbers are means of {recipe.models} models; these of {models}.")
    name = base_name(pipe)
    if not any(same(name, known) for known in (recipe.base, recipe.base.rpartition("/")[2])):
        light.append(f"The published numbers are of {recipe.base}; the pipeline is called {name}.")
    return [*grave, *light], not grave


def _base_rows(recipe: Recipe, arm: str) -> list[str]:
    own = [recipe.row] if arm != ORIGINAL and ORIGINAL in recipe.arms else []
    return [*recipe.after, *own]


def _passed(outcome: Outcome | None, metric: str, weights: str) -> bool:
    """Whether a base row was measured with these weights, inside its band: in this metric, or in all it has."""
    if outcome is None:
        return False
    relevant = [result for result in outcome.results if result.metric == metric] or outcome.results
    return outcome.weights == weights and all(result.verdict == "inside" for result in relevant)


def _file(out: Path, row: str, arm: str) -> Path:
    return out / f"row-{row}-{arm}.json"
