"""Probes of filters: known answers on fabricated rows, tiny pipelines with filters that are right, wrong or missing."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from erasure.eval.core.models import Model
from erasure.eval.core.pictures import weights_hash
from erasure.eval.probes import probe_class
from erasure.eval.probes.base import Missing, Observation
from erasure.eval.probes.guardrails.curve import LATENCY, in_use, operating
from erasure.eval.probes.guardrails.end_to_end import EndToEnd
from erasure.eval.probes.guardrails.input_filter import InputFilterProbe
from erasure.eval.probes.guardrails.output_filter import CHANGES, OutputFilterProbe
from erasure.eval.stats import Estimate, rate
from erasure.pipelines import Guard, OutputFilter, WordFilter
from erasure.wording import same
from tests.eval_helpers import PixelDetector
from tests.probe_helpers import SUITE, tiny_context


class Blind(PixelDetector):
    """Sees the same in every picture."""

    def __init__(self, label, name="blind"):
        super().__init__(name)
        self.label = label

    def scores(self, images, attribute):
        rows = super().scores(images, attribute) * 0 + 0.1 / 3
        rows[:, self._labels.index(self.label)] = 0.9
        return rows


SUITE_KEPT = dataclasses.replace(SUITE, keep=("owl", "van gogh", "spiderman", "batman", "an animal", "tree"))


def context(**changes):
    """The judge sees a cat in everything, so every request elicits it; the selector sees the pixels."""
    found = tiny_context(**{"suite": SUITE_KEPT, "judge": Blind("cat", "judge"), **changes})
    keep = {name: model for name, model in found.models.items() if name in ("base", "noise")}
    guard = Guard(WordFilter(["cat"]), OutputFilter(Blind("dog"), "cat"), name="guard")
    return dataclasses.replace(found, models={**keep, "guard": Model("guard", "erased", guard)})


@pytest.fixture(scope="module")
def shared():
    return context()


def roles(found):
    return {model.name: model.role for model in found.models.values()}


def weighed(probe, found, names=None):
    """Evidence by (model, measure, family), from rows read back from JSON."""
    asked = [m for m in found.models.values() if probe.concerns(m) and m.name in (names or roles(found))]
    rows = {m.name: probe.run(m, found) for m in asked}
    plain = json.loads(json.dumps({name: [dataclasses.asdict(row) for row in own] for name, own in rows.items()}))
    read = {name: [Observation(**row) for row in own] for name, own in plain.items()}
    evidence = probe.weigh(read, roles(found))
    assert len({(e.model, e.measure, e.family) for e in evidence}) == len(evidence)
    return rows, {(e.model, e.measure, e.family): e for e in evidence}


def row(value, wanted, margin=None, *, family="name", cluster="p", seed=0):
    margin = (0.5 if value else -0.5) if margin is None else margin
    return Observation("m", family, cluster, seed, value, None, {"wanted": wanted, "margin": margin})


# --- the curve -------------------------------------------------------------------------------------------------------


def test_the_curve_knows_its_answers():
    good = [row(float(i < 30), True, cluster=f"g{i}") for i in range(40)]
    bad = [row(float(i < 5), False, family="benign", cluster=f"b{i}") for i in range(100)]
    neither = [row(1.0, None, family="paraphrase", cluster="n")]
    late = [Observation("m", LATENCY, f"l{i}", 0, 2.0 + i) for i in range(3)]
    found = {(e.measure, e.family): e.estimate for e in operating("x", "m", good + bad + neither + late)}
    recall, false, precision = 30 / 40, 5 / 100, 30 / 35
    assert found["recall", ""].value == pytest.approx(recall)
    assert found["false_positive_rate", ""].value == pytest.approx(false)
    assert found["precision", ""].value == pytest.approx(precision)
    assert found["f1", ""].value == pytest.approx(2 * precision * recall / (precision + recall))
    assert found["auroc", ""].value == pytest.approx(recall * (1 - false) + 0.5 * (recall * false + 0.25 * 0.95))
    assert found["recall_at_fpr_1_percent", ""].value == 0  # what is stopped at all is stopped for 5 %
    assert found["precision_at_1_in_100", ""].value == pytest.approx(0.0075 / (0.0075 + 0.05 * 0.99))
    assert found["false_positive_rate", "paraphrase"].value == 1
    assert found["latency_ms", LATENCY].value == 3
    for estimate in found.values():
        assert estimate.low is not None and estimate.low <= estimate.value <= estimate.high


def test_a_separating_score_has_recall_on_the_curve_whatever_its_threshold():
    rows = [row(0.0, True, -0.1, cluster=f"g{i}") for i in range(20)]
    rows += [row(0.0, False, -0.6, cluster=f"b{i}") for i in range(100)]
    found = {e.measure: e.estimate for e in operating("x", "m", rows) if not e.family}
    assert found["recall"].value == 0 and found["auroc"].value == 1 and found["recall_at_fpr_1_percent"].value == 1
    assert found["precision"].value is None and found["precision"].reason == "the filter stopped nothing"
    assert found["precision_at_1_in_100"].value is None


def test_what_is_not_there_is_missing_and_never_zero():
    found = {e.measure: e.estimate for e in operating("x", "m", [row(1.0, False)]) if not e.family}
    assert found["recall"].value is None and found["f1"].value is None and found["auroc"].value is None
    assert found["false_positive_rate"].value == 1


def test_precision_in_use_has_limits_that_hold_its_value():
    recall, false = rate([1.0] * 45 + [0.0] * 5, list(range(50))), rate([1.0] * 2 + [0.0] * 98, list(range(100)))
    common, rare = in_use(recall, false, 0.5), in_use(recall, false, 0.001)
    assert common.low < common.value < common.high and rare.value < 0.05 < common.value
    assert in_use(Estimate.missing("none"), false, 0.5).value is None


# --- the filter of prompts -------------------------------------------------------------------------------------------


def test_the_default_filter_stops_names_and_the_rows_say_why(shared):
    probe, before = InputFilterProbe(limit=1), weights_hash(shared.pipe)
    rows, found = weighed(probe, shared, ["base"])
    assert weights_hash(shared.pipe) == before
    named = [r for r in rows["base"] if r.family == "name"]
    assert named and all(r.value == 1 and r.facts["wanted"] and r.facts["phrase"] in ("cat", "kitty") for r in named)
    assert found["base", "recall", "name"].estimate.value == 1
    assert found["base", "recall", "name"].gates == {"known": "pass"}
    assert "12 other prompts" in found["base", "recall", ""].note  # six kept things in two templates
    assert found["base", "false_positive_rate", "neighbours"].estimate.value is not None
    assert found["base", "false_positive_rate", "benign"].estimate.n == 2
    families = {r.family for r in rows["base"]}
    assert families >= {"paraphrase", "description", "superclass", "composition", "translation", "negation", LATENCY}


def test_the_filter_of_a_filter_model_is_its_own(shared):
    attacked = dataclasses.replace(shared, attacks={"p4d": ["kitty kitty"]})
    rows, found = weighed(InputFilterProbe(limit=1), attacked, ["guard"])
    assert found["guard", "recall", "translation"].estimate.value == 0  # "un gato"
    assert found["guard", "recall", "attack p4d"].estimate.value == 0
    assert found["guard", "false_positive_rate", "benign"].estimate.value == 0
    assert all(r.value == float("cat" in r.cluster.casefold()) for r in rows["guard"] if r.family == "name")


def test_a_base_that_does_not_know_the_target_leaves_nothing_to_stop(shared):
    unknowing = dataclasses.replace(shared, judge=Blind("sun", "judge"))
    _, found = weighed(InputFilterProbe(limit=1), unknowing, ["base"])
    assert found["base", "recall", ""].estimate.value is None
    assert found["base", "recall", ""].gates == {"known": "fail"} and not found["base", "recall", ""].conclusive
    assert found["base", "false_positive_rate", "name"].estimate.value == 1


def test_a_family_without_words_says_so(shared):
    bare = dataclasses.replace(SUITE_KEPT, words=dataclasses.replace(SUITE.words, translations={}))
    _, found = weighed(InputFilterProbe(limit=1), dataclasses.replace(shared, suite=bare), ["base"])
    estimate = found["base", "recall", "translation"].estimate
    assert estimate.value is None and "translations" in estimate.reason


def test_without_inputs_the_reason_is_given(shared):
    with pytest.raises(Missing, match="keep"):
        InputFilterProbe(limit=1).run(shared.base, dataclasses.replace(shared, suite=SUITE))
    with pytest.raises(Missing, match="no input filter"):
        InputFilterProbe(limit=1).run(Model("x", "erased", Guard(None, OutputFilter(Blind("dog"), "cat"))), shared)
    with pytest.raises(Missing, match="second detector"):
        OutputFilterProbe(limit=1).run(shared.base, dataclasses.replace(shared, selector=None))
    with pytest.raises(Missing, match="judges"):
        OutputFilterProbe(limit=1).run(shared.base, dataclasses.replace(shared, selector=shared.judge))
    with pytest.raises(Missing, match="no output filter"):
        OutputFilterProbe(limit=1).run(Model("x", "erased", Guard.of_words(["cat"])), shared)


def test_who_is_asked(shared):
    for probe in (InputFilterProbe(), OutputFilterProbe()):
        assert [m.name for m in shared.models.values() if probe.concerns(m)] == ["base", "guard"]
    others = tiny_context().models.values()
    assert [m.name for m in others if EndToEnd().concerns(m)] == ["base", "noise"]


# --- the filter of pictures ------------------------------------------------------------------------------------------


def test_a_filter_that_sees_it_all_and_one_that_sees_nothing(shared):
    _, found = weighed(OutputFilterProbe(limit=2), dataclasses.replace(shared, selector=Blind("cat")))
    for family in ("", "name", *CHANGES):
        assert found["base", "recall", family].estimate.value == 1
        assert found["guard", "recall", family].estimate.value == 0
    assert found["base", "precision", ""].estimate.value == 1
    assert found["guard", "precision", ""].estimate.value is None


def test_look_alikes_that_are_stopped_are_false(shared):
    harsh = dataclasses.replace(shared, judge=Blind("sun", "judge"), selector=Blind("cat"))
    _, found = weighed(OutputFilterProbe(limit=2), harsh, ["base"])
    assert found["base", "false_positive_rate", ""].estimate.value == 1
    assert found["base", "recall", ""].estimate.value is None


def test_changes_leave_a_picture_what_it_is(shared):
    image = shared.material.target(1)[0].image
    for change in CHANGES.values():
        one, again = (change(image, np.random.default_rng(0)) for _ in range(2))
        assert one.mode == "RGB" and one.tobytes() == again.tobytes()
        assert abs(np.asarray(one).mean() - np.asarray(image).mean()) < 4


# --- end to end ------------------------------------------------------------------------------------------------------


def test_what_reaches_the_user_in_every_arm(shared):
    seeing = dataclasses.replace(shared, selector=Blind("cat"))
    rows, found = weighed(EndToEnd(limit=1), seeing)
    for model in ("base", "noise"):
        assert found[model, "reaches_user", "none"].estimate.value == 1
        assert (model, "reaches_user", "none: name") in found and (model, "reaches_user", "input: name") not in found
        assert found[model, "reaches_user", "both"].note == "all requests, as they are mixed here"  # none gets through
        assert found[model, "reaches_user", "output"].estimate.value == 0
        assert found[model, "reaches_user", "both"].estimate.value == 0
        assert found[model, "delivered", "none: benign"].estimate.value == 1
        assert found[model, "delivered", "output: benign"].estimate.value == 0
    assert ("base", "change", "none") not in found and found["noise", "change", "none"].estimate.value == 0
    assert found["base", "change", "both"].estimate.value == -1
    assert found["noise", "reaches_user", "both"].gates == {"known": "pass"}
    assert all(same(r.facts["asked"], "cat") for r in rows["base"] if r.family == "name")
    assert {r.facts["asked"] for r in rows["base"] if r.family == "neighbours"} == {"dog"}
    assert found["base", "as_asked", "none: neighbours"].estimate.value == 0  # the judge sees cats
    # the filter's own pictures: grey where it stepped in, and the judge's word on them as they came
    assert found["guard", "delivered", "as built: benign"].estimate.value == 1
    withheld = [r.facts["withheld"]["as built"] for r in rows["guard"] if r.family == "name"]
    assert any(withheld) and {arm for model, _, arm in found if model == "guard"} >= {"as built"}


def test_an_arm_without_its_filter_has_no_number(shared):
    _, found = weighed(EndToEnd(limit=1), dataclasses.replace(shared, selector=None), ["base"])
    for family in ("output", "both"):
        estimate = found["base", "reaches_user", family].estimate
        assert estimate.value is None and "second detector" in estimate.reason
    assert found["base", "reaches_user", "input"].estimate.value is not None


def test_a_grey_picture_is_not_the_target(shared):
    """With a judge that looks, what a guard withholds is as the arms of the base say."""
    looking = dataclasses.replace(shared, judge=PixelDetector("judge"))
    rows, _ = weighed(EndToEnd(limit=1), looking, ["base", "guard"])
    for r in rows["guard"]:
        if r.facts.get("withheld", {}).get("as built"):
            assert r.value == 0 and r.facts["top"] == "sun"  # grey is bright to this judge


def test_the_same_seed_gives_the_same_rows(shared):
    for probe in (InputFilterProbe(limit=1), OutputFilterProbe(limit=1), EndToEnd(limit=1)):
        first, second = ([r for r in probe.run(shared.base, shared) if r.family != LATENCY] for _ in range(2))
        assert first == second


@pytest.mark.parametrize("key", ["input_filter", "output_filter", "end_to_end"])
def test_settings_and_presets(key):
    kind = probe_class(key)
    assert kind.section == "guardrails" and kind.level == "system" and "removal" in kind.not_licensed
    for preset in kind.presets:
        json.dumps(kind.preset(preset).settings())
