"""What CONTRIBUTING.md shows is what the code has, and works as it is written there."""

import configparser
import importlib
import re
import tomllib
from pathlib import Path

import pytest
import torch

from erasure import Erasure, erase
from erasure.backbone.cross import Lumina2Backbone
from erasure.backbone.generic import TransformerBackbone
from erasure.backbone.noise import Flow
from erasure.eval.probes.base import lacking
from erasure.methods import METHODS, available
from tests.probe_helpers import tiny_context
from tests.slow import first
from tests.test_operator import draw
from tests.tiny import identical, tiny, weights

PAGE = (Path(__file__).resolve().parents[1] / "CONTRIBUTING.md").read_text("utf-8")
GROUP = "erasure.methods"


def block(language, start):
    """The one block of code in a language that holds a line beginning like this."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)
    (found,) = (code for code in blocks if re.search(f"^{re.escape(start)}", code, flags=re.MULTILINE))
    return found


def test_the_model_on_the_page_is_the_one_in_the_code():
    names = {"TransformerBackbone": TransformerBackbone, "Flow": Flow}
    exec(block("python", "class Lumina2Backbone"), names)
    shown, real = (
        {name: value for name, value in vars(kind).items() if name == "__doc__" or not name.startswith("_")}
        for kind in (names["Lumina2Backbone"], Lumina2Backbone)
    )
    assert shown == real


def test_the_probe_on_the_page_runs_as_it_is_written_there():
    names = {"__name__": "page"}
    exec(block("python", "class Whisper"), names)
    probe, context = names["Whisper"].preset("smoke"), tiny_context()
    rows = {name: probe.run(context.models[name], context) for name in ("base", "noise", "gold-0")}
    assert lacking(probe, context) is None and {row.cluster for own in rows.values() for row in own} == {"cat cat"}
    found = probe.weigh(rows, {name: context.models[name].role for name in rows})
    assert {e.measure for e in found if e.model == "noise"} == {"rate", "change", "above_control", "residual"}


@pytest.mark.parametrize("declared_in", ["setup.cfg", "pyproject.toml"])
@pytest.mark.parametrize("architecture", first(["sd1", "sd3"], "sd1"))
def test_a_method_of_another_package_works_as_on_the_page(declared_in, architecture, tmp_path, monkeypatch):
    if declared_in == "setup.cfg":
        setup = configparser.ConfigParser()
        setup.read_string(block("ini", "[options.entry_points]"))
        lines = setup["options.entry_points"][GROUP].split("\n")
        points = dict(re.split(r"\s*=\s*", line) for line in lines if line)
    else:
        points = tomllib.loads(block("toml", f'[project.entry-points."{GROUP}"]'))["project"]["entry-points"][GROUP]
    module = tmp_path / "my_package" / "my_module.py"
    module.parent.mkdir()
    module.write_text(block("python", "class MyMethod"), "utf-8")
    installed = tmp_path / "my_package-1.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1\n", "utf-8")
    declared = "\n".join(f"{name} = {target}" for name, target in points.items())
    (installed / "entry_points.txt").write_text(f"[{GROUP}]\n{declared}\n", "utf-8")
    assert "my-method" not in available()
    monkeypatch.syspath_prepend(tmp_path)
    assert available() == {**METHODS.built_in, "my-method": "my_package.my_module:MyMethod"}

    pipe = tiny(architecture)
    before, base = weights(pipe), draw(pipe)
    short = {"iterations": 3, "lr": 0.05, "trajectories": 1, "num_inference_steps": 3}
    own = importlib.import_module("my_package.my_module").MyMethod  # as in a notebook, before it is declared
    undeclared = erase(pipe, "superhero", own, progress=False, apply=False, **short)
    edit = erase(pipe, "superhero", method="my-method", progress=False, **short)
    assert undeclared.config == edit.config and identical(undeclared.tensors, edit.tensors)
    erased = draw(pipe)
    assert not torch.equal(erased, base)
    edit.save_pretrained(tmp_path / "edit")
    edit.remove(pipe)
    assert identical(weights(pipe), before)
    monkeypatch.undo()  # the package is not installed any more
    assert "my-method" not in available()
    Erasure.from_pretrained(tmp_path / "edit").apply(pipe)
    assert torch.equal(draw(pipe), erased)
