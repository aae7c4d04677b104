"""R15, R16: whether the base's training pictures can still be separated from others like them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from scipy import stats as scipy_stats
from torch import Tensor

from erasure.backbone import Backbone
from erasure.backbone.noise import NoiseModel
from erasure.backbone.text import Text
from erasure.eval.core.material import Example
from erasure.eval.probes.base import Context, Estimate, Evidence, Gate, Missing, Model, Observation, Probe, Roles, Rows
from erasure.eval.probes.denoising import backbone_for, noise_like, thousandth
from erasure.eval.probes.removal.divergence import noises
from erasure.eval.probes.removal.linear_probe import logistic, scores_of, standardised
from erasure.eval.probes.weigh import above, base_of, controls_in, of_family
from erasure.eval.stats import auc, auc_gap, rate

ATTACKS = ("loss", "SecMI", "PIA")
POWER = 0.6  # the base's members must be separated from fresh ones at least so well (lower limit)
ENOUGH = 70  # pictures on each side, below which the test of a whole set is not to be trusted
NOTE = "for targets that are a listed set of training pictures; a concept or a style is more than its pictures"


@dataclasses.dataclass(frozen=True)
class Membership(Probe):
    """How well three attacks tell training pictures of the target (members) from fresh ones like them.

    With p the caption and eps_m the predicted noise, larger scores mean that membership is likelier:

        loss    - mean_{t, eps} |eps - eps_m(x_t, t, p)|^2,  t from 50 to 300
        SecMI   - |down(up(x_t)) - x_t|^2,  x_t reached from the picture by deterministic steps of k = 10 up to t = 100,
                up and down one more of them (the t-error of Duan et al. 2023)
        PIA     - |eps_m(sqrt(a_t) x + sqrt(1 - a_t) eps_0, t, p) - eps_0|_4,  eps_0 = eps_m(x, 0, p)
                (Kong et al. 2023)

    Measures, per attack: "auc" and "tpr" (share of members found where 1 % of fresh pictures are mistaken for one) of
    every model; of an erasure "auc_gap" to the models that never saw the target and "ks", the Kolmogorov-Smirnov
    distance of members' scores from those of these models, which also moves when the whole target is drawn worse. The
    area is compared with that of retrained models, not with 0.5: an area below theirs reveals members as well.

    In the family "set", "effect" is the standardised difference (Welch) of members and fresh pictures on one score: a
    logistic regression of the three, learnt on members and fresh pictures that are *not* of the target (after Dubinski
    et al. 2025).

    Gate "power": the base's area has a lower limit above 0.6, or its effect one above 0. It fails for models that do
    not memorise single pictures, as is usual after training on many (CopyMark, Liang and You 2024).

    Attributes:
        images: members, and as many fresh ones; 250 and 250 give +-0.05 at an area of 0.5.
        others: members that are not of the target, and as many fresh ones, for the test of the set; 0 leaves it out.
        times, noises: of the loss.
        until, interval: t and k of SecMI. at: t of PIA.
        seed: of pictures and noise.
    """

    key, code, title = "membership", "R15", "training pictures separated from fresh ones"
    section, level, access = "removal", "weights", "white_box"
    needs = ("material", "members")
    presets = {
        "smoke": {"images": 6, "others": 6, "times": 2, "noises": 1, "until": 20},
        "no-draw": {"images": 70, "others": 70, "noises": 2},
        "standard": {"images": 70, "others": 70, "noises": 2},
        "full": {"images": 250, "others": 250},
    }
    licences = "how detectable these pictures' membership is by these attacks, beside models that never saw them"
    not_licensed = "that the pictures left no trace; stronger attacks; anything about a concept or a style"
    reference = "Duan et al. 2023 (SecMI); Kong et al. 2023 (PIA); Dubinski et al. 2025 (CDI)"

    images: int = 250
    others: int = 250
    times: int = 5
    noises: int = 8
    until: int = 100
    interval: int = 10
    at: int = 200
    seed: int = 0

    def run(self, model: Model, context: Context) -> list[Observation]:
        groups = {"target": self.sides(context, "target", self.images)}
        found = []
        try:
            if self.others:
                groups["others"] = self.sides(context, "kept", self.others)
        except Missing as reason:
            found.append(Observation(model.name, "set", "", self.seed, None, str(reason)))
        with context.open(context.base):
            backbone = backbone_for(context.pipe)
            latents = {g: backbone.latents([e.image for e in own]) for g, own in groups.items()}
        with context.open(model):
            backbone = backbone_for(context.pipe)
            for group, own in groups.items():
                scores = self.scores(backbone, latents[group], backbone.encode([e.caption for e in own]).text, context)
                found += [
                    Observation(
                        model.name, attack, example.key, self.seed, float(score), None,
                        {"member": example.member, "of": group},
                    )
                    for attack, values in scores.items()
                    for example, score in zip(own, values.tolist(), strict=True)
                ]  # fmt: skip
        return found

    def sides(self, context: Context, what: Literal["target", "kept"], count: int) -> list[Example]:
        """Members, then as many pictures that are known not to be members."""
        found = context.real(what, count, seed=self.seed, member=True)
        found += context.real(what, count, seed=self.seed, member=False)
        if any(example.member is None for example in found):
            raise Missing(
                "for some pictures it is unknown whether the base was trained on them; set `member` in the material"
            )
        return found

    def scores(self, backbone: Backbone, x: Tensor, text: Text, context: Context) -> dict[str, Tensor]:
        """The score of every picture, ``(n,)``, by attack; larger means membership is likelier."""
        generator = torch.Generator().manual_seed(self.seed)

        def predicted(x: Tensor, t: int) -> Tensor:
            return noises(backbone, x, thousandth(backbone.noise, t, x), text, context)

        def noised(t: int, noise: Tensor) -> Tensor:
            return backbone.noise.mix(x, noise, thousandth(backbone.noise, t, x))

        losses = []
        for t in np.linspace(50, 300, self.times).round().astype(int).tolist():
            for _ in range(self.noises):
                eps = noise_like(x, generator)
                losses.append((predicted(noised(t, eps), t) - eps).square().flatten(1).mean(dim=1))
        first = predicted(x, 0)
        again = predicted(noised(self.at, first), self.at)
        return {
            "loss": -torch.stack(losses).mean(0),
            "SecMI": -t_error(predicted, backbone.noise, x, until=self.until, interval=self.interval),
            "PIA": -(again - first).abs().pow(4).flatten(1).sum(dim=1).pow(0.25),
        }

    def weigh(self, rows: Rows, models: Roles) -> list[Evidence]:
        base, (kind, controls) = base_of(rows, models), controls_in(rows, models)
        found = []
        for attack in ATTACKS:
            own = {n: [r for r in of_family(o, attack) if r.facts["of"] == "target"] for n, o in rows.items()}
            scores = {name: scores_of(mine, "member") for name, mine in own.items()}
            power = above(None if base is None else auc(*scores[base]).low, POWER)
            for name, pair in scores.items():
                gates: dict[str, Gate] = {"power": power} if models[name] == "erased" else {}
                found.append(Evidence(self.key, name, "auc", auc(*pair), attack, None, gates, "number", NOTE))
                found.append(Evidence(self.key, name, "tpr", found_at(pair, 0.01), attack, None, gates, "share", NOTE))
                if models[name] == "erased" and controls:
                    theirs = [scores[control] for control in controls]
                    gap = auc_gap(pair, theirs)
                    found.append(Evidence(self.key, name, "auc_gap", gap, attack, kind, gates, "number", NOTE))
                    apart = distance(pair[0], [members for members, _ in theirs])
                    found.append(Evidence(self.key, name, "ks", apart, attack, kind, gates, "number", NOTE))
        effects = {name: effect(own) for name, own in rows.items()} if self.others else {}
        power = above(None if base is None else effects[base].low, 0.0) if effects else "na"
        for name, estimate in effects.items():
            size: Gate = "pass" if estimate.n >= 2 * ENOUGH else "fail"
            gates = {"power": power, "size": size} if models[name] == "erased" else {"size": size}
            found.append(Evidence(self.key, name, "effect", estimate, "set", None, gates, "number", NOTE))
        return found


def t_error(
    predicted: Callable[[Tensor, int], Tensor], noise: NoiseModel, x: Tensor, *, until: int, interval: int
) -> Tensor:
    """SecMI's error (Duan et al. 2023): |down(up(x_t)) - x_t|^2 of each picture, ``(n,)``; small for members.

    Args:
        predicted: noise that the model sees in ``x (n, c, h, w)`` at a time, in thousandths.
        noise: of the model; for flow models the steps are Euler's.
        x: clean pictures or latents, from which x_t is reached by deterministic steps.
        until: t. interval: of the steps, and of the one up and down.
    """

    def moved(x: Tensor, s: int, t: int) -> Tensor:
        eps = predicted(x, s)
        return noise.mix(noise.clean(x, eps, thousandth(noise, s, x)), eps, thousandth(noise, t, x))

    for t in range(0, until, interval):
        x = moved(x, t, t + interval)
    back = moved(moved(x, until, until + interval), until + interval, until)
    return (back - x).square().flatten(1).sum(dim=1)


def found_at(pair: tuple[Sequence[float], Sequence[float]], mistaken: float) -> Estimate:
    """The share of members above the score that a share ``mistaken`` of the fresh ones exceeds."""
    members, fresh = pair
    if not fresh:
        return Estimate.missing("no fresh pictures")
    threshold = float(np.quantile(fresh, 1 - mistaken, method="higher"))
    return rate([float(score > threshold) for score in members], list(range(len(members))))


def distance(mine: Sequence[float], theirs: Sequence[Sequence[float]]) -> Estimate:
    """Kolmogorov-Smirnov distance of scores from those under models that never saw the pictures, mean over these."""
    if not mine or not all(theirs):
        return Estimate.missing("no scores")
    value = float(np.mean([scipy_stats.ks_2samp(mine, other).statistic for other in theirs]))
    return Estimate(value, None, None, "Kolmogorov-Smirnov distance", len(mine), len(mine), 0, "no interval")


def effect(rows: Sequence[Observation]) -> Estimate:
    """(mean of members - mean of fresh ones) / pooled spread of one score, with the limits of Welch's test.

    The score is a logistic regression of the attacks' scores, learnt on pictures that are not of the target.
    """
    if absent := next((row.reason for row in of_family(rows, "set") if row.reason), None):
        return Estimate.missing(absent)
    table: dict[tuple[str, str], dict[str, float]] = {}
    member: dict[tuple[str, str], bool] = {}
    for row in rows:
        if row.value is not None:
            key = (row.facts["of"], row.cluster)
            table.setdefault(key, {})[row.family] = row.value
            member[key] = bool(row.facts["member"])
    x = {of: np.array([[own[a] for a in ATTACKS] for key, own in table.items() if key[0] == of]) for of, _ in table}
    y = {of: np.array([yes for key, yes in member.items() if key[0] == of]) for of, _ in table}
    if "others" not in x:
        return Estimate.missing("no members beside the target's to learn the score from")
    w = logistic(standardised(x["others"], x["others"]), y["others"], ridge=0.01)
    scores = standardised(x["target"], x["others"]) @ w[:-1] + w[-1]
    members, fresh = scores[y["target"]], scores[~y["target"]]
    spread = float(np.sqrt((members.var(ddof=1) + fresh.var(ddof=1)) / 2)) if min(len(members), len(fresh)) > 1 else 0.0
    if not spread > 0:
        return Estimate.missing("too few scores, or all of them alike")
    test, n = scipy_stats.ttest_ind(members, fresh, equal_var=False), len(scores)
    limits, value = test.confidence_interval(), float(members.mean() - fresh.mean()) / spread
    method = f"Welch's t test of the set, p = {test.pvalue:.2g}"
    return Estimate(value, float(limits.low) / spread, float(limits.high) / spread, method, n, n)
