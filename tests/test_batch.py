"""The batch runner: a checked recipe, one result per cell, nothing done twice, nothing lost."""

import contextlib
import csv
import json
import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from rich.console import Console
from typer.testing import CliRunner

import erasure.registry
from erasure.artifact import export_single_file
from erasure.backbone import backbone_of
from erasure.batch import Recipe, run
from erasure.batch.judging import within_memory
from erasure.batch.overview import collect, plan, prunable, rows
from erasure.batch.worker import Worker, alone
from erasure.cli import app
from erasure.methods.gram import Gram
from tests.processes import PROCESSES
from tests.slow import first
from tests.tiny import tiny, tiny_pipeline

QUIET = Console(quiet=True)

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


@pytest.fixture(name="recipe")
def recipe_fixture(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "base")

    def write(second="wizard"):
        path = tmp_path / "recipe.yaml"
        path.write_text(RECIPE.format(base=tmp_path / "base", second=second))
        return Recipe.load(path)

    return write


def test_every_cell_gets_an_erasure_and_a_result_and_is_not_run_again(recipe, monkeypatch):
    plan = recipe()
    assert run(plan, console=QUIET) == 0
    for cell in plan.cells():
        result = json.loads((plan.out / cell.key / "result.json").read_text())
        assert result["status"] == "done" and (plan.out / cell.key / "erasure" / "erasure.safetensors").exists()
    monkeypatch.setattr("erasure.batch.stages.erase", lambda *a, **k: pytest.fail("a finished cell was run again"))
    assert run(plan, console=QUIET) == 0


def test_an_erasure_without_figures_of_its_own_is_a_result_too(tmp_path):
    tiny("sd1").save_pretrained(tmp_path / "base")
    (tmp_path / "recipe.yaml").write_text(
        "version: 1\nout: results\nbases: [base]\nevaluate: false\nconcepts: [{name: superhero}]\nmethods:\n"
        "  - {name: receler, settings: {iterations: 2, trajectories: 2, num_inference_steps: 2, attack_steps: 1}}\n"
    )
    plan = Recipe.load(tmp_path / "recipe.yaml")
    assert run(plan, console=QUIET) == 0 and [row.state for row in rows(plan)] == ["done"]


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


def test_a_failed_cell_is_recorded_passed_over_and_tried_again_where_that_is_asked_for(recipe, monkeypatch):
    plan = recipe(second="wizard " * 80)
    assert run(plan, console=QUIET) == 2
    results = [json.loads((plan.out / cell.key / "result.json").read_text()) for cell in plan.cells()]
    assert [r["status"] for r in results] == ["done", "done", "failed", "failed"]
    assert "longer than the text encoder" in results[2]["error"] and "Traceback" in results[2]["traceback"]
    assert run(plan, console=QUIET, retry_failed=True) == 2
    again = [json.loads((plan.out / cell.key / "result.json").read_text()) for cell in plan.cells()]
    assert [r["attempts"] for r in again] == [1, 1, 2, 2]
    monkeypatch.setattr("erasure.batch.stages.erase", lambda *a, **k: pytest.fail("a failed cell was run again"))
    assert run(plan, console=QUIET) == 2


@pytest.mark.parametrize("harm", first(["gone", "truncated", "altered"], "truncated"))
def test_a_finished_cell_whose_erasure_is_not_what_was_written_is_made_again(recipe, harm):
    plan = recipe()
    run(plan, console=QUIET)
    file = plan.out / plan.cells()[0].key / "erasure" / "erasure.safetensors"
    whole = file.read_bytes()
    if harm == "gone":
        file.unlink()
    else:
        file.write_bytes(whole[:-9] if harm == "truncated" else whole[:-1] + bytes([whole[-1] ^ 1]))
    assert next(rows(plan)).state == "damaged"
    assert run(plan, console=QUIET) == 0 and file.read_bytes() == whole


def test_a_lost_result_does_not_cost_the_erasure(recipe, monkeypatch):
    plan = recipe()
    run(plan, console=QUIET)
    for cell in plan.cells():
        (plan.out / cell.key / "result.json").unlink()
    monkeypatch.setattr("erasure.batch.stages.erase", lambda *a, **k: pytest.fail("an erasure was made again"))
    assert run(plan, console=QUIET) == 0
    assert {row.state for row in rows(plan)} == {"done"}


def test_a_killed_training_goes_on_at_its_checkpoint(recipe, monkeypatch):
    plan, real = recipe(), torch.optim.Adam.step
    run(plan, console=QUIET)
    cell = next(cell for cell in plan.cells() if cell.method.name == "esd")
    file = plan.out / cell.key / "erasure" / "erasure.safetensors"
    whole = file.read_bytes()
    for name in ("result.json", "made.json"):
        (plan.out / cell.key / name).unlink()

    def dies(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.optim.Adam, "step", dies)
    with pytest.raises(KeyboardInterrupt):
        run(plan, console=QUIET)
    monkeypatch.setattr(torch.optim.Adam, "step", real)
    assert run(plan, console=QUIET) == 0 and file.read_bytes() == whole


def test_a_half_written_result_is_run_again(recipe):
    plan = recipe()
    run(plan, console=QUIET)
    result = plan.out / plan.cells()[0].key / "result.json"
    result.write_text(result.read_text()[:20])
    run(plan, console=QUIET)
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
        (("version: 1", "version: 1\nlimit: 0"), "limit: .*greater than 0; got 0"),
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


def test_another_precision_makes_other_cells(recipe, tmp_path):
    full, path = {cell.key for cell in recipe().cells()}, tmp_path / "recipe.yaml"
    path.write_text(path.read_text() + "dtype: float16\n")
    assert not full & {cell.key for cell in Recipe.load(path).cells()}


def test_the_configs_of_a_base_of_one_file_lie_where_a_recipe_says(tmp_path):
    tiny("sd1").save_pretrained(tmp_path / "configs")
    export_single_file(tiny("sd1"), tmp_path / "model.safetensors")

    def plan(bases="[model.safetensors]", config="config: configs"):
        (tmp_path / "recipe.yaml").write_text(
            f"version: 1\nout: results\nbases: {bases}\n{config}\nconcepts: [{{name: superhero}}]\n"
            "methods: [uce]\nevaluate: false\n"
        )
        return Recipe.load(tmp_path / "recipe.yaml")

    recipe = plan()
    (cell,) = recipe.cells()
    assert run(recipe, console=QUIET) == 0 and (recipe.out / cell.key / "erasure").is_dir()
    (other,) = plan(config="").cells()
    assert other.key != cell.key  # configs and parts of another folder are another model
    with pytest.raises(ValueError, match="config: a folder of configs goes with a single file"):
        plan(bases="[emoji-world]")
    with pytest.raises(ValueError, match="config: the folder .*elsewhere.* has no model_index.json"):
        plan(config="config: elsewhere")
    mixed = plan(bases="[emoji-world, model.safetensors]")
    assert [cell.config for cell in mixed.cells()] == [None, str(tmp_path / "configs")]


def test_any_error_in_a_cell_is_that_cells(recipe, monkeypatch):
    plan = recipe()
    monkeypatch.setattr("erasure.batch.stages.erase", lambda *a, **k: {}["surprise"])
    assert run(plan, console=QUIET) == 4


# --- several processes ------------------------------------------------------------------------------------------------


def process(path, **environment):
    """One of several that run a recipe."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    run(Recipe.load(path), console=QUIET, poll=0.05)


def erasures(plan):
    return {c.key: (plan.out / c.key / "erasure" / "erasure.safetensors").read_bytes() for c in plan.cells()}


def test_processes_share_the_cells_and_a_killed_one_is_made_up_for(recipe, tmp_path):
    run(recipe(), console=QUIET)
    expected = erasures(recipe())
    path = tmp_path / "recipe.yaml"
    path.write_text(path.read_text().replace("out: results", "out: shared"))
    shared = Recipe.load(path)
    workers = [
        PROCESSES.Process(target=process, args=(path,), kwargs={"RANK": str(rank), "WORLD_SIZE": "2"})
        for rank in (0, 1)
    ]
    for worker in workers:
        worker.start()
    first = shared.out / shared.cells()[0].key
    until = time.monotonic() + 120
    while not any(first.glob("*.json")) and time.monotonic() < until:
        time.sleep(0.01)
    os.kill(workers[0].pid, signal.SIGKILL)
    for worker in workers:
        worker.join(180)
    assert workers[1].exitcode == 0
    assert erasures(shared) == expected
    assert all(row.state == "done" for row in rows(shared))


def test_a_cell_that_another_process_is_at_is_waited_for_and_not_done_twice(recipe, monkeypatch):
    plan, (first, *_) = recipe(), recipe().cells()
    (plan.out / first.key).mkdir(parents=True)
    lock = FileLock(str(plan.out / first.key / ".lock"))
    lock.acquire()
    assert next(rows(plan)).state == "running"
    slept = []

    def sleeps(seconds):
        slept.append(seconds)
        lock.release()

    monkeypatch.setattr("erasure.batch.runner.time.sleep", sleeps)
    assert run(plan, console=QUIET, poll=7.0) == 0
    assert slept == [7.0] and {row.state for row in rows(plan)} == {"done"}


@pytest.mark.parametrize(
    ("environment", "worker"),
    [
        ({}, Worker()),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, Worker(3, 8, 1)),
        ({"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "2"}, Worker(3, 4, 0)),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "1"}, Worker(1, 2, 1)),
        ({"RANK": "", "WORLD_SIZE": "x"}, Worker()),
    ],
)
def test_a_worker_is_what_its_launcher_says(environment, worker):
    assert Worker.of(environment) == worker


def test_workers_begin_apart_and_all_come_to_everything():
    cells = list(range(10))
    orders = [Worker(rank, 3).order(cells) for rank in range(3)]
    assert [order[0] for order in orders] == [0, 3, 6] and all(sorted(order) == cells for order in orders)
    with pytest.raises(ValueError, match="rank 3 of 3"):
        Worker(3, 3)


def test_a_launched_process_trains_by_itself(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with alone():
        assert "WORLD_SIZE" not in os.environ
    assert os.environ["WORLD_SIZE"] == "2"


def test_too_little_memory_halves_the_batch():
    tried = []

    def draws(most):
        def attempt(batch_size):
            tried.append(batch_size)
            if batch_size > most:
                raise torch.OutOfMemoryError
            return batch_size

        return attempt

    assert within_memory(draws(4)) == 4 and tried == [16, 8, 4]
    with pytest.raises(torch.OutOfMemoryError):
        within_memory(draws(0))


# --- what a recipe spans, and what came of it -------------------------------------------------------------------------


def test_a_base_goes_by_its_content_and_not_by_when_it_was_written(recipe, tmp_path):
    before = [cell.key for cell in recipe().cells()]
    for file in (tmp_path / "base").rglob("*"):
        os.utime(file, (1, 1))
    assert before == [cell.key for cell in recipe().cells()]


@pytest.mark.parametrize("base", ["/", ".", "results"])
def test_a_folder_that_is_no_model_is_refused_and_not_searched(recipe, tmp_path, base, monkeypatch):
    recipe()
    (tmp_path / "results").mkdir()
    path = tmp_path / "recipe.yaml"
    path.write_text(path.read_text().replace(str(tmp_path / "base"), base))
    monkeypatch.setattr(Path, "rglob", lambda *_: pytest.fail("it was searched"))
    with pytest.raises(ValueError, match="bases: the folder .* has no model_index.json"):
        Recipe.load(path).cells()


def test_another_version_of_the_library_makes_other_cells(recipe, monkeypatch):
    before = {cell.key for cell in recipe().cells()}
    monkeypatch.setattr("erasure.batch.recipe.__version__", "99.0")
    assert not before & {cell.key for cell in recipe().cells()}


def test_a_method_without_a_seed_has_one_cell(recipe, tmp_path):
    recipe()
    path = tmp_path / "recipe.yaml"
    path.write_text(path.read_text().replace("seeds: [0]", "seeds: [0, 1, 2]"))
    count = [cell.method.name for cell in Recipe.load(path).cells()]
    assert (count.count("uce"), count.count("esd")) == (2, 6)


def test_installed_packages_are_not_searched_for_every_cell(recipe, tmp_path, monkeypatch):
    recipe()
    path = tmp_path / "recipe.yaml"
    path.write_text(path.read_text().replace("seeds: [0]", f"seeds: {list(range(50))}"))
    searched, real = [], erasure.registry.entry_points
    erasure.registry.declared.cache_clear()
    monkeypatch.setattr("erasure.registry.entry_points", lambda **group: (searched.append(group), real(**group))[1])
    assert len({cell.key for cell in Recipe.load(path).cells()}) == 102
    assert len(searched) < 10


def test_the_plan_counts_what_is_left_and_says_what_it_does_not_know(recipe):
    plan_of = recipe()
    nothing = plan(plan_of)
    assert nothing.states == {"waiting": 4} and nothing.unknown == ("esd", "uce") and nothing.passes == 0
    run(plan_of, console=QUIET)
    first = plan_of.cells()[1]
    made = json.loads((plan_of.out / first.key / "result.json").read_text())
    (plan_of.out / first.key / "result.json").unlink()
    left = plan(plan_of)
    assert left.states == {"done": 3, "waiting": 1} and left.unknown == () and left.bytes > 0
    assert left.passes == made["cost"]["passes"] > 0


def test_results_are_collected_on_a_page_that_holds_names_as_text(recipe):
    plan = recipe(second="=<b>wizard</b>")
    with pytest.raises(ValueError, match="run it first"):
        collect(plan)
    run(plan, console=QUIET)
    table, page, *_ = collect(plan)
    with table.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 4 and {line["state"] for line in lines} == {"done"}
    assert lines[2]["concept"] == "'=<b>wizard</b>"
    text = page.read_text()
    assert "<b>wizard" not in text and "=&lt;b&gt;wizard" in text and "4 done" in text


def test_only_cells_of_other_recipes_are_pruned(recipe, tmp_path):
    old = recipe(second="fairy")
    run(old, console=QUIET)
    (old.out / "cache").mkdir(exist_ok=True)
    new = recipe()
    gone = prunable(new)
    assert {folder.name for folder in gone} == {c.key for c in old.cells()} - {c.key for c in new.cells()} != set()
    path = str(tmp_path / "recipe.yaml")
    listed = CliRunner().invoke(app, ["batch", "prune", path])
    assert listed.exit_code == 0 and all(folder.exists() for folder in gone)
    assert CliRunner().invoke(app, ["batch", "prune", path, "--yes"]).exit_code == 0
    assert not any(folder.exists() for folder in gone) and (old.out / "cache").exists()


def test_the_command_line_runs_a_recipe_says_how_far_it_is_and_collects(recipe, tmp_path):
    recipe()
    path, call = str(tmp_path / "recipe.yaml"), CliRunner().invoke
    assert "4 waiting" in call(app, ["batch", "status", path]).output
    assert "4 cells" in call(app, ["batch", "validate", path]).output
    assert call(app, ["batch", path, "--dry-run"]).exit_code == 0
    ran = call(app, ["batch", path])
    assert ran.exit_code == 0 and "4 done" in ran.output
    assert "index.html" in call(app, ["batch", "collect", path]).output
    wrong = call(app, ["batch", "statu", str(tmp_path)])
    assert wrong.exit_code == 2 and "Did you mean 'status'" in wrong.output
    schema = json.loads(call(app, ["batch", "schema"]).output)
    assert {"out", "concepts", "methods"} <= set(schema["properties"])


def test_cells_of_several_bases_say_which_is_theirs(recipe, tmp_path):
    recipe()
    path = tmp_path / "recipe.yaml"
    one = CliRunner().invoke(app, ["batch", "status", str(path)]).output
    assert "base" not in one.splitlines()[1]
    path.write_text(re.sub(r"bases: .*", f"bases: [{tmp_path / 'base'}, emoji-world]", path.read_text()))
    both = CliRunner().invoke(app, ["batch", "status", str(path)]).output
    assert "base" in both.splitlines()[1] and both.count("emoji-world") == 4


def test_a_full_disk_stops_the_run(recipe, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    plan = recipe()
    monkeypatch.setattr("erasure.batch.stages.erase", full)
    with pytest.raises(OSError, match="No space left"), contextlib.suppress(KeyboardInterrupt):
        run(plan, console=QUIET)
    assert {row.state for row in rows(plan)} == {"waiting"}


def test_a_full_disk_behind_another_error_stops_the_run_too(recipe, monkeypatch):
    def full(*args, **kwargs):
        try:
            raise OSError(28, "No space left on device")
        except OSError:
            raise ValueError("the writer of weights gave up") from None

    monkeypatch.setattr("erasure.batch.stages.erase", full)
    with pytest.raises(OSError, match="No space left"):
        run(recipe(), console=QUIET)
