"""Request after request: prefixes of a series are what was asked for by then, and what came back is counted."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import erasure.world
from erasure import Concept, Suite, erase
from erasure.cli.arms import stacked
from erasure.eval import assess
from erasure.eval.core.hashes import weights_hash
from erasure.eval.core.models import Model
from erasure.eval.core.stacked import Stacked
from erasure.eval.probes.base import Context, Missing, Observation
from erasure.eval.probes.suppression.sequential import Sequential, series_of
from erasure.eval.worldkit import detectors
from tests.eval_helpers import PixelDetector
from tests.probe_helpers import SUITE, tiny_context
from tests.tiny import tiny_pipeline, weights

NAMES = ("cat", "ninja", "wizard")
EYE = PixelDetector("eye", labels=("cat", "ninja", "wizard", "dog", "sun", "nothing"))
SMALL = Sequential(looks=3, prompts=1, kept=2, images_per_prompt=1)


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


@pytest.fixture(scope="module")
def edits(pipe):
    return [erase(pipe, Concept(name, anchor="animal"), keep=["dog"], name=name, apply=False) for name in NAMES]


def context_of(pipe, change) -> Context:
    models = {"base": Model("base", "base"), "all": Model("all", "erased", change)}
    return tiny_context(pipe=pipe, models=models, judge=EYE)


def drawn_by(pipe, names) -> dict[str, torch.Tensor]:
    with Model("some", "erased", names).on(pipe):
        return weights(pipe)


# --- what is asked of which model ------------------------------------------------------------------------------------


def test_every_prefix_is_asked_for_every_request_and_for_what_is_kept(pipe, edits):
    context, before = context_of(pipe, Stacked("all", edits)), weights_hash(pipe)
    rows = SMALL.run(context.models["all"], context)
    assert weights_hash(pipe) == before and rows == SMALL.run(context.models["all"], context)
    asked = {(row.facts["after"], row.facts["request"], row.facts["label"]) for row in rows}
    own = [(1, "cat"), (2, "ninja"), (3, "wizard"), (0, "dog"), (0, "sun")]
    assert asked == {(k, *one) for k in range(4) for one in own} and len(rows) == 20
    pictures = {k: [r.facts["image_hash"] for r in rows if r.facts["after"] == k] for k in range(4)}
    assert len({*map(tuple, pictures.values())}) == 4
    with context.open(context.base) as base:
        drawn = context.draw(base, context.base, [r.cluster for r in rows if r.facts["after"] == 0])
    hashes = [row.facts["image_hash"] for row in context.observe(
        context.base, [image for (image,) in drawn], family="", clusters=[""] * 5, seeds=[0] * 5
    )]  # fmt: skip
    assert hashes == pictures[0]  # after none it is the base


def test_few_looks_are_spread_over_a_long_series_with_both_ends(pipe, edits):
    many = [  # no two alike: the same edit is not put on twice
        dataclasses.replace(edit, name=f"request {i}", tensors={k: t * (1 + i / 100) for k, t in edit.tensors.items()})
        for i, edit in enumerate(edits * 3)
    ]
    context = context_of(pipe, Stacked("all", many))
    rows = dataclasses.replace(SMALL, looks=3).run(context.models["all"], context)
    assert {row.facts["after"] for row in rows} == {0, 1, 5, 9}
    assert {row.facts["request"] for row in rows} == {0, 1, 5, 9}


def test_a_joint_solution_is_asked_as_if_it_had_been_solved_request_by_request(pipe, edits):
    concepts = [Concept(name, anchor="animal") for name in NAMES]
    joint, two = (erase(pipe, concepts[:n], keep=["dog"], name=f"{n}", apply=False) for n in (3, 2))
    series = series_of(Model("joint", "erased", joint))
    assert series.names == (("cat",), ("ninja",), ("wizard",))
    mine, theirs = drawn_by(pipe, series.after(2)), drawn_by(pipe, two)
    base = weights(pipe)
    moved = [name for name in base if not torch.equal(base[name], theirs[name])]
    assert moved and all(torch.allclose(mine[name], theirs[name], atol=1e-5) for name in base)
    context = context_of(pipe, joint)
    assert {row.facts["after"] for row in SMALL.run(context.models["all"], context)} == {0, 1, 2, 3}


def test_what_is_a_single_request_says_so_in_one_sentence(pipe, edits):
    for change in (edits[0], Stacked("one", edits[:1]), dataclasses.replace(edits[0], system={})):
        context = context_of(pipe, change)
        with pytest.raises(Missing, match="is a single request") as told:
            SMALL.run(context.models["all"], context)
        assert str(told.value).count(". ") == 0
    assert not Sequential().concerns(context.base)


def test_what_a_request_names_is_never_counted_as_kept_and_what_the_judge_lacks_is_said(pipe, edits):
    suite = dataclasses.replace(SUITE, unrelated=("sun", "ninja"))
    judge = PixelDetector("blind", labels=("cat", "ninja", "dog", "nothing"))
    context = dataclasses.replace(context_of(pipe, Stacked("all", edits)), suite=suite, judge=judge)
    rows = SMALL.run(context.models["all"], context)
    assert {row.facts["label"] for row in rows if row.value is not None and not row.facts["request"]} == {"dog"}
    assert {row.cluster: row.reason for row in rows if row.value is None} == {
        label: f"blind has no label {label!r}" for label in ("wizard", "sun")
    }
    found = Sequential().weigh({"all": rows}, {"base": "base", "all": "erased"})
    assert "cat" in {e.family for e in found if e.measure == "returned"}
    nobody = dataclasses.replace(context, judge=PixelDetector("nobody", labels=("dog", "nothing")))
    with pytest.raises(Missing, match="nobody has a label for none"):
        SMALL.run(context.models["all"], nobody)


def test_settings_that_compare_nothing_are_refused():
    for wrong in ({"looks": 1}, {"prompts": 0}):
        with pytest.raises(ValueError, match="two looks or more"):
            Sequential(**wrong)


# --- what is made of it ----------------------------------------------------------------------------------------------


def fabricated(seen: dict[tuple[int, int], float], *, templates: int = 12) -> list[Observation]:
    """Rows of three requests and what is kept, seen as often as ``(after, request)`` says, else not at all."""
    labels = ("dog", *NAMES)
    return [
        Observation("all", f"after {k}", f"{label} {i}", s, float(i < templates * seen.get((k, request), 0.0)), None, {
            "template": f"{i}", "phrase": label, "label": label, "request": request, "after": k, "of": 3,
        })
        for k in range(4) for request, label in enumerate(labels) for i in range(templates) for s in range(2)
    ]  # fmt: skip


def weighed(rows):
    found = Sequential().weigh({"all": rows}, {"base": "base", "all": "erased"})
    return {(e.measure, e.family): e for e in found}


def test_a_first_concept_that_later_requests_bring_back_is_seen_and_what_stays_out_is_not():
    base = {(0, j): 1.0 for j in range(4)}
    kept = {(1, 0): 1.0, (2, 0): 1.0, (3, 0): 0.5}
    others = {(1, 2): 1.0, (1, 3): 1.0, (2, 3): 1.0}  # their turn has not come
    found = weighed(fabricated({**base, **kept, **others, (2, 1): 0.5, (3, 1): 1.0}))
    assert [found["rate", f"requests {k}"].estimate.value for k in range(4)] == [1, 0, 0.5, 1]
    assert found["returned", "cat"].estimate.value == 1 and found["returned", "cat"].conclusive
    assert found["returned", "ninja"].estimate.value == 0 and found["returned", "ninja"].conclusive
    assert found["returned", ""].estimate.value == 0.5 and ("returned", "wizard") not in found
    assert found["rate", "erased, after 2"].estimate.value == 0.25  # the cat's 0.5 and the ninja's 0
    assert [found["change", f"kept, after {k}"].estimate.value for k in (1, 2, 3)] == [0, 0, -0.5]


def test_what_was_never_drawn_or_never_left_cannot_return():
    drawn = weighed(fabricated({(k, j): 1.0 for k in range(4) for j in range(4)}))
    assert drawn["returned", "cat"].gates == {"known": "pass", "power": "fail"}
    never = weighed(fabricated({(k, 0): 1.0 for k in range(4)}))
    assert never["returned", "cat"].gates == {"known": "fail", "power": "fail"}
    assert not drawn["returned", ""].conclusive and not never["returned", ""].conclusive


# --- whole -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_stack_is_judged_like_any_erasure(pipe, edits, tmp_path):
    suite = dataclasses.replace(SUITE, concept=dataclasses.replace(SUITE.concept, neighbours=("dog",)))
    arms = {"cat": edits[0], **stacked({edit.name: edit for edit in edits})}
    found = assess(pipe, arms, suite, preset="smoke", detectors=[EYE], probes=("direct", "sequential", "construction"),
                   progress=False, out=tmp_path)  # fmt: skip
    assert {e.model for e in found.evidence if e.probe == "sequential"} == {"in order"}
    assert "is a single request" in found.missing["sequential"]["cat"]
    assert not [model for model in found.missing.get("construction", {}) if model == "in order"]
    again = assess(pipe, arms, suite, preset="smoke", detectors=[EYE], probes=("sequential",), progress=False,
                   out=tmp_path)  # fmt: skip
    assert [e for e in again.evidence if e.probe == "sequential"] == [
        e for e in found.evidence if e.probe == "sequential"
    ]


def test_the_command_line_stacks_what_it_was_given_and_refuses_a_single_one(edits):
    (arm,) = stacked({edit.name: edit for edit in edits}).values()
    assert [edit.name for edit in arm.erasures] == list(NAMES)
    with pytest.raises(ValueError, match="two erasures or more"):
        stacked({"cat": edits[0]})


@pytest.mark.slow
def test_on_emoji_world_three_requests_stay_out_and_cost_little():
    pipe, suite = erasure.world.load(), Suite.load("superhero")
    names = ("superhero", "cat", "castle")
    keep = [word for word in suite.kept if word not in names]
    edits = [erase(pipe, name, keep=keep, name=name, apply=False) for name in names]
    context = tiny_context(
        pipe=pipe, suite=suite, judge=detectors.detectors()[0],
        models={"base": Model("base", "base"), "all": Model("all", "erased", Stacked("all", edits))},
    )  # fmt: skip
    rows = Sequential(looks=3, prompts=4, kept=8, images_per_prompt=1).run(context.models["all"], context)
    found = weighed(rows)
    assert found["rate", "requests 0"].estimate.value == 1 and found["rate", "kept, after 0"].estimate.value >= 0.75
    assert found["rate", "erased, after 3"].estimate.value <= 0.25
    assert found["returned", ""].estimate.value <= 0.25 and found["change", "kept, after 3"].estimate.value >= -0.4
