"""What is drawn together: clusters, crossed clusters, and the weights that stand for drawing them anew.

Pictures resemble each other for several reasons at once. Those of one prompt share everything but the noise; prompts
share a template ("a noto drawing of {}") or a phrase ("caped hero"); pictures after one training share that training.
An interval that draws prompts alone takes six prompts of one bad template for six independent facts. So both factors
are drawn, each on its own, and a picture counts as often as the product of the two says.

References: Owen 2007, "The pigeonhole bootstrap", Annals of Applied Statistics 1, 386-411; Owen and Eckles 2012,
"Bootstrapping data arrays of arbitrary order", Annals of Applied Statistics 6, 895-927: the product of the weights of
the factors never understates the variance where both have many levels. Kish 1965 (design effect).
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import ClassVar

import numpy as np
from scipy import stats as scipy_stats

RESAMPLES = 2000
LEVEL = 0.95
ASSUMED_CORRELATION = 0.3  # of pictures of one prompt, in the score intervals
FEW = 5  # factors with at most so many levels get a t interval too: a bootstrap of three runs is too narrow


@dataclasses.dataclass(frozen=True)
class Crossed:
    """A cluster with two reasons to resemble others: in place of a prompt wherever clusters are given.

    Class attributes:
        first_correlation, second_correlation: assumed in score intervals for pictures that share one factor only.
        both_correlation: for those that share both.
        by: the factors, in words.
        drawn: how many of them are a sample of others; the second may be a list that is meant as it stands.
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
    """A prompt for something kept: its template, and the label, which stands for no other label.

    What is said of "these nine neighbours" is about them, so templates are drawn and labels are not.
    """

    first_correlation: ClassVar[float] = 0.1
    by: ClassVar[tuple[str, str]] = ("template", "label")
    drawn: ClassVar[int] = 1


@dataclasses.dataclass(frozen=True)
class Trained(Crossed):
    """A prompt after one of several trainings: the run, and the prompt.

    No correlation of a run is assumed where the runs do not differ: three runs cannot exclude any, and what they do
    differ by is in the interval.
    """

    second_correlation: ClassVar[float] = ASSUMED_CORRELATION
    by: ClassVar[tuple[str, str]] = ("run", "prompt")


def crossed(units: Sequence[Hashable]) -> list[Crossed]:
    """The units, if all of them are crossed in the same way; else none."""
    found = [unit for unit in units if isinstance(unit, Crossed) and type(unit) is type(units[0])]
    return found if len(found) == len(units) else []


def factors(units: Sequence[Hashable]) -> dict[str, list[Hashable]]:
    """What is drawn: the name of each factor to its level of every unit; those with one level are left out.

    Clusters that are not crossed are one factor, "prompt". If no factor has two levels, the second stays.
    """
    if not (pairs := crossed(units)):
        return {"prompt": list(units)}
    kind = pairs[0]
    both = dict(zip(kind.by, ([u.first for u in pairs], [u.second for u in pairs]), strict=True))
    varied = {name: own for name, own in [*both.items()][: kind.drawn] if len(set(own)) > 1}
    return varied or {kind.by[1]: both[kind.by[1]]}


def weights(units: Sequence[Hashable], seed: int) -> np.ndarray:
    """How often each of some distinct units counts in every resample: ``(resamples, units)``.

    Units of one factor are drawn with replacement. Crossed ones count by the product of how often their two levels
    were drawn.
    """
    product = np.ones((RESAMPLES, len(units)))
    for number, levels in enumerate(factors(units).values()):
        index = {level: i for i, level in enumerate(dict.fromkeys(levels))}
        rng = np.random.default_rng(seed if number == 0 else [seed, number])
        draws = rng.multinomial(len(index), np.full(len(index), 1 / len(index)), size=RESAMPLES)
        product *= draws[:, [index[level] for level in levels]]
    return product


def resampled_means(values: np.ndarray, units: Sequence[Hashable], seed: int) -> np.ndarray:
    """The mean in every bootstrap resample; NaN where a resample holds no picture (possible for crossed units only)."""
    index = {unit: i for i, unit in enumerate(dict.fromkeys(units))}
    at = [index[unit] for unit in units]
    sums, sizes = np.bincount(at, values, len(index)), np.bincount(at, minlength=len(index))
    draws = weights(list(index), seed)
    with np.errstate(invalid="ignore"):
        return draws @ sums / (draws @ sizes)


def bootstrap(values: np.ndarray, units: Sequence[Hashable], seed: int, level: float = LEVEL) -> tuple[float, float]:
    """Percentile limits of the mean when whole levels are drawn, and of the t interval where a factor has few."""
    low, high = np.nanquantile(resampled_means(values, units, seed), tails(level))
    limits = float(low), float(high)
    for few in few_levels(values, units, level):
        limits = wider(limits, few)
    return limits


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
    t = float(scipy_stats.t.ppf(0.5 + level / 2, len(means) - 1))
    return t * float(np.std(means, ddof=1)) / len(means) ** 0.5


def resampled_by(units: Sequence[Hashable]) -> str:
    """How units are drawn, in words; what is not in it when there was one run only."""
    names = list(factors(units))
    text = f"cluster bootstrap by {' and '.join(names)}"
    return text + ONE_RUN if units and isinstance(units[0], Trained) and "run" not in names else text


ONE_RUN = ", of one run: what another training would give is not in it"


def effective_n(n: int, clusters: int, *, correlation: float = ASSUMED_CORRELATION) -> float:
    """How many independent samples ``n`` pictures of ``clusters`` prompts are worth (Kish's design effect)."""
    return n / (1 + (n / clusters - 1) * correlation)


def effective_size(units: Sequence[Hashable], *, copies: int = 1) -> float:
    """The same for pictures with their clusters: of crossed ones, those that share one factor count too.

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
    # A factor with one level is no sample of its kind: what is said holds for that level, and it costs nothing.
    return n / (1 + kind.both_correlation * max(0.0, both - 1) + sum(alike[name] for name in names))


def wider(first: tuple[float, float], second: tuple[float, float]) -> tuple[float, float]:
    """The outermost limits of two intervals."""
    return min(first[0], second[0]), max(first[1], second[1])


def tails(level: float = LEVEL) -> tuple[float, float]:
    return (1 - level) / 2, (1 + level) / 2
