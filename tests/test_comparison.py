"""Methods side by side: what making them costs, which of them none beats, and what the page says."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from erasure.backbone import backbone_of
from erasure.batch import Recipe, run
from erasure.batch.comparison import Line, Rate, best, lines_of, picture, table, write_comparison
from erasure.batch.cost import counted
from erasure.methods import BUILT_IN, method_class
from tests.test_cli import run as call
from tests.tiny import make, tiny, tiny_pipeline


@pytest.fixture
def erasure(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    return lambda *arguments: call(*arguments, monkeypatch=monkeypatch, capsys=capsys)


@pytest.mark.parametrize("architecture", ["sd1", "sdxl", "flux"])
def test_the_cost_of_a_fine_tune_is_counted_in_rows(architecture):
    pipe = tiny(architecture)
    settings = {"iterations": 4, "batch_size": 3, "trajectories": 2, "keep_steps": None, "num_inference_steps": 5}
    with counted(backbone_of(pipe)) as cost:
        make(pipe, "superhero", "esd", preset="official-2025-x", adapter="auto", progress=False, **settings)
    steps, guided = 2 * 5, architecture != "flux"  # two trajectories of five steps
    # without two predictions a step, the bank predicts at guidance 1 and for the empty prompt anew
    assert cost.forward == steps * (2 if guided else 3)
    assert cost.trained == 4 * 3 and cost.passes == cost.forward + 3 * 12 and cost.seconds > 0


def test_a_closed_form_costs_no_pass():
    pipe = tiny_pipeline()
    with counted(backbone_of(pipe)) as cost:
        make(pipe, "superhero", "uce", keep=["ninja"])
    assert cost.passes == 0


def rates(target, near, far=0.9):
    return {
        name: Rate(value, max(0.0, value - 0.1), min(1.0, value + 0.1))
        for name, value in (("target", target), ("neighbours", near), ("unrelated", far))
    }


LINES = [
    Line("uce", "superhero", rates(0.1, 0.9), 0, 3.0, 270_000),
    Line("esd", "superhero", rates(0.05, 0.8), 4000, 60.0, 4_000_000),
    Line("leco", "superhero", rates(0.2, 0.85), 4000, 60.0, 900_000),
    Line("sld", "superhero", error="sld does not | work here"),
]


def test_the_table_has_the_strongest_first_and_failures_last():
    rows = table(LINES).splitlines()[2:]
    assert [row.split("`")[1] for row in rows] == ["esd", "uce", "leco", "sld"]
    assert "5 % (0 to 15)" in rows[0] and "4,000" in rows[0] and "0.27 MB" in rows[1]
    assert "failed: sld does not / work here" in rows[3]
    assert len({row.count("|") for row in rows}) == 1


def test_the_front_holds_what_none_beats_on_both_counts():
    assert best({"a": (0.9, 0.9), "b": (0.8, 0.95), "c": (0.85, 0.8), "d": (0.9, 0.9)}) == ["a", "b", "d"]
    assert best({"a": (0.5, 0.5)}) == ["a"] and best({}) == []


def test_the_picture_is_drawn_of_one_suite_and_of_several(tmp_path):
    for number, lines in enumerate([LINES, [*LINES, Line("uce", "cat", rates(0.3, 0.7), 0, 3.0, 1)]]):
        file = tmp_path / f"{number}.png"
        picture(lines, file)
        assert file.stat().st_size > 10_000


def test_the_page_is_made_of_what_a_recipe_came_to(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "base")
    quick = {"iterations": 2, "trajectories": 2, "num_inference_steps": 3}
    plan = Recipe(
        version=1,
        out=tmp_path / "results",
        concepts=({"name": "superhero", "neighbours": ["ninja"]},),
        methods=(
            {"name": "uce"},
            {"name": "esd", "preset": "official-2025-x", "settings": quick},
            {"name": "mace-cfr"},  # refuses: it needs an anchor
        ),
        bases=(str(tmp_path / "base"),),
        evaluate=False,
    )
    with pytest.raises(ValueError, match="no cell .* has a result"):
        write_comparison(plan)
    assert run(plan, console=Console(quiet=True)) == 1
    uce, esd, mace = lines_of(plan)
    assert uce.passes == 0 and uce.size > 0 and uce.error is None
    assert esd.passes >= 2 * 2 + 2 * 3  # two trajectories of at least one step, two training steps
    assert "anchor" in mace.error
    files = write_comparison(plan)
    assert [file.name for file in files] == ["comparison.json", "comparison.md"]  # nothing was measured, so no picture
    assert [line["method"] for line in json.loads(files[0].read_text())] == ["uce", "esd", "mace-cfr"]


def test_methods_are_compared_from_the_command_line(tmp_path, erasure):
    code, out, _ = erasure("compare", "--suite", "superhero", "-m", "uce", "--limit", "1", "--out", tmp_path)
    assert code == 0 and "comparison.png" in out
    (line,) = json.loads((tmp_path / "comparison.json").read_text())
    assert set(line["rates"]) == {"target", "neighbours", "unrelated"} and line["error"] is None
    (result,) = tmp_path.glob("*/result.json")
    before = result.read_bytes()
    again, out, _ = erasure("compare", "--suite", "superhero", "-m", "uce", "--limit", "1", "--out", tmp_path)
    assert again == 0 and "1 done" in out and result.read_bytes() == before


def test_suites_of_different_bases_are_not_compared(tmp_path, erasure):
    code, _, err = erasure("compare", "--suite", "superhero", "--suite", "van_gogh", "--out", tmp_path)
    assert code == 2 and "different bases" in err


def test_methods_are_listed_by_what_one_has(erasure):
    _, flux, _ = erasure("methods", "--for", "flux", "--no-training")
    assert "uce" in flux and "esd" not in flux and "sld" not in flux
    _, trained, _ = erasure("methods", "--training")
    assert "leco" in trained and "double-projections" not in trained
    code, _, err = erasure("methods", "--for", "fluxx")
    assert code == 2 and "did you mean 'flux'" in err


def test_the_page_of_methods_has_a_section_for_each():
    page = (Path(__file__).resolve().parents[1] / "docs" / "methods.md").read_text("utf-8")
    lacking = [name for name in BUILT_IN if f"\n### {name}\n" not in page or method_class(name).summary[1:] not in page]
    assert not lacking, "python docs/methods.py writes them"
