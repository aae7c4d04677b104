"""Prompts that a text encoder cuts are refused before anything is drawn, or left out with the reason."""

from __future__ import annotations

import dataclasses

import pytest

from erasure.backbone.text import TooLong
from erasure.concept import Words
from erasure.eval import assess, evaluate
from erasure.eval.lengths import refuse_cut, too_long
from erasure.eval.pictures import generate
from erasure.eval.probes import probe_class
from erasure.eval.probes.base import Missing
from tests.eval_helpers import AddNoise, PixelDetector
from tests.probe_helpers import SUITE, tiny_context
from tests.tiny import ARCHITECTURES, tiny, tiny_pipeline

LONG = "a cat " * 400


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_names_the_prompts_it_would_cut(architecture):
    pipe = tiny(architecture)
    found = too_long(pipe, ["a cat", LONG, "", f"the {LONG}"])
    assert list(found) == [LONG, f"the {LONG}"]
    assert all("longer than the text encoder reads" in reason for reason in found.values())
    assert not too_long(pipe, ["a cat", ""]) and not too_long(pipe, [])


def test_where_nothing_is_known_that_is_noted():
    (note,) = refuse_cut(object(), ["a cat"])
    assert "is not known" in note
    assert refuse_cut(tiny_pipeline(), ["a cat"]) == []


class NeverDrawn:
    def __call__(self, *args, **kwargs):
        raise AssertionError("a picture was drawn")


@pytest.mark.parametrize("where", ["target", "neighbours", "unrelated"])
@pytest.mark.parametrize("run", [evaluate, assess])
def test_a_suite_that_the_encoder_cuts_is_refused_before_any_drawing(run, where, monkeypatch):
    pipe = tiny_pipeline()
    changes = {
        "target": {"concept": dataclasses.replace(SUITE.concept, templates=("{}", LONG + "{}"))},
        "neighbours": {"concept": dataclasses.replace(SUITE.concept, neighbours=("dog", LONG + "dog"))},
        "unrelated": {"unrelated": (LONG,)},
    }
    suite = dataclasses.replace(SUITE, **changes[where])
    monkeypatch.setattr(type(pipe), "__call__", NeverDrawn.__call__)
    with pytest.raises(TooLong, match="the text encoder cuts . of .*longer than the text encoder reads") as error:
        run(pipe, {"edit": AddNoise()}, suite, detectors=[PixelDetector()], progress=False)
    assert error.value.prompts


def test_prompts_of_a_probe_that_are_cut_are_left_out_with_the_reason():
    words = Words(descriptions=("a pet that meows", LONG.replace("cat", "pet")))
    context = tiny_context()
    context = dataclasses.replace(context, suite=dataclasses.replace(context.suite, words=words))
    rows = probe_class("description")(images_per_prompt=2).run(context.base, context)
    assert {row.value is None for row in rows if len(row.cluster) > 200} == {True}
    assert {row.value in (0.0, 1.0) for row in rows if len(row.cluster) < 200} == {True}
    assert all("longer than the text encoder reads" in row.reason for row in rows if row.value is None)
    (level,) = (
        e.estimate for e in probe_class("description")().weigh({"base": rows}, {"base": "base"}) if e.measure == "rate"
    )
    known = [row.value for row in rows if row.value is not None]
    assert level.value == pytest.approx(sum(known) / len(known)) and level.excluded == len(rows) - len(known)


def test_a_probe_that_draws_them_itself_says_so():
    context = tiny_context()
    with pytest.raises(Missing, match="longer than the text encoder reads"):
        context.draw(context.pipe, context.base, ["a cat", LONG])
    (drawn,) = context.draw(context.pipe, context.base, [LONG], cut=True)
    assert drawn[0].tobytes() == generate(context.pipe, [LONG], num_inference_steps=2, progress=False)[0][0].tobytes()
