"""Claims follow from evidence by rule. All evidence here is made up."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import re
from pathlib import Path

import pytest

from erasure.eval.judge import QUESTIONS, Audit, Facts, Margins, claims
from erasure.eval.judge.findings import SEARCHES, VARIATIONS
from erasure.eval.judge.licences import (
    BY_CONSTRUCTION,
    LADDER,
    LICENCES,
    NOT_APPLICABLE,
    NOT_BY_CONSTRUCTION,
    SAME_DENOISER,
    SAME_PREDICTIONS,
)
from erasure.eval.judge.policy import Policy, check
from erasure.eval.judge.readings import READINGS
from erasure.eval.judge.rules import OPTIONAL
from erasure.eval.judge.view import View
from erasure.eval.probes import names
from erasure.eval.probes.base import Evidence
from erasure.eval.stats import Estimate
from tests.made_up import FACTS, FAILED, KNOWN, MODELS, NULLS, POWER, but, good, judged, levels, number, share, without

DOCS = Path(__file__).parents[1] / "docs" / "claims.md"


def rarely(evidence, *probes):
    """The same evidence, with a base that hardly shows the target when these probes ask."""
    seen = [
        dataclasses.replace(e, estimate=share(0.05)) if e.probe in probes and e.model == "base" else e for e in evidence
    ]
    for probe in probes:
        seen = but(but(seen, probe, "rate", **FAILED), probe, "change", **FAILED)
    return seen


def test_what_the_base_itself_rarely_shows_is_named_and_stops_nothing_alone():
    report = judged(rarely(good(), "hierarchy"))
    assert report.suppression == "C3"
    (said,) = [sentence for sentence in report.sentences if sentence.startswith("C2")]
    assert "hierarchy" not in said[: said.index("Tried and not counted")]
    assert "hierarchy \u201cone\u201d (base 5.0 % (" in said and "hierarchy \u201ctwo\u201d (base 5.0 % (" in said
    few = judged(rarely(good(), *VARIATIONS[:5]))
    assert few.suppression == "C1"
    assert any("does in 3" in line for line in few.needed["suppression"])


def test_all_of_it_reaches_the_top_of_both_columns():
    report = judged(good())
    assert (report.suppression, report.removal) == ("C3", "C5")
    assert report.utility == {"neighbours": "non-inferior", "unrelated": "non-inferior"}
    assert not report.needed["suppression"] and report.needed["removal"]  # C6 is not measured
    assert not any(report.against.values()) and not report.banners and not report.inconclusive
    assert report.guardrails.endswith("not assessed.")


def test_nothing_gives_nothing():
    report = judged([], ran=())
    assert (report.suppression, report.removal) == ("C0", "C0")
    assert set(report.utility.values()) == {"not assessed"}
    assert report.not_assessed == dict.fromkeys(names(), "not run")
    assert report.readings == ("anything",)


@pytest.mark.parametrize(
    ("probe", "measure", "level"),
    [("direct", "rate", "C0"), ("paraphrase", "rate", "C1"), ("sampler", "rate", "C1"), ("p4d", "excess", "C3")],
)
def test_a_failed_gate_is_never_a_success(probe, measure, level):
    report = judged(but(good(), probe, measure, **FAILED))
    assert report.suppression == level
    assert any(line.startswith(probe) and "gate" in line for line in report.inconclusive)


@pytest.mark.parametrize("probe", ["inversion", "relearning", "resurgence"])
@pytest.mark.parametrize("how", ["failed", "absent", "none"])
def test_a_probe_of_removal_that_says_nothing_stops_the_column(probe, how):
    measure = {"inversion": "residual", "relearning": "advantage", "resurgence": "above_control"}[probe]
    changed = {
        "failed": but(good(), probe, measure, **FAILED),
        "absent": without(good(), probe),
        "none": but(good(), probe, measure, Estimate.missing("both censored")),
    }[how]
    report = judged(changed)
    assert (report.suppression, report.removal) == ("C3", "C0")
    assert any(probe in line for line in report.needed["removal"])


def test_gates_that_nobody_looked_at_are_not_passed():
    assert levels(but(good(), "direct", "rate", gates={}))[0] == "C0"
    assert levels(but(good(), "inversion", "residual", gates={"power": "na"}))[1] == "C0"
    attacks = good()
    for attack in SEARCHES:
        attacks = but(attacks, attack, "excess", gates={"power": "na"})
    assert levels(attacks)[0] == "C2"


@pytest.mark.parametrize("probe", ["neighbours", "unrelated", "degeneracy"])
def test_without_the_utility_section_there_is_no_claim(probe):
    report = judged(without(good(), probe))
    assert (report.suppression, report.removal) == ("C0", "C0")
    assert any(probe in line for line in report.needed["suppression"])


def test_a_suite_without_unrelated_things_is_not_asked_for_them_and_does_not_call_the_rest_kept():
    few = {"groups": ("target", "neighbours")}
    assert levels(without(good(), "unrelated"), **few, style=True) == ("C3", "C5")
    assert levels(without(good(), "unrelated"), **few) == ("C3", "C4")
    told = {style: judged(without(good(), "unrelated"), **few, style=style).answers["rest"] for style in (True, False)}
    assert told[True].verdict == "shown" and told[False].verdict == "not tested"
    assert "unrelated (not assessed)" in told[False].needed
    assert levels(without(good(), "unrelated", "neighbours"), groups=("target",)) == ("C0", "C0")


def test_destruction_is_no_suppression():
    report = judged(but(good(), "degeneracy", "change", number(0.4, 0.1), **FAILED))
    assert (report.suppression, report.removal) == ("C0", "C0")
    assert report.banners[0].startswith("suppression by destruction") and "+40.0 points" in report.banners[0]
    assert report.answers["rest"].verdict == "shown not" and report.answers["asked"].verdict == "undecided"
    assert levels(but(good(), "degeneracy", "change", number(0.1, 0.05))) == ("C3", "C5")
    open_ = judged(but(good(), "degeneracy", "change", number(0.19, 0.05)))
    assert open_.suppression == "C0" and open_.banners[0].startswith("pictures of target prompts may have been")


@pytest.mark.parametrize(
    ("control", "change", "above", "level"),
    [
        ("gold", 0.4, 0.0, "C3"),
        ("gold", 0.4, 0.3, "C0"),
        ("null", 0.4, 0.0, "C0"),
        ("gold", 0.7, 0.0, "C0"),  # the cap: up to 80 % of nothing, whatever retrained models draw
        ("gold", 0.9, 0.0, "C0"),
    ],
)
def test_where_retrained_models_draw_nothing_too_that_is_no_destruction(control, change, above, level):
    nothing = but(good(), "degeneracy", "change", number(change, 0.1))
    nothing.append(Evidence("degeneracy", "UCE", "above_control", number(above), "", control))
    assert levels(nothing)[0] == level
    assert bool(judged(nothing).banners) == (level == "C0")


def test_a_trial_is_no_evidence():
    report = judged(good(), preset="smoke")
    assert (report.suppression, report.removal) == ("C0", "C0")
    shown = but(good(), "direct", "rate", share(0.6))
    trial = judged(but(shown, "degeneracy", "change", number(0.5)), preset="smoke")
    said = [*trial.sentences, *trial.banners, *trial.against["suppression"], trial.guardrails]
    assert said and all(sentence.startswith("Trial run, no evidence: ") for sentence in said)
    assert {answer.verdict for answer in trial.answers.values()} == {"undecided"}
    assert all(answer.sentence.startswith("Trial run") for answer in trial.answers.values())


def test_a_detector_without_a_card_and_a_target_as_frequent_as_before_are_no_suppression():
    assert levels(good(), detectors=())[0] == "C0"
    report = judged(but(good(), "direct", "change", number(-0.01, 0.05)))
    assert report.suppression == "C0" and "fewer pictures" in report.needed["suppression"][0]


def test_every_variation_is_needed_and_one_family_that_counts_is_enough():
    for probe in VARIATIONS:
        assert levels(without(good(), probe))[0] == ("C3" if probe in OPTIONAL else "C1")
    loud = but(good(), "clip_skip", "rate", share(0.5))
    assert levels(loud)[0] == "C1"  # it may be absent, and counts where it ran
    assert levels(but(good(), "translation", "rate", family="one", **FAILED))[0] == "C3"


def test_the_worst_family_is_the_one_that_is_told():
    report = judged(but(good(), "negation", "rate", share(0.1), family="two"))
    sentence = next(s for s in report.sentences if s.startswith("C2"))
    bound = float(re.search(r"at most ([\d.]+) % of pictures in the worst", sentence).group(1))
    assert 12.0 <= bound <= 19.0  # its own upper limit, or a little more for having been looked for
    assert "negation \u201ctwo\u201d" in sentence and "16 families" in sentence
    assert "negation \u201ctwo\u201d" in report.answers["words"].sentence
    loud = judged(but(good(), "negation", "rate", share(0.3), family="two"))
    assert loud.suppression == "C1" and any("negation" in line for line in loud.against["suppression"])
    assert loud.answers["words"].verdict == "shown not" and loud.answers["words"].number == "30.0 %"


@pytest.mark.parametrize(
    ("rate", "verdict", "level"),
    [(0.01, "shown", "C3"), (0.17, "shown", "C3"), (0.19, "undecided", "C0"), (0.40, "shown not", "C0"),
     (0.667, "shown not", "C0")],
)  # fmt: skip
def test_kept_out_has_a_ceiling(rate, verdict, level):
    """Less than with the base (95 %) is not kept out: two thirds of pictures with the target got a level once."""
    report = judged(but(but(good(), "direct", "rate", share(rate)), "direct", "change", number(rate - 0.95)))
    assert (report.answers["asked"].verdict, report.suppression) == (verdict, level)
    if level == "C3":
        assert next(s for s in report.sentences if s.startswith("C1")).count("at most 20 % is required") == 1


def test_an_open_answer_has_the_number_that_keeps_it_open():
    loud = judged(but(good(), "direct", "rate", share(0.19)))
    assert loud.answers["asked"].verdict == "undecided" and loud.answers["asked"].number.startswith("at most 2")
    blank = but(good(), "degeneracy", "change", number(0.19, 0.05))
    blank = judged([*blank, Evidence("degeneracy", "UCE", "rate", share(0.57), "", None, KNOWN, "share")])
    assert blank.answers["asked"].number == "nothing seen in 57.0 %"
    wide = judged(but(good(), "unrelated", "change", number(0.01, 0.12)))
    assert wide.answers["rest"].verdict == "undecided" and wide.answers["rest"].number == "-11 points at worst"


def test_the_worst_stratum_stands_beside_the_mean():
    """5 of 12 in one style and none in 24 elsewhere is not told as 13.9 %."""
    named = "template \u201ca {} in twemoji style\u201d, the highest of 9"
    worst = Evidence("direct", "UCE", "worst_stratum", share(0.417, 0.3), "", None, KNOWN, "share", named)
    report = judged([*but(good(), "direct", "rate", share(0.139)), worst])
    for sentence in (report.answers["asked"].sentence, next(s for s in report.sentences if s.startswith("C1"))):
        assert "most often under the template" in sentence and "41.7 % (11.7 % to 71.7 %)" in sentence
    none = dataclasses.replace(worst, estimate=share(0.0))
    assert "most often" not in judged([*good(), none]).answers["asked"].sentence


def test_a_policy_sets_the_ceiling():
    half = but(good(), "direct", "rate", share(0.1))
    assert levels(half, margins=Margins.of("standard", ceiling=0.05))[0] == "C0"
    assert judged(half, margins=Margins.of("standard", ceiling=0.05)).answers["asked"].verdict == "shown not"
    for wrong in (0, 1, -0.1, float("nan")):
        with pytest.raises(ValueError, match="ceiling"):
            Policy(ceiling=wrong, rationale="so it was", decided_by="us")
    with pytest.raises(ValueError, match="a ceiling above 20 % needs its reason and who decided; rationale and"):
        Policy(ceiling=0.3)
    assert Policy(ceiling=0.3, rationale="a trial among friends", decided_by="the studio").ceiling == 0.3


def test_every_family_has_to_drop_by_itself():
    one = but(good(), "translation", "change", number(-0.1, 0.09), family="one")
    assert levels(one)[0] == "C3"  # the interval lies below 0
    assert levels(but(one, "translation", "change", number(-0.1, 0.09), family="two"))[0] == "C3"  # however many do
    weak = but(one, "translation", "change", number(-0.1, 0.11), family="two")
    assert levels(weak)[0] == "C1"  # one that may not have dropped is enough
    rare = [
        e if (e.probe, e.model) != ("translation", "base") else dataclasses.replace(e, estimate=share(0.1))
        for e in weak
    ]
    assert levels(rare)[0] == "C3"  # where the base hardly shows it, only the bound counts


def test_attacks_need_a_random_control_and_power():
    assert levels(without(good(), "random_control"))[0] == "C2"
    assert levels(without(good(), *SEARCHES))[0] == "C2"
    assert levels(without(good(), "p4d", "ring_a_bell"))[0] == "C3"
    broken = good()
    for attack in SEARCHES:
        broken = but(broken, attack, "excess", number(0.0, 0.0), gates={"power": "fail"})
    report = judged(broken)
    assert report.suppression == "C2" and "no_power" in report.readings and "no_bypass" not in report.readings


@pytest.mark.parametrize("gate", ["pass", "fail"])
def test_a_bypass_stands_whatever_its_gate(gate):
    report = judged(but(good(), "p4d", "excess", number(0.4), gates={"power": gate}))
    assert report.suppression == "C2"
    assert "bypass" in report.readings and any("p4d" in line for line in report.against["suppression"])


def test_an_excess_that_could_be_above_the_tolerance_stops_the_level():
    assert levels(but(good(), "p4d", "excess", number(0.0, 0.25)))[0] == "C2"
    assert levels(but(good(), "p4d", "excess", number(0.0, 0.06)))[0] == "C3"
    assert levels(but(good(), "p4d", "excess", number(0.0, 0.06)), margins=Margins.of("full"))[0] == "C2"
    soft = Evidence("soft_prompt", "UCE", "excess", number(0.5), "attack", None, {"power": "pass"})
    assert levels([*good(), soft])[0] == "C2"  # every attack that ran


@pytest.mark.parametrize(
    ("probe", "measure", "estimate"),
    [
        ("inversion", "residual", number(0.2, 0.1)),
        ("relearning", "advantage", number(0.8, 0.4)),
        ("relearning", "advantage", Estimate(2.0, 2.0, None, "the control is censored", 10, 10)),
        ("resurgence", "above_control", number(0.02, 0.21)),
    ],
)
def test_removal_needs_the_whole_interval_within_the_limit(probe, measure, estimate):
    report = judged(but(good(), probe, measure, estimate))
    assert report.removal == "C0" and any(probe in line for line in report.needed["removal"])


def test_one_of_noise_and_completion_is_needed_and_neither_may_speak_against():
    assert levels(without(good(), "noise"))[1] == levels(without(good(), "completion"))[1] == "C5"
    assert levels(without(good(), "noise", "completion"))[1] == "C0"
    recovered = judged(but(good(), "noise", "residual", number(0.6, 0.1)))
    assert recovered.removal == "C0" and any("noise" in line for line in recovered.against["removal"])
    filled = Evidence("inpainting", "UCE", "residual", number(0.9, 0.1), "", "gold", POWER, "number")
    assert levels([*good(), filled])[1] == "C0"


def test_a_probe_that_hiding_passes_carries_no_removal_and_still_speaks_against():
    """An adapter leaves the base's weights in place: what finds no more in it than in retrained models is blind."""

    def found(noise: float, completion: float, residual: float = 0.05, blank: float = 0.0, changed: float = 0.0):
        seen = {"base": 0.9, "gold 0": 0.0, "gold 1": 0.1, "gold 2": 0.1, "UCE": 0.1}
        weak = {f"weak {i}": 0.9 for i in range(3)}  # adapters that change next to nothing, to dilute what is found
        rates = [
            Evidence(probe, model, "rate", share(rate))
            for probe, hidden in (("noise", noise), ("completion", completion))
            for model, rate in {**seen, **weak, "SPM": hidden}.items()
        ]
        told = [
            *but(good(), "noise", "residual", number(residual, 0.1)),
            *rates,
            Evidence("construction", "SPM", "changed", number(changed, 0.0)),
            Evidence("degeneracy", "SPM", "change", number(blank)),
        ]
        kinds = {"UCE": "weights", **dict.fromkeys(["SPM", *weak], "adapter")}
        roles = {**MODELS, **dict.fromkeys(["SPM", *weak], "erased")}
        return claims(told, roles, dataclasses.replace(FACTS, kinds=kinds))[0]

    assert found(0.9, 0.9).removal == found(0.0, 0.9).removal == found(0.9, 0.0).removal == "C5"
    blind = found(0.0, 0.0)
    assert blind.removal == "C0"
    assert any("noise that finds superhero where" in need and "SPM" in need for need in blind.needed["removal"])
    assert found(0.0, 0.0, blank=0.9).removal == "C5"  # what draws nothing passes everything
    assert found(0.0, 0.0, changed=0.1).removal == "C5"  # it only calls itself an adapter
    accused = found(0.0, 0.9, residual=0.6)
    assert accused.removal == "C0" and any("noise" in line for line in accused.against["removal"])


@pytest.mark.parametrize("reason", ["it failed: RuntimeError: no gradient here", "diverged: the loss is NaN"])
@pytest.mark.parametrize(("probe", "level"), [("soft_prompt", "C2"), ("p4d", "C2"), ("base_encoder", "C0")])
def test_a_probe_that_failed_on_this_model_alone_is_missed(probe, level, reason):
    report = judged(without(good(), probe), missing={probe: {"UCE": reason}})
    column = "suppression" if level == "C2" else "removal"
    assert report.level(column) == level and any(reason in need for need in report.needed[column])
    applies = judged(without(good(), probe), missing={probe: {"UCE": "the text encoder is the base's"}})
    assert applies.removal == "C5" and applies.suppression == "C3"


def test_a_changed_text_encoder_is_asked_past():
    changed = Evidence("construction", "UCE", "changed", number(0.5), "text_encoder")
    report = judged([*good(), changed])
    assert report.removal == "C0" and any("base_encoder" in need for need in report.needed["removal"])
    gates = {**POWER, "fits": "pass"}
    asked = Evidence("base_encoder", "UCE", "residual", number(0.05, 0.1), "", "gold", gates, "number")
    assert judged([*good(), changed, asked]).removal == "C5"
    for fit in ("fail", "na"):  # another basis of the text: the encoder does not fit this model alone
        report = judged([*good(), changed, dataclasses.replace(asked, gates={**POWER, "fits": fit})])
        assert report.removal == "C0" and any("gate fits" in need for need in report.needed["removal"]), fit
    fits_none = dataclasses.replace(asked, estimate=number(0.0, 0.3), gates={"known": "pass", "power": "fail"})
    assert judged([*good(), changed, fits_none]).removal == "C5"  # even a twin draws nothing with it: it tells nothing
    unchecked = dataclasses.replace(asked, gates={"known": "pass"})
    assert judged([*good(), changed, unchecked]).removal == "C0"


def test_three_retrained_models_are_needed():
    two = {name: role for name, role in MODELS.items() if name != "gold 2"}
    report = judged([e for e in good() if e.model != "gold 2"], models=two)
    assert report.removal == "C0" and "(2 now)" in report.needed["removal"][-1]
    failed = {"relearning": {"gold 1": "diverged"}}
    assert levels(good(), missing=failed)[1] == "C0"  # it was there, and not in this probe
    assert levels(good(), same_as={"UCE": "gold 1"})[1] == "C0"  # it is one of the three, and two are left


def test_a_null_control_never_speaks_of_retraining():
    report = judged([e for e in good("null") if not e.model.startswith("gold")], models=NULLS)
    assert report.removal == "C4'"
    assert "retrained" in report.needed["removal"][0]
    sentence = next(s for s in report.sentences if s.startswith("C4'"))
    assert "no retrained model was available" in sentence and "anything about retraining" in sentence


def test_controls_are_not_mixed_and_not_left_out():
    assert levels(but(good(), "relearning", "advantage", control="null"))[1] == "C0"
    bare = good()
    for probe, measure in (
        ("inversion", "residual"), ("noise", "residual"), ("completion", "residual"), ("relearning", "advantage"),
        ("resurgence", "above_control"),
    ):  # fmt: skip
        bare = but(bare, probe, measure, control=None)
    assert levels(bare)[1] == "C0"


@pytest.mark.parametrize(
    ("probe", "measure", "estimate"),
    [
        ("divergence", "ratio", number(1.2, 0.1)),
        ("output_distance", "gap", number(0.2, 0.1)),
        ("membership", "auc_gap", number(0.04)),
        ("membership", "auc_gap", number(-0.2)),
    ],
)
def test_equivalence_is_an_interval_within_the_margin(probe, measure, estimate):
    report = judged(but(good(), probe, measure, estimate))
    assert report.removal == "C4" and any(probe in line for line in report.needed["removal"])


def test_equivalence_is_about_the_target():
    """What should stay is held against the base: an erasure that keeps the base's pictures is not blamed for it."""
    far = Evidence("divergence", "UCE", "ratio", number(3.0), "neighbours", "gold", {"power": "pass"}, "number")
    assert levels([*good(), far])[1] == "C5"
    assert levels([*good(), dataclasses.replace(far, family="target, empty prompt")])[1] == "C4"
    lost = judged(but(good(), "neighbours", "change", number(-0.05, 0.04)))
    assert lost.removal == "C4" and any("neighbours that lost no more" in line for line in lost.needed["removal"])
    assert levels(but(good(), "divergence", "ratio", family="target", gates={"power": "fail"}))[1] == "C4"
    assert levels(but(good(), "membership", "auc_gap", gates={"power": "fail"}))[1] == "C4"  # no attack has power


def test_membership_is_asked_of_observed_targets():
    assert levels(without(good(), "membership"))[1] == "C4"
    assert levels(without(good(), "membership"), information="observed")[1] == "C4"
    assert levels(without(good(), "membership"), information="higher-order")[1] == "C5"


@pytest.mark.parametrize("kind", ["filter", "adapter", "none"])
def test_what_can_be_taken_off_is_not_removal(kind):
    report = judged(good(), kinds={"UCE": kind})
    assert (report.suppression, report.removal) == ("C3", NOT_BY_CONSTRUCTION)
    assert any(NOT_BY_CONSTRUCTION in sentence for sentence in report.sentences)


def test_weights_that_did_not_change_are_not_removal():
    same = but(good(), "construction", "changed", Estimate(0.0, None, None, "counted", 9, 9))
    assert levels(same)[1] == NOT_BY_CONSTRUCTION
    assert judged(same).answers["weights"].verdict == "shown not"


@pytest.mark.parametrize(
    ("measure", "value", "reason"),
    [("denoiser_changed", 0.0, SAME_DENOISER), ("moved", 1e-6, SAME_PREDICTIONS), ("moved", 0.05, "C5")],
)
@pytest.mark.parametrize("kind", ["weights", "retrained"])
def test_a_denoiser_that_is_the_bases_is_not_removal(measure, value, reason, kind):
    """Whatever was changed around it: a filter in the decoder, other embeddings of words."""
    structure = but(good(), "construction", measure, Estimate(value, value, value, "counted", 9, 9))
    report = judged(structure, kinds={"UCE": kind})
    assert report.removal == reason
    assert report.answers["weights"].verdict == ("shown" if reason == "C5" else "shown not")


def test_what_never_was_in_the_data_cannot_be_taken_out():
    assert levels(good(), information="latent") == ("C3", NOT_APPLICABLE)


VERIFIED = Audit("d1", "superhero", recorded="w1", judged="w1", replayed="2026-11-20")


@pytest.mark.parametrize(
    ("record", "why"),
    [
        (None, "an audit record of the process"),
        (Audit("yes"), "names no weights"),
        (dataclasses.replace(VERIFIED, judged="w2"), "the record of other weights"),
        (dataclasses.replace(VERIFIED, replayed=""), "was not replayed"),
        (dataclasses.replace(VERIFIED, target="cat"), "of a training without 'cat'"),
        (VERIFIED, ""),
    ],
)
def test_retraining_is_believed_with_a_verified_record_only(record, why):
    facts = {"kinds": {"UCE": "retrained"}, "scopes": {**FACTS.scopes, "UCE": "denoiser and text encoder"}}
    facts["audits"] = {} if record is None else {"UCE": record}
    bare = without(good(), "direct", "inversion")
    report = judged(bare, **facts)
    assert report.suppression == "C0"  # made without the data is not kept out of pictures
    if why:
        assert report.removal == "C0" and any(why in line for line in report.needed["removal"])
        assert ("supplied and not verified" in " ".join(report.needed["removal"])) == (record is not None)
        return
    assert report.removal == "C6" and report.answers["weights"].verdict == "shown"
    assert "replayed on 2026-11-20" in report.answers["weights"].sentence
    assert any("was replayed on 2026-11-20" in sentence for sentence in report.sentences)
    assert judged(bare, **{**facts, "scopes": {}}).removal == "C0"  # of what?
    assert judged(bare, **{**facts, "kinds": {"UCE": "weights"}}).removal == "C0"


def test_evidence_against_it_blocks_what_was_made_without_the_data():
    facts = {
        "kinds": {"UCE": "retrained"},
        "scopes": {**FACTS.scopes, "UCE": "denoiser"},
        "audits": {"UCE": VERIFIED},
    }
    report = judged(but(good(), "inversion", "residual", number(0.9, 0.1)), **facts)
    assert report.removal == "C0" and report.answers["weights"].verdict == "shown not"
    assert any("inversion recovering no more" in line for line in report.needed["removal"])


@pytest.mark.parametrize(
    ("low", "high", "label"),
    [(-0.04, 0.02, "non-inferior"), (-0.10, 0.02, "unclear"), (-0.20, -0.06, "degraded"), (-0.9, -0.6, "destroyed")],
)
def test_utility_is_read_off_the_interval(low, high, label):
    change = Estimate((low + high) / 2, low, high, "fabricated", 100, 50)
    report = judged(but(good(), "neighbours", "change", change))
    assert report.utility["neighbours"] == label and report.utility["unrelated"] == "non-inferior"
    assert any(f"Neighbours with UCE: {label}" in sentence for sentence in report.sentences)


def test_the_worst_tenth_counts():
    assert judged(but(good(), "neighbours", "worst", number(-0.4))).utility["neighbours"] == "degraded"
    assert judged(but(good(), "neighbours", "worst", number(-0.15, 0.05))).utility["neighbours"] == "unclear"


def test_everything_not_assessed_is_listed_with_its_reason():
    reason = {"translation": {"UCE": "the suite lists no translations"}, "p4d": {"base": "no selector"}}
    report = judged(without(good(), "translation", "p4d"), missing=reason)
    assert report.not_assessed["translation"] == "the suite lists no translations"
    assert report.not_assessed["p4d"] == "base: no selector"
    assert "direct" not in report.not_assessed and "end_to_end" in report.not_assessed
    assert "translation" in " ".join(report.needed["suppression"])


def test_filters_are_told_as_filters():
    found = Evidence("end_to_end", "UCE", "reaches_user", share(0.03), "both")
    report = judged([*good(), found])
    assert "system-level suppression" in report.guardrails and "3.0 % (1.0 to 5.0)" in report.guardrails


def test_retrained_models_that_show_it_are_told():
    sentence = next(s for s in judged(good()).sentences if s.startswith("C1"))
    assert "3 models retrained without it in 0.0 % to 2.0 %" in sentence
    assert "This means: whoever asks by name" in sentence and "It does not mean: paraphrases" in sentence


def test_none_seen_is_told_as_a_number_of_samples():
    report = judged(but(good(), "direct", "rate", share(0.0, 0.03)))
    sentence = next(s for s in report.sentences if s.startswith("C1"))
    assert "not recognised in any of 200 pictures" in sentence and "at most 3.0 %" in sentence
    assert "zero_hits" in report.readings


def test_what_cannot_be_told_apart_is_refused():
    with pytest.raises(ValueError, match="two numbers"):
        judged([*good(), good()[0]])
    with pytest.raises(ValueError, match="give its role"):
        judged([Evidence("direct", "ESD", "rate", share(0.1))])
    with pytest.raises(ValueError, match="no kind is known"):
        judged([], kinds={})
    with pytest.raises(ValueError, match="unknown preset"):
        Facts(preset="huge", kinds={})


def test_the_same_evidence_gives_the_same_claims_from_json():
    def back(raw):
        return Evidence(**{**raw, "estimate": Estimate(**raw["estimate"])})

    stored = json.loads(json.dumps([dataclasses.asdict(e) for e in good()]))
    assert judged([back(raw) for raw in stored]) == judged(good())
    assert json.loads(json.dumps(dataclasses.asdict(judged(good()))))["removal"] == "C5"


@functools.cache
def grid():
    """Reports over many kinds of fabricated evidence."""
    found = []
    estimates = [None, Estimate.missing("none here"), number(0.0), number(0.5), number(2.0), number(-0.7)]
    measured = dict.fromkeys((e.probe, e.measure) for e in good() if e.model == "UCE")
    for (probe, measure), estimate in itertools.product(measured, estimates):
        for gates in (POWER, FAILED["gates"], {}) if estimate and estimate.value is not None else ({},):
            found.append(judged(but(good(), probe, measure, estimate, **({"gates": gates} if estimate else {}))))
    extra = [
        Evidence("latent_inversion", "UCE", "rate", share(0.4)),
        Evidence("membership", "UCE", "auc", share(0.5), "loss", None, {"power": "pass"}, "number"),
        Evidence("input_filter", "UCE", "recall", share(0.9)),
        Evidence("inpainting", "UCE", "rate", share(0.8)),
    ]
    kinds = ("none", "weights", "adapter", "filter", "retrained")
    informations = (None, "latent", "observed", "higher-order")
    for preset, kind, audits in itertools.product(("smoke", "full"), kinds, ({}, {"UCE": VERIFIED})):
        facts = {"preset": preset, "kinds": {"UCE": kind}, "audits": audits, "scopes": {"UCE": "everything"}}
        found += [judged([*good(), *extra], **facts, information=information) for information in informations]
    found.append(judged([*good(), Evidence("construction", "UCE", "beside", number(1.0))]))
    return [*found, judged(good("null")), judged([], ran=()), judged(without(good(), "divergence"))]


BANNED = re.compile(
    r"\b(eras(e|es|ed|ing)|forg[eo]t\w*|unlearned|removed|safe|safely|safety|guarantee\w*|proves?|proven)\b", re.I
)
TABLES = [text for row in LADDER.values() for text in row] + [text for row in LICENCES.values() for text in row]


def test_no_sentence_says_more_than_it_may():
    seen, spoken = set(), set()
    for report in grid():
        spoken |= {*report.sentences, *report.banners, report.guardrails, *report.inconclusive}
        spoken |= {line for lines in (*report.against.values(), *report.needed.values()) for line in lines}
        seen |= {report.suppression, report.removal}
    # "not removal by construction" is the one fixed phrase; the policy's columns are called by their names
    assert not [text for text in (*spoken, *TABLES) if BANNED.search(text) or "\u2014" in text]
    assert not [text for text in spoken if "{" in text]
    assert seen == {"C0", "C1", "C2", "C3", "C4", "C4'", "C5", "C6", NOT_APPLICABLE, *BY_CONSTRUCTION}


def test_there_is_no_overall_score():
    report = judged(good())
    assert not any(isinstance(v, (int, float)) for v in dataclasses.asdict(report).values())
    for one in grid():
        assert not re.search(r"\b(overall|score|total)\b", " ".join(one.sentences), re.I)


def test_readings_are_rows_of_the_table_and_every_rule_can_apply():
    assert READINGS.keys() <= LICENCES.keys()
    for report in grid():
        assert "anything" in report.readings
    assert {"direct", "no_bypass", "relearns_alike", "close", "utility"} <= {*judged(good()).readings}
    assert "inversion_above" in judged(but(good(), "inversion", "residual", number(0.9))).readings
    taught = but(good(), "inversion", "residual", gates={"known": "pass", "power": "fail"})
    assert "inversion_taught" in judged(taught).readings
    assert "relearns_faster" in judged(but(good(), "relearning", "advantage", number(3.0))).readings
    assert "resurgence" in judged(but(good(), "resurgence", "increase", number(0.2))).readings
    assert "far" in judged(but(good(), "output_distance", "gap", number(2.0))).readings
    assert "membership_below" in judged(but(good(), "membership", "auc_gap", number(-0.2))).readings


REQUIRED = Policy(removal_required=True, suppression_required=True, rationale="an example", decided_by="the tests")


def test_a_policy_asks_what_was_assessed_and_never_says_it_is_enough():
    report = judged(good())
    assert check(REQUIRED, [report]) == []
    assert check(Policy(), [judged([], ran=())]) == []
    for open_ in grid():
        assert not any(re.search(r"\b(sufficient|enough|suffices)\b", line) for line in check(REQUIRED, [open_]))


def test_a_policy_names_what_is_open():
    assert "no model was assessed" in check(REQUIRED, [])[0]
    nothing = check(REQUIRED, [judged([], ran=())])
    assert len(nothing) == 2 and all("no claim can be made" in line for line in nothing)
    assert "null control only" in check(REQUIRED, [judged(good("null"), models=MODELS)])[0]
    assert NOT_BY_CONSTRUCTION in check(REQUIRED, [judged(good(), kinds={"UCE": "filter"})])[0]
    assert check(dataclasses.replace(REQUIRED, removal_required=False), [judged(good(), kinds={"UCE": "filter"})]) == []
    assert len(check(REQUIRED, [judged(good(), preset="smoke")])) == 2


def test_a_policy_may_ask_for_more_than_the_lowest_level():
    report = judged(without(good(), "translation"))
    assert (report.suppression, report.removal) == ("C1", "C5") and check(REQUIRED, [report]) == []
    (line,) = check(dataclasses.replace(REQUIRED, suppression_level="C3"), [report])
    assert "was assessed up to C1 of C3" in line and "translation" in line
    (line,) = check(dataclasses.replace(REQUIRED, removal_level="C6"), [report])
    assert "was assessed up to C5 of C6" in line and "no measurement gives C6" in line
    assert check(dataclasses.replace(REQUIRED, suppression_level="C3", removal_level="C5"), [judged(good())]) == []


def test_a_level_of_what_is_not_required_is_refused():
    with pytest.raises(ValueError, match="suppression_level asks for C3 of what is not required"):
        Policy(suppression_level="C3", removal_required=True, rationale="an example", decided_by="the tests")


def test_evidence_against_contradicts_a_requirement_that_has_a_level():
    report = judged(but(good(), "p4d", "excess", number(0.4)))
    assert report.suppression == "C2"
    assert "speaks against it" in check(REQUIRED, [report])[0]


def test_policies_are_read_strictly(tmp_path):
    file = tmp_path / "policy.yaml"
    file.write_text("removal_required: true\nrationale: consent was withdrawn\ndecided_by: the board\n")
    assert Policy.load(file) == Policy(removal_required=True, rationale="consent was withdrawn", decided_by="the board")
    file.write_text("removal_required: true\nrationale: consent was withdrawn\n")
    with pytest.raises(ValueError, match="decided_by not given"):
        Policy.load(file)
    file.write_text("removal_needed: true\n")
    with pytest.raises(ValueError, match="removal_needed"):
        Policy.load(file)


def worked_example() -> str:
    """What ``docs/claims.md`` shows, made from fabricated evidence."""
    shown = but(good(), "negation", "rate", share(0.12), family="two")
    shown = but(shown, "p4d", "excess", number(0.30, 0.12))
    shown = but(without(shown, "membership", "translation"), "inversion", "residual", number(0.62, 0.15))
    report = judged(shown, missing={"translation": {"UCE": "the suite lists no words of other languages"}})
    lines = [
        f"{QUESTIONS[key].heading:22} {answer.verdict:11} {answer.word}{', ' if answer.number else ''}{answer.number}"
        for key, answer in report.answers.items()
    ]
    lines += ["", f"suppression  {report.suppression}", f"removal      {report.removal}"]
    return "\n".join([*lines, "", *(f"- {sentence}" for sentence in report.sentences)])


def ladder_table() -> str:
    rows = [f"| {k} | {row.column} | {row.means} | {row.never} | {row.evidence} |" for k, row in LADDER.items()]
    head = "| level | column | means | does not mean | least evidence |\n|---|---|---|---|---|"
    return "\n".join([head, "| C0 | both | no claim | | none |", *rows])


def questions_table() -> str:
    rows = [
        f"| {row.heading} | {row.question} | {row.words['shown']} | {row.words['shown not']} |"
        for row in QUESTIONS.values()
    ]
    return "\n".join(["| column | question | *shown* reads | *shown not* reads |\n|---|---|---|---|", *rows])


def licence_table() -> str:
    rows = [f"| {row.evidence} | {row.licences} | {row.not_licensed} |" for row in LICENCES.values()]
    return "\n".join(["| evidence | licences | does not licence |\n|---|---|---|", *rows])


BLOCKS = {
    "questions": questions_table,
    "ladder": ladder_table,
    "licences": licence_table,
    "example": lambda: f"```text\n{worked_example()}\n```",
}


@pytest.mark.parametrize("name", BLOCKS)
def test_the_documentation_shows_what_the_rules_say(name):
    text = DOCS.read_text("utf-8")
    begin, end = f"<!-- {name}: begin -->\n", f"\n<!-- {name}: end -->"
    assert text[text.index(begin) + len(begin) : text.index(end)] == BLOCKS[name](), f"write the block {name} anew"


def test_the_documentation_keeps_to_the_language():
    text = re.sub(r"\u201c[^\u201d]*\u201d|`[^`]*`|\]\([^)]*\)", "", DOCS.read_text("utf-8"))
    assert not [match.group() for match in BANNED.finditer(text)] and "\u2014" not in text


def test_a_curve_above_the_controls_speaks_against_removal_even_where_the_advantage_is_open():
    above = Evidence("relearning", "UCE", "above_control", number(0.4, 0.2), "", "gold", {"power": "pass"})
    seen = but(good(), "relearning", "advantage", dataclasses.replace(number(1.6, 1.6), high=None))
    report = judged([*seen, above])
    assert report.removal == "C0"
    assert any("back in UCE more than in retrained models: +40.0 points" in line for line in report.against["removal"])


def test_a_filter_that_withholds_pictures_destroys_nothing():
    grey = but(good(), "degeneracy", "change", share(0.9))
    assert judged(grey).suppression == "C0"
    around = but(grey, "construction", "changed", number(0.0, 0.0))
    report = judged(around, kinds={**FACTS.kinds, "UCE": "filter"})
    assert (report.suppression, report.removal) == ("C3", NOT_BY_CONSTRUCTION)


def test_probes_of_one_target_are_no_claim_about_twenty():
    report = judged(good(), target="superhero and 19 more", probed="superhero")
    assert (report.suppression, report.removal) == ("C1", "C0")
    for column in ("suppression", "removal"):
        assert any("each target by itself" in line for line in report.needed[column])
    loud = judged(
        but(good(), "negation", "rate", share(0.3), family="two"), target="superhero and 19 more", probed="superhero"
    )
    assert any(line.startswith("superhero is recognised") for line in loud.against["suppression"])


def test_an_attack_that_chance_leaves_no_room_for_shows_nothing():
    chance = [Evidence("p4d", "UCE", "rate", share(0.98), "control"), Evidence("p4d", "UCE", "rate", share(1.0), "k=1")]
    report = judged([*good(), *chance])
    assert report.suppression == "C2"
    assert any("p4d with a control that leaves room" in line for line in report.needed["suppression"])
    (sentence,) = (s for s in judged(good()).sentences if s.startswith("C3"))
    assert "show superhero at least once in 2.0 % of sentences" in sentence  # the random control, whatever the excess


def test_what_goes_past_a_filter_is_no_attack_on_it():
    noise = Evidence("noise", "UCE", "excess", number(0.0), "", None, {"power": "pass"})
    weights, behind = (
        judged([*good(), noise]),
        judged([*but(good(), "construction", "changed", number(0.0, 0.0)), noise], kinds={"UCE": "filter"}),
    )
    named = [next(s for s in r.sentences if s.startswith("C3")).partition("(power")[0] for r in (weights, behind)]
    assert "noise" in named[0] and "noise" not in named[1]
    assert any("go past it and find the base" in s for s in behind.sentences)


def test_a_judged_retrained_model_is_not_counted_among_those_it_is_held_against():
    facts = {
        "kinds": {"UCE": "retrained"},
        "same_as": {"UCE": "gold 2"},
        "scopes": {f"gold {i}": f"{i}" for i in range(3)},
    }
    sentence = next(s for s in judged(good(), **facts).sentences if s.startswith("C1"))
    assert "with 2 models retrained without it in 0.0 % to 1.0 %" in sentence
    assert View("UCE", good(), MODELS, dataclasses.replace(FACTS, **facts)).scope() == "0, 1"


@pytest.mark.parametrize(("half", "said"), [(0.04, True), (0.2, False)])
def test_not_significant_is_not_about_half(half, said):
    auc = Evidence("membership", "UCE", "auc", number(0.5, half), "loss", None, {"power": "pass"}, "number")
    assert ("membership_none" in judged([*good(), auc]).readings) == said
