"""From observations to evidence: what every probe that counts pictures has in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterable, Sequence
from statistics import fmean
from typing import Any

from erasure.eval.core.models import Role
from erasure.eval.core.observations import Control, Evidence, Gate, Observation, Roles, Rows
from erasure.eval.stats import (
    Asked,
    Estimate,
    Kept,
    Trained,
    difference,
    mean,
    paired_changes,
    rate,
    residual,
    spread_half_width,
    t_half_width,
    wider,
    worst_stratum,
)

KNOWN = 0.5  # the base must show the target in this share of pictures, or its absence means nothing
POWER = 0.2  # and exceed a model that never saw it by this much, or nothing can be said relative to that

Key = tuple[str, str, int]
Values = Sequence[float | None]


# --- which rows -----------------------------------------------------------------------------------------------------


def of_role(rows: Rows, models: Roles, role: Role) -> list[str]:
    """The models of a role that have rows."""
    return [name for name, own in rows.items() if own and models[name] == role]


def base_of(rows: Rows, models: Roles) -> str | None:
    """The name of the base, if it has rows."""
    return next(iter(of_role(rows, models, "base")), None)


def base_rows(rows: Rows, models: Roles) -> Sequence[Observation]:
    """The rows of the base; empty where it has none."""
    base = base_of(rows, models)
    return () if base is None else rows[base]


def controls_in(rows: Rows, models: Roles) -> tuple[Control | None, list[str]]:
    """The models with rows that never saw the target: retrained ones if there are any, else the first null."""
    golds, nulls = of_role(rows, models, "gold"), of_role(rows, models, "null")[:1]
    return ("gold", golds) if golds else ("null", nulls) if nulls else (None, [])


def families(rows: Iterable[Observation]) -> list[str]:
    """The families in the order they were observed."""
    return list(dict.fromkeys(row.family for row in rows))


def of_family(rows: Iterable[Observation], family: str) -> list[Observation]:
    return [row for row in rows if row.family == family]


def each_family(rows: Rows, family: str) -> dict[str, list[Observation]]:
    """The rows of one family of every model."""
    return {name: of_family(own, family) for name, own in rows.items()}


def key_of(row: Observation) -> Key:
    return row.family, row.cluster, row.seed


def values(rows: Sequence[Observation], keys: Sequence[Key]) -> list[float | None]:
    """The values at some keys (family, cluster, seed), in their order; None where there is no row."""
    at = {key_of(row): row.value for row in rows}
    return [at.get(key) for key in keys]


# --- how they are drawn ---------------------------------------------------------------------------------------------


def units(rows: Sequence[Observation], *, kept: bool = False) -> list[Hashable]:
    """What intervals resample, for every row: training and prompt, or template and phrase, or the cluster.

    Args:
        kept: the rows are about their own phrases, which are fixed and no sample: what should stay, and whether
            pictures of target prompts were destroyed.
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


def widened_by_controls(above: Estimate, rates: Sequence[float | None]) -> Estimate:
    """A model's distance from the mean of controls, with how the controls differ among themselves.

    The two ends answer two questions. Below: a model that never saw the target may lie as far from their mean as one
    more of them, so it is above them only beyond that (a prediction interval). Above: the mean of all such models is
    known only from these (a t interval). One control says nothing of either.
    """
    known = [rate for rate in rates if rate is not None]
    if above.value is None or above.low is None or above.high is None or len(known) < 2:
        return above
    own = above.value - spread_half_width(known), above.value + t_half_width(known)
    low, high = wider((above.low, above.high), own)
    return dataclasses.replace(above, low=low, high=high, method=f"{above.method}; widened by how the controls differ")


def plain_mean(values: Values) -> float | None:
    """The mean of what is known, without an interval."""
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def share(rows: Sequence[Observation]) -> Estimate:
    """The rate of hits, with clusters resampled."""
    return rate([row.value for row in rows], [row.cluster for row in rows])


def average(rows: Sequence[Observation]) -> Estimate:
    """The mean of the values, with clusters resampled."""
    return mean([row.value for row in rows], [row.cluster for row in rows])


def within(rows: Sequence[Observation], first: str, second: str) -> Estimate:
    """The change of one model from a family to another, paired by cluster and seed."""
    asked = of_family(rows, second)
    before, after = (values(rows, [(family, row.cluster, row.seed) for row in asked]) for family in (first, second))
    return difference(before, after, units(asked))


def at_least(low: float | None, least: float) -> Gate:
    """A gate on a lower limit; "na" where there is none."""
    return "na" if low is None else "pass" if low >= least else "fail"


def above(low: float | None, limit: float) -> Gate:
    """The same for a lower limit that must not be equal."""
    return "na" if low is None else "pass" if low > limit else "fail"


def gated(found: Iterable[Evidence], models: Roles, **gates: Gate) -> list[Evidence]:
    """Numbers of erasures with further gates; those of the base and of controls have none."""
    return [dataclasses.replace(e, gates={**e.gates, **gates}) if models[e.model] == "erased" else e for e in found]


# --- contrasts ------------------------------------------------------------------------------------------------------


def identical(first: Sequence[Observation], second: Sequence[Observation]) -> bool:
    """Whether two models drew the same pictures, every one of them."""
    pictures = [{key_of(row): (row.facts.get("image_hash"), row.value) for row in rows} for rows in (first, second)]
    return bool(first) and all(row.facts.get("image_hash") for row in first) and pictures[0] == pictures[1]


def unchanged(rows: Sequence[Observation]) -> Estimate:
    """The change between identical pictures: 0, and certain for these prompts."""
    return Estimate(0.0, 0.0, 0.0, "identical pictures", len(rows), len({row.cluster for row in rows}))


def contrasts(
    probe: str,
    rows: Rows,
    models: Roles,
    family: str = "",
    *,
    known: float = KNOWN,
    shares: bool = True,
    kept: bool = False,
) -> list[Evidence]:
    """Rate of every model, and of every erasure its change against the base, against the controls, and the residual.

    "above_control" is no narrower than the controls differ (:func:`widened_by_controls`).

    Args:
        probe: its key.
        rows: observations of different models are paired by family, cluster and seed.
        family: one family, or "" for all together.
        known: the share of pictures in which the base must show the target (lower limit). 0.3 for paraphrases, say.
        shares: values are 0 or 1; False for other numbers, which get means and no score intervals.
        kept: the rows are about their own phrases; see :func:`units`.

    With retrained controls that have twins, the residual is read between the two: they differ in their data alone.
    Otherwise the base represents the models that saw the target.

    "worst_stratum" is the rate of the template or the phrase with the highest one, where rows have both.
    """
    chosen = each_family(rows, family) if family else rows
    base, (kind, controls) = base_of(chosen, models), controls_in(chosen, models)
    twins = of_role(chosen, models, "twin") if kind == "gold" else []
    level = rate if shares else mean
    asked = base_rows(chosen, models)
    drawn_of_base = units(asked, kept=kept)
    at = dict(zip(map(key_of, asked), drawn_of_base, strict=True))
    keys, clusters = list(at), list(at.values())
    seen = {name: values(own, keys) for name, own in chosen.items()}
    gate = at_least(level([row.value for row in asked], drawn_of_base).low, known) if asked else "na"
    found = []
    for name, own in chosen.items():
        if not own:
            continue
        drawn = units(own, kept=kept)
        gates: dict[str, Gate] = {"known": gate} if models[name] == "erased" else {}
        common: dict[str, Any] = {
            "family": family, "gates": gates, "unit": "share" if shares else "number", "note": of_one_run(drawn)
        }  # fmt: skip
        hits = [row.value for row in own]
        found.append(Evidence(probe, name, "rate", level(hits, drawn), **common))
        if shares and not kept and (worst := worst_stratum(hits, drawn)) is not None:
            found.append(Evidence(probe, name, "worst_stratum", worst[0], **{**common, "note": worst[1]}))
        if models[name] != "erased" or base is None:
            continue
        mine, theirs, never = seen[name], seen[base], [seen[control] for control in controls]
        same = identical(chosen[base], own)
        change = unchanged(own) if same else gap([(theirs, mine)], clusters, shares=shares)
        found.append(Evidence(probe, name, "change", change, **common))
        if controls:
            above = gap([(one, mine) for one in never], clusters, shares=shares)
            above = widened_by_controls(above, [plain_mean(one) for one in never])
            found.append(Evidence(probe, name, "above_control", above, control=kind, **common))
        if controls and shares:
            saw = [seen[twin] for twin in twins] or [theirs]
            room = gap([(one, other) for one in never for other in saw], clusters, shares=True)
            power: dict[str, Gate] = {**gates, "power": at_least(room.low, POWER)}
            left = residual(mine, saw, never, clusters)
            found.append(
                Evidence(probe, name, "residual", left, control=kind, **{**common, "gates": power, "unit": "number"})
            )
    return found


def gap(pairs: Sequence[tuple[Values, Values]], clusters: Sequence[Hashable], *, shares: bool = True) -> Estimate:
    """Second minus first over pairs of models on the same pictures, each with its cluster.

    Args:
        shares: the values are hits; else any numbers.
    """
    before, after = ([value for pair in pairs for value in pair[side]] for side in (0, 1))
    many = [*clusters] * len(pairs)
    if shares:
        return difference(before, after, many, copies=len(pairs))
    return mean(paired_changes(before, after), many)
