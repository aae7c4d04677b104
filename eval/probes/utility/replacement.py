"""U10: what is drawn instead of the target."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence

import numpy as np

from erasure.eval.core.verdicts import among
from erasure.eval.probes.base import Context, Estimate, Evidence, Model, Observation, Probe, Roles, Rows
from erasure.eval.probes.pictured import observed, records
from erasure.eval.probes.weigh import controls_in, share
from erasure.eval.stats import RESAMPLES, effective_n, tails, wilson
from erasure.wording import same


@dataclasses.dataclass(frozen=True)
class Replacement(Probe):
    """The distribution over the detector's labels ("nothing" included) on target prompts, against two standards.

    ``distance``: total variation to models that never saw the target, 1/2 sum_l |p(l) - q(l)|, the mean over them; 0
    is the same distribution, 1 disjoint ones. That of a retrained model to the others is the noise floor, because two
    samples of one distribution are never at 0.
    ``anchor``: share of pictures of what the suite says should be drawn instead. The user decides which of the two an
    erasure should meet; a high anchor share often comes with a large distance.
    """

    key, code, title = "replacement", "U10", "what is drawn instead"
    section, level, access = "utility", "outputs", "black_box"
    needs = ("evaluation",)
    presets = {"smoke": {}, "quick": {}, "standard": {}, "full": {}}
    licences = "what this detector sees on target prompts, and how far that is from the control's"
    not_licensed = "things without a label; whether the replacement is acceptable"
    reference = "Cooper et al. 2024, arXiv 2412.06966 (what an edited model should draw is open)"

    def run(self, model: Model, context: Context) -> list[Observation]:
        judge, found = context.judge, []
        anchors = {concept.name: concept.anchor for concept in context.suite.concepts}
        known = judge.labels(context.suite.attribute)
        for record in records(context.paired, model.name, "target"):
            seen, anchor = observed(record, judge.name, "name"), anchors[record.label]
            top = seen.facts["top"]
            value, reason = None if top is None else float(same(top, anchor)), seen.reason
            if not anchor:
                value, reason = None, "the suite names no anchor"
            elif not among(anchor, known):
                value, reason = None, f"{judge.name} has no label {anchor!r}"
            facts = {**seen.facts, "anchor": anchor}
            found.append(dataclasses.replace(seen, value=value, reason=reason, facts=facts))
        return found

    def weigh(self, rows: Rows, models: Roles) -> list[Evidence]:
        kind, controls = controls_in(rows, models)
        found = []
        for name, own in rows.items():
            note = "most often: " + ", ".join(f"{label} {100 * part:.0f} %" for label, part in shares(own)[:3])
            reasons = dict.fromkeys(row.reason for row in own if row.value is None and row.reason)
            anchored = dataclasses.replace(share(own), reason="; ".join(reasons) or None)
            found.append(Evidence(self.key, name, "anchor", anchored, note=note))
            others = [control for control in controls if control != name]
            if others:
                apart = distance(rows, name, others)
                note = "noise floor: retrained models among themselves" if name in controls else note
                found.append(Evidence(self.key, name, "distance", apart, control=kind, unit="number", note=note))
            elif not controls:
                none = Estimate.missing("no model that never saw the target is there to compare with")
                found.append(Evidence(self.key, name, "distance", none, unit="number", note=note))
        return found


def shares(rows: Sequence[Observation]) -> list[tuple[str, float]]:
    """The labels on top and their shares, most frequent first."""
    seen = Counter(row.facts["top"] for row in rows if row.facts["top"] is not None)
    return [
        (label, count / seen.total()) for label, count in sorted(seen.items(), key=lambda item: (-item[1], item[0]))
    ]


def distance(rows: Rows, name: str, others: Sequence[str], *, seed: int = 0) -> Estimate:
    """Mean total variation between what one model and each of some others show on the same prompts.

    The interval is the wider at each end of a bootstrap of prompts (the same for all models) and of Wilson's for a
    share of that size: at a distance of d, a share d of the pictures has other labels.
    """
    models = [name, *others]
    seen = {m: [(r.cluster, r.facts["top"]) for r in rows[m] if r.facts["top"] is not None] for m in models}
    prompts = list(dict.fromkeys(cluster for cluster, _ in seen[name]))
    if any({cluster for cluster, _ in seen[m]} != set(prompts) or not prompts for m in models):
        return Estimate.missing("not every model has a verdict for every target prompt")
    labels = sorted({top for m in models for _, top in seen[m]})
    counts = np.zeros((len(models), len(prompts), len(labels)))
    for i, m in enumerate(models):
        for cluster, top in seen[m]:
            counts[i, prompts.index(cluster), labels.index(top)] += 1

    def apart(times: np.ndarray) -> np.ndarray:
        """Distances ``(r,)`` for prompts drawn ``(r, prompts)`` times."""
        p = np.einsum("rc,mcl->mrl", times, counts)
        p /= p.sum(axis=-1, keepdims=True)
        return np.abs(p[0] - p[1:]).sum(axis=-1).mean(axis=0) / 2

    value = float(apart(np.ones((1, len(prompts))))[0])
    chance = np.full(len(prompts), 1 / len(prompts))
    times = np.random.default_rng(seed).multinomial(len(prompts), chance, size=RESAMPLES)
    low, high = np.quantile(apart(times), tails())
    n = len(seen[name])
    size = effective_n(n, len(prompts))
    score = wilson(min(value, 1.0) * size, size)
    method = "wider of cluster bootstrap by prompt and Wilson"
    return Estimate(value, min(float(low), score[0]), max(float(high), score[1]), method, n, len(prompts))
