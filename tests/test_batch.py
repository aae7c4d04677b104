"""The batch runner: a checked recipe, one result per cell, nothing done twice, nothing lost."""

import json

import pytest
from rich.console import Console

from erasure.backbone import backbone_of
from erasure.batch import Recipe, run
from erasure.methods.gram import Gram
from tests.tiny import tiny_pipeline

RECIPE = """
version: 1
out: results
bases: [{base}]
concepts:
  - {{name: superhero, neighbours: [ninja]}}
  - {{name: "{second}"}}
methods:
  - uce
  - {{name: esd, preset: official-2025-x, settings: {{iterations: 2, trajectories: 2, num_inference_steps: 3}}}}
seeds: [0]
evaluate: false
"""


@pytest.fixture
def recipe(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "base")

    def write(second="wizard"):
        path = tmp_path / "recipe.yaml"
        path.write_text(RECIPE.format(base=tmp_path / "base", second=second))
        return Recipe.load(path)

    return write


def test_every_cell_gets_an_erasure_and_a_result_and_is_not_run_again(recipe, monkeypatch):
    plan = recipe()
    assert run(plan, console=Console(quiet=True)) == 0
    for cell in plan.cells():
        result = json.loads((plan.out / cell.key / "result.json").read_text())
        assert result["status"] == "done" and (plan.out / cell.key / "erasure" / "erasure.safetensors").exists()
    monkeypatch.setattr("erasure.batch.runner.erase", lambda *a, **k: pytest.fail("a finished cell was run again"))
    assert run(plan, console=Console(quiet=True)) == 0


def test_files_in_a_recipe_lie_beside_it_and_their_content_counts(tmp_path, monkeypatch):
    backbone = backbone_of(tiny_pipeline())

    def recipe(settings="{corpus: corpus.safetensors}"):
        (tmp_path / "recipe.yaml").write_text(
            f"version: 1\nout: results\nconcepts: [{{name: cat}}]\nmethods: [{{name: speed, settings: {settings}}}]\n"
        )
        return Recipe.load(tmp_path / "recipe.yaml")

    with pytest.raises(FileNotFoundError, match="taken relative to the recipe"):
        recipe()
    Gram.of(backbone, ["a dog"]).save(tmp_path / "corpus.safetensors")
    monkeypatch.chdir("/")
    (cell,) = recipe().cells()
    assert cell.method.settings == {"corpus": str(tmp_path / "corpus.safetensors")}
    key = cell.key
    Gram.of(backbone, ["a dog", "a bear"]).save(tmp_path / "corpus.safetensors")
    assert recipe().cells()[0].key != key
    with pytest.raises(ValueError, match="under `seeds`"):
        recipe("{seed: 5}")


def test_a_base_that_was_trained_on_is_another_one(recipe, tmp_path):
    before = [cell.key for cell in recipe().cells()]
    assert before == [cell.key for cell in recipe().cells()]
    tiny_pipeline(seed=5).save_pretrained(tmp_path / "base")
    assert not set(before) & {cell.key for cell in recipe().cells()}


def test_a_failed_cell_is_recorded_passed_over_and_tried_again(recipe):
    plan = recipe(second="wizard " * 80)
    assert run(plan, console=Console(quiet=True)) == 2
    results = [json.loads((plan.out / cell.key / "result.json").read_text()) for cell in plan.cells()]
    assert [r["status"] for r in results] == ["done", "done", "failed", "failed"]
    assert "longer than the text encoder" in results[2]["error"]
    assert run(plan, console=Console(quiet=True)) == 2


def test_a_half_written_result_is_run_again(recipe):
    plan = recipe()
    run(plan, console=Console(quiet=True))
    result = plan.out / plan.cells()[0].key / "result.json"
    result.write_text(result.read_text()[:20])
    run(plan, console=Console(quiet=True))
    assert json.loads(result.read_text())["status"] == "done"


def test_cells_differ_by_every_setting(recipe):
    keys = [cell.key for cell in recipe().cells()]
    assert len(set(keys)) == 4


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (("seeds: [0]", "seed: [0]"), "seed"),
        (("- uce", "- ucee"), r"unknown method 'ucee' \(did you mean 'uce'\?\)"),
        (("iterations: 2", "iteration: 2"), r"has no setting 'iteration' \(did you mean 'iterations'\?\)"),
        (("seeds: [0]", "seeds: []"), "nothing to run"),
        (("version: 1", "version: 9"), "version"),
        (("version: 1", "version: 1\nlimit: 0"), "limit: .*greater than or equal to 1; got 0"),
        (("seeds: [0]", "seeds: [-1]"), "seeds.0: .*greater than or equal to 0; got -1"),
    ],
)
def test_a_recipe_with_a_slip_is_refused_in_one_line(recipe, tmp_path, change, fault):
    recipe()
    path = tmp_path / "recipe.yaml"
    path.write_text(path.read_text().replace(*change))
    with pytest.raises(ValueError, match=fault) as caught:
        Recipe.load(path)
    assert "\n" not in str(caught.value)


def test_a_trial_run_never_stands_for_the_full_one(recipe, tmp_path):
    full = {cell.key for cell in recipe().cells()}
    for line in ("limit: 4", "dtype: float16"):
        path = tmp_path / "recipe.yaml"
        path.write_text(path.read_text() + line + "\n")
        assert not full & {cell.key for cell in Recipe.load(path).cells()}


def test_any_error_in_a_cell_is_that_cells(recipe, monkeypatch):
    plan = recipe()
    monkeypatch.setattr("erasure.batch.runner.erase", lambda *a, **k: {}["surprise"])
    assert run(plan, console=Console(quiet=True)) == 4
