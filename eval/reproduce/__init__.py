"""Published numbers, measured again: by whoever has the weights, the prompt files and a GPU.

A recipe (:mod:`erasure.eval.reproduce.published`) names pictures to draw and what to measure on them. The result is the
number, its interval, the published one with its band, and a verdict. Base rows come first: where the base is off,
something about the installation, the detector or the files differs, and what the same set-up says of an erasure is not
read. Nothing here is tuned to match.

A number inside its band says that this set-up gives what the paper's gave; nothing about the weights of a model.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from erasure.artifact.base import base_name
from erasure.concept import same, write_atomically
from erasure.eval.models import Applied, check_restored
from erasure.eval.pictures import weights_hash
from erasure.eval.probes.base import Missing
from erasure.eval.prompt_files import KINDS
from erasure.eval.reproduce.attack import attack
from erasure.eval.reproduce.measures import Inputs, Job, Pictures, boxes, cmmd_to_real, coco, inappropriate
from erasure.eval.reproduce.published import ORIGINAL, RECIPES, Published, Recipe, Step
from erasure.eval.stats import Estimate

__all__ = [
    "ORIGINAL", "RECIPES", "Inputs", "Outcome", "Pictures", "Published", "Recipe", "Result", "Step", "reproduce",
]  # fmt: skip

Verdict = Literal["inside", "outside", "base row first", "not comparable", "not measured"]

MEASURES: dict[str, Callable[[Job], dict[str, Estimate]]] = {
    "boxes": boxes,
    "coco": coco,
    "cmmd": cmmd_to_real,
    "inappropriate": inappropriate,
    "attack": attack,
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
        facts: hashes of prompt files, guidance by rows, detector cards, tries of attacks.
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
        write_atomically(file, json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n")
        return file

    @classmethod
    def load(cls, file: Path) -> Outcome:
        raw = json.loads(file.read_text("utf-8"))
        results = tuple(
            Result(**{**r, "estimate": Estimate(**r["estimate"]), "band": tuple(r["band"])}) for r in raw["results"]
        )
        return cls(**{**raw, "results": results, "warnings": tuple(raw["warnings"])})


def reproduce(
    recipe: str | Recipe,
    pipe: Any,
    inputs: Inputs,
    out: str | Path,
    *,
    arm: str = ORIGINAL,
    change: Applied | None = None,
) -> Outcome:
    """Measure one row again and compare it with what was published. The result is written into ``out``.

    Args:
        recipe: a key of :data:`RECIPES`, or a recipe.
        pipe: the unmodified base, safety checker off. It is given back as it was.
        out: folder for pictures and results. Results of base rows are looked for here.
        arm: which of the published models this is.
        change: what makes it of the base; None for the original alone.

    Raises:
        ValueError: an unknown row or arm, an erasure for the original, or none for another arm.
        RuntimeError: the erasure did not give the weights back.
    """
    if isinstance(recipe, str):
        if recipe not in RECIPES:
            raise ValueError(f"unknown row {recipe!r}; choose one of {list(RECIPES)}")
        recipe = RECIPES[recipe]
    if arm not in recipe.arms:
        raise ValueError(f"row {recipe.row} has no published model {arm!r}; choose one of {list(recipe.arms)}")
    if (arm == ORIGINAL) != (change is None):
        raise ValueError(
            f"{ORIGINAL!r} is the base alone and every other model is an edit of it; got {arm!r}, {change}"
        )
    out, before = Path(out), weights_hash(pipe)
    found: dict[str, Estimate] = {}
    facts: dict[str, Any] = {"confidence": recipe.confidence, "erasure": None if change is None else change.name}
    for step in recipe.steps:
        job = Job(pipe, change, step, inputs, out)
        try:
            found |= MEASURES[step.measure](job)
        except Missing as missing:
            found |= {f"{step.measure}:reason": Estimate.missing(str(missing))}
        facts[step.measure] = job.facts
    if change is not None:
        check_restored(pipe, before, change.name)
    warnings, comparable = _warnings(recipe, pipe, inputs)
    bases, results = _base_rows(recipe, arm), []
    off: dict[str, None] = {}
    for name, known in recipe.arms[arm].items():
        first = [row for row in bases if not _passed(out, row, name, before)]
        off |= dict.fromkeys(first)
        value = _value(name, found, recipe)
        results.append(Result(name, value, known.value, known.band, _verdict(value, known.band, comparable, first)))
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


def _warnings(recipe: Recipe, pipe: Any, inputs: Inputs) -> tuple[list[str], bool]:
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
    name = base_name(pipe)
    if not any(same(name, known) for known in (recipe.base, recipe.base.rpartition("/")[2])):
        light.append(f"The published numbers are of {recipe.base}; the pipeline is called {name}.")
    return [*grave, *light], not grave


def _base_rows(recipe: Recipe, arm: str) -> list[str]:
    own = [recipe.row] if arm != ORIGINAL and ORIGINAL in recipe.arms else []
    return [*recipe.after, *own]


def _passed(out: Path, row: str, metric: str, weights: str) -> bool:
    """Whether a base row was measured here, with these weights, inside its band: in this metric, or in all it has."""
    file = _file(out, row, ORIGINAL)
    if not file.exists():
        return False
    outcome = Outcome.load(file)
    relevant = [result for result in outcome.results if result.metric == metric] or outcome.results
    return outcome.weights == weights and all(result.verdict == "inside" for result in relevant)


def _file(out: Path, row: str, arm: str) -> Path:
    return out / f"row-{row}-{arm}.json"
