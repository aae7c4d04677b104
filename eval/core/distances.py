"""How far the kept pictures of an arm are from the base's, for the same prompts: kernel and Fréchet distance.

Both sides have the same prompts and different seeds. The *null* is the base against itself with other seeds: with two
or more pictures per prompt, one half of its seeds against the other half; with one, a set drawn with other seeds. The
change of an arm is its distance minus that null, over the same prompts.

- Kernel distance (KID): ``MMD²`` with the kernel ``(x·y / d + 1)³``, over all pairs of pictures of *different* prompts,
  so pictures of one prompt need not be independent. It has no bias, and may be below 0.
- Fréchet distance: of two Gaussians. Its bias is large while there are fewer pictures than features; the null has
  the same bias, so use the change.

Intervals resample whole prompts. A resample repeats prompts, so its Fréchet distance is larger than that of the sample:
its draws are centred on the estimate. In simulations (20 prompts of 2 pictures, 60 of 1; 300 runs) 92 to 100 % of the
intervals contain the true value, and between equal models under 1 % of the changes exclude 0.

References: Gretton et al. 2012, JMLR 13, 723-773 (unbiased MMD²); Bińkowski et al. 2018 (KID); Heusel et al. 2017.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from erasure.concept import Prompt
from erasure.eval.core.metrics import INCEPTION, MIN_IMAGES, features_of, frechet_distance
from erasure.eval.core.records import Distance
from erasure.eval.stats import Estimate
from erasure.eval.stats.resample import tails

OTHER_SEEDS = 10_000  # offset of the seeds of the null where each prompt has one picture
KEPT = ("neighbours", "unrelated")
KID_DRAWS, FRECHET_DRAWS = 2000, 200

Pictures = Sequence[Sequence[Image.Image]]  # a row for each prompt
Pairs = list[tuple[np.ndarray, np.ndarray]]  # features (prompts, pictures, d) of an arm, and of the base's other seeds


class Distances:
    """The distances of one evaluation; the base is measured first, and every other arm against it.

    ``extractors`` have a ``name``; see :func:`erasure.eval.core.metrics.features_of`. Every arm draws ``prompts`` with
    ``seeds``.
    """

    def __init__(self, extractors: Sequence[Any], prompts: Sequence[Prompt], seeds: Sequence[int]) -> None:
        self.extractors, self.seeds = list(extractors), list(seeds)
        names = [_name(extractor) for extractor in self.extractors]
        if len(set(names)) < len(names):
            raise ValueError(f"two feature extractors have one name; got {names}; give each a name of its own")
        members = {group: [i for i, p in enumerate(prompts) if p.group == group] for group in KEPT}
        self.groups = {group: rows for group, rows in members.items() if rows}
        self.each = max(1, len(seeds) // 2)  # pictures of a prompt in a set
        self._base: dict[tuple[str, str], tuple[np.ndarray, np.ndarray | None, dict[str, Drawn]]] = {}

    @property
    def enough(self) -> list[str]:
        """The groups that have enough pictures to be compared."""
        return [g for g, rows in self.groups.items() if len(rows) * self.each >= MIN_IMAGES and len(rows) > 1]

    @property
    def wanted(self) -> list[int]:
        """Rows of prompts that the base must draw with other seeds, too, for the null."""
        drawn = self.extractors and len(self.seeds) == 1
        return sorted(i for group in self.enough for i in self.groups[group]) if drawn else []

    def of(self, arm: str, images: Pictures, others: Pictures = ()) -> list[Distance]:
        """The distances of one arm. ``images`` are of every prompt, ``others`` (with the base) of :attr:`wanted`."""
        other = dict(zip(self.wanted, others, strict=True)) if others else {}
        found = []
        for extractor in self.extractors:
            name = _name(extractor)
            for group, rows in self.groups.items():
                if group not in self.enough:
                    reason = f"too few pictures ({len(rows) * self.each}; at least {MIN_IMAGES})"
                    found += [Distance(arm, key, Estimate.missing(reason), group) for key in titles(name)]
                    continue
                mine = _features([images[i] for i in rows], extractor)
                if others:
                    self._base[name, group] = mine, _features([other[i] for i in rows], extractor), {}
                elif (name, group) not in self._base:
                    self._base[name, group] = mine, None, {}
                found += self._measured(arm, name, group, mine)
        return found

    def _measured(self, arm: str, name: str, group: str, mine: np.ndarray) -> list[Distance]:
        base, other, null = self._base[name, group]
        pairs = self._pairs(mine, base, other)
        drawn = {"kid": kid_draws(pairs), "frechet": frechet_draws(pairs)}
        if not null:  # this is the base
            null.update(drawn)
        found = []
        for (kind, one), key in zip(drawn.items(), titles(name), strict=True):
            value = one.estimate()
            change = None if one is null[kind] else one.minus(null[kind]).estimate()
            found.append(Distance(arm, key, value, group, change))
        return found

    def _pairs(self, mine: np.ndarray, base: np.ndarray, other: np.ndarray | None) -> Pairs:
        if other is not None:
            return [(mine, other)]
        first, second = slice(0, self.each), slice(self.each, 2 * self.each)
        return [(mine[:, first], base[:, second]), (mine[:, second], base[:, first])]


def titles(name: str) -> tuple[str, str]:
    """The names of the two distances: KID and FID are on Inception's features alone."""
    return ("KID", "FID") if name == INCEPTION else (f"kid[{name}]", f"frechet[{name}]")


class Drawn:
    """A statistic and its value in each resample of prompts."""

    def __init__(self, value: float, draws: np.ndarray, pictures: int, prompts: int, method: str) -> None:
        self.value, self.draws, self.pictures, self.prompts, self.method = value, draws, pictures, prompts, method

    def minus(self, other: Drawn) -> Drawn:
        """The difference, resample by resample."""
        return Drawn(self.value - other.value, self.draws - other.draws, self.pictures, self.prompts, self.method)

    def estimate(self) -> Estimate:
        low, high = np.quantile(self.draws, tails())
        return Estimate(self.value, float(low), float(high), self.method, self.pictures, self.prompts)


def kid_draws(pairs: Pairs) -> Drawn:
    """The kernel distance, and its value in 2000 resamples of prompts.

    With ``K_xy(p, q)`` the mean kernel between the pictures of prompt p in x and of prompt q in y, it is the mean over
    ``p ≠ q`` of ``K_xx(p, q) + K_yy(p, q) - K_xy(p, q) - K_xy(q, p)``.
    """
    terms = np.mean([_terms(x, y) for x, y in pairs], axis=0)
    np.fill_diagonal(terms, 0.0)
    prompts = len(terms)
    weights = _weights(prompts, KID_DRAWS)
    draws = ((weights @ terms) * weights).sum(1) / (prompts**2 - (weights**2).sum(1))
    value = float(terms.sum()) / (prompts * (prompts - 1))
    pictures = prompts * pairs[0][0].shape[1]
    return Drawn(value, draws, pictures, prompts, "unbiased, pairs of different prompts; cluster bootstrap by prompt")


def _terms(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        (p, m, d), (q, n, _) = a.shape, b.shape
        k = (a.reshape(p * m, d) @ b.reshape(q * n, d).T / d + 1) ** 3
        return k.reshape(p, m, q, n).mean((1, 3))

    cross = kernel(x, y)
    return kernel(x, x) + kernel(y, y) - cross - cross.T


def frechet_draws(pairs: Pairs) -> Drawn:
    """The Fréchet distance, and its value in 200 resamples of prompts, centred on the estimate."""
    prompts, each, d = pairs[0][0].shape
    value = _mean(lambda x, y: frechet_distance(x, y), pairs)
    draws = []
    for weights in _weights(prompts, FRECHET_DRAWS):
        p = np.repeat(weights / weights.sum() / each, each)
        draws.append(_mean(lambda x, y, p=p: frechet_distance(x, y, p), pairs))  # type: ignore[misc]
    centred = np.array(draws) + value - np.mean(draws)
    method = f"cluster bootstrap by prompt, centred; {prompts * each} pictures, {d} features"
    return Drawn(value, centred, prompts * each, prompts, method)


def _mean(distance: Callable[[np.ndarray, np.ndarray], float], pairs: Pairs) -> float:
    d = pairs[0][0].shape[-1]
    return float(np.mean([distance(x.reshape(-1, d), y.reshape(-1, d)) for x, y in pairs]))


def _weights(prompts: int, draws: int) -> np.ndarray:
    """How often each prompt is drawn, (draws, prompts), the same for every arm; never one prompt alone."""
    counts = np.random.default_rng(0).multinomial(prompts, np.full(prompts, 1 / prompts), size=draws)
    return counts[(counts < prompts).all(1)].astype(float)


def _features(images: Pictures, extractor: Any) -> np.ndarray:
    flat = features_of([image for row in images for image in row], extractor)
    return flat.reshape(len(images), -1, flat.shape[-1])


def _name(extractor: Any) -> str:
    return str(getattr(extractor, "name", type(extractor).__name__))
