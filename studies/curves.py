"""Do the intervals about learning curves hold what they promise? Simulations for relearning and plasticity.

``studies.coverage`` prints their tables; tests/test_coverage.py runs them with few repeats.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import expit

from erasure.eval.core.models import Role
from erasure.eval.probes.base import Observation
from erasure.eval.probes.removal.plasticity import Plasticity
from erasure.eval.probes.removal.relearning import SHORT
from erasure.eval.probes.removal.relearning import advantages as octaves
from erasure.eval.stats import Estimate

KNOWN = 0.95  # share of the base's pictures with the target


class Relearnt(NamedTuple):
    """Shares of repeats.

    Attributes:
        covered: an advantage of one octave is in the interval.
        faster: a model that never saw the target is said to learn it faster than the others.
        above: the same by the area between the curves.
    """

    covered: float
    faster: float
    above: float


class Slowed(NamedTuple):
    """Shares of repeats in which the truth is covered and in which less than an octave is shown, and the mean width."""

    covered: float
    within: float
    width: float


def curve(
    rng: np.random.Generator,
    octave: float,
    steps: Sequence[int],
    *,
    spread: float,
    runs: int,
    prompts: Sequence[float] = (0.0,) * 12,
    images: int = 1,
    most: float = KNOWN,
) -> list[Observation]:
    """Rows of a model with the rate ``most expit(4 (log2 step - T))``, T = octave + what a run and a prompt add."""
    found = []
    for run in range(runs):
        own = octave + rng.normal(0, spread)
        for step in steps:
            for number, later in enumerate(prompts):
                shown = most * expit(4 * (np.log2(max(step, 0.5)) - own - later))
                for seed in range(run * images, (run + 1) * images):
                    facts = {"step": step, "run": run, "prompt": f"p{number}"}
                    hit = float(rng.random() < shown)
                    found.append(Observation("model", f"step {step}", f"p{number}", seed, hit, None, facts))
    return found


def covers(estimate: Estimate, truth: float) -> bool:
    """Whether an interval, which may be open, contains a number."""
    low, high = (end if limit is None else limit for end, limit in ((-np.inf, estimate.low), (np.inf, estimate.high)))
    return bool(low - 1e-9 <= truth <= high + 1e-9)


def advantages(spread: float, repeats: int, *, between: float = 0.0, old: bool = False) -> Relearnt:
    """Of relearning against three models, where trainings differ by ``spread`` octaves and models by ``between``.

    ``old`` is one training with twice as many pictures.
    """
    rng, first = np.random.default_rng(7), float(np.log2(10))
    runs, images = (1, 2) if old else (3, 1)
    roles: dict[str, Role] = {"base": "base", "erased": "erased", "gold 0": "gold", "gold 1": "gold", "gold 2": "gold"}

    def found(octave: float) -> dict[str, Estimate]:
        rows = {"base": curve(rng, -10, (0,), spread=0, runs=runs, images=images)}
        for model in [*roles][1:]:
            at = octave if model == "erased" else rng.normal(first, between)
            rows[model] = curve(rng, at, SHORT, spread=spread, runs=runs, images=images)
        return {e.measure: e.estimate for e in octaves("relearning", rows, roles)}

    one = [found(first - 1)["advantage"] for _ in range(repeats)]
    none = [found(rng.normal(first, between)) for _ in range(repeats)]
    return Relearnt(
        float(np.mean([covers(e, 1) for e in one])),
        float(np.mean([(e["advantage"].low or 0) > 0 for e in none])),
        float(np.mean([(e["above_control"].low or 0) > 0 for e in none])),
    )


def slower(octave: float, spread: float, repeats: int, *, runs: int = 10) -> Slowed:
    """Of a model that learns something new ``octave`` later than the base, which finds some of eight prompts easier."""
    rng, probe, own = np.random.default_rng(10), Plasticity(), np.linspace(-1.5, 1.5, 8)
    roles: dict[str, Role] = {"base": "base", "erased": "erased"}
    start, found = float(np.log2(28)), []
    for _ in range(repeats):
        rows = {
            "base": curve(rng, start, probe.steps, spread=spread, runs=runs, prompts=own.tolist(), most=1),
            "erased": curve(rng, start + octave, probe.steps, spread=spread, runs=runs, prompts=[0.0] * 8, most=1),
        }
        found += [e.estimate for e in probe.weigh(rows, roles) if e.measure == "slowed"]
    widths = [e.high - e.low for e in found if e.high is not None and e.low is not None]
    shown = [e.high is not None and e.high <= 1 for e in found]
    return Slowed(float(np.mean([covers(e, octave) for e in found])), float(np.mean(shown)), float(np.mean(widths)))
