"""R11: how far the denoiser is from retrained ones, relative to their distance from each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from erasure.backbone import Backbone
from erasure.backbone.text import Text
from erasure.eval.core.material import Example
from erasure.eval.core.pictures import image_hash
from erasure.eval.probes.base import Context, Estimate, Evidence, Gate, Missing, Model, Observation, Probe, Roles, Rows
from erasure.eval.probes.denoising import backbone_for, noise_like
from erasure.eval.probes.weigh import base_of, each_family, families, gated, of_family, of_role
from erasure.eval.stats import mean, ratio

EMPTY = "target, empty prompt"
KEPT = 8  # retrained models whose predictions stay in memory, so that each is opened only once


@dataclasses.dataclass(frozen=True)
class Divergence(Probe):
    """Distance of noise predictions on real pictures, as a multiple of the distance between two retrained models.

    With x a clean latent, x_t = sqrt(a_t) x + sqrt(1 - a_t) eps and p its caption,

        D(m, g) = E_{x, t, eps} |eps_m(x_t, t, p) - eps_g(x_t, t, p)|^2 / dim(eps)

        ratio(m) = mean_g D(m, g) / mean_{g < g'} D(g, g')

    over the retrained models g: 1 is no farther from a retrained model than another one is. "residual" is
    (D(e, g) - D(g, g')) / (D(b, g) - D(g, g')): 0 as a retrained model, 1 as far as the base, above 1 farther.
    Pictures, noise and latents (of the base's autoencoder) are the same for every model; each model reads the captions
    with its own text encoder. Four strata: the target with its captions, with the empty prompt, neighbours, unrelated.

    Attributes:
        images: real pictures of each stratum. Intervals come from resampling them; 40 give about +-15 % of the ratio.
        bins: number of timesteps, the middles of equal parts of the schedule. Fewer may miss where models differ.
        seed: of pictures and noise.

    The normalisation is ours. The squared difference of predictions is, up to weights, the Kullback-Leibler divergence
    of two diffusion processes (Song et al. 2021, "Maximum likelihood training of score-based diffusion models").
    """

    key, code, title = "divergence", "R11", "distance of the denoiser from retrained ones"
    section, level, access = "removal", "weights", "white_box"
    needs = ("gold", "material")
    presets = {
        "smoke": {"images": 2, "bins": 2},
        "quick": {"images": 12, "bins": 4},
        "no-draw": {"images": 40, "bins": 10},
        "standard": {"images": 40, "bins": 10},
        "full": {"images": 125, "bins": 10},
    }
    licences = "how close the predictions are to retraining on these pictures, timesteps and captions"
    not_licensed = "equality of parameters, any (epsilon, delta) bound, what another prompt brings out"
    reference = "own normalisation of a score distance (Song et al. 2021)"

    images: int = 40
    bins: int = 10
    seed: int = 0

    def run(self, model: Model, context: Context) -> list[Observation]:
        golds = [gold for gold in retrained(context) if gold.name != model.name]
        strata, absent = self.strata(context)
        with context.open(context.base):
            backbone = backbone_for(context.pipe)
            latents = {f: backbone.latents([e.image for e in own]) for f, own in strata.items()}
        theirs = {gold.name: self.predictions(gold, context, strata, latents) for gold in golds}
        mine = self.predictions(model, context, strata, latents)
        gaps = {name: (mine - other).square().mean(-1) for name, other in theirs.items()}  # each (pictures, bins)
        each = [(family, example.key) for family, own in strata.items() for example in own]
        found = [Observation(model.name, family, "", self.seed, None, reason) for family, reason in absent.items()]
        for i, (family, key) in enumerate(each):
            to = {name: gap[i].mean().item() for name, gap in gaps.items()}
            by_t = torch.stack([gap[i] for gap in gaps.values()]).mean(0).tolist()
            facts = {"to": to, "by_t": [float(f"{d:.4g}") for d in by_t]}
            found.append(Observation(model.name, family, key, self.seed, sum(to.values()) / len(to), None, facts))
        return found

    def weigh(self, rows: Rows, models: Roles) -> list[Evidence]:
        golds, base, found = of_role(rows, models, "gold"), base_of(rows, models), []
        for family in families(next(iter(rows.values()), ())) if len(golds) > 1 else []:
            at = {
                name: {row.cluster: away(row, [gold for gold in golds if gold != name]) for row in own}
                for name, own in each_family(rows, family).items()
            }
            if absent := next((row.reason for row in of_family(rows[golds[0]], family) if row.reason), None):
                missing = Estimate.missing(absent)
                found += [Evidence(self.key, n, "ratio", missing, family, "gold") for n in rows if n not in golds]
                continue
            keys = list(at[golds[0]])
            floor = [_mean([at[gold][key] for gold in golds]) for key in keys]
            distance = {name: [own.get(key) for key in keys] for name, own in at.items()}
            own = [Evidence(self.key, g, "floor", mean(distance[g], keys), family, "gold", {}, "number") for g in golds]
            power: Gate = "na"
            if base is not None:
                low = ratio(distance[base], floor, keys).low
                power = "pass" if low is not None and low > 1 else "fail"
            for name in (name for name in rows if models[name] != "gold"):
                own.append(
                    Evidence(self.key, name, "ratio", ratio(distance[name], floor, keys), family, "gold", {}, "number")
                )
                if models[name] == "erased" and base is not None:
                    left = ratio(_minus(distance[name], floor), _minus(distance[base], floor), keys)
                    own.append(Evidence(self.key, name, "residual", left, family, "gold", {}, "number"))
            found += gated(own, models, power=power)
        return found

    def strata(self, context: Context) -> tuple[dict[str, list[Example]], dict[str, str]]:
        """Pictures by family, and family to the reason why it has none."""
        target = context.real("target", self.images, seed=self.seed)
        found = {"target": target, EMPTY: [dataclasses.replace(e, caption="") for e in target]}
        absent = {}
        for family, labels in (("neighbours", context.suite.neighbours), ("unrelated", context.suite.unrelated)):
            try:
                found[family] = context.real("kept", self.images, seed=self.seed, labels=labels)
            except Missing as reason:
                absent[family] = str(reason)
        return found, absent

    def predictions(
        self, model: Model, context: Context, strata: Mapping[str, Sequence[Example]], latents: Mapping[str, Tensor]
    ) -> Tensor:
        """The noise a model predicts for every picture of every stratum, ``(pictures, bins, c h w)`` float32 on CPU."""
        known: dict[str, Tensor] = context.memory.setdefault(self.key, {})
        with context.open(model):
            key = ""
            if model.role == "gold":
                shown = [(f, e.caption, image_hash(e.image)) for f, own in strata.items() for e in own]
                schedule = sorted((k, str(v)) for k, v in context.pipe.scheduler.config.items())
                key = repr((context.hash_weights(context.pipe), self.settings(), shown, schedule, context.batch_size))
            if key in known:
                return known[key]
            backbone = backbone_for(context.pipe)
            parts = []
            for family, own in strata.items():
                x, text = latents[family], backbone.encode([example.caption for example in own]).text
                generator, bins = torch.Generator().manual_seed(self.seed), []  # both strata of the target share noise
                for i in range(self.bins):
                    t = backbone.noise.times(torch.full((len(x),), (i + 0.5) / self.bins)).to(x.device)
                    noised = backbone.noise.mix(x, noise_like(x, generator), t)
                    bins.append(noises(backbone, noised, t, text, context))
                parts.append(torch.stack(bins, 1).flatten(2).cpu())
            predicted = torch.cat(parts)
        if key:
            known[key] = predicted
            for old in list(known)[:-KEPT]:
                del known[old]
        return predicted


def away(row: Observation, golds: Sequence[str]) -> float | None:
    """Mean distance of one picture's predictions to those of some retrained models."""
    return None if row.value is None else _mean([row.facts["to"][gold] for gold in golds])


def retrained(context: Context) -> list[Model]:
    """The models retrained without the target, two or more: their distance from each other is the unit."""
    golds = context.of_role("gold")
    if len(golds) < 2:
        raise Missing(
            "two or more models retrained without the target are needed: their distance from each other is the unit; "
            f"there is {len(golds)}, and null controls do not replace them"
        )
    return golds


@torch.no_grad()
def noises(backbone: Backbone, x: Tensor, t: Tensor, text: Text, context: Context) -> Tensor:
    """The noise that a model predicts in ``x (n, c, h, w)`` at ``t (n,)``, in batches, float32."""
    rows = torch.arange(len(x)).split(context.batch_size)
    plain = backbone.plain_guidance
    predicted = [backbone.predict_float(x[r], t[r], text[r], guidance=plain) for r in rows]
    return torch.cat([backbone.noise.split(p, x[r], t[r])[1] for p, r in zip(predicted, rows, strict=True)])


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def _minus(values: Sequence[float | None], floor: Sequence[float | None]) -> list[float | None]:
    return [None if v is None or f is None else v - f for v, f in zip(values, floor, strict=True)]
