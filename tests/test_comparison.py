"""Methods side by side: what making them costs, which of them none beats, and what the page says."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from erasure import Concept
from erasure.backbone import backbone_of
from erasure.batch import Recipe, run
from erasure.batch.comparison import INSIDE_NOTE, MEANS_NOTE, TARGETS, page, table, write_comparison
from erasure.batch.cost import counted
from erasure.batch.lines import Line, Rate, averaged, before_of, inside_of, lines_of, mean, means, rest_of
from erasure.batch.pictures import kept_out, still_inside
from erasure.concept import WORLD, Suite
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


def test_what_a_backward_pass_computes_again_is_counted():
    pipe, entered = tiny("sd1"), []
    handle = pipe.unet.register_forward_pre_hook(
        lambda m, a, k: entered.append(len(a[0] if a else k["sample"])), with_kwargs=True
    )
    settings = {"iterations": 2, "batch_size": 1, "num_inference_steps": 4, "early": 1, "late": 1, "retain": 0.0}
    with counted(backbone_of(pipe)) as cost:
        make(pipe, Concept("superhero", anchor="cat"), "eraseflow", progress=False, **settings)
    handle.remove()
    assert cost.trained == cost.again == 2 * 2 * 2  # two steps of two terms, with guidance
    looked = sum(entered) - (cost.forward + cost.trained + cost.again)
    assert looked == 4  # calls that are only looked at, and stopped before the denoiser runs
    assert cost.passes == cost.forward + 4 * 8


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


def figure(group, rate, change, detector="a"):
    return {"group": group, "detector": detector, "rate": {"value": rate, "low": 0.0, "high": 1.0},
            "change": {"value": change}}  # fmt: skip


def test_the_base_stands_above_the_methods_of_its_target():
    """By the less flattering detector, as the methods are: the higher rate of the target, the lower of what is kept."""
    figures = [figure("target", 0.1, -0.8), figure("target", 0.0, -0.95, "b"), figure("unrelated", 0.7, -0.2),
               figure("unrelated", 0.8, -0.15, "b")]  # fmt: skip
    before = before_of(figures)
    assert before == pytest.approx({"target": 0.95, "unrelated": 0.9})
    lines = [Line("uce", "superhero", rates(0.1, 0.9), before=before), Line("uce", "cat", rates(0.1, 0.9)),
             Line("esd", "superhero", rates(0.2, 0.9), before=before)]  # fmt: skip
    rows = table(lines).splitlines()[2:]
    assert [row.split(" | ")[:2] for row in rows] == [
        ["| `uce`", "cat"], ["| base", "superhero"], ["| `uce`", "superhero"], ["| `esd`", "superhero"]
    ]  # fmt: skip
    assert rows[1] == "| base | superhero | 95 % |  | 90 % | | | |"
    assert averaged(lines)[0].before == {}  # one of its targets has none
    both = [Line("uce", suite, rates(0.1, 0.9), before={"target": x}) for suite, x in (("a", 1.0), ("b", 0.5))]
    assert averaged(both)[0].before == {"target": 0.75}


def test_the_picture_is_drawn_of_what_was_measured(tmp_path):
    """A row for each method that has rates: more methods make a higher picture, those that failed do not."""
    from matplotlib.image import imread

    for name, lines in (("all", LINES), ("measured", LINES[:3]), ("fewer", LINES[:2])):
        kept_out(lines, tmp_path / f"{name}.png")
    heights = [len(imread(tmp_path / f"{name}.png")) for name in ("all", "measured", "fewer")]
    assert heights[0] == heights[1] > heights[2]


# --- what is still inside, and means over targets ---------------------------------------------------------------------


def inside(**values):
    return {name: Rate(value, value - 0.2, value + 0.2) for name, value in values.items()}


def line(method, suite, target, **more):
    return Line(method, suite, rates(target, 0.9), 100, 1.0, 1000, **more)


def evidence(probe, measure, value, conclusive=True, control="gold"):
    return {"probe": probe, "measure": measure, "control": control, "value": value, "low": None, "high": None,
            "conclusive": conclusive}  # fmt: skip


def test_the_number_about_the_weights_is_that_of_the_probe_that_recovers_most_and_whose_gates_it_passed():
    found = inside_of([
        evidence("inversion", "residual", 0.1),
        evidence("completion", "residual", 0.4),
        evidence("base_encoder", "residual", 0.9, conclusive=False),
        evidence("relearning", "advantage", 1.5),
    ])  # fmt: skip
    assert {name: rate.value for name, rate in found.items()} == {"residual": 0.4, "advantage": 1.5}
    lost = rest_of([evidence("neighbours", "change", -0.2), evidence("unrelated", "change", 0.0)])
    assert lost.value == -0.2 and rest_of([]) is None


def test_the_second_picture_has_a_panel_for_each_measure(tmp_path):
    from matplotlib.image import imread

    lines = [line("uce", "cat", 0.1, inside=inside(residual=0.4, advantage=1.0), rest=Rate(-0.1, -0.2, None))]
    lines += [
        line("esd", "cat", 0.2, inside=inside(residual=0.2), rest=Rate(-0.3, -0.4, -0.2)),
        line("sld", "cat", 0.3),
    ]
    still_inside(lines, tmp_path / "two.png")
    still_inside(lines[1:], tmp_path / "one.png")
    assert imread(tmp_path / "two.png").shape[1] > imread(tmp_path / "one.png").shape[1]


def test_a_mean_over_targets_is_as_wide_as_what_is_known_of_it():
    spread = mean([Rate(0.1, 0.0, 0.2), Rate(0.5, 0.4, 0.6), Rate(0.3, 0.2, 0.4)])
    assert spread.value == pytest.approx(0.3)
    assert spread.high - 0.3 == pytest.approx(4.3027 * 0.2 / 3**0.5, rel=1e-4)  # t with 2 degrees of freedom
    equal = mean([Rate(0.0, 0.0, 0.2)] * 4, within=(0.0, 1.0))
    assert (equal.low, equal.high) == (0.0, pytest.approx(0.2 / 4**0.5))  # not of no width
    assert mean([Rate(0.4, 0.1, 0.8)]) == Rate(0.4, 0.1, 0.8) and mean([Rate(0.4, None, 0.8)] * 2).low is None


def test_means_are_over_targets_seeds_first_and_say_how_many():
    lines = [
        *(line("esd", "cat", value) for value in (0.2, 0.4)),  # two seeds
        line("esd", "rose", 0.7, inside=inside(residual=0.5)),
        line("uce", "cat", 0.1),
        Line("uce", "rose", error="no"),
        Line("sld", "cat", error="does not work"),
        Line("sld", "rose", error="does not work"),
    ]
    esd, uce, sld = means(lines)
    assert esd.suite == "2 targets" and esd.rates["target"].value == pytest.approx(0.5)
    assert esd.inside == {}  # one of its targets has none
    assert uce.suite == "1 of 2 targets" and sld.error == "does not work"
    assert means(lines[:2]) == [] and averaged(lines[:2])[0].rates["target"].value == pytest.approx(0.3)
    text = page(lines)
    assert "| `esd` | 2 targets | 50 % (" in text and MEANS_NOTE in text and INSIDE_NOTE in text


def test_presets_of_a_method_are_told_apart():
    found = averaged([line("esd", "cat", 0.2), line("esd", "cat", 0.4, preset="official-2025-x")])
    assert [one.label for one in found] == ["esd", "esd official-2025-x"]


@pytest.mark.parametrize("options", [(), ("--suite", "cat", "--targets", "5"), ("--targets", "6")])
def test_a_comparison_is_on_suites_or_on_a_number_of_targets(options, tmp_path, erasure):
    code, _, err = erasure("compare", *options, "--out", tmp_path / "new")
    assert code == 2 and ("--targets 5" in err or "take fewer" in err) and not (tmp_path / "new").exists()


def test_the_five_targets_are_suites_of_the_world():
    suites = [Suite.load(name) for name in TARGETS]
    assert len({suite.target for suite in suites}) == 5 and {suite.base for suite in suites} == {WORLD}


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


def test_a_single_file_is_compared_by_the_configs_that_are_named(tmp_path, erasure, monkeypatch):
    plans = []
    monkeypatch.setattr("erasure.batch.run", lambda plan, **_: plans.append(plan) or 0)
    options = ("--suite", "superhero", "-m", "uce", "--base", "model.safetensors", "--config", tmp_path)
    erasure("compare", *options, "--out", tmp_path / "out")
    assert plans[0].config == tmp_path and plans[0].bases == ("model.safetensors",)


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
