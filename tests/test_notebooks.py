"""The notebooks: they open in Colab, what is committed was executed, and the one about Stable Diffusion runs on it.

`make notebooks` executes all of them in their tiny form.
"""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import nbformat
import pytest

from erasure.eval.detectors.clip import ClipDetector
from tests.tiny import tiny

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NAMES = {"batch_and_register", "closed_form", "evaluation", "fine_tuning", "quickstart", "spiderman"}
REPOSITORY = "diffusion-erasure/erasure"
LARGEST = 600_000  # bytes; pictures as JPEG, or as PNG with a palette


def code(file: Path) -> list[str]:
    return [cell.source for cell in nbformat.read(file, 4).cells if cell.cell_type == "code"]


def test_every_notebook_is_known():
    assert {file.stem for file in NOTEBOOKS} == NAMES


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_opens_in_colab(file):
    cells = nbformat.read(file, 4).cells
    nbformat.validate(nbformat.read(file, 4))
    address = f"https://colab.research.google.com/github/{REPOSITORY}/blob/main/notebooks/{file.name}"
    assert cells[0].source.startswith("[![Open in Colab](") and f"({address})" in cells[0].source
    assert f"git clone --quiet --depth 1 https://github.com/{REPOSITORY} " in cells[1].source
    assert REPOSITORY in (ROOT / "mkdocs.yml").read_text("utf-8")


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_what_is_committed_was_executed(file):
    cells = [cell for cell in nbformat.read(file, 4).cells if cell.cell_type == "code"]
    assert any(output.output_type == "display_data" or "data" in output for cell in cells for output in cell.outputs)
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert file.stat().st_size < LARGEST


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_the_code_is_python_and_has_a_tiny_form(file):
    first, *others = code(file)
    plain = "\n".join("    pass" if line.startswith(("    !", "    %")) else line for line in first.splitlines())
    for source in (plain, *others):
        ast.parse(source)
    assert any("ERASURE_TINY" in source for source in others)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_one_variable_switches_spiderman_to_a_stable_diffusion_checkpoint(tmp_path, monkeypatch, capsys):
    """On a tiny random one: every cell runs, about Spiderman and his neighbours."""
    tiny("sd1").save_pretrained(tmp_path / "checkpoint")
    judge, load = ROOT / "eval" / "worldkit" / "weights" / "clip", ClipDetector.load
    stand_in = functools.partial(load, name="stand-in")  # open_clip's own weights are not here
    monkeypatch.setattr(ClipDetector, "load", lambda model, weights, **more: stand_in(judge, **more))
    monkeypatch.setenv("ERASURE_TINY", "1")
    monkeypatch.chdir(tmp_path)
    sources = code(ROOT / "notebooks" / "spiderman.ipynb")[1:]
    assert sum(source.startswith('CHECKPOINT = "emoji-world"\n') for source in sources) == 1
    names: dict[str, object] = {}
    for source in sources:
        line = 'CHECKPOINT = "checkpoint"\n'
        exec(compile(source.replace('CHECKPOINT = "emoji-world"\n', line), "spiderman", "exec"), names)
    out = capsys.readouterr().out
    assert "Spiderman - Spider-Man" in out and "Batman, Superman" in out
    assert (tmp_path / "spiderman-uce" / "erasure.safetensors").exists()
    assert (tmp_path / "spiderman-uce-lora.safetensors").exists()
