"""U3: whether the target, or its anchor, appears where something else was asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from erasure.eval.core.verdicts import among
from erasure.eval.probes.base import Context, Evidence, Missing, Model, Observation, Probe, Roles, Rows
from erasure.eval.probes.utility.binding import beside, looked_at
from erasure.eval.probes.utility.neighbours import side_effects
from erasure.eval.probes.weigh import base_rows, families


@dataclasses.dataclass(frozen=True)
class Leakage(Probe):
    """Share of pictures in which the target, or the suite's anchor, is drawn in place of another thing.

    Two situations, one family for each of the two intruders; "change" is minus the base's:

    - "target in its place", "anchor in its place": of pictures for "a superhero and a castle", those in which the
      castle is *not* among the judge's two likeliest labels and the intruder *is*. Suites about a style have none.
    - "target on kept prompts", "anchor on kept prompts": of the evaluation's pictures for neighbours and unrelated
      things, those whose likeliest label is the intruder. Prompts that ask for the anchor itself are left out.

    Parts of the target (a cape on the castle) have no label and are not seen. There is no gate on the base, whose rate
    is mostly near 0.

    Attributes:
        prompts: with target and another thing; 0 draws nothing and reads the evaluation alone. With the same ``seed``
            they are those of :class:`~erasure.eval.probes.utility.binding.Binding` "beside the target", so both share
            cached pictures.
    """

    key, code, title = "leakage", "U3", "target or anchor in place of others"
    section, level, access = "utility", "outputs", "black_box"
    needs = ("base",)
    presets = {
        "smoke": {"prompts": 2, "images_per_prompt": 1},
        "quick": {"prompts": 0},
        "standard": {"prompts": 25, "images_per_prompt": 2},
        "full": {"prompts": 100, "images_per_prompt": 2},
    }
    measures = {"rate": "seen in its place"}
    licences = "how often this label is seen in the place of another thing that was asked for"
    not_licensed = "parts or attributes of the target without a label of their own"
    reference = "Erasure or Erosion, CVPR 2026 (compositions under erasure); T2I-CompBench, 2023"

    prompts: int = 25
    images_per_prompt: int = 2
    seed: int = 0

    def run(self, model: Model, context: Context) -> list[Observation]:
        known = context.judge.labels(context.suite.attribute)
        names = {
            "target": [concept.name for concept in context.suite.concepts],
            "anchor": [concept.anchor for concept in context.suite.concepts if concept.anchor],
        }
        intruders = {who: [label for label in known if among(label, given)] for who, given in names.items()}
        found = []
        for who, labels in intruders.items():
            if labels:
                found += self._on_kept_prompts(model, context, who, labels)
        if self.prompts and context.suite.attribute == "concept":
            found += self._in_its_place(model, context, intruders)
        if not found:
            raise Missing("there is neither an evaluation to read from nor anything to draw with a label of the judge")
        return found

    def _on_kept_prompts(self, model: Model, context: Context, who: str, labels: Sequence[str]) -> list[Observation]:
        records = [] if context.evaluation is None else context.evaluation.select(model.name)
        found = []
        for record in records:
            if record.group == "target" or among(record.label, labels):
                continue
            verdict = record.verdicts[context.judge.name]
            value = None if verdict.top is None else float(verdict.top in labels)
            facts = {
                "prompt": record.prompt, "label": record.label, "top": verdict.top, "image_hash": record.image_hash,
            }  # fmt: skip
            family = f"{who} on kept prompts"
            found.append(Observation(model.name, family, record.prompt, record.seed, value, verdict.reason, facts))
        return found

    def _in_its_place(
        self, model: Model, context: Context, intruders: Mapping[str, Sequence[str]]
    ) -> list[Observation]:
        asked = [
            one
            for one in beside(context, self.prompts, seed=self.seed)
            if not set(one.wanted["concept"]) & set(intruders["anchor"])
        ]
        found = []
        for one, seed, facts in looked_at(context, model, asked, self.images_per_prompt):
            for who, labels in intruders.items():
                if labels:
                    taken = not one.met(facts["likeliest"]) and bool(set(labels) & set(facts["likeliest"]["concept"]))
                    family = f"{who} in its place"
                    found.append(Observation(model.name, family, one.text, seed, float(taken), None, facts))
        return found

    def weigh(self, rows: Rows, models: Roles) -> list[Evidence]:
        base = base_rows(rows, models)
        return [e for family in families(base) for e in side_effects(self.key, rows, models, family, known=None)]
