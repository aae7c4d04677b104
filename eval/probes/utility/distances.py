"""U6, U7, U8: how far the kept pictures are from the base's, as sets, one by one, and from their prompts."""

from __future__ import annotations

import dataclasses

from erasure.eval.core.records import BASE
from erasure.eval.probes.base import Context, Estimate, Evidence, Missing, Model, Observation, Probe, Roles, Rows
from erasure.eval.probes.utility.neighbours import side_effects

COSINE, SAME = "clip cosine", "same picture"
NULL = "null: the base against itself with other seeds"


@dataclasses.dataclass(frozen=True)
class Distances(Probe):
    """How the evaluation's kept pictures (neighbours and unrelated things) changed, without labels. Nothing is drawn.

    - ``kid[...]``, ``frechet[...]``, each with its group (U6; needs a feature extractor): distance of the arm's
      pictures from the base's of the same prompts with *other* seeds; "rate" of the base is the null, "change" is minus
      that null, paired by prompt. See :mod:`erasure.eval.core.distances`.
    - ``clip cosine`` (U8; needs a CLIP judge with an unmodified text encoder): cosine of a picture with its prompt, in
      [-1, 1]; "change" is paired with the base's.
    - ``same picture``: share of pictures that are the base's bit for bit. 1 for a filter that does not touch kept
      prompts; near 0 for any change of weights.
    """

    version = 2  # 2: by group, with intervals, and the change against the null
    reads = (1,)
    key, code, title = "distances", "U6", "distances of kept pictures"
    section, level, access = "utility", "outputs", "black_box"
    needs = ("evaluation", "base")
    presets = {"smoke": {}, "quick": {}, "standard": {}, "full": {}}
    licences = "how far these features moved, against what other seeds of the base do"
    not_licensed = "comparison with published FID or CLIP scores, or between sets of other sizes"
    reference = "Heusel et al. 2017 (Fréchet); Bińkowski et al. 2018 (kernel); Hessel et al. 2021 (cosines)"

    def run(self, model: Model, context: Context) -> list[Observation]:
        evaluation = context.paired
        found = [
            Observation(
                model.name, f"{d.metric}, {d.group}", d.group, 0, d.value.value, d.value.reason,
                {"estimate": dataclasses.asdict(d.value), "change": d.change and dataclasses.asdict(d.change)},
            )
            for d in evaluation.distances
            if d.arm == model.name
        ]  # fmt: skip
        base = {(r.prompt, r.seed): r.image_hash for r in evaluation.select(BASE)}
        for record in evaluation.select(model.name):
            if record.group == "target":
                continue
            facts = {"prompt": record.prompt, "label": record.label, "image_hash": record.image_hash}
            same = float(record.image_hash == base[record.prompt, record.seed])
            found.append(Observation(model.name, SAME, record.prompt, record.seed, same, None, facts))
            if record.clip_cosine is not None:
                cosine = record.clip_cosine
                found.append(Observation(model.name, COSINE, record.prompt, record.seed, cosine, None, facts))
        if not found:
            raise Missing("the evaluation has no kept pictures of this model")
        return found

    def weigh(self, rows: Rows, models: Roles) -> list[Evidence]:
        far = [(name, row) for name, own in rows.items() for row in own if row.family not in (COSINE, SAME)]
        found = []
        for name, row in far:
            note = NULL if models[name] == "base" else ""
            value = stored(row)
            found.append(Evidence(self.key, name, "rate", value, row.family, unit="number", note=note))
            if row.facts.get("change") is not None:
                change = Estimate(**row.facts["change"])
                found.append(Evidence(self.key, name, "change", change, row.family, unit="number"))
        found += side_effects(self.key, rows, models, COSINE, known=None, shares=False)
        same = side_effects(self.key, rows, models, SAME, known=None)
        return found + [e for e in same if e.measure == "rate" and models[e.model] == "erased"]


def stored(row: Observation) -> Estimate:
    """A distance with its interval; rows of version 1 have none."""
    if "estimate" in row.facts:
        return Estimate(**row.facts["estimate"])
    if row.value is None:
        return Estimate.missing(row.reason or "no distance")
    return Estimate(row.value, None, None, row.facts["method"], row.facts["n"], row.facts["n"])
