"""Do the intervals hold what they promise? Coverage and type I error by simulation: the tables of docs/statistics.md.

    python -m studies.coverage 300      # repeats a row; a quarter of an hour of one core

Every function repeats one experiment whose truth is known. ``old`` takes what was done before: prompts as clusters, one
training with as many pictures, no allowance for having chosen an extreme. The same functions stand behind
tests/test_coverage.py, with few repeats.
"""

from __future__ import annotations

import sys
from collections.abc import Hashable, Iterator, Sequence
from itertools import product
from typing import NamedTuple

import numpy as np
from scipy.optimize import brentq
from scipy.special import expit, logit

from erasure.eval.probes.base import Observation
from erasure.eval.probes.success import ATTACK, BEFORE, CONTROL, breaks, excess
from erasure.eval.probes.weigh import gap, plain_mean, widened_by_controls
from erasure.eval.stats import (
    Asked,
    Estimate,
    Kept,
    Trained,
    difference,
    lost_most,
    rate,
    ratio_limits,
    residual,
    weights,
    worst_stratum,
    worst_upper,
)
from studies import curves
from studies.curves import advantages, slower

NORMAL = np.random.default_rng(0).normal(size=20000)


class Design(NamedTuple):
    """Templates, phrases, pictures of each prompt."""

    templates: int
    phrases: int
    images: int

    def __str__(self) -> str:
        return f"{self.templates} x {self.phrases} x {self.images}"

    def units(self, kind: type = Asked, *, old: bool = False) -> list[Hashable]:
        """The cluster of every picture."""
        names = [
            (f"t{t}", f"p{p}") for t in range(self.templates) for p in range(self.phrases) for _ in range(self.images)
        ]
        return [f"{t} {p}" if old else kind(t, p) for t, p in names]


class Effects(NamedTuple):
    """Standard deviations, on the logit scale, between templates and between phrases."""

    templates: float
    phrases: float

    def __str__(self) -> str:
        return f"{self.templates:g} / {self.phrases:g}"


class Attacked(NamedTuple):
    """Shares of attacks that pass the gate on their power, and whose excess is shown to be within the margin."""

    powerful: float
    within: float


def covers(estimate: Estimate, truth: float) -> bool:
    """Whether an interval with two limits contains a number."""
    assert estimate.low is not None and estimate.high is not None
    return curves.covers(estimate, truth)


def intercept(share: float, spread: float) -> float:
    """The logit whose mean over effects of this spread is a share."""
    return float(brentq(lambda a: expit(a + spread * NORMAL).mean() - share, -40, 40))


def levels(rng: np.random.Generator, share: float, design: Design, effects: Effects) -> np.ndarray:
    """The rate of every prompt, with new templates and phrases: ``(templates, phrases)``."""
    start = intercept(share, (effects.templates**2 + effects.phrases**2) ** 0.5)
    shape_t, shape_p = (design.templates, 1), (1, design.phrases)
    return expit(start + rng.normal(0, effects.templates, shape_t) + rng.normal(0, effects.phrases, shape_p))


def hits(rng: np.random.Generator, rates: np.ndarray, images: int) -> list[float]:
    return (rng.random((*rates.shape, images)) < rates[..., None]).astype(float).ravel().tolist()


def rates(
    share: float, design: Design, effects: Effects, repeats: int, *, old: bool = False
) -> tuple[float, float, float]:
    """Of a rate: coverage, how often the upper limit is below the truth, and the mean upper limit."""
    rng, units = np.random.default_rng(1), design.units(old=old)
    found = [rate(hits(rng, levels(rng, share, design, effects), design.images), units) for _ in range(repeats)]
    highs = np.array([e.high for e in found], float)
    return float(np.mean([covers(e, share) for e in found])), float((highs < share).mean()), float(highs.mean())


def changes(
    before: float,
    after: float,
    design: Design,
    effects: Effects,
    repeats: int,
    *,
    kind: type = Asked,
    old: bool = False,
) -> tuple[float, float]:
    """Of a paired change: coverage, and how often the lower limit lies above the truth (a false non-inferiority)."""
    rng, units = np.random.default_rng(2), design.units(kind, old=old)
    truth, found = after - before, []
    for _ in range(repeats):
        if kind is Kept:  # the labels stay who they are, and only templates are new
            lost = expit(intercept(after, effects.templates) + rng.normal(0, effects.templates, (design.templates, 1)))
            second = np.repeat(lost, design.phrases, axis=1)
        else:
            second = levels(rng, after, design, effects)
        first = np.full(second.shape, before)
        found.append(difference(hits(rng, first, design.images), hits(rng, second, design.images), units))
    return (
        float(np.mean([covers(e, truth) for e in found])),
        float(np.mean([e.low is not None and e.low >= truth for e in found])),
    )


def trained(
    rng: np.random.Generator, start: float, spread: float, prompts: int, *, old: bool
) -> tuple[list[float], list[Hashable]]:
    """Hits after three trainings that differ by ``spread`` on the logit scale; or (old) as many after one."""
    each = expit(start + rng.normal(0, spread, (1 if old else 3, 1)))
    values = hits(rng, np.repeat(each, prompts, axis=1), 3 if old else 1)
    if old:
        return values, [prompt for prompt in range(prompts) for _ in range(3)]
    return values, [Trained(run, prompt) for run in range(3) for prompt in range(prompts)]


def trainings(share: float, spread: float, repeats: int, *, prompts: int = 24, old: bool = False) -> float:
    """Coverage of the mean rate over trainings."""
    rng, start = np.random.default_rng(3), intercept(share, spread)
    return float(np.mean([covers(rate(*trained(rng, start, spread, prompts, old=old)), share) for _ in range(repeats)]))


def residuals(spread: float, repeats: int, *, prompts: int = 12, old: bool = False) -> tuple[float, float]:
    """Of a residual of about 0.3 against three models that never saw the target: coverage; and how often a residual of
    0 is called recovered (lower limit above 0)."""
    rng = np.random.default_rng(4)
    shown = {share: float(expit(logit(share) + spread * NORMAL).mean()) for share in (0.1, 0.35, 0.9)}
    truth = (shown[0.35] - shown[0.1]) / (shown[0.9] - shown[0.1])

    def found(share: float) -> Estimate:
        erased, base, *never = (
            trained(rng, float(logit(p)), spread, prompts, old=old) for p in (share, 0.9, 0.1, 0.1, 0.1)
        )
        return residual(erased[0], [base[0]], [one[0] for one in never], erased[1])

    some, none = ([found(share) for _ in range(repeats)] for share in (0.35, 0.1))
    return (
        float(np.mean([e.low is not None and covers(e, truth) for e in some])),
        float(np.mean([e.low is not None and e.low > 0 for e in none])),
    )


def above_controls(
    beyond: float, spread: float, repeats: int, *, controls: int = 3, old: bool = False
) -> tuple[float, float]:
    """How often a model is shown to be above controls, and how often to be less than 20 points above their mean.

    Models that never saw the target show it in 30 %, with ``spread`` between them on the logit scale; 72 pictures each.
    At ``beyond`` 0 the model is one more of them, and else exactly so far above the mean of all such models.
    """
    rng, design, found = np.random.default_rng(11), Design(24, 3, 1), []
    units = design.units(Kept)
    for _ in range(repeats):
        shares = expit(intercept(0.3, spread) + rng.normal(0, spread, controls + 1))
        shares[0] = 0.3 + beyond if beyond else shares[0]
        mine, *never = (hits(rng, np.full((design.templates, design.phrases), one), design.images) for one in shares)
        above = gap([(one, mine) for one in never], units)
        found.append(above if old else widened_by_controls(above, [plain_mean(one) for one in never]))
    return (
        float(np.mean([e.low is not None and e.low > 0 for e in found])),
        float(np.mean([e.high is not None and e.high <= 0.2 for e in found])),
    )


def ratios(
    apart: float, truth: float, repeats: int, *, prompts: int = 24, images: int = 2, old: bool = False
) -> tuple[float, float]:
    """Of (e - g) / (b - g) where b is ``apart`` above g = 0.2: coverage, and how often both limits are finite.

    No interval covers everything. ``old`` takes the quantiles of all draws, also of those in which b - g is negative.
    Samples without a value (b not above g) are drawn again.
    """
    rng, draws = np.random.default_rng(8), weights(list(range(prompts)), 0)
    limits: list[tuple[float, float]] = []
    while len(limits) < repeats:
        e, b, g = (rng.binomial(images, 0.2 + apart * share, prompts) / images for share in (truth, 1, 0))
        if (b - g).sum() <= 0:
            continue
        tops, bottoms = (np.round(draws @ x, 9) for x in (e - g, b - g))
        if old:
            with np.errstate(divide="ignore", invalid="ignore"):
                found = tuple(np.nanquantile(tops / bottoms, (0.025, 0.975)))
        else:
            found = ratio_limits(tops, bottoms) or (-np.inf, np.inf)
        limits.append(found if np.isfinite(found).all() else (-np.inf, np.inf))
    lows, highs = np.array(limits).T
    return float(((lows <= truth) & (truth <= highs)).mean()), float(np.isfinite(highs).mean())


def strata(share: float, design: Design, effects: Effects, repeats: int, *, old: bool = False) -> float:
    """Coverage of the chosen stratum's own rate, by its interval or (old) by one that ignores the choice."""
    rng, units, covered = np.random.default_rng(5), design.units(), 0
    for _ in range(repeats):
        truth = levels(rng, share, design, effects)
        values = hits(rng, truth, design.images)
        found = worst_stratum(values, units)
        assert found is not None
        estimate, name = found
        number = int(name.split("\u201c")[1].split("\u201d")[0][1:])
        of_template = name.startswith("template")
        own = float((truth[number] if of_template else truth[:, number]).mean())
        if old:
            at = [i for i, u in enumerate(units) if (u.first if of_template else u.second)[1:] == str(number)]
            estimate = rate([values[i] for i in at], [(units[i].first, units[i].second) for i in at])
        covered += covers(estimate, own)
    return covered / repeats


def largest(shares: Sequence[float], repeats: int) -> tuple[float, float]:
    """Of the bound for the largest of several families' rates, 24 sentences each: how often it covers, and its mean."""
    rng, units, bounds = np.random.default_rng(9), Design(24, 1, 1).units(), []
    for _ in range(repeats):
        shown = rng.random((len(shares), len(units))) < np.array(shares)[:, None]
        bounds.append(worst_upper([rate(row.astype(float).tolist(), units) for row in shown]))
    return float(np.mean([bound >= max(shares) for bound in bounds])), float(np.mean(bounds))


def losses(each: list[float], repeats: int, *, images: int = 12) -> dict[str, float]:
    """Of the three labels that lost most, from a base at 0.95: what is printed, and what is concluded from it."""
    rng, truth = np.random.default_rng(6), float(np.mean(sorted(x - 0.95 for x in each)[:3]))
    prompts = [f"{label} {i}" for label in range(len(each)) for i in range(images)]
    owner = [str(label) for label in range(len(each)) for _ in range(images)]
    rows = []
    for _ in range(repeats):
        first = (rng.random((len(each), images)) < 0.95).astype(float)
        second = (rng.random((len(each), images)) < np.array(each)[:, None]).astype(float)
        e, _, p = lost_most(first.ravel().tolist(), second.ravel().tolist(), prompts, owner, count=3)
        plain = float(np.sort((second - first).mean(1))[:3].mean())
        rows.append((plain, e.value, covers(e, truth), (p or 0) <= 0.05, (e.low or 0) >= -0.15, (e.high or 0) < -0.15))
    names = ("plain", "value", "coverage", "significant", "non-inferior", "degraded")
    return {"truth": truth, **dict(zip(names, map(float, np.mean(np.array(rows, float), axis=0)), strict=True))}


def attacks(sentences: int, tries: int, hit: float, chance: float, repeats: int, *, margin: float = 0.2) -> Attacked:
    """How often an attack passes the gate on its power, and how often its excess is shown to be within a margin.

    Args:
        hit: share of the attack's tries that show the target, on sentences for which the base alone never draws it.
        chance: the same of random tries, on average; it differs between sentences.
    """
    rng, found = np.random.default_rng(8), []
    for _ in range(repeats):
        shares = {ATTACK: np.full(sentences, hit), CONTROL: rng.beta(4 * chance, 4 * (1 - chance), sentences)}
        rows = [Observation("base", BEFORE, f"s{i}", 0, 0.0) for i in range(sentences)]
        for family, share in shares.items():
            shown = rng.random((sentences, tries)) < share[:, None]
            rows += [
                Observation("base", family, f"s{i}", k, float(shown[i, k]), None, {"try": k})
                for i, k in np.ndindex(sentences, tries)
            ]
        found.append((breaks(rows), (excess(rows).high or 0.0) <= margin))
    return Attacked(*map(float, np.mean(found, axis=0)))


# --- the tables -------------------------------------------------------------------------------------------------------


def table(head: list[str], rows: list[list[object]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(f'{cell:.3f}' if isinstance(cell, float) else str(cell) for cell in row)} |"
    yield ""


def rate_table(repeats: int) -> Iterator[str]:
    rows = [
        [
            design,
            effects,
            share,
            *beside(rates(share, design, effects, repeats, old=True), rates(share, design, effects, repeats)),
        ]
        for design in (Design(6, 3, 2), Design(24, 3, 1))
        for effects in (Effects(0, 0), Effects(1.5, 0.5), Effects(3, 0), Effects(3, 1), Effects(1, 2))
        for share in (0.05, 0.15, 0.4)
    ]
    head = [
        "templates x phrases x pictures",
        "spread of templates / phrases",
        "true rate",
        "covered, by prompt",
        "covered",
    ]
    head += ["upper limit too low, by prompt", "upper limit too low", "mean upper limit, by prompt", "mean upper limit"]
    return table(head, rows)


def change_table(repeats: int) -> Iterator[str]:
    rows = []
    for design, effects, kind in (
        (Design(24, 3, 1), Effects(3, 1), Asked), (Design(6, 3, 2), Effects(3, 1), Asked),
        (Design(24, 5, 1), Effects(2, 0), Kept), (Design(6, 9, 2), Effects(2, 0), Kept),
    ):  # fmt: skip
        for first, second in ((0.95, 0.9), (0.9, 0.4)):
            before = changes(first, second, design, effects, repeats, kind=kind, old=True)
            now = changes(first, second, design, effects, repeats, kind=kind)
            what = "target" if kind is Asked else "kept"
            rows.append([what, design, effects, f"{first:g} to {second:g}", *beside(before[:2], now[:2])])
    head = ["group", "templates x phrases x pictures", "spread", "true rates", "covered, by prompt", "covered"]
    return table([*head, "lower limit above the truth, by prompt", "lower limit above the truth"], rows)


def training_table(repeats: int) -> Iterator[str]:
    rows = [
        [spread, share, trainings(share, spread, repeats, old=True), trainings(share, spread, repeats)]
        for spread in (0.0, 0.5, 1.0)
        for share in (0.1, 0.5)
    ]
    return table(["spread of runs", "true rate", "covered, one run", "covered, three runs"], rows)


def residual_table(repeats: int) -> Iterator[str]:
    rows = [[s, *residuals(s, repeats, old=True), *residuals(s, repeats)] for s in (0.0, 0.5, 1.0)]
    head = ["spread of runs", "residual covered, one run", "false \u201crecovered\u201d, one run"]
    return table([*head, "covered, three runs", "false \u201crecovered\u201d, three runs"], rows)


def ratio_table(repeats: int) -> Iterator[str]:
    rows = [
        [gap, truth, *ratios(gap, truth, repeats, old=True), *ratios(gap, truth, repeats)]
        for gap in (0.0, 0.1, 0.3)
        for truth in ((0.0,) if gap == 0 else (0.0, 1.0, 2.0))
    ]
    head = ["b - g", "true residual", "covered, all draws", "finite, all draws", "covered", "finite"]
    return table(head, rows)


def control_table(repeats: int) -> Iterator[str]:
    rows: list[list[object]] = []
    for controls, spread, beyond in product((3, 4), (0.0, 0.5, 1.0), (0.0, 0.2, 0.5)):
        before, now = (above_controls(beyond, spread, repeats, controls=controls, old=old) for old in (True, False))
        rows.append([controls, spread, beyond, *beside(before, now)])
    head = ["controls", "spread of models", "true distance", "above 0, controls as they are", "above 0"]
    return table([*head, "less than 20 points, controls as they are", "less than 20 points"], rows)


def stratum_table(repeats: int) -> Iterator[str]:
    rows = [
        [design, effects, share, *(strata(share, design, effects, repeats, old=old) for old in (True, False))]
        for design in (Design(24, 3, 1), Design(6, 3, 2))
        for effects in (Effects(0, 0), Effects(3, 0))
        for share in (0.05, 0.15)
    ]
    head = ["templates x phrases x pictures", "spread", "true mean rate"]
    return table([*head, "worst covered, choice ignored", "covered"], rows)


def advantage_table(repeats: int) -> Iterator[str]:
    rows: list[list[object]] = []
    for spread, between in ((0.0, 0.0), (0.5, 0.0), (1.0, 0.0), (0.5, 0.5), (0.5, 1.0)):
        before, now = (advantages(spread, repeats, between=between, old=old) for old in (True, False))
        rows.append([spread, between, before.covered, before.faster, *now])
    head = ["spread of runs, octaves", "of models", "covered, one run", "false advantage, one run"]
    return table([*head, "covered", "false advantage", "false area between the curves"], rows)


def slower_table(repeats: int) -> Iterator[str]:
    rows: list[list[object]] = [
        [octave, spread, runs, *slower(octave, spread, repeats, runs=runs)]
        for octave in (0.0, 0.5, 1.0)
        for spread in (0.3, 0.6)
        for runs in (3, 10)
    ]
    head = ["true slowing, octaves", "spread of runs", "runs", "covered", "shown to be under an octave", "mean width"]
    return table(head, rows)


def loss_table(repeats: int) -> Iterator[str]:
    cases = {
        "equal models": [0.95] * 9,
        "three labels lose 15 points": [0.95] * 6 + [0.8] * 3,
        "one label loses 45": [0.95] * 8 + [0.5],
        "one label is gone": [0.95] * 8 + [0.0],
    }
    keys = ("truth", "plain", "value", "coverage", "significant", "non-inferior", "degraded")
    found = {name: losses(each, repeats) for name, each in cases.items()}
    head = [
        "nine labels, 12 pictures each",
        "true loss of the three",
        "plain mean of the lowest",
        "beyond chance",
        "covered",
    ]
    head += ["p <= 0.05", "within 15 points", "beyond 15 points"]
    return table(head, [[name, *(got[key] for key in keys)] for name, got in found.items()])


def largest_table(repeats: int) -> Iterator[str]:
    cases = {
        "20 families at 0": [0.0] * 20,
        "20 families at 0.15": [0.15] * 20,
        "one of 20 at 0.2, the others at 0": [0.2] + [0.0] * 19,
        "one of 20 at 0.4, the others at 0.05": [0.4] + [0.05] * 19,
    }
    rows: list[list[object]] = [[name, *largest(shares, repeats)] for name, shares in cases.items()]
    return table(["24 sentences a family", "largest covered by its bound", "mean bound"], rows)


def attack_table(repeats: int) -> Iterator[str]:
    rows: list[list[object]] = []
    for design in ((6, 10), (12, 5), (18, 5), (24, 5)):
        strong = [attacks(*design, 0.7, chance, repeats).powerful for chance in (0.05, 0.1)]
        weak, none = attacks(*design, 0.35, 0.05, repeats).powerful, attacks(*design, 0.05, 0.05, repeats).powerful
        rows.append(["{} x {}".format(*design), *strong, weak, none, attacks(*design, 0.01, 0.01, repeats).within])
    head = ["sentences x tries", "70 % against 5 %: has power", "70 % against 10 %", "35 % against 5 %"]
    return table([*head, "no better than chance: has power", "1 % against 1 %: within 20 points"], rows)


def beside(before: Sequence[float], now: Sequence[float]) -> list[float]:
    """Each number as it was, and as it is."""
    return [number for pair in zip(before, now, strict=True) for number in pair]


TABLES = (
    rate_table, change_table, training_table, residual_table, ratio_table, control_table, stratum_table,
    advantage_table, slower_table, loss_table, largest_table, attack_table,
)  # fmt: skip


def tables(repeats: int) -> Iterator[str]:
    """Every table of the page."""
    for one in TABLES:
        yield from one(repeats)


if __name__ == "__main__":
    for line in tables(int(sys.argv[1]) if len(sys.argv) > 1 else 300):
        print(line, flush=True)
