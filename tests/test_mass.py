"""Many concepts at once or in turn: the right groups are counted, and the model comes back."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

import erasure
from erasure.concept import Concept, Suite
from erasure.eval.core.records import Arm, Evaluation, Record, Verdict
from erasure.eval.core.stacked import Stacked
from studies.mass import Mass, in_turn
from tests.eval_helpers import PixelDetector
from tests.tiny import identical, tiny_pipeline, weights

EYE = PixelDetector("eye", labels=("cat", "ninja", "wizard", "dog", "sun", "nothing"))
SUITE = Suite(
    version=1,
    name="three",
    concept=Concept("cat", anchor="animal", neighbours=("dog",), templates=("{}", "a photo of {}")),
    also=(Concept("ninja", anchor="animal"), Concept("wizard", anchor="animal")),
    unrelated=("sun",),
    images_per_prompt=1,
    num_inference_steps=2,
)


def small(pipe, **changes):
    return in_turn(pipe, SUITE, detectors=[EYE], **{"counts": (1, 3), "progress": False, **changes})


def fabricated(seen: dict[str, set[str]]) -> Mass:
    """Models that draw exactly the labels they are said to draw; two prompts of each label."""
    records = tuple(
        Record(arm, p.text, p.group, p.label, 0, {"eye": Verdict(p.label, 1.0, p.label in labels)}, None, "0")
        for arm, labels in seen.items()
        for p in SUITE.prompts()
    )
    arms = tuple(Arm(name, "0", {}) for name in seen)
    return Mass(Evaluation(SUITE, arms, {"eye": EYE.card}, records, (), (), {}))


def test_every_group_is_counted_where_it_belongs():
    found = fabricated(
        {
            "base": {"cat", "ninja", "wizard", "dog", "sun"},
            "1 alone": {"ninja", "wizard", "dog", "sun"},
            "2 together": {"wizard", "dog"},
            "2 in turn": {"cat", "wizard", "dog", "sun"},
            "3 together": set(),
        }
    )
    lines = {line.model: line for line in found.lines()}
    values = {
        name: [getattr(line, what).value for what in ("suppressed", "first", "back", "waiting", "kept", "unrelated")]
        for name, line in lines.items()
    }
    assert values == {
        "base": [1, 1, None, None, 1, 1],
        "1 alone": [0, 0, None, 1, 1, 1],
        "2 together": [0, 0, 0, 1, 1, 0],
        "2 in turn": [0.5, 1, 1, 1, 1, 1],  # the cat came back
        "3 together": [0, 0, 0, None, 0, 0],
    }
    assert lines["2 in turn"].count == 2
    assert found.table().count("\n") == 1 + len(lines)


@pytest.mark.slow
def test_all_ways_are_drawn_and_the_model_comes_back_bit_for_bit():
    pipe = tiny_pipeline()
    before = weights(pipe)
    found = small(pipe)
    assert [arm.name for arm in found.evaluation.arms] == ["base", "1 alone", "3 together", "3 in turn"]
    assert len({arm.weights for arm in found.evaluation.arms}) == 4
    assert identical(before, weights(pipe))
    assert found.evaluation.arms[3].config["keep"] == ["dog"]
    again = small(pipe)
    assert again.evaluation.records == found.evaluation.records


@pytest.mark.slow
def test_a_second_run_draws_nothing_and_a_saved_one_is_read_back(tmp_path, monkeypatch):
    pipe = tiny_pipeline()
    first = small(pipe, counts=(2,), cache_dir=tmp_path / "cache")
    monkeypatch.setattr(type(pipe), "__call__", None)
    assert small(pipe, counts=(2,), cache_dir=tmp_path / "cache").lines() == first.lines()
    first.save(tmp_path)
    assert (tmp_path / "mass.md").read_text("utf-8").startswith("| concepts |")
    assert Mass(Evaluation.from_json(tmp_path)).table() == first.table()


def test_a_stack_is_its_erasures_one_after_another():
    pipe = tiny_pipeline()
    edits = [erasure.erase(pipe, c, keep=["dog"], apply=False, name=c.name) for c in SUITE.concepts]
    before = weights(pipe)
    for edit in edits:
        edit.apply(pipe)
    wanted = weights(pipe)
    for edit in edits:
        edit.remove(pipe)
    stack = Stacked("all", edits)
    stack.apply(pipe)
    assert identical(wanted, weights(pipe))
    stack.remove(pipe)
    assert identical(before, weights(pipe))
    assert [c["name"] for c in stack.config["concepts"]] == ["cat", "ninja", "wizard"]


def test_a_stack_that_is_refused_leaves_nothing_on():
    pipe = tiny_pipeline()
    edits = [erasure.erase(pipe, name, keep=["dog"], apply=False, name="one name") for name in ("cat", "ninja")]
    before = weights(pipe)
    with pytest.raises(ValueError, match="one name"):
        Stacked("twice", edits).apply(pipe)
    assert identical(before, weights(pipe))
    with pytest.raises(ValueError, match="nothing to stack"):
        Stacked("none", [])


@pytest.mark.parametrize("counts", [(), (0, 1), (1, 4)])
def test_counts_the_suite_cannot_serve_are_refused(counts):
    with pytest.raises(ValueError, match="between 1 and the number of concepts"):
        in_turn(None, SUITE, detectors=[EYE], counts=counts)


def test_a_way_that_is_none_is_refused():
    with pytest.raises(ValueError, match="choose among"):
        in_turn(None, SUITE, detectors=[EYE], counts=(1,), ways=("backwards",))


def test_the_reader_is_told_that_arms_differ_in_what_they_suppress():
    assert "first concepts of the list" in small(tiny_pipeline(), counts=(1,), limit=1).evaluation.warnings[0]


def test_the_suite_of_the_docs_page_tells_and_withholds_halves_that_do_not_overlap(monkeypatch):
    docs = Path(__file__).resolve().parents[1] / "docs"
    monkeypatch.syspath_prepend(str(docs))
    script = runpy.run_path(str(docs / "mass.py"))
    suite = script["suite_of"](50)
    assert len(suite.concepts) == 50
    named = {concept.anchor for concept in suite.concepts} | set(suite.kept)
    assert not named & set(suite.unrelated)
    assert script["suite_of"](50) == suite
