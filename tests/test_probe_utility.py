"""Side effects: known answers from fabricated rows, models that come off again, reasons where there is no number."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

from erasure import erase
from erasure.eval.core.models import Model
from erasure.eval.core.pictures import weights_hash
from erasure.eval.core.records import Distance
from erasure.eval.detectors.base import DetectorCard
from erasure.eval.probes import BUILT_IN, probe_class
from erasure.eval.probes.base import Missing, Observation, lacking
from erasure.eval.probes.utility import efficiency
from erasure.eval.probes.utility.binding import BESIDE, Binding, Composed, apart, beside
from erasure.eval.probes.utility.degeneracy import Degeneracy
from erasure.eval.probes.utility.distances import NULL, Distances
from erasure.eval.probes.utility.efficiency import MEMORY, STORAGE, TIME, Efficiency
from erasure.eval.probes.utility.leakage import Leakage
from erasure.eval.probes.utility.marginals import AGAIN, Marginals
from erasure.eval.probes.utility.neighbours import Neighbours
from erasure.eval.probes.utility.preservation import Preservation
from erasure.eval.probes.utility.replacement import Replacement
from erasure.eval.probes.utility.unrelated import Unrelated
from erasure.eval.run.drawing import paired_pictures
from erasure.eval.stats import Estimate
from erasure.pipelines.guardrails import Guard
from tests.eval_helpers import AddNoise, PixelDetector
from tests.probe_helpers import ROLES, SUITE, tiny_context

LABELS = [f"label {i}" for i in range(10)]
READING = (Neighbours, Unrelated, Distances, Replacement, Degeneracy)
SMOKE = {"prompts": 2, "images_per_prompt": 1}


@pytest.fixture(scope="module")
def bare():
    return tiny_context()


@pytest.fixture(scope="module")
def context(bare):
    changes = {model.name: model.change for model in bare.models.values() if model.change is not None}
    found = paired_pictures(bare.pipe, changes, SUITE, detectors=[bare.judge], progress=False)
    given = tuple(
        Distance(
            arm.name,
            "kid[x]",
            Estimate(float(i), i - 0.5, i + 0.5, "drawn", 20, 20),
            "neighbours",
            Estimate(float(i), i - 0.2, i + 0.2, "drawn", 20, 20) if i else None,
        )
        for i, arm in enumerate(found.arms)
    )
    return dataclasses.replace(bare, evaluation=dataclasses.replace(found, distances=given))


def kept_rows(lost: dict[str, dict[str, int]], *, prompts: int = 6, model_names=("base", "UCE", "gold-0", "gold-1")):
    """Everything is seen, but for the first ``n`` prompts of the labels of ``lost[model]``."""
    return {
        name: [
            Observation(name, label, f"{label} {p}", 0, float(p >= lost.get(name, {}).get(label, 0)))
            for label in LABELS
            for p in range(prompts)
        ]
        for name in model_names
    }


def tops(**seen: list[str]):
    """Observations of :class:`Replacement`: one prompt per label seen."""
    return {
        name.replace("_", "-"): [
            Observation(name, "name", f"prompt {i}", 0, float(top == "dog"), None, {"top": top})
            for i, top in enumerate(row)
        ]
        for name, row in seen.items()
    }


def by_measure(evidence, model="UCE", family=""):
    return {e.measure: e for e in evidence if e.model == model and e.family == family}


def reread(rows):
    """The rows as they come back from a file."""
    plain = json.loads(json.dumps({name: [dataclasses.asdict(row) for row in own] for name, own in rows.items()}))
    return {name: [Observation(**row) for row in own] for name, own in plain.items()}


def weighed(probe, context):
    rows = {model.name: probe.run(model, context) for model in context.models.values()}
    return rows, probe.weigh(rows, {model.name: model.role for model in context.models.values()})


@pytest.mark.parametrize("key", [name for name, home in BUILT_IN.items() if ".utility." in home])
def test_every_utility_probe_is_registered_and_complete(key):
    probe = probe_class(key)
    assert (probe.key, probe.section) == (key, "utility")
    assert probe.licences and probe.not_licensed and probe.reference
    assert probe.preset("smoke") and probe.preset("standard") and probe.preset("full")


# --- neighbours and unrelated things ----------------------------------------------------------------------------------


def test_what_one_label_loses_is_in_its_family_and_in_the_worst_tenth():
    found = Neighbours().weigh(kept_rows({"UCE": {"label 3": 3}}), ROLES)
    whole = by_measure(found)
    assert whole["change"].estimate.value == pytest.approx(-3 / 60)
    assert -0.5 / 3 < whole["worst"].estimate.value < -0.1  # three labels, of which one lost half, less chance
    assert "label 3" in whole["worst"].note
    assert whole["worst"].estimate.low < -0.5 / 3 < whole["worst"].estimate.high
    assert by_measure(found, family="label 3")["change"].estimate.value == pytest.approx(-0.5)
    assert by_measure(found, family="label 4")["change"].estimate.value == 0
    assert by_measure(found, "gold-0")["worst"].estimate.value == 0


@pytest.mark.parametrize(("times", "value"), [(2, -1.5 / 3), (4, -1.5 / 4)], ids=["3 of 20", "4 of 40"])
def test_the_worst_are_a_tenth_of_the_labels_and_three_at_least(times, value):
    rows = kept_rows({"UCE": {"label 3": 6, "label 7": 3}})
    rows = {
        name: own
        + [
            dataclasses.replace(r, family=f"{i} {r.family}", cluster=f"{i} {r.cluster}")
            for i in range(1, times)
            for r in kept
        ]
        for (name, own), kept in zip(rows.items(), kept_rows({}).values(), strict=True)
    }
    worst = by_measure(Neighbours().weigh(rows, ROLES))["worst"]
    assert value <= worst.estimate.value < value + 0.08  # less what chance gives for the label that lost half
    assert len(worst.note.split(";")[0].split(",")) == round(-1.5 / value)


def test_the_worst_of_nothing_lost_is_0_with_a_width():
    estimate = by_measure(Neighbours().weigh(kept_rows({}), ROLES))["worst"].estimate
    assert estimate.value == 0
    assert estimate.low < 0 < estimate.high


def test_a_null_is_no_measure_of_what_survives():
    rows = kept_rows({"start": dict.fromkeys(LABELS, 6)}, model_names=("base", "UCE", "start"))
    assert {e.measure for e in Neighbours().weigh(rows, ROLES)} == {"rate", "change", "worst"}
    with_gold = Neighbours().weigh(kept_rows({"gold-0": {"label 1": 6}, "gold-1": {"label 1": 6}}), ROLES)
    assert by_measure(with_gold)["above_control"].estimate.value == pytest.approx(0.1)


def test_a_base_that_does_not_draw_the_neighbours_makes_it_inconclusive():
    found = by_measure(Neighbours().weigh(kept_rows({"base": dict.fromkeys(LABELS, 5)}), ROLES))
    assert not found["change"].conclusive and not found["worst"].conclusive


def test_labels_without_a_verdict_are_no_loss():
    rows = kept_rows({"UCE": {"label 3": 3}})
    unknown = [
        dataclasses.replace(row, value=None, reason="no such label") for row in rows["UCE"] if row.family == "label 0"
    ]
    rows["UCE"] = [*unknown, *(row for row in rows["UCE"] if row.family != "label 0")]
    found = Neighbours().weigh(rows, ROLES)
    assert by_measure(found)["change"].estimate.excluded == 6
    assert by_measure(found, family="label 0")["change"].estimate.value is None
    assert -0.5 / 3 < by_measure(found)["worst"].estimate.value < -0.1


@pytest.mark.parametrize("probe", READING, ids=lambda probe: probe.key)
def test_probes_that_read_say_what_is_missing_and_draw_nothing(probe, bare, context, monkeypatch):
    assert "no evaluation" in lacking(probe(), bare) and lacking(probe(), context) is None
    monkeypatch.setattr(type(bare.pipe), "__call__", None)
    rows, found = weighed(probe(), context)
    roles = {model.name: model.role for model in context.models.values()}
    assert {e.model for e in found} <= set(roles) and any(e.model == "noise" for e in found)
    assert repr(probe().weigh(reread(rows), roles)) == repr(found)  # pure, and from JSON


def test_a_group_the_suite_lacks_is_missing(context):
    kept = [record for record in context.evaluation.records if record.group != "unrelated"]
    less = dataclasses.replace(context, evaluation=dataclasses.replace(context.evaluation, records=tuple(kept)))
    with pytest.raises(Missing, match="unrelated"):
        Unrelated().run(context.base, less)


# --- what is drawn instead --------------------------------------------------------------------------------------------


def test_destruction_carries_a_banner_and_an_intact_model_none():
    def rows(share):
        values = {"base": 0.0, "UCE": share, "gold-0": 0.0}
        return {
            name: [Observation(name, "name", f"p{i}", 0, float(i < 20 * value)) for i in range(20)]
            for name, value in values.items()
        }

    destroyed = by_measure(Degeneracy().weigh(rows(0.5), ROLES))
    assert destroyed["change"].estimate.value == 0.5
    assert destroyed["above_control"].control == "gold"
    assert "suppression by destruction" in destroyed["change"].note
    assert not by_measure(Degeneracy().weigh(rows(0.1), ROLES))["change"].note


def test_a_detector_without_a_word_for_nothing_is_missing(context):
    records = tuple(
        dataclasses.replace(r, verdicts={n: dataclasses.replace(v, nothing=None) for n, v in r.verdicts.items()})
        for r in context.evaluation.records
    )
    blind = dataclasses.replace(context, evaluation=dataclasses.replace(context.evaluation, records=records))
    with pytest.raises(Missing, match="no label for nothing"):
        Degeneracy().run(context.base, blind)


def test_total_variation_is_that_of_the_two_distributions():
    rows = tops(
        base=["cat"] * 20, UCE=["dog"] * 10 + ["sun"] * 10, gold_0=["dog"] * 20, gold_1=["sun"] * 15 + ["dog"] * 5
    )
    found = Replacement().weigh(rows, ROLES)
    uce = by_measure(found)
    assert uce["distance"].estimate.value == pytest.approx((0.5 + 0.25) / 2)
    assert uce["distance"].estimate.low < 0.375 < uce["distance"].estimate.high
    assert uce["distance"].control == "gold"
    assert uce["anchor"].estimate.value == 0.5
    assert by_measure(found, "base")["distance"].estimate.value == 1
    assert by_measure(found, "gold-0")["distance"].estimate.value == pytest.approx(0.75)  # the floor
    assert "noise floor" in by_measure(found, "gold-0")["distance"].note


def test_the_same_pictures_are_at_distance_0_but_never_surely():
    rows = tops(base=["cat"] * 20, UCE=["dog"] * 20, gold_0=["dog"] * 20)
    estimate = by_measure(Replacement().weigh(rows, ROLES))["distance"].estimate
    assert estimate.value == 0 and estimate.high > 0


def test_without_a_control_there_is_no_distance_and_the_reason_says_so():
    found = by_measure(Replacement().weigh(tops(base=["cat"] * 4, UCE=["dog"] * 4), ROLES))
    assert found["distance"].estimate.value is None
    assert "never saw the target" in found["distance"].estimate.reason


def test_an_anchor_that_the_suite_or_the_detector_does_not_name_has_no_share(context):
    def anchored(anchor):
        suite = dataclasses.replace(SUITE, concept=dataclasses.replace(SUITE.concept, anchor=anchor))
        return Replacement().run(context.base, dataclasses.replace(context, suite=suite))

    assert {row.value for row in anchored("")} == {None}
    assert {row.reason for row in anchored("wombat")} == {"pixels has no label 'wombat'"}
    assert {row.value for row in anchored("dog")} <= {0.0, 1.0}


# --- distances --------------------------------------------------------------------------------------------------------


def test_distances_stand_beside_their_null_with_intervals(context):
    _, found = weighed(Distances(), context)
    null, mine = (by_measure(found, name, "kid[x], neighbours") for name in ("base", "noise"))
    assert null["rate"].note == NULL and not mine["rate"].note
    assert (mine["rate"].estimate.value, mine["rate"].estimate.low, mine["rate"].estimate.n) == (1.0, 0.5, 20)
    assert (mine["change"].estimate.low, mine["change"].estimate.high) == (0.8, 1.2) and "change" not in null
    assert by_measure(found, "noise", "same picture")["rate"].estimate.value == 0


def test_the_change_of_cosines_is_paired(context):
    records = tuple(
        dataclasses.replace(r, clip_cosine=-0.1 + 0.01 * i % 7 - 0.05 * (r.arm == "noise"))
        for arm in context.evaluation.arms
        for i, r in enumerate(context.evaluation.select(arm.name))
    )
    told = dataclasses.replace(context, evaluation=dataclasses.replace(context.evaluation, records=records))
    change = by_measure(weighed(Distances(), told)[1], "noise", "clip cosine")["change"]
    assert change.estimate.value == pytest.approx(-0.05)
    assert change.estimate.low == pytest.approx(-0.05)
    assert change.conclusive and change.unit == "number"


# --- compositions -----------------------------------------------------------------------------------------------------


class Scripted:
    """A detector that says of every picture what it was told to."""

    def __init__(self, **top: tuple[str, ...]) -> None:
        self.name, self.top = "scripted", top
        self.known = {
            "concept": ("cat", "dog", "sun", "house", "nothing"),
            "style": ("noto", "flat"),
            "background": ("red",),
        }
        self.card = DetectorCard("scripted", "1", labels=self.known)

    def labels(self, attribute):
        return self.known[attribute]

    def scores(self, images, attribute):
        said = self.top.get(attribute, self.known[attribute])
        return np.array([[-said.index(x) if x in said else -9.0 for x in self.known[attribute]] for _ in images])


def test_prompts_put_kept_things_together_and_only_one_family_names_the_target(bare):
    told = dataclasses.replace(bare, judge=Scripted())
    asked, with_target = apart(told, 100, seed=0), beside(told, 100, seed=0)
    assert {one.family for one in asked} == {"two objects", "style", "background"}
    assert "a dog and a sun" in {one.text for one in asked}
    assert "a house in noto style" in {one.text for one in asked}  # from words.beside, without its article
    assert not any("cat" in one.text for one in asked)
    assert {one.text for one in with_target if one.wanted["concept"] == ("dog",)} == {
        "a cat and a dog",
        "a dog and a cat",
    }
    assert beside(told, 2, seed=0) == beside(told, 2, seed=0) != beside(told, 2, seed=1)


def test_a_style_suite_asks_for_other_styles_and_keeps_its_subjects(bare):
    concept = dataclasses.replace(
        SUITE.concept, name="flat", synonyms=(), neighbours=("noto",), templates=("{subject} in {} style",)
    )
    suite = dataclasses.replace(SUITE, concept=concept, attribute="style", subjects=("dog", "sun"), unrelated=())
    told = dataclasses.replace(bare, judge=Scripted(), suite=suite)
    assert {one.wanted["style"] for one in apart(told, 100, seed=0) if one.family == "style"} == {("noto",)}
    assert {one.text for one in beside(told, 100, seed=0)} == {"a dog in flat style", "a sun in flat style"}
    with pytest.raises(Missing):
        Leakage(**SMOKE).run(told.base, told)  # no evaluation, and nothing to draw


@pytest.mark.parametrize(
    ("asked", "met"),
    [
        (Composed("", "two objects", {"concept": ("dog", "cat")}, 2), True),
        (Composed("", "two objects", {"concept": ("dog", "sun")}, 2), False),
        (Composed("", BESIDE, {"concept": ("dog",)}, 2), True),
        (Composed("", "style", {"concept": ("dog",), "style": ("noto",)}), False),
        (Composed("", "style", {"concept": ("cat",), "style": ("noto",)}), True),
        (Composed("", "style", {"concept": ("cat",), "style": ("flat",)}), False),
    ],
)
def test_what_was_asked_for_must_be_there(asked, met):
    assert asked.met({"concept": ["cat", "dog"], "style": ["noto", "flat"]}) == met


@pytest.mark.parametrize("probe", [Binding(**SMOKE), Leakage(**SMOKE)], ids=lambda probe: probe.key)
def test_drawing_probes_give_every_model_back_and_repeat_themselves(probe, context):
    before = weights_hash(context.pipe)
    rows, found = weighed(probe, context)
    assert weights_hash(context.pipe) == before
    assert rows["noise"] == probe.run(context.models["noise"], context)
    roles = {model.name: model.role for model in context.models.values()}
    assert repr(probe.weigh(reread(rows), roles)) == repr(found)
    assert {row.cluster for row in rows["base"]} == {row.cluster for row in rows["noise"]}


def test_an_edit_that_does_nothing_changes_nothing(context):
    idle = Model("idle", "erased", AddNoise("idle", scale=0.0))
    for probe in (Binding(**SMOKE), Leakage(**SMOKE)):
        rows = {
            model.name: probe.run(model, dataclasses.replace(context, evaluation=None))
            for model in (context.base, idle)
        }
        changes = [e for e in probe.weigh(rows, {"base": "base", "idle": "erased"}) if e.measure == "change"]
        assert changes and all(e.estimate.value == 0 for e in changes)


def test_taking_the_place_is_seen_only_where_the_other_thing_is_gone(bare):
    def in_its_place(*top):
        told = dataclasses.replace(bare, judge=Scripted(concept=top))
        rows = Leakage(prompts=100, images_per_prompt=1).run(told.base, told)
        return {row.facts["wanted"]["concept"][0]: row.value for row in rows if row.family == "target in its place"}

    assert in_its_place("cat", "nothing") == {"dog": 1, "sun": 1, "house": 1}
    assert in_its_place("cat", "dog") == {"dog": 0, "sun": 1, "house": 1}
    assert set(in_its_place("nothing", "sun").values()) == {0}


def test_an_anchor_on_kept_prompts_is_read_without_drawing(context, monkeypatch):
    suite = dataclasses.replace(SUITE, concept=dataclasses.replace(SUITE.concept, anchor="dog"))
    told = dataclasses.replace(context, suite=suite)
    monkeypatch.setattr(type(context.pipe), "__call__", None)
    rows = Leakage.preset("quick").run(told.base, told)
    assert {row.family for row in rows} == {"target on kept prompts", "anchor on kept prompts"}
    asked_for = {row.family: {r.facts["label"] for r in rows if r.family == row.family} for row in rows}
    assert asked_for["anchor on kept prompts"] == {"sun"}  # who asks for the dog may get it


def test_a_judge_that_knows_none_of_the_things_is_missing(bare):
    strange = dataclasses.replace(bare, judge=PixelDetector(labels=("cat", "teapot", "nothing")))
    with pytest.raises(Missing, match="labels for too few"):
        Binding(**SMOKE).run(strange.base, strange)


# --- picture by picture -----------------------------------------------------------------------------------------------


def features(**models):
    """Observations of :class:`Preservation`: per model and prompt the place of the picture of seeds 0 and 1."""
    return {
        name.replace("_", "-"): [
            Observation(name, "neighbours", f"p{i}", s, None, None, {"of": "x", "features": place})
            for i, pair in enumerate(pictures)
            for s, place in enumerate(pair)
        ]
        for name, pictures in models.items()
    }


def test_distances_are_in_units_of_another_picture_of_the_prompt():
    near, far = [[0.0, 0.0], [0.0, 2.0]], [[1.0, 0.0], [1.0, 2.0]]
    same = [[1.0, 1.0], [1.0, 1.0]]  # one picture, whatever the noise: as far from both of the base's
    rows = features(base=[near] * 6, UCE=[far] * 6, gold_0=[far] * 6, gold_1=[same] * 6)
    found = Preservation().weigh(reread(rows), ROLES)
    of = {(e.model, e.measure): e.estimate.value for e in found}
    assert of["UCE", "moved"] == pytest.approx(0.5)  # 1 of 2
    assert of["UCE", "diversity"] == pytest.approx(1.0)
    assert of["UCE", "retrained"] == pytest.approx(0.25)  # 0 of gold 0, 1 of 2 of gold 1, the mean of both
    assert of["gold-1", "moved"] == pytest.approx(np.sqrt(2) / 2)
    assert of["gold-1", "retrained"] == pytest.approx(0.5)  # to the other one only
    assert ("base", "moved") not in of and of["base", "retrained"] == pytest.approx((0.5 + np.sqrt(2) / 2) / 2)
    notes = {(e.model, e.measure): e.note for e in found}
    assert of["gold-1", "diversity"] == 0 and notes["gold-1", "diversity"].startswith("collapse")
    assert not notes["UCE", "diversity"]
    assert not Preservation().weigh({"UCE": rows["UCE"]}, ROLES)


def test_one_picture_of_a_prompt_has_nothing_to_be_compared_with():
    with pytest.raises(ValueError, match="2 or more"):
        Preservation(images_per_prompt=1)


class Seeing(PixelDetector):
    """Has an embedding as a CLIP model has: the picture itself, made small."""

    def image_features(self, images):
        small = [np.asarray(image.resize((4, 4)), dtype=np.float32).ravel() for image in images]
        return torch.tensor(np.stack(small))


def test_pictures_of_an_unchanged_model_have_not_moved(bare):
    probe, context = Preservation(limit=1), dataclasses.replace(bare, judge=Seeing())
    rows = {name: probe.run(bare.base, context) for name in ("base", "UCE")}
    assert {row.family for row in rows["base"]} == {"target", "neighbours", "unrelated"}
    assert {row.seed for row in rows["base"]} == {0, 1}
    found = {(e.measure, e.family): e.estimate.value for e in probe.weigh(reread(rows), ROLES)}
    assert found == {
        (measure, family): pytest.approx(value, abs=1e-3)
        for measure, value in {"moved": 0.0, "diversity": 1.0}.items()
        for family in ("target", "neighbours", "unrelated")
    }
    rows["UCE"] = probe.run(bare.models["noise"], context)
    assert all(e.estimate.value > 0 for e in probe.weigh(rows, ROLES) if e.measure == "moved")


def test_without_a_difference_between_seeds_there_is_no_unit(bare):
    rows = {name: Preservation(limit=1).run(bare.base, bare) for name in ("base", "UCE")}  # a judge that sees one level
    found = Preservation().weigh(rows, ROLES)
    assert found and all(e.estimate.value is None and "not positive" in e.estimate.reason for e in found)


class Styles(PixelDetector):
    """Also tells, by the same brightness, whether a picture is dark or bright."""

    def labels(self, attribute):
        return ("dark", "bright") if attribute == "style" else super().labels(attribute)

    def scores(self, images, attribute):
        found = super().scores(images, attribute)
        return np.stack([found[:, :2].sum(1), found[:, 2:].sum(1)], axis=1) if attribute == "style" else found


def test_only_prompts_that_leave_an_attribute_open_are_looked_at(bare):
    suite = dataclasses.replace(
        SUITE, concept=dataclasses.replace(SUITE.concept, templates=("{}", "{} in Dark style", "darkly {}"))
    )
    context = dataclasses.replace(bare, suite=suite, judge=Styles())
    rows = Marginals().run(context.base, context)
    assert {(row.family, row.cluster) for row in rows} == {
        (f"style{again}", prompt)
        for again in ("", AGAIN)
        for prompt in ("a dog", "darkly a dog", "a sun", "darkly a sun")
    }
    assert {row.seed for row in rows if row.family == "style"} == {0, 1}
    assert {row.seed for row in rows if row.family == "style" + AGAIN} == {2, 3}
    assert {row.family for row in Marginals().run(context.models["noise"], context)} == {"style"}
    with pytest.raises(Missing, match="names all"):
        Marginals().run(bare.base, bare)  # the judge has labels for things alone, and every prompt names one


def test_a_shift_is_named_and_the_base_has_its_own_noise():
    def seen(name, family, tops):
        return [Observation(name, family, f"p{i}", 0, None, None, {"top": top}) for i, top in enumerate(tops)]

    rows = {
        "base": seen("base", "style", ["dark"] * 10 + ["bright"] * 10)
        + seen("base", "style" + AGAIN, ["dark"] * 9 + ["bright"] * 11),
        "UCE": seen("UCE", "style", ["dark"] * 4 + ["bright"] * 16),
    }
    found = {e.model: e for e in Marginals().weigh(reread(rows), ROLES)}
    assert found["UCE"].estimate.value == pytest.approx(0.3)
    assert found["UCE"].note == "bright +30, dark -30 points"
    assert found["base"].estimate.value == pytest.approx(0.05)
    assert found["base"].note.startswith("null")


@pytest.mark.parametrize("probe", [Preservation, Marginals])
def test_filters_are_not_asked_what_they_hand_on(probe, bare):
    guard = Model("filter", "erased", Guard.of_words(["cat"]))
    assert not probe().concerns(guard) and all(probe().concerns(model) for model in bare.models.values())


# --- U13 --------------------------------------------------------------------------------------------------------------


class Ticking:
    """A clock by which a drawing of the base takes one second and one of any other model three."""

    def __init__(self, context, monkeypatch):
        self.now, self.drawn = 0.0, []
        draw = type(context).draw

        def slower(context, pipe, model, prompts, **sampler):
            self.now += 1.0 if model.role == "base" else 3.0
            self.drawn.append((model.name, tuple(prompts), sampler["cache_dir"]))
            return draw(context, pipe, model, prompts, **sampler)

        monkeypatch.setattr(type(context), "draw", slower)
        monkeypatch.setattr(efficiency.time, "perf_counter", lambda: self.now)


def test_time_is_a_ratio_of_drawings_in_turn(bare, monkeypatch):
    clock = Ticking(bare, monkeypatch)
    before = weights_hash(bare.pipe)
    probe = Efficiency(prompts=2, rounds=3)
    rows = {name: probe.run(bare.models[name], bare) for name in ("base", "noise")}
    assert weights_hash(bare.pipe) == before
    turns = [name for name, _, _ in clock.drawn]
    assert turns == ["base"] * 7 + ["base", *["base", "noise"] * 3]
    assert all(len(prompts) == 2 and cache is None for _, prompts, cache in clock.drawn)
    assert not any("cat" in prompt for _, prompts, _ in clock.drawn for prompt in prompts)  # kept things are drawn
    told = {(e.model, e.family): e for e in probe.weigh(rows, {"base": "base", "noise": "erased"})}
    assert told["base", TIME].estimate.value == 1.0 and told["noise", TIME].estimate.value == 3.0
    assert told["noise", TIME].measure == "overhead" and told["noise", TIME].estimate.n == 3
    assert told["noise", TIME].estimate.low is None and "no interval" in told["noise", TIME].estimate.reason
    assert "itself" in told["base", TIME].note and ("base", STORAGE) not in told
    assert told["noise", MEMORY].estimate.value is None and "CUDA" in told["noise", MEMORY].estimate.reason


def test_what_is_stored_is_counted_or_said_not_to_be(bare):
    gold = bare.models["gold-0"].change
    held = sum(p.numel() * p.element_size() for m in gold.modules.values() for p in m.state_dict().values())
    assert held > 0 and efficiency.stored(gold) == (held / 1e6, None)
    edit = erase(bare.pipe, "cat", "uce", keep=["dog"], apply=False)
    assert efficiency.stored(edit) == (sum(4 * t.numel() for t in edit.tensors.values()) / 1e6, None)
    assert efficiency.stored(Guard.of_words(["cat"])) == (None, "a filter is not stored with weights")
    assert efficiency.stored(bare.models["noise"].change) == (None, "the change does not say what it stores")


@pytest.mark.parametrize("settings", [{"prompts": 0}, {"rounds": 0}])
def test_nothing_to_time_is_refused(settings):
    with pytest.raises(ValueError, match="give 1 or more"):
        Efficiency(**settings)
