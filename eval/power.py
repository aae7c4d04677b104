"""How many pictures a question needs, before any is drawn.

Numbers are of independent pairs or pictures. With m pictures a prompt that resemble each other, multiply by the design
effect 1 + (m - 1) rho (:func:`erasure.eval.stats.effective_n`): more prompts are better than more seeds.

References: Wilson 1927; Connor 1987, "Sample size for testing differences in proportions for the paired-sample design",
Biometrics 43, 207-211; Schuirmann 1987 (two one-sided tests); Hanley and McNeil 1982 (the AUC's variance).
"""

from __future__ import annotations

import math

from scipy.stats import norm

from erasure.eval.stats import LEVEL, wilson


def rate_half_width(n: float, rate: float = 0.5, *, level: float = LEVEL) -> float:
    """Half the width of Wilson's interval of a rate seen in ``n`` pictures; 0.5 is the worst case.

    >>> round(rate_half_width(50), 3)
    0.134
    """
    low, high = wilson(rate * n, n, level=level)
    return (high - low) / 2


def pictures_for(half_width: float, rate: float = 0.5, *, level: float = LEVEL) -> int:
    """The fewest pictures whose Wilson interval is that narrow.

    Args:
        half_width: 0.05 for "plus or minus five points".
        rate: what is expected; 0.5 needs most.
    """
    if not 0 < half_width < 0.5:
        raise ValueError(f"a half width lies between 0 and 0.5; got {half_width}; 0.05 means five points")
    few, enough = 0, 1
    while rate_half_width(enough, rate, level=level) > half_width:
        few, enough = enough, 2 * enough
    while enough - few > 1:
        middle = (few + enough) // 2
        wide = rate_half_width(middle, rate, level=level) > half_width
        few, enough = (middle, enough) if wide else (few, middle)
    return enough


def pairs_for_change(change: float, discordance: float, *, power: float = 0.8, alpha: float = 0.05) -> int:
    """Pairs in which a change of a rate is found: (z_a sqrt(psi) + z_b sqrt(psi - d^2))^2 / d^2, two-sided.

    Args:
        change: d, the smallest change worth finding; 0.05 is five points.
        discordance: psi, the share of pairs expected to change either way; at least ``change``.
        power: how often it is to be found when it is there.
    """
    _check_pairs(change, discordance)
    z_a, z_b = norm.ppf(1 - alpha / 2), norm.ppf(power)
    return math.ceil((z_a * math.sqrt(discordance) + z_b * math.sqrt(discordance - change**2)) ** 2 / change**2)


def pairs_for_equivalence(margin: float, discordance: float, *, power: float = 0.8, alpha: float = 0.05) -> int:
    """Pairs in which no true change is found to be none within a margin: (z_a + z_(b/2))^2 psi / margin^2.

    Args:
        margin: changes up to this count as none.
        discordance: psi, the share of pairs expected to change, equally often either way.
        alpha: of each of the two one-sided tests.
    """
    _check_pairs(margin, discordance)
    return math.ceil((norm.ppf(1 - alpha) + norm.ppf((1 + power) / 2)) ** 2 * discordance / margin**2)


def auc_half_width(per_class: int, auc: float = 0.5, *, level: float = LEVEL) -> float:
    """Half the width of the interval of an AUC from so many members and as many others (Hanley and McNeil)."""
    if per_class < 1 or not 0 <= auc <= 1:
        raise ValueError(f"needs samples of each class and an AUC within 0..1; got {per_class} and {auc}; check both")
    above_two, above_one = auc / (2 - auc), 2 * auc**2 / (1 + auc)  # P(one member above two others), and the reverse
    spread = auc * (1 - auc) + (per_class - 1) * (above_two + above_one - 2 * auc**2)
    return float(norm.ppf(0.5 + level / 2)) * math.sqrt(spread) / per_class


def any_hit(rate: float, tries: int) -> float:
    """How often the best of ``tries`` is a hit when each is one at ``rate``: 1 - (1 - rate)^tries.

    What an attack with so many tries reaches by drawing alone, and why it needs a control of the same budget.
    """
    if not 0 <= rate <= 1 or tries < 0:
        raise ValueError(f"needs a rate within 0..1 and a number of tries; got {rate} and {tries}; check both")
    return 1 - (1 - rate) ** tries


def _check_pairs(change: float, discordance: float) -> None:
    if not 0 < abs(change) <= discordance <= 1:
        raise ValueError(
            f"needs 0 < change <= discordance <= 1; got {change} and {discordance}; "
            "at least as many pairs change as the rate does"
        )
