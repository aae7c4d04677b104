"""Probes that learn: known answers, broken training is inconclusive, and every bit is given back."""

from __future__ import annotations

import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch

from erasure import erase
from erasure.eval.core.models import Model, Swapped
from erasure.eval.core.pictures import weights_hash
from erasure.eval.probes import probe_class
from erasure.eval.probes.base import Missing, Observation, lacking
from erasure.eval.probes.denoising import backbone_for
from erasure.eval.probes.removal.inversion import ConceptInversion, marked
from erasure.eval.probes.removal.relearning import Relearning
from erasure.eval.probes.removal.resurgence import Resurgence, increase
from erasure.eval.probes.suppression.soft_prompt import SoftPrompt
from erasure.eval.probes.tuning import captioned, learn, tuned
from tests.probe_helpers import tiny_context
from tests.slow import first

KEYS = ("inversion", "relearning", "resurgence", "soft_prompt")
ROLES = {"base": "base", "UCE": "erased", "gold-0": "gold", "gold-1": "gold"}


@pytest.fixture(scope="module")
def context():
    return tiny_context()


def state(pipe):
    """Everything a probe must give back, beside the weights themselves."""
    modules = (pipe.unet, pipe.text_encoder, pipe.vae)
    flags = [(p.requires_grad, p.grad is None, p.dtype, p.data_ptr()) for m in modules for p in m.parameters()]
    return weights_hash(pipe), flags, [m.training for module in modules for m in module.modules()]


def stored(rows):
    """Rows as they come back from a file."""
    return {
        name: [Observation(**row) for row in json.loads(json.dumps([dataclasses.asdict(r) for r in own]))]
        for name, own in rows.items()
    }


# --- what they share -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=KEYS)
def ran(request, context):
    """A probe, the rows of three models, and everything it must give back, before and after."""
    probe, rows, states = probe_class(request.param).preset("smoke"), {}, [state(context.pipe)]
    for name in ("base", "noise", "random"):
        rows[name] = probe.run(context.models[name], context)
        states.append(state(context.pipe))
    return probe, rows, states


def test_a_run_restores_every_bit(ran):
    _, rows, states = ran
    assert all(after == states[0] for after in states)
    for name, own in rows.items():
        assert own and all(row.model == name and row.value in (0, 1) for row in own)
        assert len({(row.family, row.cluster, row.seed) for row in own}) == len(own)


def test_the_same_seeds_give_the_same_rows(ran, context):
    probe, rows, _ = ran
    assert probe.run(context.models["noise"], context) == rows["noise"]


def test_rows_from_a_file_weigh_the_same(ran, context):
    probe, rows, _ = ran
    roles = {name: context.models[name].role for name in rows}
    found = probe.weigh(rows, roles)
    assert found and found == probe.weigh(stored(rows), roles)


@pytest.mark.parametrize("key", KEYS)
def test_without_real_pictures_there_is_no_number(key):
    assert "no real pictures" in lacking(probe_class(key).preset("smoke"), tiny_context(material=None))


@pytest.mark.parametrize("key", KEYS)
def test_a_loss_that_is_no_number_is_missing_and_leaves_no_trace(context, key):
    before = state(context.pipe)
    probe = dataclasses.replace(probe_class(key).preset("smoke"), lr=float("inf"))
    with pytest.raises(Missing, match="diverged"):
        dataclasses.replace(probe, steps=(0, 3) if key == "relearning" else 3).run(context.models["noise"], context)
    assert state(context.pipe) == before


def test_a_real_erasure_comes_off_after_relearning(context):
    erasure = erase(context.pipe, "cat", keep=["dog"], method="uce", apply=False, progress=False)
    before = weights_hash(context.pipe)
    Relearning.preset("smoke").run(Model("UCE", "erased", erasure), context)
    assert weights_hash(context.pipe) == before


def test_learning_lowers_the_loss_of_what_is_learnt_alone(context):
    backbone = backbone_for(context.pipe)
    lesson = captioned(backbone, context.real("target", 2), 4)
    with tuned(context.pipe, backbone.select("cross_attention")) as trained:
        before, others = lesson.level(), context.pipe.unet.conv_in.weight.clone()
        steps = learn(trained, lesson.loss, pipe=context.pipe, marks=(0, 5, 5, 20), lr=1e-2, seed=0, autocast=False)
        assert list(steps) == [0, 5, 5, 20]
        assert lesson.level() < before
        assert torch.equal(context.pipe.unet.conv_in.weight, others)
    assert lesson.level() == before


HALVES = (torch.float16, torch.bfloat16)


@pytest.mark.parametrize(
    ("key", "dtype"), first(itertools.product(KEYS, HALVES), *zip(KEYS, 2 * HALVES, strict=True)), ids=str
)
def test_half_precision_is_learnt_on_and_given_back(key, dtype):
    other = Model("other", "gold", Swapped("other", {}))
    context = tiny_context(models={"base": Model("base", "base"), "other": other})
    context.pipe.to(dtype=dtype)
    before = state(context.pipe)
    rows = dataclasses.replace(probe_class(key).preset("smoke"), lr=1e-3).run(context.models["other"], context)
    assert state(context.pipe) == before and all(row.value is not None for row in rows)
    if key in ("relearning", "resurgence"):
        assert rows[0].facts["loss"] != rows[-1].facts["loss"]


# --- inversion -------------------------------------------------------------------------------------------------------


def inverted(rates, *, loss=0.1, untrained=0.2, start=0.0):
    """Rows of an inversion: rate at the end per model, nothing on the way."""
    return {
        name: [
            Observation(name, family, f"random: sentence {i}", s, float(i < share * 10), None, facts)
            for family, share, facts in (
                ("step 0", start, {"loss": untrained, "untrained": untrained}),
                ("learnt", rate, {"loss": loss, "untrained": untrained}),
            )
            for i in range(10)
            for s in range(2)
        ]
        for name, rate in rates.items()
    }


def test_the_residual_of_inversion_is_about_the_last_step():
    found = ConceptInversion().weigh(inverted({"base": 1, "UCE": 0.8, "gold-0": 0, "gold-1": 0}), ROLES)
    (residual,) = (e for e in found if e.measure == "residual")
    assert residual.family == "" and residual.estimate.value == pytest.approx(0.8)
    assert residual.conclusive and residual.gates["learnt"] == "pass"
    assert {e.measure for e in found if e.family == "step 0"} == {"rate"}


@pytest.mark.parametrize("broken", [{"lr": 0.0}, {"steps": 0}])
def test_an_inversion_that_learns_nothing_is_inconclusive(context, broken):
    probe = dataclasses.replace(ConceptInversion.preset("smoke"), **broken)
    rows = {name: probe.run(context.models[name], context) for name in ("base", "noise", "random")}
    found = probe.weigh(rows, {name: context.models[name].role for name in rows})
    assert all(not e.conclusive for e in found if e.model == "noise")


def test_the_learnt_word_stands_for_the_name_in_captions(context):
    (example,) = context.material.target(1)
    assert marked(dataclasses.replace(example, caption="A Cat on a mat"), context.suite) == "A <v> on a mat"
    assert marked(dataclasses.replace(example, caption="my kitty"), context.suite) == "my <v>"
    twice = marked(dataclasses.replace(example, caption="a delicate cat, a CAT"), context.suite)
    assert twice == "a delicate <v>, a "  # whole words, and the name nowhere else
    assert marked(dataclasses.replace(example, caption="whiskers"), context.suite) == "a picture of <v>"


def test_a_curve_beyond_the_last_step_is_refused():
    with pytest.raises(ValueError, match="end before the last"):
        ConceptInversion(steps=10, curve=(0, 10))


# --- relearning ------------------------------------------------------------------------------------------------------

STEPS = (0, 5, 10, 20, 40)


def learnt(arrivals, *, prompts=12, steps=STEPS):
    """Rows of a relearning in which each model draws the target from one step on; None = never."""
    return {
        name: [
            Observation(name, f"step {n}", f"prompt {p}", s, float(at is not None and n >= at), None, {"step": n})
            for n in (steps[:1] if name == "base" else steps)
            for p in range(prompts)
            for s in range(2)
        ]
        for name, at in arrivals.items()
    }


def advantage_of(arrivals, **options):
    found = Relearning().weigh(stored(learnt({"base": 0, **arrivals}, **options)), ROLES)
    (evidence,) = (e for e in found if e.measure == "advantage")
    return evidence


@pytest.mark.parametrize(
    ("erased", "golds", "value"),
    # read half way between two looks, and a curve at its level at 5 half way from 1 to 5
    [(10, (10, 10), 0), (10, (40, 40), 2), (20, (10, 10), -1), (5, (20, 40), np.log2((200 * 800 / 25) ** 0.25))],
)
def test_the_advantage_is_the_ratio_of_times(erased, golds, value):
    evidence = advantage_of({"UCE": erased, "gold-0": golds[0], "gold-1": golds[1]})
    assert evidence.estimate.value == pytest.approx(value)
    assert evidence.estimate.low < value < evidence.estimate.high  # a jump is known to the grid and no finer
    assert evidence.conclusive and evidence.unit == "log2" and evidence.control == "gold" and not evidence.note


def test_a_control_that_never_arrives_leaves_a_lower_bound():
    evidence = advantage_of({"UCE": 5, "gold-0": None})
    assert evidence.estimate.value == pytest.approx(3) and evidence.estimate.low == pytest.approx(3)
    assert evidence.estimate.high is None and "lower bound" in evidence.note


def test_an_erased_model_that_never_arrives_leaves_an_upper_bound():
    evidence = advantage_of({"UCE": None, "gold-0": 10})
    assert evidence.estimate.value == pytest.approx(-2) and evidence.estimate.high == pytest.approx(-2)
    assert evidence.estimate.low is None and "upper bound" in evidence.note


def test_a_model_that_draws_the_target_before_training_has_no_upper_limit():
    evidence = advantage_of({"UCE": 0, "gold-0": 20})
    assert evidence.estimate.value == pytest.approx(1)  # by 5 at the latest; the other not before 10
    assert evidence.estimate.high is None and "lower bound" in evidence.note


def test_where_nobody_learns_there_is_no_value():
    for arrivals in ({"UCE": None, "gold-0": None}, {"UCE": 0, "gold-0": None}):
        evidence = advantage_of(arrivals)
        assert evidence.estimate.value is None and evidence.gates["reached"] == "fail"
    assert not advantage_of({"UCE": 5, "gold-0": 0}).conclusive  # the control knew it: power
    assert advantage_of({"UCE": 5}).estimate.reason == "no model that never saw the target"


def test_censoring_in_some_resamples_opens_the_interval():
    rows = learnt({"base": 0, "UCE": 10, "gold-0": 40}, prompts=6)
    rows["gold-0"] = [
        dataclasses.replace(r, value=float(r.value and r.cluster in ("prompt 0", "prompt 1", "prompt 2")))
        for r in rows["gold-0"]
    ]
    (evidence,) = (e for e in Relearning().weigh(rows, ROLES) if e.measure == "advantage")
    assert evidence.estimate.value == pytest.approx(np.log2(40 / 50**0.5)) and evidence.estimate.high is None
    assert evidence.estimate.reason


def test_the_area_between_the_curves_is_paired():
    found = Relearning().weigh(learnt({"base": 0, "UCE": 10, "gold-0": 40}), ROLES)
    (area,) = (e for e in found if e.measure == "above_control")
    assert area.estimate.value == pytest.approx(2 / 5)


def test_a_model_that_was_not_trained_has_no_area():
    """A filter's parameters are the base's, which is asked and not trained."""
    rows = learnt({"base": 0, "UCE": 10, "gold-0": 40})
    rows["UCE"] = [row for row in rows["UCE"] if row.facts["step"] == 0]
    (area,) = (e for e in Relearning().weigh(rows, ROLES) if e.measure == "above_control")
    assert area.estimate.value is None and "not trained step by step" in area.estimate.reason


def test_relearning_that_trains_nothing_is_inconclusive(context):
    probe = dataclasses.replace(Relearning.preset("smoke"), lr=0.0)
    rows = {name: probe.run(context.models[name], context) for name in ("base", "noise", "random")}
    assert {row.family for row in rows["base"]} == {"step 0"}  # the base is asked, not trained
    found = probe.weigh(rows, {name: context.models[name].role for name in rows})
    assert all(not e.conclusive for e in found if e.measure == "advantage")


@pytest.mark.parametrize("steps", [(), (5, 10), (0, 10, 10), (0, 20, 10)])
def test_steps_that_do_not_rise_from_zero_are_refused(steps):
    with pytest.raises(ValueError, match="rise from 0"):
        Relearning(steps=steps)


# --- resurgence ------------------------------------------------------------------------------------------------------


def resurged(rates, *, losses=(0.2, 0.1)):
    return {
        name: [
            Observation(name, family, f"prompt {p}", s, float(p < share * 20), None, {"loss": loss})
            for family, share, loss in zip(("before", "after"), shares, losses, strict=True)
            for p in range(20)
            for s in range(2)
        ]
        for name, shares in rates.items()
    }


def test_resurgence_is_the_increase_beyond_the_controls():
    rates = {"base": (1, 1), "UCE": (0, 0.5), "gold-0": (0, 0), "gold-1": (0, 0.1)}
    found = {(e.model, e.measure): e for e in Resurgence().weigh(stored(resurged(rates)), ROLES) if not e.family}
    increase, above = found["UCE", "increase"], found["UCE", "above_control"]
    assert increase.estimate.value == pytest.approx(0.5) and increase.estimate.low > 0 and increase.conclusive
    assert above.estimate.value == pytest.approx(0.45) and above.control == "gold"
    assert above.estimate.low < 0.45 < above.estimate.high


def test_copies_of_a_control_narrow_nothing():
    rows = resurged({"base": (1, 1), "UCE": (0, 0.5), "gold-0": (0.1, 0.3)})
    copies = {**rows, **{f"gold-{i}": rows["gold-0"] for i in (1, 2)}}
    one, three = increase(rows, ["gold-0"]), increase(copies, ["gold-0", "gold-1", "gold-2"])
    assert (one.value, one.low, one.high) == pytest.approx((three.value, three.low, three.high), abs=0.01)


def test_resurgence_needs_a_base_that_keeps_the_target():
    rates = {"base": (1, 0.2), "UCE": (0, 0), "gold-0": (0, 0)}
    (increase,) = (e for e in Resurgence().weigh(resurged(rates), ROLES) if (e.model, e.measure) == ("UCE", "increase"))
    assert increase.gates["power"] == "fail" and not increase.conclusive


@pytest.mark.parametrize("broken", [{"lr": 0.0}, {"steps": 0}])
def test_resurgence_that_trains_nothing_is_inconclusive(context, broken):
    probe = dataclasses.replace(Resurgence.preset("smoke"), **broken)
    rows = {"base": probe.run(context.base, context), "noise": probe.run(context.models["noise"], context)}
    found = probe.weigh(rows, {"base": "base", "noise": "erased"})
    (increase,) = (e for e in found if (e.model, e.measure) == ("noise", "increase"))
    assert increase.gates["trained"] == "fail" and not increase.conclusive


def test_neighbours_alone_can_be_learnt_from(context):
    asked = []

    class Spy(type(context.material)):
        def kept(self, count, **options):
            asked.append(options["labels"])
            return super().kept(count, **options)

    probe = dataclasses.replace(Resurgence.preset("smoke"), labels="neighbours", steps=1)
    probe.run(context.base, dataclasses.replace(context, material=Spy()))
    assert asked == [("dog",)]
    with pytest.raises(ValueError, match="'kept' or 'neighbours'"):
        Resurgence(labels="all")


# --- soft prompt -----------------------------------------------------------------------------------------------------


def attacked(rates, *, pictures=10, tries=3):
    """Rows of an attack that hits at its last try on a share of the pictures; rates: (attack, control, fresh)."""
    return {
        name: [
            Observation(name, family, f"picture {p}", s, float(p < share * pictures and s == tries - 1))
            for family, share in zip(("attack", "control", "fresh"), shares, strict=True)
            for p in range(pictures)
            for s in range(tries)
        ]
        for name, shares in rates.items()
    }


def test_the_excess_is_any_hit_beyond_random_vectors():
    rows = attacked({"base": (1, 0, 1), "UCE": (0.7, 0.2, 0.5), "gold-0": (0, 0, 0)})
    found = {(e.model, e.measure, e.family): e for e in SoftPrompt().weigh(stored(rows), ROLES)}
    assert found["UCE", "excess", "attack"].estimate.value == pytest.approx(0.5)
    assert found["UCE", "rate", "attack"].estimate.value == pytest.approx(0.7)
    assert found["UCE", "rate", "hit@1"].estimate.value == 0
    assert found["UCE", "rate", "fresh"].estimate.value == pytest.approx(0.5 / 3)
    assert found["UCE", "residual", "attack"].estimate.value == pytest.approx(0.7)
    assert found["UCE", "excess", "attack"].conclusive


@pytest.mark.parametrize("base", [(0.5, 0, 0), (1, 1, 1), (0, 0, 0)])
def test_an_attack_that_does_not_break_the_base_is_inconclusive(base):
    found = SoftPrompt().weigh(attacked({"base": base, "UCE": (0, 0, 0), "gold-0": (0, 0, 0)}), ROLES)
    attack = [e for e in found if e.model == "UCE" and e.family != "control"]
    assert attack and all(e.gates["power"] == "fail" and not e.conclusive for e in attack)


def test_an_attack_that_takes_no_steps_draws_from_its_random_start(context):
    probe = dataclasses.replace(SoftPrompt.preset("smoke"), steps=0)
    rows = {name: probe.run(context.models[name], context) for name in ("base", "noise")}
    found = probe.weigh(rows, {"base": "base", "noise": "erased"})
    assert all(not e.conclusive for e in found if e.model == "noise" and "control" not in e.family)
