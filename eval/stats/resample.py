"""The bootstrap over clusters and crossed clusters.

Pictures are similar for several reasons. Those of one prompt share everything but the noise; prompts share a template
("a noto drawing of {}") or a phrase ("caped hero"); pictures after one training share that training. Six prompts of one
bad template are not six independent observations. So both factors are resampled separately, and a picture counts by the
product of the two weights.

References: Owen 2007, "The pigeonhole bootstrap", Annals of Applied Statistics 1, 386-411; Owen and Eckles 2012,
"Bootstrapping data arrays of arbitrary order", Annals of Applied Statistics 6, 895-927: the product of the weights of
the factors never understates the variance where both have many levels. Kish 1965 (design effect).
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import ClassVar

import numpy as np
from scipy.special import stdtrit

RESAMPLES = 2000
LEVEL = 0.95
ASSUMED_CORRELATION = 0.3  # of pictures of one prompt, in the score intervals
FEW = 5  # factors with at most this many levels get a t interval, too: a bootstrap of three runs is too narrow


@dataclasses.dataclass(frozen=True)
class Crossed:
    """A cluster of two factors, in place of a prompt wherever clusters are given.

    Class attributes:
        first_correlation, second_correlation: assumed in score intervals for pictures that share one factor only.
        both_correlation: for those that share both.
        by: the factors, in words.
        drawn: how many of them are resampled; the second may be a fixed list.
    """

    first: Hashable
    second: Hashable

    first_correlation: ClassVar[float] = 0.0
    second_correlation: ClassVar[float] = 0.0
    both_correlation: ClassVar[float] = ASSUMED_CORRELATION
    by: ClassVar[tuple[str, str]] = ("first", "second")
    drawn: ClassVar[int] = 2


@dataclasses.dataclass(frozen=True)
class Asked(Crossed):
    """A prompt: its template, with ``{}`` where the phrase goes, and the phrase."""

    first_correlation: ClassVar[float] = 0.1
    second_correlation: ClassVar[float] = 0.05
    by: ClassVar[tuple[str, str]] = ("template", "phrase")


@dataclasses.dataclass(frozen=True)
class Kept(Crossed):
    """A prompt for something kept: its template, and the label. Labels are fixed, so only templates are resampled."""

    first_correlation: ClassVar[float] = 0.1
    by: ClassVar[tuple[str, str]] = ("template", "label")
    drawn: ClassVar[int] = 1


@dataclasses.dataclass(frozen=True)
class Trained(Crossed):
    """A prompt after one of several trainings: the run, and the prompt. No correlation within a run is assumed."""

    second_correlation: ClassVar[float] = ASSUMED_CORRELATION
    by: ClassVar[tuple[str, str]] = ("run", "prompt")


@dataclasses.dataclass(frozen=True)
class Listed(Trained):
    """The same where the prompts are a fixed list and no sample: only runs are resampled."""

    drawn: ClassVar[int] = 1


def crossed(units: Sequence[Hashable]) -> list[Crossed]:
    """The units, if all of them are crossed in the same way; else none."""
    found = [unit for unit in units if isinstance(unit, Crossed) and type(unit) is type(units[0])]
    return found if len(found) == len(units) else []


def factors(units: Sequence[Hashable]) -> dict[str, list[Hashable]]:
    """The factors to resample: name to the level of every unit; those with one level are left out.

    Clusters that are not crossed are one factor, "prompt". If no factor has two levels, the second stays.
    """
    if not (pairs := crossed(units)):
        return {"prompt": list(units)}
    kind = pairs[0]
    both = dict(zip(kind.by, ([u.first for u in pairs], [u.second for u in pairs]), strict=True))
    varied = {name: own for name, own in [*both.items()][: kind.drawn] if len(set(own)) > 1}
    return varied or {kind.by[1]: both[kind.by[1]]}


def weights(units: Sequence[Hashable], seed: int) -> np.ndarray:
    """The weight of each distinct unit in every resample: ``(resamples, units)``, not to be written to.

    Levels are drawn with replacement; crossed units have the product of the weights of their two levels.
    """
    return _weights(tuple(units), seed)


@functools.lru_cache(maxsize=32)  # one model after another is asked the same prompts
def _weights(units: tuple[Hashable, ...], seed: int) -> np.ndarray:
    product = np.ones((RESAMPLES, len(units)))
    for number, levels in enumerate(factors(units).values()):
        index = {level: i for i, level in enumerate(dict.fromkeys(levels))}
        product *= times_drawn(len(index), seed, number)[:, [index[level] for level in levels]]
    product.setflags(write=False)
    return product


@functools.lru_cache(maxsize=64)  # a report asks for the same few draws thousands of times
def times_drawn(levels: int, seed: int, number: int) -> np.ndarray:
    """How often each level of a factor is drawn in every resample: ``(resamples, levels)``, not to be written to.

    Args:
        number: of the factor, 0 or 1, so that two factors of one size are drawn apart.
    """
    rng = np.random.default_rng(seed if number == 0 else [seed, number])
    draws = rng.multinomial(levels, np.full(levels, 1 / levels), size=RESAMPLES)
    draws.setflags(write=False)
    return draws


def resampled_means(values: np.ndarray, units: Sequence[Hashable], seed: int) -> np.ndarray:
    """The mean in every bootstrap resample; NaN where a resample holds no picture (possible for crossed units only)."""
    index = {unit: i for i, unit in enumerate(dict.fromkeys(units))}
    at = [index[unit] for unit in units]
    sums, sizes = np.bincount(at, values, len(index)), np.bincount(at, minlength=len(index))
    draws = weights(list(index), seed)
    with np.errstate(invalid="ignore"):
        return draws @ sums / (draws @ sizes)


def bootstrap(values: np.ndarray, units: Sequence[Hashable], seed: int, level: float = LEVEL) -> tuple[float, float]:
    """Percentile limits of the mean, no narrower than the t interval of a factor with few levels."""
    means = resampled_means(values, units, seed)
    means = np.sort(means[~np.isnan(means)])
    # np.nanquantile, in a third of its time: a report has thousands of these
    low, high = np.interp(np.array(tails(level)) * (len(means) - 1), np.arange(len(means)), means)
    limits = float(low), float(high)
    for few in few_levels(values, units, level):
        limits = wider(limits, few)
    return limits


def ratio_limits(tops: np.ndarray, bottoms: np.ndarray) -> tuple[float, float] | None:
    """95 % limits of a ratio from draws of its two parts; None where they are infinite.

    The interval is Fieller's: every r for which ``top - r bottom`` may be 0. A draw with a bottom of 0 or less allows
    every r that is large enough and every r that is small enough, so it counts as infinite for the upper limit and as
    minus infinite for the lower one. With 2.5 % of such draws no number is excluded.

    Reference: Fieller 1954, "Some problems in interval estimation", Journal of the Royal Statistical Society B 16.
    """
    positive, (tail, top) = bottoms > 0, tails()
    ratios = np.divide(tops, bottoms, out=np.zeros(len(tops)), where=positive)
    with np.errstate(invalid="ignore"):
        low = float(np.quantile(np.where(positive, ratios, -np.inf), tail))
        high = float(np.quantile(np.where(positive, ratios, np.inf), top))
    return (low, high) if np.isfinite([low, high]).all() else None


def few_levels(values: np.ndarray, units: Sequence[Hashable], level: float = LEVEL) -> list[tuple[float, float]]:
    """mean ± t(K - 1) s / sqrt(K) over the means of the K levels, for each factor of crossed units with few levels."""
    found = []
    for levels in factors(units).values() if crossed(units) else ():
        if not 2 <= len(set(levels)) <= FEW:
            continue
        means = [float(values[[own == one for own in levels]].mean()) for one in dict.fromkeys(levels)]
        half = t_half_width(means, level=level)
        found.append((float(values.mean()) - half, float(values.mean()) + half))
    return found


def t_half_width(means: Sequence[float] | np.ndarray, *, level: float = LEVEL) -> float:
    """t(K - 1) s / sqrt(K), of K means."""
    t = float(stdtrit(len(means) - 1, 0.5 + level / 2))
    return t * float(np.std(means, ddof=1)) / len(means) ** 0.5


def jackknife_half_width(without: Sequence[float] | np.ndarray, *, level: float = LEVEL) -> float:
    """t(K - 1) times the standard error from K values of a statistic, each without one of K runs.

    For a statistic of all runs together that is no mean of theirs. Its variance is (K - 1)/K times the sum of squares
    about the mean (Efron and Stein 1981, "The jackknife estimate of variance", Annals of Statistics 9, eq. 1.2).
    """
    return (len(without) - 1) * t_half_width(without, level=level)


def spread_half_width(means: Sequence[float] | np.ndarray, *, level: float = LEVEL) -> float:
    """t(K - 1) s sqrt(1 + 1/K): how far one more such model may lie from the mean of K (a prediction interval)."""
    return t_half_width(means, level=level) * (len(means) + 1) ** 0.5


def resampled_by(units: Sequence[Hashable]) -> str:
    """How units are resampled, in words."""
    names = list(factors(units))
    text = f"cluster bootstrap by {' and '.join(names)}"
    return text + ONE_RUN if units and isinstance(units[0], Trained) and "run" not in names else text


ONE_RUN = ", of one run: what another training would give is not in it"


def effective_n(n: int, clusters: int, *, correlation: float = ASSUMED_CORRELATION) -> float:
    """How many independent samples ``n`` pictures of ``clusters`` prompts are worth (Kish's design effect)."""
    return n / (1 + (n / clusters - 1) * correlation)


def effective_size(units: Sequence[Hashable], *, copies: int = 1) -> float:
    """The same from the cluster of each picture, crossed or not.

    n / (1 + r_12 s_12 + r_1 s_1 + r_2 s_2), with s the mean number of other pictures that share both factors, only the
    first, only the second, and r the assumed correlations.
    """
    n = -(-len(units) // copies)
    if not (pairs := crossed(units)):
        return effective_n(n, len(set(units)))
    kind, names = pairs[0], factors(units)

    def sharing(keys: Sequence[Hashable]) -> float:
        """Mean number of pictures with the same key, oneself included."""
        return sum(size * size for size in Counter(keys).values()) / len(keys) / copies

    both = sharing(pairs)
    alike = {
        kind.by[0]: kind.first_correlation * (sharing([unit.first for unit in pairs]) - both),
        kind.by[1]: kind.second_correlation * (sharing([unit.second for unit in pairs]) - both),
    }
    # A factor with one level is not resampled: the result holds for that level.
    return n / (1 + kind.both_correlation * max(0.0, both - 1) + sum(alike[name] for name in names))


def wider(first: tuple[float, float], second: tuple[float, float]) -> tuple[float, float]:
    """The outermost limits of two intervals."""
    return min(first[0], second[0]), max(first[1], second[1])


def tails(level: float = LEVEL) -> tuple[float, float]:
    return (1 - level) / 2, (1 + level) / 2
