"""What each method came to on each target, and the means over targets, from the results of a recipe."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from erasure.batch.recipe import Cell, Recipe
from erasure.batch.stages import result_of
from erasure.eval.judge import QUESTIONS
from erasure.eval.stats.resample import t_half_width

GROUPS = ("target", "neighbours", "unrelated")
WORST = {"target": max, "neighbours": min, "unrelated": min}  # of several detectors the less flattering one
ANY = (-math.inf, math.inf)  # the range of a number that has none
INSIDE = {"residual": "residual in the weights", "advantage": "faster relearnt, powers of two"}


@dataclasses.dataclass(frozen=True)
class Rate:
    """A number with its 95 % interval; a share of pictures prints as per cent. An open end is None."""

    value: float
    low: float | None
    high: float | None

    def __str__(self) -> str:
        return self.written("{:.0f}", 100, " %")

    def written(self, form: str, factor: float = 1, unit: str = "") -> str:
        """The number, times a factor, with its interval; an open end is a question mark."""
        value, low, high = ("?" if x is None else form.format(factor * x) for x in (self.value, self.low, self.high))
        return f"{value}{unit} ({low} to {high})"


@dataclasses.dataclass(frozen=True)
class Line:
    """One method on one suite, or its mean over several.

    Attributes:
        method, suite: names. preset: of the method, where the recipe names one.
        rates: group ("target", "neighbours", "unrelated") to the share of its pictures that show what was asked for.
            Of several detectors the less flattering one: the highest rate of the target, the lowest of what is kept.
        passes: forward passes that making the erasure took; see :class:`~erasure.batch.cost.Cost`.
        seconds: it took, on the machine of this run.
        size: bytes of the erasure's file.
        error: why there is none, otherwise None.
        answers: the five verdicts of its evaluation, each with its number.
        inside: "residual" (0 as a model that never saw the target, 1 as the base; of the probe that recovers most) and
            "advantage" (log2 of how much faster the target is relearnt than by such a model), as far as they were
            measured and no gate failed.
        controls: what "never saw the target" means for them: "gold", a retrained model, or "null".
        rest: change of the kept pictures that are drawn right, against the base; of the group that lost more.
        before: the rates of the base's pictures.
    """

    method: str
    suite: str
    rates: dict[str, Rate] = dataclasses.field(default_factory=dict)
    passes: int = 0
    seconds: float = 0.0
    size: int = 0
    error: str | None = None
    answers: dict[str, str] = dataclasses.field(default_factory=dict)
    inside: dict[str, Rate] = dataclasses.field(default_factory=dict)
    controls: tuple[str, ...] = ()
    rest: Rate | None = None
    preset: str = ""
    before: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def label(self) -> str:
        """The method with its preset."""
        return f"{self.method} {self.preset}".strip()

    @classmethod
    def read(cls, row: Mapping[str, Any]) -> Line:
        """A line as ``comparison.json`` has it."""
        read = {name: {key: Rate(**rate) for key, rate in row[name].items()} for name in ("rates", "inside")}
        return cls(**{**row, **read, "rest": Rate(**row["rest"]) if row["rest"] else None})


# --- what the cells came to -------------------------------------------------------------------------------------------


def lines_of(recipe: Recipe) -> list[Line]:
    """The results of a recipe that has been run, in its order; cells without one are left out."""
    found = ((cell, result_of(recipe, cell)) for cell in recipe.cells())
    return [_line(cell, result, recipe.out / cell.key) for cell, result in found if result is not None]


def _line(cell: Cell, result: dict[str, Any], folder: Path) -> Line:
    if "cost" not in result:
        return Line(cell.method.name, cell.target, error=str(result.get("error")), preset=cell.method.preset or "")
    evidence = result.get("evidence") or []
    size = sum(file.stat().st_size for file in (folder / "erasure").glob("*.safetensors"))
    return Line(
        cell.method.name,
        cell.target,
        rates_of(result.get("figures", ())),
        result["cost"]["passes"],
        result["cost"]["seconds"],
        size,
        answers=answers_of(result),
        inside=inside_of(evidence),
        controls=tuple(sorted({e["control"] for e in evidence if e["measure"] in INSIDE and e["control"]})),
        rest=rest_of(evidence),
        preset=cell.method.preset or "",
        before=before_of(result.get("figures", ())),
    )


def rates_of(figures: Sequence[dict[str, Any]]) -> dict[str, Rate]:
    """Group to its rate by the less flattering detector: the highest of the target, the lowest of what is kept."""
    rates = {}
    for group in GROUPS:
        own = [row["rate"] for row in figures if row["group"] == group]
        own = [Rate(rate["value"], rate["low"], rate["high"]) for rate in own if rate["value"] is not None]
        if own:
            rates[group] = WORST[group](own, key=lambda rate: rate.value)
    return rates


def before_of(figures: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Group to the base's rate, chosen in the same way: what an erasure's rate changed from."""
    before = {}
    for group in GROUPS:
        own = [row for row in figures if row["group"] == group and (row.get("change") or {}).get("value") is not None]
        if own:
            before[group] = WORST[group](row["rate"]["value"] - row["change"]["value"] for row in own)
    return before


def answers_of(result: Mapping[str, Any]) -> dict[str, str]:
    """The five verdicts of an evaluation as a table has them: the word and its number."""
    answers = result.get("answers") or {}
    return {key: f"{answers[key]['word']} {answers[key]['number']}".strip() for key in QUESTIONS if answers.get(key)}


def inside_of(evidence: Sequence[dict[str, Any]]) -> dict[str, Rate]:
    """What is still in the weights: of each measure the highest number whose gates it passed."""
    found = {}
    for measure in INSIDE:
        own = [_rate(e) for e in evidence if e["measure"] == measure and e["conclusive"]]
        if own:
            found[measure] = max(own, key=lambda rate: rate.value)
    return found


def rest_of(evidence: Sequence[dict[str, Any]]) -> Rate | None:
    """The change of the kept group that lost more."""
    own = [_rate(e) for e in evidence if e["measure"] == "change" and e["value"] is not None]
    return min(own, key=lambda rate: rate.value, default=None)


def _rate(e: dict[str, Any]) -> Rate:
    return Rate(e["value"], e["low"], e["high"])


# --- over several targets ---------------------------------------------------------------------------------------------


def means(lines: Sequence[Line]) -> list[Line]:
    """A line for each method with its means over targets; empty where there is one target."""
    return averaged(lines) if len({line.suite for line in lines}) > 1 else []


def averaged(lines: Sequence[Line]) -> list[Line]:
    """A line for each method: means over seeds, then over targets. A number that one target lacks has no mean."""
    total = len({line.suite for line in lines})
    methods: dict[str, list[Line]] = {}
    for line in lines:
        methods.setdefault(line.label, []).append(line)
    return [own[0] if len(own) == 1 else _mean_line(own, total) for own in methods.values()]


def _mean_line(every: Sequence[Line], total: int) -> Line:
    first, done = every[0], [line for line in every if line.error is None]
    reached = len({line.suite for line in done})
    on = f"{reached} targets" if reached == total else f"{reached} of {total} targets"
    on = on if total > 1 else first.suite
    if not done:
        return Line(first.method, on, error=first.error, preset=first.preset)

    def over(read: Callable[[Line], Rate | None], within: tuple[float, float] = ANY) -> Rate | None:
        found: dict[str, list[Rate]] = {}
        for line in done:
            if (rate := read(line)) is None:
                return None
            found.setdefault(line.suite, []).append(rate)
        return mean([mean(seeds, within=within) for seeds in found.values()], within=within)

    known = {line.suite: line.before for line in done if line.before}
    groups = [group for group in GROUPS if len(known) == reached and all(group in one for one in known.values())]
    rates = {group: over(lambda line, g=group: line.rates.get(g), (0.0, 1.0)) for group in GROUPS}  # type: ignore[misc]
    inside = {measure: over(lambda line, m=measure: line.inside.get(m)) for measure in INSIDE}  # type: ignore[misc]
    return Line(
        first.method,
        on,
        {group: rate for group, rate in rates.items() if rate is not None},
        round(statistics.mean(line.passes for line in done)),
        statistics.mean(line.seconds for line in done),
        round(statistics.mean(line.size for line in done)),
        inside={measure: rate for measure, rate in inside.items() if rate is not None},
        controls=tuple(sorted({control for line in done for control in line.controls})),
        rest=over(lambda line: line.rest),
        preset=first.preset,
        before={group: statistics.mean(one[group] for one in known.values()) for group in groups},
    )


def mean(rates: Sequence[Rate], *, within: tuple[float, float] = ANY) -> Rate:
    """The mean over targets with its interval: the wider, at each end, of two.

    One is about these targets, from their own intervals (Zou and Donner 2008, for a mean): the root of the summed
    squares of their arms, over their number. The other is about targets like these: the t interval of their values.
    The first does not collapse where all targets have the same rate, the second sees how much targets differ.

    Args:
        within: the range of such numbers, where the interval ends.
    """
    if len(rates) == 1:
        return rates[0]
    values, n = [rate.value for rate in rates], len(rates)
    middle = statistics.mean(values)
    between = t_half_width(values)

    def end(ends: Sequence[float | None], sign: int, limit: float) -> float | None:
        if any(one is None for one in ends):
            return None
        arm = math.sqrt(sum((one - rate.value) ** 2 for one, rate in zip(ends, rates, strict=True) if one is not None))
        return sign * min(sign * (middle + sign * max(arm / n, between)), sign * limit)

    return Rate(middle, end([r.low for r in rates], -1, within[0]), end([r.high for r in rates], 1, within[1]))


def ranked(lines: Sequence[Line]) -> list[Line]:
    """By target, those that keep it out best first; failed ones last."""
    return sorted(lines, key=_order)


def _order(line: Line) -> tuple[bool, str, float, str]:
    target = line.rates.get("target")
    return line.error is not None, line.suite, target.value if target else 1.0, line.label


__all__ = [
    "GROUPS",
    "INSIDE",
    "Line",
    "Rate",
    "answers_of",
    "averaged",
    "before_of",
    "inside_of",
    "lines_of",
    "mean",
    "means",
    "ranked",
    "rates_of",
    "rest_of",
]
