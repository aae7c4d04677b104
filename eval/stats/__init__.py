"""Estimates with intervals.

``estimate`` has rates and means, ``paired`` changes on the same noise, ``tests`` p-values and chosen extremes,
``several`` bounds for several rates, ``agreement`` kappa and the ROC curve, ``times`` how soon a
level is reached, ``resample`` the bootstrap.
"""

from erasure.eval.stats.agreement import auc, auc_gap, kappa
from erasure.eval.stats.estimate import Estimate, mean, rate, wilson
from erasure.eval.stats.paired import difference, paired_changes, paired_score, ratio, residual
from erasure.eval.stats.resample import (
    ASSUMED_CORRELATION,
    LEVEL,
    ONE_RUN,
    RESAMPLES,
    Asked,
    Crossed,
    Kept,
    Listed,
    Trained,
    effective_n,
    effective_size,
    ratio_limits,
    spread_half_width,
    t_half_width,
    tails,
    weights,
    wider,
)
from erasure.eval.stats.several import above, worst_upper
from erasure.eval.stats.tests import FLIPS, holm, lost_most, sign_flip, worst_stratum
from erasure.eval.stats.times import Reached, reached, sooner, stacked

RESAMPLED = "cluster bootstrap by prompt"

__all__ = [
    "ASSUMED_CORRELATION", "FLIPS", "LEVEL", "ONE_RUN", "RESAMPLED", "RESAMPLES", "Asked", "Crossed", "Estimate",
    "Kept", "Listed", "Reached", "Trained", "above", "auc", "auc_gap", "difference", "effective_n",
    "effective_size", "holm", "kappa", "lost_most", "mean", "paired_changes", "paired_score", "rate", "ratio",
    "ratio_limits", "reached", "residual", "sign_flip", "sooner", "spread_half_width", "stacked", "t_half_width",
    "tails", "weights", "wider", "wilson", "worst_stratum", "worst_upper",
]  # fmt: skip
