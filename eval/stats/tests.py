"""Tests, and estimates of extremes that were chosen: the worst stratum, the labels that lost most.

References: Holm 1979; Romano and Wolf 2005, Econometrica 73, 1237-1282 (the null of a minimum by permutation).
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence

import numpy as np

from erasure.eval.stats.estimate import Estimate, exact, present
from erasure.eval.stats.paired import difference, paired_changes
from erasure.eval.stats.resample import LEVEL, RESAMPLES, Asked, crossed, effective_n, factors, tails

EXACT = 13  # up to this many prompts with a net change, all sign patterns are counted; above, FLIPS random ones
FLIPS = 9999
FEWEST = 3  # pictures of a template or phrase, for it to be a stratum


def sign_flip(
    before: Sequence[bool | None], after: Sequence[bool | None], clusters: Sequence[Hashable], *, seed: int = 0
) -> float | None:
    """Two-sided p-value of a paired change: how often random signs of the prompts' changes give one as large.

    Without an effect, each prompt's net change could have had the other sign. With one picture per prompt this is
    McNemar's exact test. None without pairs.
    """
    changes, names, _ = present(paired_changes(before, after), clusters)
    if not len(changes):
        return None
    index = {name: i for i, name in enumerate(dict.fromkeys(names))}
    sums = np.bincount([index[name] for name in names], changes)
    sums = sums[sums != 0]  # a prompt without a net change adds nothing under either sign
    if len(sums) <= EXACT:
        signs = np.array(list(itertools.product((-1, 1), repeat=len(sums))))
        return float((np.abs(signs @ sums) >= abs(sums.sum())).mean())
    signs = np.random.default_rng(seed).choice((-1, 1), size=(FLIPS, len(sums)))
    return float((1 + (np.abs(signs @ sums) >= abs(sums.sum())).sum()) / (1 + FLIPS))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's adjustment of several p-values; missing ones stay missing and are not counted."""
    order = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, i) in enumerate(order):
        largest = max(largest, min(1.0, p * (len(order) - rank)))
        adjusted[i] = largest
    return adjusted


def worst_stratum(hits: Sequence[float | None], clusters: Sequence[Hashable]) -> tuple[Estimate, str] | None:
    """The template or the phrase with the highest rate, and its name; None where there are not two of either.

    Args:
        hits: one entry per picture.
        clusters: crossed ones; others have no strata.

    The highest of k rates may be high by chance. Its interval is the exact one (Clopper and Pearson 1934) at
    1 - 0.05 / k (Bonferroni) on the effective number, so it holds for any choice. Only strata of three pictures or more
    compete; of equal rates the one with more pictures is taken.
    """
    values, names, _ = present(hits, clusters)
    if not crossed(names) or not isinstance(names[0], Asked):
        return None
    strata = [
        (factor, level, [i for i, own in enumerate(levels) if own == level])
        for factor, levels in factors(names).items()
        if len(set(levels)) > 1
        for level in dict.fromkeys(levels)
    ]
    strata = [stratum for stratum in strata if len(stratum[2]) >= FEWEST]
    if len(strata) < 2:
        return None
    factor, level, at = max(strata, key=lambda stratum: (float(values[stratum[2]].mean()), len(stratum[2])))
    n, value = len(at), float(values[at].mean())
    size = effective_n(n, prompts := len({names[i] for i in at}))
    low, high = exact(value * size, size, level=1 - (1 - LEVEL) / len(strata))
    method = f"Clopper-Pearson, effective n {size:.0f}, for the highest of {len(strata)}"
    estimate = Estimate(value, low, high, method, n, prompts, size=size)
    return estimate, f"{factor} \u201c{level}\u201d, the highest of {len(strata)}"


def lost_most(
    before: Sequence[float | None],
    after: Sequence[float | None],
    clusters: Sequence[Hashable],
    groups: Sequence[str],
    *,
    count: int = 1,
    seed: int = 0,
) -> tuple[Estimate, list[str], float | None]:
    """How much the ``count`` groups that lost most lost beyond what they would by chance, who they are, and a p-value.

    Args:
        before, after: one value per picture, paired by prompt and noise.
        clusters: the prompt of each picture.
        groups: its group, "Batman".
        count: how many groups are averaged.

    The lowest of many changes is below zero for two equal models, too: by 9 points for the lowest three of nine labels
    with twelve pictures each. The distribution by chance comes from random signs of the prompts, with a new choice of
    the lowest each time. For the p-value these are signs of their net changes, as if the models were equal; for the
    value and its interval, signs of the differences between a prompt's change and its group's, so that a true loss does
    not count as noise. The value is the mean of the lowest changes minus the mean by chance, the interval minus its
    97.5 and 2.5 % quantiles, and never narrower than the paired interval of the chosen groups.
    """
    pairs = zip(paired_changes(before, after), groups, clusters, strict=True)
    found = [(change, (group, cluster)) for change, group, cluster in pairs if change is not None]
    excluded = len(before) - len(found)
    if not found:
        return Estimate.missing("no label has pictures of both models with a verdict", excluded=excluded), [], None
    index = {unit: i for i, unit in enumerate(dict.fromkeys(unit for _, unit in found))}
    labels = list(dict.fromkeys(group for group, _ in index))
    at, owner = [index[unit] for _, unit in found], np.array([labels.index(group) for group, _ in index])
    sums, sizes = np.bincount(at, [change for change, _ in found]), np.bincount(at)
    share = (owner[:, None] == np.arange(len(labels))) / np.bincount(owner, sizes)
    count, means, prompts = min(count, len(labels)), sums @ share, np.bincount(owner)
    lowest = float(np.sort(means)[:count].mean())
    signs = np.random.default_rng(seed).choice((-1.0, 1.0), size=(RESAMPLES - 1, len(sums)))

    def chance(changes: np.ndarray) -> np.ndarray:
        """The mean of the lowest groups under every set of signs."""
        return np.sort((signs * changes) @ share, axis=1)[:, :count].mean(axis=1)

    p_value = float((1 + (chance(sums) <= lowest + 1e-12).sum()) / RESAMPLES)
    spread = np.sqrt(prompts / np.maximum(prompts - 1, 1))  # of what is left after a group's own mean
    noise = chance((sums - sizes * means[owner]) * spread[owner])
    value, (tail, top) = lowest - float(noise.mean()), np.quantile(noise, tails())
    chosen = [labels[i] for i in np.argsort(means, kind="stable")[:count]]
    kept = [(change, unit) for change, unit in found if unit[0] in chosen]
    paired = difference([0.0] * len(kept), [change for change, _ in kept], [unit for _, unit in kept])
    middle, *ends = (x or 0.0 for x in (paired.value, paired.low, paired.high))  # there are pairs, so all are known
    low = min(lowest - float(top), value + ends[0] - middle)
    high = max(lowest - float(tail), value + ends[1] - middle)
    method = f"minus the lowest {count} of {len(labels)} by chance, wider of that and the paired interval"
    return Estimate(value, max(-1.0, low), high, method, paired.n, paired.clusters, excluded), chosen, p_value
