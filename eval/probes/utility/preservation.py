"""U7, U11: how far pictures moved one by one, and how much the pictures of one prompt still differ."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np

from erasure.eval.core.models import Model, Role
from erasure.eval.core.pictures import limited
from erasure.eval.probes.base import Context, Evidence, Observation, Probe
from erasure.eval.probes.removal.output_distance import features_of, placed, rounded
from erasure.eval.probes.weigh import families
from erasure.eval.stats import Estimate, ratio

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

    Families are the groups of the suite. Target pictures are meant to move; kept ones are not, and a retrained model
    moves them too, which is what its own ``moved`` is there for. A diversity below one half, by its upper limit, is
    called a collapse. Filters are left out: they hand on the base's picture, or none.

    Attributes:
        images_per_prompt: seeds per prompt, two at least.
        limit: at most so many prompts of each group, spread evenly; None for all. Below 15 intervals say little.
    """

    key: ClassVar = "preservation"
    code: ClassVar = "U7"
    title: ClassVar = "how far single pictures moved, how diverse they are"
    section: ClassVar = "utility"
    level: ClassVar = "outputs"
    access: ClassVar = "black_box"
    needs: ClassVar = ("base",)
    presets: ClassVar = {
        "smoke": {"limit": 2},
        "standard": {"limit": None},
        "full": {"images_per_prompt": 4, "limit": None},
    }
    measures: ClassVar = {
        "moved": "distance from the base's picture",
        "retrained": "distance from retrained models' pictures",
        "diversity": "diversity of a prompt's pictures",
    }
    licences: ClassVar = "how much these pictures changed and vary, in this judge's features"
    not_licensed: ClassVar = "whether a change is for the worse; changes that these features do not see"
    reference: ClassVar = "Cooper et al. 2024, arXiv 2412.06966 (an edit reaches other outputs); normalisation our own"

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
        asked, seeds = limited(context.suite.prompts(), self.limit), tuple(range(self.images_per_prompt))
        with context.open(model) as pipe:
            drawn = context.draw(pipe, model, [p.text for p in asked], seeds=seeds, description=f"U7 {model.name}")
        name, features = features_of(context.judge, [image for row in drawn for image in row])
        return [
            Observation(model.name, p.group, p.text, seed, None, None, {"of": name, "features": rounded(vector)})
            for (p, seed), vector in zip(itertools.product(asked, seeds), features, strict=True)
        ]

    def weigh(self, rows: Mapping[str, Sequence[Observation]], models: Mapping[str, Role]) -> list[Evidence]:
        base = next((name for name in rows if models[name] == "base"), None)
        if base is None:
            return []
        golds, found = [name for name in rows if models[name] == "gold"], []
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
