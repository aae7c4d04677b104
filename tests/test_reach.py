"""What can be reached at all: a model that differs from a retrained one in nothing gets as far as a preset promises."""

from __future__ import annotations

import dataclasses
import types

import pytest

from erasure import Suite
from erasure.eval.judge import findings
from erasure.eval.judge.view import Facts, Margins, View
from erasure.eval.probes import Observation
from erasure.eval.probes.removal.relearning import STEPS, Relearning
from erasure.eval.probes.sampling import target_prompts
from erasure.eval.probes.utility.neighbours import Neighbours
from erasure.eval.probes.utility.unrelated import Unrelated
from erasure.eval.run.assess import PICTURES
from tests.slow import first

SUITE = Suite.load("superhero")
CONTEXT = types.SimpleNamespace(suite=SUITE)
ROLES = {"base": "base", "copy": "erased", "gold 0": "gold", "gold 1": "gold", "gold 2": "gold"}
MARGINS = Margins.of("full")


def alike(rows):
    """The same rows of every model."""
    return {name: [dataclasses.replace(row, model=name) for row in rows] for name in ROLES}


def number(evidence, measure):
    (found,) = (e for e in evidence if (e.model, e.measure, e.family) == ("copy", measure, ""))
    return found.estimate


@pytest.mark.parametrize("preset", first(["standard", "full"], "standard"))
def test_a_model_that_learns_as_fast_as_a_retrained_one_is_within_twice(preset):
    probe = Relearning.preset(preset)
    prompts = target_prompts(CONTEXT, probe.prompts)

    def curve(arrived):
        return [
            Observation(
                "copy",
                f"step {s}",
                p,
                seed,
                float(s >= arrived),
                None,
                {
                    "step": s,
                    "run": seed // probe.images_per_prompt,
                    "prompt": p,
                    "loss": 1.0,
                },
            )  # fmt: skip
            for s in probe.steps
            for p in prompts
            for seed in range(probe.runs * probe.images_per_prompt)
        ]

    known = [row for row in curve(0) if row.facts["step"] == 0]
    for arrived in probe.steps[2:]:
        rows = {**alike(curve(arrived)), "base": known}
        assert number(probe.weigh(rows, ROLES), "advantage").high <= MARGINS.advantage + 1e-9, arrived
    assert all(later <= 1.45 * step for step, later in zip(STEPS[5:], STEPS[6:], strict=False))
    assert all(later <= 2 * step for step, later in zip(probe.steps[1:], probe.steps[2:], strict=False))


@pytest.mark.parametrize(
    ("kind", "preset"), [(Neighbours, "standard"), (Neighbours, "full"), (Unrelated, "full")], ids=str
)
def test_nothing_lost_is_called_non_inferior(kind, preset):
    spread = {"wide": PICTURES[preset]["wide"], "images": PICTURES[preset]["images_per_prompt"]}
    asked = [prompt for prompt in SUITE.prompts(**spread) if prompt.group == kind.group]
    rows = [
        Observation("copy", p.label, p.text, seed, 1.0, None, {"template": p.template, "phrase": p.phrase})
        for p in asked
        for seed in range(SUITE.pictures(**spread))
    ]
    evidence = kind.preset(preset).weigh(alike(rows), ROLES)
    view = View("copy", evidence, ROLES, Facts(preset, {"copy": "weights"}))
    assert findings.utility(view, kind.key) == "non-inferior"
