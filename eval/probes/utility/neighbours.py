"""U1: what is close to the target and must survive."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np

from erasure.concept import Group
from erasure.eval.models import Model, Role
from erasure.eval.probes.base import Context, Evidence, Observation, Probe
from erasure.eval.probes.suppression.direct import observed, records
from erasure.eval.probes.weigh import KNOWN, Rows, contrasts, families, values
from erasure.eval.stats import LEVEL, RESAMPLES, Estimate, difference

TENTH, FEWEST = 0.1, 3  # share of the labels, and how many at least: those that lost most


@dataclasses.dataclass(frozen=True)
class Neighbours(Probe):
    """How often a neighbour is seen when it is asked for by name: the pictures of the evaluation itself.

    One family per label and "" for all together: share, change against the base, and against retrained models (which
    may draw neighbours differently too). ``worst`` is the mean change of the tenth of the labels, three at least, that
    lost most ("pinpoint-ness"), of erasures and of retrained models, whose numbers say what a retraining costs by
    itself. The neighbours are those of the suite; nothing here looks for others.
    """

    key: ClassVar = "neighbours"
    code: ClassVar = "U1"
    title: ClassVar = "neighbours survive"
    section: ClassVar = "utility"
    level: ClassVar = "outputs"
    access: ClassVar = "black_box"
    needs: ClassVar = ("evaluation", "base")
    presets: ClassVar = {"smoke": {}, "quick": {}, "standard": {}, "full": {}}
    licences: ClassVar = "what these named neighbours lost, for these prompts and this detector"
    not_licensed: ClassVar = "other neighbours, quality beyond the label, no side effects elsewhere"
    reference: ClassVar = "HUB, ICCV 2025, arXiv 2410.05664 (pinpoint-ness)"

    group: ClassVar[Group] = "neighbours"

    def run(self, model: Model, context: Context) -> list[Observation]:
        found = records(context, model, self.group)
        return [observed(record, context.judge.name, record.label) for record in found]

    def weigh(self, rows: Mapping[str, Sequence[Observation]], models: Mapping[str, Role]) -> list[Evidence]:
        base = next((own for name, own in rows.items() if models[name] == "base"), ())
        found = side_effects(self.key, rows, models)
        gates = {e.model: e.gates for e in found if e.measure == "change"}
        for label in families(base):
            found += side_effects(self.key, rows, models, label)
        for name, own in rows.items():
            if own and base and models[name] in ("erased", "gold"):
                estimate, labels = worst(base, own)
                note = f"worst: {', '.join(labels)}" if labels else ""
                found.append(Evidence(self.key, name, "worst", estimate, gates=gates.get(name, {}), note=note))
        return found


def side_effects(
    probe: str,
    rows: Rows,
    models: Mapping[str, Role],
    family: str = "",
    *,
    known: float | None = KNOWN,
    shares: bool = True,
) -> list[Evidence]:
    """Those contrasts that mean something where nothing was to be suppressed.

    No residual, as the base and a retrained model should agree, and no null: a model that never learnt the rest either
    is no measure of how well the rest survives.

    Args:
        known: None where a base that does not show it is no fault, and no gate is passed or failed.
    """
    found = contrasts(probe, rows, models, family, known=known or 0.0, shares=shares)
    kept = [e for e in found if e.measure in ("rate", "change") or (e.measure, e.control) == ("above_control", "gold")]
    return kept if known is not None else [dataclasses.replace(e, gates={}) for e in kept]


def worst(base: Sequence[Observation], own: Sequence[Observation], *, seed: int = 0) -> tuple[Estimate, list[str]]:
    """Mean change of the tenth of the labels that lost most, and their names: (d_(1) + ... + d_(m)) / m, m = L / 10.

    Three labels at least: the few pictures of a single one are never told from a loss beyond the margin.

    Args:
        base, own: observations with the label as family, of the base and of another model.
        seed: of the bootstrap.

    The interval is the wider at each end of a bootstrap of prompts within labels, which chooses the worst anew each
    time, and of the paired interval of the labels that were chosen. The worst of several noisy numbers lies below the
    worst true one, so the estimate errs on the side of loss; the same number of a retrained model says by how much.
    """
    rng = np.random.default_rng(seed)
    pairs: dict[str, list[tuple[str, float, float]]] = {}
    changes: dict[str, float] = {}
    drawn = []
    for label in families(base):
        keys = list(dict.fromkeys((r.family, r.cluster, r.seed) for r in base if r.family == label))
        both = zip(keys, values(base, keys), values(own, keys), strict=True)
        pairs[label] = [(key[1], b, a) for key, b, a in both if b is not None and a is not None]
        if not pairs[label]:
            continue
        prompts = list(dict.fromkeys(prompt for prompt, _, _ in pairs[label]))
        at = [prompts.index(prompt) for prompt, _, _ in pairs[label]]
        sums, sizes = np.bincount(at, [a - b for _, b, a in pairs[label]]), np.bincount(at)
        times = rng.multinomial(len(prompts), np.full(len(prompts), 1 / len(prompts)), size=RESAMPLES)
        changes[label] = float(sums.sum() / sizes.sum())
        drawn.append(times @ sums / (times @ sizes))
    if not changes:
        return Estimate.missing("no label has pictures of both models with a verdict"), []
    count = min(len(changes), max(FEWEST, math.ceil(TENTH * len(changes))))
    labels = sorted(changes, key=lambda label: changes[label])[:count]
    value = float(np.mean([changes[label] for label in labels]))
    lost = [pair for label in labels for pair in pairs[label]]
    paired = difference([b for _, b, _ in lost], [a for _, _, a in lost], [prompt for prompt, _, _ in lost])
    low, high = np.quantile(np.sort(drawn, axis=0)[:count].mean(axis=0), ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    method = f"bootstrap of prompts within {len(changes)} labels, wider of that and the paired interval"
    limits = min(float(low), paired.low or 0.0, value), max(float(high), paired.high or 0.0, value)
    return Estimate(value, *limits, method, paired.n, paired.clusters), labels
