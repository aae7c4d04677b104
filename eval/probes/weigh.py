"""From observations to evidence: what every probe that counts pictures has in common."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from erasure.eval.models import Role
from erasure.eval.probes.base import Evidence, Gate, Observation
from erasure.eval.stats import Estimate, difference, mean, rate, residual

KNOWN = 0.5  # the base must show the target in this share of pictures, or its absence means nothing
POWER = 0.2  # and exceed a model that never saw it by this much, or nothing can be said relative to that

Rows = Mapping[str, Sequence[Observation]]
Key = tuple[str, str, int]


def families(rows: Iterable[Observation]) -> list[str]:
    """The families in the order they were observed."""
    return list(dict.fromkeys(row.family for row in rows))


def controls_of(models: Mapping[str, Role]) -> tuple[Literal["gold", "null"] | None, list[str]]:
    """The models that stand for "never saw the target": retrained ones if there are any, else the first null."""
    golds = [name for name, role in models.items() if role == "gold"]
    nulls = [name for name, role in models.items() if role == "null"][:1]
    return ("gold", golds) if golds else ("null", nulls) if nulls else (None, [])


def values(rows: Sequence[Observation], keys: Sequence[Key]) -> list[float | None]:
    """The values at some keys (family, cluster, seed), in their order; None where there is no row."""
    at = {(row.family, row.cluster, row.seed): row.value for row in rows}
    return [at.get(key) for key in keys]


def contrasts(
    probe: str, rows: Rows, models: Mapping[str, Role], family: str = "", *, known: float = KNOWN, shares: bool = True
) -> list[Evidence]:
    """Rate of every model, and of every erasure its change against the base, against the controls, and the residual.

    Args:
        probe: its key.
        rows: model name to observations; observations of different models are paired by family, cluster and seed.
        models: name to role.
        family: one family, or "" for all together.
        known: the share of pictures in which the base must show the target (lower limit). 0.3 for paraphrases, say.
        shares: values are 0 or 1; False for other numbers, which get means and no score intervals.
    """
    chosen = {name: [r for r in own if not family or r.family == family] for name, own in rows.items()}
    base = next((name for name, role in models.items() if role == "base" and chosen.get(name)), None)
    kind, controls = controls_of({name: role for name, role in models.items() if chosen.get(name)})
    level = rate if shares else mean
    unit: Literal["share", "number"] = "share" if shares else "number"
    found = []
    known_gate: dict[str, Gate] = {"known": "na"}
    if base is not None:
        low = level([r.value for r in chosen[base]], [r.cluster for r in chosen[base]]).low
        known_gate = {"known": "na" if low is None else "pass" if low >= known else "fail"}
    for name, own in chosen.items():
        if not own:
            continue
        gates = known_gate if models[name] == "erased" else {}
        estimate = level([r.value for r in own], [r.cluster for r in own])
        found.append(Evidence(probe, name, "rate", estimate, family, None, gates, unit))
        if models[name] != "erased" or base is None:
            continue
        keys = list(dict.fromkeys((r.family, r.cluster, r.seed) for r in chosen[base]))
        clusters = [cluster for _, cluster, _ in keys]
        mine, theirs = values(own, keys), values(chosen[base], keys)
        change = _gap(theirs, mine, clusters, shares=shares)
        found.append(Evidence(probe, name, "change", change, family, None, gates, unit))
        if not controls:
            continue
        never = [values(chosen[control], keys) for control in controls]
        many, flat = clusters * len(never), [value for one in never for value in one]
        above = _gap(flat, mine * len(never), many, shares=shares, copies=len(never))
        found.append(Evidence(probe, name, "above_control", above, family, kind, gates, unit))
        if shares:
            gap = difference(flat, theirs * len(never), many, copies=len(never))
            power: Gate = "na" if gap.low is None else "pass" if gap.low >= POWER else "fail"
            left = residual(mine, theirs, never, clusters)
            found.append(Evidence(probe, name, "residual", left, family, kind, {**gates, "power": power}, "number"))
    return found


def _gap(
    before: Sequence[float | None],
    after: Sequence[float | None],
    clusters: Sequence[str],
    *,
    shares: bool,
    copies: int = 1,
) -> Estimate:
    if shares:
        return difference(before, after, clusters, copies=copies)
    pairs = zip(before, after, strict=True)
    return mean([None if b is None or a is None else a - b for b, a in pairs], clusters)
