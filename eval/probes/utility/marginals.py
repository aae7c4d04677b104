"""U12: which styles and backgrounds are drawn when the prompt does not name them."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Sequence

from erasure.concept import Prompt
from erasure.eval.core.pictures import image_hash, limited
from erasure.eval.detectors.base import Detector
from erasure.eval.probes.base import Context, Evidence, Missing, Model, Observation, Probe, Roles, Rows
from erasure.eval.probes.utility.binding import ATTRIBUTES, ranked
from erasure.eval.probes.utility.distances import NULL
from erasure.eval.probes.utility.replacement import distance, shares
from erasure.eval.probes.weigh import base_of, each_family, families, of_family

AGAIN = " again"  # the base with other seeds
NAMED = 3  # labels in a note


@dataclasses.dataclass(frozen=True)
class Marginals(Probe):
    """How often each style and each background appears when a prompt for something kept names none ("a panda").

    ``distance``: total variation to the base's shares on the same prompts, 1/2 sum_l |p(l) - q(l)|, one family per
    attribute that the judge has labels for and that prompts leave open; 0 is equal shares, 1 disjoint ones. The base's
    is to itself with other seeds, because two samples of one distribution are never at 0. The note names the labels
    that gained or lost most. Filters are left out: they return the base's picture, or none.

    Attributes:
        images_per_prompt: the base has as many others again.
    """

    key, code, title = "marginals", "U12", "styles and backgrounds that the prompt leaves open"
    section, level, access = "utility", "outputs", "black_box"
    needs = ("base",)
    presets = {"smoke": {"images_per_prompt": 1, "limit": 2}, "standard": {}, "full": {"images_per_prompt": 4}}
    licences = "a shift in these attributes for these prompts, against what other seeds of the base do"
    not_licensed = "attributes the judge has no labels for; whether a shift matters"
    reference = "Cooper et al. 2024, arXiv 2412.06966 (an edit reaches outputs that nobody asked about)"

    images_per_prompt: int = 2
    limit: int | None = None

    def concerns(self, model: Model) -> bool:
        return model.kind != "filter"

    def run(self, model: Model, context: Context) -> list[Observation]:
        kept = limited([p for p in context.suite.prompts() if p.group != "target"], self.limit)
        left = left_open(kept, context.judge)
        if not left:
            raise Missing(f"every prompt names all that {context.judge.name} has labels for")
        asked = list(dict.fromkeys(itertools.chain(*left.values())))
        n = self.images_per_prompt
        runs = {"": range(n), **({AGAIN: range(n, 2 * n)} if model.role == "base" else {})}
        found = []
        with context.open(model) as pipe:
            for again, seeds in runs.items():
                drawn = context.pictures(pipe, model, asked, seeds=seeds)
                for attribute, prompts in left.items():
                    each = [one for one in drawn if one[0] in prompts]
                    tops = ranked(context.judge, attribute, [image for *_, image in each], 1)
                    found += [
                        Observation(model.name, attribute + again, p, s, None, None,
                                    {"prompt": p, "top": top, "image_hash": image_hash(image)})
                        for (p, s, image), (top,) in zip(each, tops, strict=True)
                    ]  # fmt: skip
        return found

    def weigh(self, rows: Rows, models: Roles) -> list[Evidence]:
        if (base := base_of(rows, models)) is None:
            return []
        found = []
        for family in (one for one in families(rows[base]) if not one.endswith(AGAIN)):
            own = each_family(rows, family)
            for name in rows:
                if name == base:
                    pair = {"": own[name], AGAIN: of_family(rows[name], family + AGAIN)}
                    value, note = distance(pair, AGAIN, [""]), NULL
                else:
                    value, note = distance(own, name, [base]), shifts(own[base], own[name])
                found.append(Evidence(self.key, name, "distance", value, family, unit="number", note=note))
        return found


def left_open(prompts: Sequence[Prompt], judge: Detector) -> dict[str, list[str]]:
    """Attribute to the prompts that name none of its labels; attributes without labels or prompts are left out."""
    found = {}
    for attribute in ATTRIBUTES:
        labels = judge.labels(attribute)
        texts = [p.text for p in prompts if not any(re.search(rf"\b{re.escape(x)}\b", p.text, re.I) for x in labels)]
        if labels and texts:
            found[attribute] = list(dict.fromkeys(texts))
    return found


def shifts(before: Sequence[Observation], after: Sequence[Observation]) -> str:
    """The labels whose shares changed most, in points."""
    was, now = dict(shares(before)), dict(shares(after))
    gaps = {label: now.get(label, 0.0) - was.get(label, 0.0) for label in {**was, **now}}
    most = sorted(gaps, key=lambda label: (-abs(gaps[label]), label))[:NAMED]
    return ", ".join(f"{label} {100 * gaps[label]:+.0f}" for label in most) + " points"
