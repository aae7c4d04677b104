"""U7, U11: how far pictures moved one by one, and how much the pictures of one prompt still differ."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from erasure.eval.probes.base import Context, Estimate, Evidence, Model, Observation, Probe, Roles, Rows
from erasure.eval.probes.features import featured, placed
from erasure.eval.probes.weigh import base_of, families, of_role
from erasure.eval.stats import ratio

COLLAPSED = 0.5  # of the base's diversity
Key = tuple[str, int]  # prompt and seed


@dataclasses.dataclass(frozen=True)
class Preservation(Probe):
    """Distances of single pictures in the judge's features f, in units of "another picture of the same prompt".

    With b_i what the base draws for a prompt, b_i' what it draws for it from other noise, and m_i what a model draws
    from the noise of b_i:

        moved     = mean |f(m_i) - f(b_i)| / mean |f(b_i) - f(b_i')|     0 the base's picture, 1 any other of the prompt
        retrained = mean |f(m_i) - f(g_i)| / mean |f(b_i) - f(b_i')|     to a retrained model g's, mean over them
        diversity = mean |f(m_i) - f(m_i')| / mean |f(b_i) - f(b_i')|    1 as diverse as the base, 0 always one picture

    Families are the groups of the suite. Target pictures should move, kept ones should not; a retrained model moves
    those, too, so compare with its own ``moved``. A diversity below one half, by its upper limit, is called a collapse.
    Filters are left out: they return the base's picture, or none.

    Attributes:
        images_per_prompt: two at least. limit: prompts of each group. Below 15 intervals are very wide.
    """

    key, code, title = "preservation", "U7", "how far single pictures moved, how diverse they are"
    section, level, access = "utility", "outputs", "black_box"
    needs = ("base",)
    presets = {"smoke": {"limit": 2}, "standard": {"limit": None}, "full": {"images_per_prompt": 4, "limit": None}}
    measures = {
        "moved": "distance from the base's picture",
        "retrained": "distance from retrained models' pictures",
        "diversity": "diversity of a prompt's pictures",
    }
    licences = "how much these pictures changed and vary, in this judge's features"
    not_licensed = "whether a change is for the worse; changes that these features do not see"
    reference = "Cooper et al. 2024, arXiv 2412.06966 (an edit reaches other outputs); normalisation our own"

    images_per_prompt: int = 2
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.images_per_prompt < 2:
            raise ValueError(
                f"images_per_prompt = {self.images_per_prompt}; pictures of one prompt are compared: 2 or more"
            )

    def concerns(self, model: Model) -> bool:
        return model.kind != "filter"

    def run(self, model: Model, context: Context) -> list[Observation]:
        return featured(model, context, images_per_prompt=self.images_per_prompt, limit=self.limit)

    def weigh(self, rows: Rows, models: Roles) -> list[Evidence]:
        if (base := base_of(rows, models)) is None:
            return []
        golds, found = of_role(rows, models, "gold"), []
        for family in families(rows[base]):
            at = {name: placed(own, family) for name, own in rows.items()}
            unit = spread(at[base])
            for name in rows:
                others = [gold for gold in golds if gold != name]
                if name != base:
                    moved = in_units(apart(at[name], [at[base]]), unit)
                    found.append(Evidence(self.key, name, "moved", moved, family, unit="number"))
                    diverse = in_units(spread(at[name]), unit)
                    low = diverse.high is not None and diverse.high < COLLAPSED
                    note = "collapse: the pictures of one prompt resemble each other" if low else ""
                    found.append(Evidence(self.key, name, "diversity", diverse, family, unit="number", note=note))
                if others:
                    away = in_units(apart(at[name], [at[gold] for gold in others]), unit)
                    found.append(Evidence(self.key, name, "retrained", away, family, "gold", unit="number"))
        return found


def apart(own: Mapping[Key, np.ndarray], others: Sequence[Mapping[Key, np.ndarray]]) -> dict[Key, float]:
    """The distance of each picture to the one of the same noise, mean over the other models."""
    return {
        key: float(np.mean([np.linalg.norm(x - other[key]) for other in others]))
        for key, x in own.items()
        if all(key in other for other in others)
    }


def spread(own: Mapping[Key, np.ndarray]) -> dict[Key, float]:
    """The distance of each picture to the others of its prompt, mean over them."""
    return {
        key: float(np.mean([np.linalg.norm(x - y) for other, y in own.items() if other[0] == key[0] and other != key]))
        for key, x in own.items()
    }


def in_units(distances: Mapping[Key, float], unit: Mapping[Key, float]) -> Estimate:
    """Mean distance over mean unit, on the pictures that have both."""
    return ratio([distances.get(key) for key in unit], list(unit.values()), [prompt for prompt, _ in unit])
