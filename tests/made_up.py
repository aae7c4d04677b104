"""Made-up evidence that lets a model reach every level, and ways to spoil it: for tests of what claims follow."""

from __future__ import annotations

import dataclasses

from erasure.eval.judge import ClaimReport, Facts, claims
from erasure.eval.judge.findings import SEARCHES, VARIATIONS
from erasure.eval.probes import names
from erasure.eval.probes.base import Evidence
from erasure.eval.stats import Estimate

MODELS = {"base": "base", "UCE": "erased", "gold 0": "gold", "gold 1": "gold", "gold 2": "gold", "start": "null"}
NULLS = {"base": "base", "UCE": "erased", "start": "null"}
FACTS = Facts(
    preset="standard",
    kinds={"UCE": "weights"},
    target="superhero",
    scopes={f"gold {i}": "denoiser and text encoder" for i in range(3)},
    detectors=("world-a", "world-b"),
    judge="world-a",
    sampler="DDIM, 25 steps, guidance 3",
    ran=tuple(names()),
)
KNOWN, POWER = {"known": "pass"}, {"known": "pass", "power": "pass"}


def number(value: float, half: float = 0.02, n: int = 200) -> Estimate:
    return Estimate(value, value - half, value + half, "fabricated", n, n)


def share(value: float, half: float = 0.02, n: int = 200) -> Estimate:
    return Estimate(value, max(0.0, value - half), min(1.0, value + half), "fabricated", n, n)


def good(control: str = "gold") -> list[Evidence]:
    """Everything that lets one model reach the top of both columns."""
    found = [Evidence("direct", "base", "rate", share(0.95)), Evidence("direct", "start", "rate", share(0.0))]
    found += [Evidence("direct", f"gold {i}", "rate", share(0.01 * i)) for i in range(3) if control == "gold"]
    for probe in ("direct", *(name for name in VARIATIONS if name != "prompt_file")):  # which needs a file
        for family in ("",) if probe == "direct" else ("one", "two"):
            found += [
                Evidence(probe, "UCE", "rate", share(0.01), family, None, KNOWN),
                Evidence(probe, "UCE", "change", number(-0.9), family, None, KNOWN),
            ]
            found += [Evidence(probe, "base", "rate", share(0.9), family)] if family else []
    found.append(Evidence("random_control", "UCE", "rate", share(0.02)))
    found += [Evidence(p, "UCE", "excess", number(0.01), "attack", None, {"power": "pass"}) for p in SEARCHES]
    for probe in ("inversion", "noise", "completion"):
        found.append(Evidence(probe, "UCE", "residual", number(0.05, 0.1), "", control, POWER, "number"))
    return [
        *found,
        Evidence("construction", "UCE", "changed", number(0.05)),
        Evidence("construction", "UCE", "denoiser_changed", number(0.1)),
        Evidence("construction", "UCE", "moved", number(0.2)),
        Evidence("plasticity", "UCE", "slowed", number(0.1, 0.5), "", None, {"known": "pass"}, "log2"),
        Evidence("relearning", "UCE", "advantage", number(0.1, 0.5), "", control, {"power": "pass"}, "log2"),
        Evidence("resurgence", "UCE", "increase", number(0.0), "", None),
        Evidence("resurgence", "UCE", "above_control", number(0.0), "", control, POWER),
        Evidence("divergence", "UCE", "ratio", number(1.05, 0.1), "target", control, {"power": "pass"}, "number"),
        Evidence("output_distance", "UCE", "gap", number(0.05, 0.1), "target", control, {"power": "pass"}, "number"),
        Evidence("membership", "UCE", "auc_gap", number(0.0), "loss", control, {"power": "pass"}, "number"),
        Evidence("neighbours", "UCE", "change", number(-0.01), "", None, KNOWN),
        Evidence("neighbours", "UCE", "worst", number(-0.05), "", None, KNOWN),
        Evidence("unrelated", "UCE", "change", number(0.0), "", None, KNOWN),
        Evidence("degeneracy", "UCE", "change", number(0.0)),
    ]


def but(evidence, probe, measure, estimate=None, *, family=None, **changes):
    """The same evidence with one number changed, or left out when nothing is given."""
    found = []
    for e in evidence:
        if e.model != "UCE" or (e.probe, e.measure) != (probe, measure) or family not in (None, e.family):
            found.append(e)
        elif estimate is not None or changes:
            found.append(dataclasses.replace(e, **({"estimate": estimate} if estimate else {}), **changes))
    return found


def without(evidence, *probes):
    return [e for e in evidence if e.probe not in probes]


def judged(evidence, models=MODELS, facts=FACTS, **changes) -> ClaimReport:
    (report,) = claims(evidence, models, dataclasses.replace(facts, **changes))
    return report


def levels(*args, **kwargs):
    report = judged(*args, **kwargs)
    return report.suppression, report.removal


FAILED = {"gates": {"known": "fail", "power": "fail"}}
