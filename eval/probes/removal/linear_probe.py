"""R14: can the target be read off the middle of the denoiser?"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from erasure.backbone import Backbone
from erasure.eval.probes.base import Context, Evidence, Model, Observation, Probe, Roles, Rows
from erasure.eval.probes.denoising import backbone_for, noise_like, thousandth
from erasure.eval.probes.removal.divergence import noises
from erasure.eval.probes.weigh import above, base_of, controls_in
from erasure.eval.stats import auc, auc_gap


@dataclasses.dataclass(frozen=True)
class LinearProbe(Probe):
    """How well a linear classifier tells noised pictures of the target from others, by activations of the denoiser.

    The activations are those of the mid-block of a U-Net, or of the middle block of a transformer: averaged over
    places, at several timesteps, with the empty prompt. The classifier is logistic regression in ``folds``-fold
    cross-validation. "auc" is the area under the curve of the held-out scores, "auc_gap" that of the model minus that
    of the controls, on the same pictures, noise and folds.

    A model that never saw the target can tell the pictures apart by their pixels, so only the difference counts, and
    only where the base has one (gate ``power``: the lower limit of its own "auc_gap" is above 0).

    Attributes:
        images: of the target, and as many others. 100 and 100 give +-0.08 at an area of 0.5.
        timesteps: of the noise, of 1000.
        others: "neighbours", which are hard enough for models to differ, or "kept" for anything else.
        folds: of the cross-validation.
        ridge: weight of |w|^2 / 2 beside the mean log loss, for standardised features. Raise it with many features and
            few pictures.
        seed: of pictures, noise and folds.

    Reference: Alain and Bengio 2016, "Understanding intermediate layers using linear classifier probes".
    """

    key, code, title = "linear_probe", "R14", "target decodable from activations"
    section, level, access = "removal", "weights", "white_box"
    needs = ("control", "material")
    presets = {
        "smoke": {"images": 10, "timesteps": (300,), "folds": 2},
        "no-draw": {"images": 100},
        "standard": {"images": 100},
        "full": {"images": 500},
    }
    descriptive = True
    licences = "how well the target is linearly separable in this layer, beside a model that never saw it"
    not_licensed = "removal: pictures are separable by their pixels alone"
    reference = "Alain and Bengio 2016"

    images: int = 100
    timesteps: tuple[int, ...] = (100, 300, 500)
    others: Literal["neighbours", "kept"] = "neighbours"
    folds: int = 5
    ridge: float = 0.01
    seed: int = 0

    def run(self, model: Model, context: Context) -> list[Observation]:
        labels = context.suite.neighbours if self.others == "neighbours" else None
        examples = context.real("target", self.images, seed=self.seed)
        examples += context.real("kept", self.images, seed=self.seed, labels=labels)
        with context.open(context.base):
            latents = backbone_for(context.pipe).latents([example.image for example in examples])
        with context.open(model):
            features = self.activations(backbone_for(context.pipe), latents, context)
        shows = np.arange(len(examples)) < self.images
        scores = held_out(features, shows, folds=self.folds, ridge=self.ridge, seed=self.seed)
        return [
            Observation(model.name, "", example.key, self.seed, float(score), None, {"target": bool(y)})
            for example, score, y in zip(examples, scores, shows, strict=True)
        ]

    def activations(self, backbone: Backbone, latents: Tensor, context: Context) -> np.ndarray:
        """Means over places of what the middle returns, ``(pictures, timesteps x channels)``."""
        seen: list[Tensor] = []

        def keep(module: Any, given: Any, out: Any) -> None:
            seen.append(backbone.middle_mean(out).cpu())

        generator = torch.Generator().manual_seed(self.seed)
        empty = backbone.encode([""]).text.repeat(len(latents))
        handles = [middle.register_forward_hook(keep) for middle in backbone.middles()]
        try:
            for step in self.timesteps:
                t = thousandth(backbone.noise, step, latents)
                x = backbone.noise.mix(latents, noise_like(latents, generator), t)
                noises(backbone, x, t, empty, context)
        finally:
            for handle in handles:
                handle.remove()
        each = torch.cat(seen).reshape(len(self.timesteps), len(latents), -1)
        return each.transpose(0, 1).flatten(1).double().numpy()

    def weigh(self, rows: Rows, models: Roles) -> list[Evidence]:
        scores = {name: scores_of(own, "target") for name, own in rows.items()}
        kind, controls = controls_in(rows, models)
        found = [Evidence(self.key, name, "auc", auc(*pair), unit="number") for name, pair in scores.items()]
        if not controls:
            return found
        gaps = {name: auc_gap(pair, [scores[control] for control in controls]) for name, pair in scores.items()}
        base = base_of(rows, models)
        gates = {"power": above(None if base is None else gaps[base].low, 0.0)}
        return found + [
            Evidence(self.key, name, "auc_gap", gap, "", kind, gates, "number")
            for name, gap in gaps.items()
            if models[name] == "erased"
        ]


def scores_of(rows: Sequence[Observation], fact: str) -> tuple[list[float], list[float]]:
    """The values of rows for which a fact is true, and of the others."""
    known = [(row.value, bool(row.facts[fact])) for row in rows if row.value is not None]
    return [v for v, yes in known if yes], [v for v, yes in known if not yes]


def logistic(x: np.ndarray, y: np.ndarray, *, ridge: float) -> np.ndarray:
    """Weights and offset ``(d + 1,)`` that minimise mean log(1 + exp(-s f(x))) + ridge / 2 |w|^2, with s = +-1."""
    sign = np.where(y, 1.0, -1.0)

    def loss(w: np.ndarray) -> tuple[float, np.ndarray]:
        margin = sign * (x @ w[:-1] + w[-1])
        pull = -sign / (1 + np.exp(np.clip(margin, -500, 500))) / len(x)
        gradient = np.append(x.T @ pull + ridge * w[:-1], pull.sum())
        return float(np.logaddexp(0, -margin).mean() + ridge / 2 * (w[:-1] @ w[:-1])), gradient

    return minimize(loss, np.zeros(x.shape[1] + 1), jac=True, method="L-BFGS-B").x


def standardised(x: np.ndarray, like: np.ndarray) -> np.ndarray:
    """``x`` on the scale on which ``like`` has mean 0 and spread 1."""
    return (x - like.mean(0)) / (like.std(0) + 1e-9)


def held_out(x: np.ndarray, y: np.ndarray, *, folds: int, ridge: float, seed: int) -> np.ndarray:
    """The score of each row by a logistic regression on the other folds; each fold has its share of both kinds."""
    fold, rng = np.empty(len(x), dtype=int), np.random.default_rng(seed)
    for kind in (True, False):
        own = rng.permutation(np.flatnonzero(y == kind))
        fold[own] = np.arange(len(own)) % folds
    scores = np.empty(len(x))
    for k in range(folds):
        train, test = fold != k, fold == k
        w = logistic(standardised(x[train], x[train]), y[train], ridge=ridge)
        scores[test] = standardised(x[test], x[train]) @ w[:-1] + w[-1]
    return scores
