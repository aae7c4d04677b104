"""Against the erasure's own objective: what is trained, what it moves, and that a model without the target shows it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from erasure.backbone import backbone_of
from erasure.eval.core.hashes import weights_hash
from erasure.eval.probes.base import Observation, lacking
from erasure.eval.probes.removal.gradient_reversal import GradientReversal, Reversal
from erasure.eval.probes.tuning import learn, tuned
from tests.probe_helpers import ROLES, tiny_context
from tests.slow import first
from tests.tiny import tiny

SMOKE = GradientReversal.preset("smoke")


@pytest.fixture(scope="module")
def context():
    return tiny_context(material=None)  # it needs no picture


@pytest.fixture(scope="module", params=first(("sd1", "sdxl", "sd3", "flux"), "sd1", "flux"))
def banked(request):
    context = tiny_context(pipe=tiny(request.param), models={})
    backbone = backbone_of(context.pipe)
    return backbone, *SMOKE.bank(backbone, ["a cat", "a dog"], context)


# --- the objective ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("g", [3.0, -1.0])
def test_before_training_the_loss_is_what_g_leaves_of_the_models_own_difference(banked, g):
    backbone, bank, text = banked
    rows = torch.randint(len(bank), (16,), generator=torch.Generator().manual_seed(0))
    apart = (bank.conditional - bank.unconditional)[rows].double()
    wanted = (1 - g) ** 2 * apart.square().mean().item()
    assert wanted > 0 and Reversal(backbone, bank, text, g, 2).level() == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize(("g", "low", "high"), first([(3.0, 1.4, 4.0), (-1.0, -2.0, 0.6)], (-1.0, -2.0, 0.6)))
def test_training_makes_the_difference_from_the_empty_prompt_larger_or_turns_it_round(context, g, low, high):
    backbone = backbone_of(context.pipe)
    bank, text = SMOKE.bank(backbone, ["a cat", "a dog"], context)
    lesson, rows = Reversal(backbone, bank, text, g, 8), torch.arange(len(bank))
    own = bank.conditional - bank.unconditional
    with tuned(context.pipe, backbone.select("all")) as trained:
        levels = [lesson.level() for _ in learn(
            trained, lesson.loss, pipe=context.pipe, marks=(0, 60), lr=1e-3, seed=0, autocast=False
        )]  # fmt: skip
        with torch.no_grad():
            after = backbone.predict(*bank.inputs(backbone, text, rows)) - bank.unconditional
    assert levels[1] < 0.5 * levels[0]
    assert low < ((after * own).sum() / own.square().sum()).item() < high


# --- a run -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_needs_no_picture_restores_every_bit_and_repeats_itself(context):
    before = weights_hash(context.pipe)
    rows = {name: SMOKE.run(context.models[name], context) for name in ("base", "noise", "gold-0")}
    assert weights_hash(context.pipe) == before and SMOKE.run(context.models["noise"], context) == rows["noise"]
    assert {row.family for row in rows["base"]} == {"amplified 0", "reversed 0"}  # only asked
    assert {row.family for row in rows["gold-0"]} == {f"{way} {step}" for way in SMOKE.ways for step in (0, 2)}
    hashes = {
        family: [r.facts["image_hash"] for r in rows["noise"] if r.family == family]
        for family in ("amplified 0", "reversed 0", "amplified 2", "reversed 2")
    }
    assert hashes["amplified 0"] == hashes["reversed 0"]
    assert len({*map(tuple, hashes.values())}) == 3
    assert SMOKE.weigh(rows, {name: context.models[name].role for name in rows})


def test_without_a_control_it_says_so():
    alone = tiny_context()
    alone = dataclasses.replace(alone, models={name: alone.models[name] for name in ("base", "noise")})
    assert "never saw the target" in lacking(SMOKE, alone)


@pytest.mark.parametrize("wrong", [{"amplify": 1.0}, {"reverse": 0.5}, {"amplify": None, "reverse": None}])
def test_a_g_that_does_nothing_is_refused(wrong):
    with pytest.raises(ValueError, match="amplifying takes g above 1"):
        GradientReversal(**wrong)
    with pytest.raises(ValueError, match="steps must rise"):
        GradientReversal(steps=(5, 10))


# --- what is made of it ----------------------------------------------------------------------------------------------


def fabricated(curves: dict[str, dict[tuple[str, int], float]]) -> dict[str, list[Observation]]:
    """Twenty prompts a point; ``curves`` give the share with the target by way and step."""
    return {
        name: [
            Observation(name, f"{way} {step}", f"p{i}", s, float(i < 20 * share), None,
                        {"way": way, "step": step, "run": 0, "prompt": f"p{i}"})
            for (way, step), share in own.items() for i in range(20) for s in range(2)
        ]
        for name, own in curves.items()
    }  # fmt: skip


def test_what_comes_back_in_the_erased_and_never_in_a_retrained_model_is_above_the_control():
    nothing = {(way, step): 0.0 for way in ("amplified", "reversed") for step in (0, 5, 10)}
    back = {**nothing, ("amplified", 5): 0.6, ("amplified", 10): 0.9}
    base = {("amplified", 0): 1.0, ("reversed", 0): 1.0}
    rows = fabricated({"base": base, "UCE": back, "gold-0": nothing, "gold-1": nothing})
    found = {
        (e.measure, e.family): e for e in GradientReversal(steps=(0, 5, 10)).weigh(rows, ROLES) if e.model == "UCE"
    }
    assert [found["rate", f"amplified {k}"].estimate.value for k in (0, 5, 10)] == [0, 0.6, 0.9]
    assert found["above_control", "amplified"].estimate.value == pytest.approx(0.5)
    assert found["above_control", "amplified"].conclusive and found["above_control", "amplified"].estimate.low > 0
    advantage = found["advantage", "amplified"]
    assert advantage.estimate.value >= 1 and "a lower bound" in advantage.note and advantage.conclusive
    assert found["above_control", "reversed"].estimate.value == 0
    assert found["advantage", "reversed"].estimate.value is None and np.isfinite(advantage.estimate.value)
