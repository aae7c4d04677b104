"""R13: how far the pictures are from those of models that never saw the target."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy.spatial.distance import cdist, pdist

from erasure.eval.probes.base import Context, Estimate, Evidence, Gate, Model, Observation, Probe, Roles, Rows
from erasure.eval.probes.features import featured, placed
from erasure.eval.probes.removal.divergence import retrained
from erasure.eval.probes.weigh import base_of, families, of_role
from erasure.eval.stats import FLIPS, RESAMPLED, RESAMPLES, ratio_limits

CLOSE = "the base is no farther from retrained models than they are from each other"


@dataclasses.dataclass(frozen=True)
class OutputDistance(Probe):
    """Distance of a model's pictures from those of retrained models: 0 as another of them, 1 no closer than the base.

    d(a, b) is the unbiased squared maximum mean discrepancy of the judge's features, without pairs of the same noise
    (Gretton et al. 2012, equation 4):

        d(a, b) = mean_{i != j} k(a_i, a_j) + k(b_i, b_j) - k(a_i, b_j) - k(a_j, b_i),    k(x, y) = exp(-|x - y|^2 / h)

    with h the median of |x - y|^2 over the retrained models' pictures of the stratum. Averaged over retrained models g:

        G = (d(e, g) - d(g, g')) / (d(b, g) - d(g, g'))

    Above 1 is farther away than the base. The interval resamples prompts and takes the retrained models as given. The
    note has a permutation test of d(e, g) > 0, which swaps the two models' pictures prompt by prompt.

    Attributes:
        limit: prompts of each stratum. Below 15 intervals are very wide.
    """

    key, code, title = "output_distance", "R13", "distance of the pictures from those of retrained models"
    section, level, access = "removal", "outputs", "black_box"
    needs = ("gold",)
    presets = {
        "smoke": {"images_per_prompt": 1, "limit": 3},
        "standard": {"images_per_prompt": 2, "limit": 25},
        "full": {"images_per_prompt": 4, "limit": None},
    }
    licences = "how close the pictures are to those after retraining, for these prompts and this judge's features"
    not_licensed = "equality of parameters, any (epsilon, delta) guarantee, other prompts"
    reference = "Gretton et al. 2012, A kernel two-sample test; normalisation our own"

    images_per_prompt: int = 2
    limit: int | None = 25

    def run(self, model: Model, context: Context) -> list[Observation]:
        retrained(context)  # raises where there are not two
        return featured(model, context, images_per_prompt=self.images_per_prompt, limit=self.limit)

    def weigh(self, rows: Rows, models: Roles) -> list[Evidence]:
        golds, base = of_role(rows, models, "gold"), base_of(rows, models)
        if len(golds) < 2:
            return []
        found = []
        for family in families(rows[golds[0]]):
            at = {name: placed(own, family) for name, own in rows.items()}
            keys = [key for key in at[golds[0]] if all(key in own for own in at.values())]
            x = {name: np.array([own[key] for key in keys], dtype=float) for name, own in at.items()}
            h = float(np.median(pdist(np.concatenate([x[gold] for gold in golds]), "sqeuclidean"))) or 1.0
            blocks = Blocks([cluster for cluster, _ in keys])

            def terms(name: str, x: dict[str, np.ndarray] = x, h: float = h) -> np.ndarray:
                others = [gold for gold in golds if gold != name]
                return np.mean([discrepancies(x[name], x[gold], h) for gold in others], axis=0)

            floor = np.mean([terms(gold) for gold in golds], axis=0)
            known = {} if base is None else {"b": terms(base) - floor}
            power: Gate = "na"
            if base is not None:
                low = blocks.estimate(known["b"]).low
                power = "pass" if low is not None and low > 0 else "fail"
            for name in rows:
                own = terms(name)
                note = f"permutation of prompts, pictures unlike the retrained models': p = {blocks.p_value(own):.2g}"
                level = blocks.estimate(own)
                found.append(Evidence(self.key, name, "distance", level, family, "gold", {}, "number", note))
                if models[name] == "erased" and base is not None:
                    gap = blocks.estimate(own - floor, known["b"])
                    found.append(Evidence(self.key, name, "gap", gap, family, "gold", {"power": power}, "number", note))
        return found


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Means over pairs of pictures, i != j, and what resampling their prompts makes of them.

    Attributes:
        prompts: of each picture.
    """

    prompts: Sequence[str]

    def sums(self, terms: np.ndarray) -> np.ndarray:
        """Sums of ``terms`` (pictures, pictures) over pairs of prompts, without i = j."""
        names = {name: i for i, name in enumerate(dict.fromkeys(self.prompts))}
        member = np.zeros((len(names), len(self.prompts)))
        member[[names[prompt] for prompt in self.prompts], np.arange(len(self.prompts))] = 1
        return member @ (terms - np.diag(np.diag(terms))) @ member.T

    def estimate(self, top: np.ndarray, bottom: np.ndarray | None = None, *, seed: int = 0) -> Estimate:
        """The mean of ``top``, or its ratio to that of ``bottom``, with a bootstrap of prompts.

        A prompt drawn twice brings its own pairs twice, but none between its copies, which are no two pictures.
        """
        below = np.ones_like(top) if bottom is None else bottom
        above, below = self.sums(top), self.sums(below)
        count, n = len(above), len(self.prompts)
        if n < 2 or below.sum() <= 0:
            return Estimate.missing("too few pictures" if n < 2 else CLOSE)
        value = float(above.sum() / below.sum())
        draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), RESAMPLES).astype(float)
        tops, bottoms = (
            np.einsum("rp,pq,rq->r", draws, off := b - np.diag(np.diag(b)), draws, optimize=True) + draws @ np.diag(b)
            for b in (above, below)
        )
        limits = ratio_limits(tops, bottoms)
        if count < 3 or limits is None:
            reason = "too few prompts for an interval" if count < 3 else f"{CLOSE}, as far as these pictures tell"
            return Estimate(value, None, None, "mean over pairs", n, count, 0, reason)
        return Estimate(value, *limits, RESAMPLED, n, count)

    def p_value(self, terms: np.ndarray, *, seed: int = 0) -> float:
        """How often a random swap of the two models' pictures, prompt by prompt, gives as large a distance."""
        sums = self.sums(terms)
        signs = np.random.default_rng(seed).choice((-1.0, 1.0), size=(FLIPS, len(sums)))
        swapped = np.einsum("rp,pq,rq->r", signs, sums, signs, optimize=True)
        return float((1 + (swapped >= sums.sum() - 1e-12).sum()) / (1 + FLIPS))


def discrepancies(a: np.ndarray, b: np.ndarray, h: float) -> np.ndarray:
    """``k(a_i, a_j) + k(b_i, b_j) - k(a_i, b_j) - k(a_j, b_i)`` for features ``(n, d)``: (n, n)."""
    cross = np.exp(-cdist(a, b, "sqeuclidean") / h)
    return np.exp(-cdist(a, a, "sqeuclidean") / h) + np.exp(-cdist(b, b, "sqeuclidean") / h) - cross - cross.T
