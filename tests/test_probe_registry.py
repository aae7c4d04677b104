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
