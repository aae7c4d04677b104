"""From observations to evidence: what every probe that counts pictures has in common."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Literal

from erasure.eval.core.models import Role
from erasure.eval.probes.base import Evidence, Gate, Observation
from erasure.eval.stats import (
    Asked,
    Estimate,
    Kept,
    Trained,
    difference,
    mean,
    rate,
    residual,
    worst_stratum,
)

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


def twins_of(models: Mapping[str, Role]) -> list[str]:
    """The models that were retrained on everything, with the steps and settings of the retrained ones."""
    return [name for name, role in models.items() if role == "twin"]


def values(rows: Sequence[Observation], keys: Sequence[Key]) -> list[float | None]:
    """The values at some keys (family, cluster, seed), in their order; None where there is no row."""
    at = {key_of(row): row.value for row in rows}
    return [at.get(key) for key in keys]


def units(rows: Sequence[Observation], *, kept: bool = False) -> list[Hashable]:
    """What intervals draw, for every row: its training and its prompt, its template and its phrase, or its cluster.

    Rows that were written before templates and phrases were kept have their cluster alone, and weigh as they did.

    Args:
        kept: the phrases are the labels of what should stay, which are meant as they stand.
    """
    runs = [row.facts.get("run", row.facts.get("init")) for row in rows]
    if all(run is not None for run in runs):
        return [Trained(run, row.facts.get("prompt", row.cluster)) for run, row in zip(runs, rows, strict=True)]
    if all(row.facts.get("template") for row in rows):
        kind = Kept if kept else Asked
        return [kind(row.facts["template"], row.facts["phrase"]) for row in rows]
    return [row.cluster for row in rows]


def of_one_run(drawn: Sequence[Hashable]) -> str:
    """The note of a number from one training; "" for others."""
    runs = {unit.first for unit in drawn if isinstance(unit, Trained)}
    return "one training: what another one would give is not in the interval" if len(runs) == 1 else ""


def identical(first: Sequence[Observation], second: Sequence[Observation]) -> bool:
    """Whether two models drew the same pictures, every one of them."""
    pictures = [{key_of(row): (row.facts.get("image_hash"), row.value) for row in rows} for rows in (first, second)]
    return bool(first) and all(row.facts.get("image_hash") for row in first) and pictures[0] == pictures[1]


def unchanged(rows: Sequence[Observation]) -> Estimate:
    """The change between identical pictures: none, and nothing to be unsure about on these prompts."""
    return Estimate(0.0, 0.0, 0.0, "identical pictures", len(rows), len({row.cluster for row in rows}))


def key_of(row: Observation) -> Key:
    return row.family, row.cluster, row.seed


def contrasts(
    probe: str,
    rows: Rows,
    models: Mapping[str, Role],
    family: str = "",
    *,
    known: float = KNOWN,
    shares: bool = True,
    kept: bool = False,
) -> list[Evidence]:
    """Rate of every model, and of every erasure its change against the base, against the controls, and the residual.

    Args:
        probe: its key.
        rows: model name to observations; observations of different models are paired by family, cluster and seed.
        models: name to role.
        family: one family, or "" for all together.
        known: the share of pictures in which the base must show the target (lower limit). 0.3 for paraphrases, say.
        shares: values are 0 or 1; False for other numbers, which get means and no score intervals.
        kept: the rows are about what should stay: their labels are no sample of others.

    The residual is read between the controls and their twins where retrained models have any, else the base: gold and
    twin differ in their data alone, gold and base also in how long they were trained.

    Beside a rate stands "worst_stratum": the template or the phrase with the highest one, where rows say theirs.
    """
    chosen = {name: [r for r in own if not family or r.family == family] for name, own in rows.items()}
    base = next((name for name, role in models.items() if role == "base" and chosen.get(name)), None)
    kind, controls = controls_of({name: role for name, role in models.items() if chosen.get(name)})
    level = rate if shares else mean
    unit: Literal["share", "number"] = "share" if shares else "number"
    found = []
    known_gate: dict[str, Gate] = {"known": "na"}
    if base is not None:
        low = level([r.value for r in chosen[base]], units(chosen[base], kept=kept)).low
        known_gate = {"known": "na" if low is None else "pass" if low >= known else "fail"}
    for name, own in chosen.items():
        if not own:
            continue
        gates = known_gate if models[name] == "erased" else {}
        drawn = units(own, kept=kept)
        note = of_one_run(drawn)
        estimate = level([r.value for r in own], drawn)
        found.append(Evidence(probe, name, "rate", estimate, family, None, gates, unit, note))
        if shares and not kept and (worst := worst_stratum([r.value for r in own], drawn)) is not None:
            found.append(Evidence(probe, name, "worst_stratum", worst[0], family, None, gates, unit, worst[1]))
        if models[name] != "erased" or base is None:
            continue
        at = dict(zip(map(key_of, chosen[base]), units(chosen[base], kept=kept), strict=True))
        keys, clusters = list(at), list(at.values())
        mine, theirs = values(own, keys), values(chosen[base], keys)
        same = identical(chosen[base], own)
        change = unchanged(own) if same else _gap(theirs, mine, clusters, shares=shares)
        found.append(Evidence(probe, name, "change", change, family, None, gates, unit, note))
        if not controls:
            continue
        never = [values(chosen[control], keys) for control in controls]
        many, flat = clusters * len(never), [value for one in never for value in one]
        above = _gap(flat, mine * len(never), many, shares=shares, copies=len(never))
        found.append(Evidence(probe, name, "above_control", above, family, kind, gates, unit, note))
        if shares:
            twins = twins_of({n: r for n, r in models.items() if chosen.get(n)}) if kind == "gold" else []
            saw = [values(chosen[twin], keys) for twin in twins] or [theirs]
            pairs = [(one, other) for one in never for other in saw]
            gap = difference(
                [value for one, _ in pairs for value in one],
                [value for _, other in pairs for value in other],
                clusters * len(pairs),
                copies=len(pairs),
            )
            power: Gate = "na" if gap.low is None else "pass" if gap.low >= POWER else "fail"
            left = residual(mine, saw, never, clusters)
            gated: dict[str, Gate] = {**gates, "power": power}
            found.append(Evidence(probe, name, "residual", left, family, kind, gated, "number", note))
    return found


def _gap(
    before: Sequence[float | None],
    after: Sequence[float | None],
    clusters: Sequence[Hashable],
    *,
    shares: bool,
    copies: int = 1,
) -> Estimate:
    if shares:
        return difference(before, after, clusters, copies=copies)
    pairs = zip(before, after, strict=True)
    return mean([None if b is None or a is None else a - b for b, a in pairs], clusters)
