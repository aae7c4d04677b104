"""Probes of other packages: an entry point, and nothing else."""

from __future__ import annotations

from collections import Counter
from importlib.metadata import EntryPoint

import pytest

from erasure import registry
from erasure.eval.probes import Observation, Probe, names, probe_class, probes_of
from erasure.eval.probes.weigh import contrasts
from tests.probe_helpers import tiny_context


class Brightness(Probe):
    """How bright a picture of the target is: a probe of somebody else's."""

    key, code, title = "brightness", "X1", "brightness"
    section, level, access = "suppression", "outputs", "black_box"
    presets = {"smoke": {}}
    licences, not_licensed = "how bright it is", "anything else"

    def run(self, model, context):
        with context.open(model) as pipe:
            [[image]] = context.draw(pipe, model, ["a cat"])
        return [Observation(model.name, "", "a cat", 0, image.convert("L").getpixel((0, 0)) / 255)]

    def weigh(self, rows, models):
        return contrasts(self.key, rows, models, shares=False)


@pytest.fixture
def declared(monkeypatch):
    def declare(name, value):
        point = EntryPoint(name, value, "erasure.probes")
        monkeypatch.setattr(registry, "declared", lambda group, path: (point,) if group == "erasure.probes" else ())

    return declare


def test_a_probe_of_another_package_is_listed_last_and_runs_in_its_presets(declared):
    before = names()
    declared("brightness", f"{__name__}:Brightness")
    assert names() == (*before, "brightness") and probe_class("brightness") is Brightness
    assert [type(probe) for probe in probes_of("smoke", ("brightness",))] == [Brightness]
    assert Brightness not in [type(probe) for probe in probes_of("standard")]
    context = tiny_context()
    rows = {name: Brightness().run(context.models[name], context) for name in ("base", "noise")}
    found = Brightness().weigh(rows, {"base": "base", "noise": "erased"})
    assert {e.measure for e in found if e.model == "noise"} == {"rate", "change"}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("direct", f"{__name__}:Brightness", "two packages define the probe 'direct'"),
        ("glow", f"{__name__}:Brightness", "whose key is 'glow'"),
        ("glow", f"{__name__}:declared", "must be a class"),
    ],
)
def test_a_name_that_is_taken_or_names_no_probe_is_refused(declared, name, value, message):
    declared(name, value)
    with pytest.raises(ValueError, match=message):
        probe_class(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dirct", r"unknown probe 'dirct' \(did you mean 'direct'\?\)$"),
        ("qqq", r"unknown probe 'qqq'; choose one of .*'direct'"),  # all fifty where none is near
    ],
)
def test_an_unknown_probe_is_met_with_the_one_that_was_meant_or_with_all(name, message):
    with pytest.raises(ValueError, match=message):
        probe_class(name)


def test_no_two_probes_share_a_place_in_the_taxonomy():
    codes = Counter(probe_class(name).code for name in names())
    assert [code for code, count in codes.items() if count > 1] == []


def test_a_key_may_ask_for_larger_samples():
    [direct, more] = probes_of("standard", ("direct", "relearning:runs=5, prompts=18"))
    [as_it_is] = probes_of("standard", ("relearning",))
    assert (more.runs, more.prompts) == (5, 18) and (as_it_is.runs, as_it_is.prompts) == (3, 12)
    assert {**more.settings(), "runs": 3, "prompts": 12} == as_it_is.settings()
    assert direct.settings() == probes_of("standard", ("direct",))[0].settings()


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("relearning:runs=2", "runs of 'relearning' must be 3 or more, as the preset has; got '2'"),
        ("relearning:prompts=x", "must be 12 or more"),
        ("relearning:runs=", "must be 3 or more"),
        ("relearning:runs=-5", "must be 3 or more"),
        ("relearning:lr=1", "can be raised; got 'lr=1'"),
        ("relearning:", "can be raised; got ''"),
        ("construction:runs=5", "has no sample that could be larger"),
    ],
)
def test_a_sample_cannot_be_made_smaller_nor_anything_else_changed(key, message):
    with pytest.raises(ValueError, match=message):
        probes_of("standard", (key,))
