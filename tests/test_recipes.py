"""Recipes: concepts from CSV files and registers, outputs, evaluations and a push, each done once and checked."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from rich.console import Console
from safetensors.torch import load_file
from typer.testing import CliRunner

from erasure import Erasure
from erasure.batch import Recipe, run
from erasure.batch.concepts import COLUMNS, read_csv
from erasure.batch.judging import SHARED
from erasure.batch.outputs import FORMATS, as_delta
from erasure.batch.overview import collect, rows
from erasure.batch.publishing import described
from erasure.cli import app
from erasure.concept import Concept
from erasure.methods import BUILT_IN
from erasure.opening import load_base
from tests.eval_helpers import PixelDetector
from tests.probe_helpers import SUITE
from tests.register_helpers import add, new_register
from tests.tiny import tiny_pipeline, weights

DOCS = Path(__file__).parents[1] / "docs"
QUIET = Console(quiet=True)
ALL = "[{name: lora, rank: 2}, peft, kohya, comfyui, delta, denoiser, pipeline, single_file]"
WEIGHTS = Path("erasure", "erasure.safetensors")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_pipeline(seed=3).save_pretrained(folder)  # a null control has the weights of seed 0
    return folder


@pytest.fixture
def recipe(tmp_path, base):
    """Writes and reads a recipe; what is given takes the place of the defaults."""

    def write(**given):
        facts = {"out": "results", "bases": f"[{base}]", "concepts": "[{name: cat, neighbours: [dog]}]"}
        facts |= {"methods": "[{name: uce, preset: official-2025}]", "evaluate": "false", **given}
        path = tmp_path / "recipe.yaml"
        path.write_text("version: 1\n" + "".join(f"{key}: {value}\n" for key, value in facts.items()), "utf-8")
        return Recipe.load(path)

    return write


def no_more(monkeypatch, *names):
    for name in names:
        monkeypatch.setattr(f"erasure.batch.{name}", lambda *a, n=name, **k: pytest.fail(f"{n} was called again"))


def states(plan):
    return [row.state for row in rows(plan)]


# --- what is erased ---------------------------------------------------------------------------------------------------


def test_a_row_of_a_csv_file_is_a_concept(tmp_path, recipe):
    (tmp_path / "names.csv").write_text(
        "Name,synonyms,neighbours,anchor,kind,keep\n"
        "cat,kitty | feline,dog,dog,,wolf|fox\n"
        "\n"
        '"Van Gogh","Vincent, the painter",Monet,,style,\n',
        "utf-8-sig",
    )
    first, second = (cell.wanted for cell in recipe(concepts="[names.csv]").cells())
    assert first.concepts == (Concept("cat", synonyms=("kitty", "feline"), neighbours=("dog",), anchor="dog"),)
    assert first.keep == ("dog", "wolf", "fox") and second.keep is None
    assert second.concepts[0].synonyms == ("Vincent, the painter",) and second.concepts[0].kind == "style"


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_spreadsheets_may_separate_as_they_like(delimiter, tmp_path):
    (tmp_path / "names.csv").write_text(f"name{delimiter}anchor\r\ncat{delimiter}dog\r\n", newline="")
    assert read_csv(tmp_path / "names.csv")[0].concepts == (Concept("cat", anchor="dog"),)


def test_rows_may_be_erased_together(tmp_path, recipe):
    (tmp_path / "few.csv").write_text("name,neighbours\ncat,dog|lion\ntiger,lion\ndog,wolf\n")
    (cell,) = recipe(concepts="[{csv: few.csv, together: true}]").cells()
    assert [concept.name for concept in cell.concepts] == ["cat", "tiger", "dog"] and cell.target == "few"
    assert cell.wanted.keep == ("lion", "wolf")  # the dog is one row's neighbour and another one's target


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("name\ncat\n\nCat\n", "line 4: 'Cat' stands in line 2 already"),
        ("nam\ncat\n", r"line 1: unknown column 'nam' \(did you mean 'name'\?\)"),
        ("name,name\ncat,x\n", "line 1: the column 'name' stands twice"),
        ("anchor\ncat\n", "line 1: no column 'name'"),
        ("name,anchor\ncat,dog\nrose,tulip,red\n", "line 3: 3 fields, and the header has 2"),
        ("name,anchor\ncat\n", "line 2: 1 fields"),
        ("name,anchor\ncat,dog\n,tulip\n", "line 3: a concept needs a name"),
        ("name,anchor\ncat,cat\n", "line 2: the anchor equals the target"),
        ("name,kind\ncat,thing\n", "line 2: kind: .*'object'.*got 'thing'"),
        ("name,keep\ncat,wolf|CAT\n", "line 2: 'CAT' is both to be erased and to be kept"),
        ("name,templates\ncat,a photo\n", "line 2: a template needs"),
        ("name,anchor\ncat,dog\n'\"',x\n\"lion,x\n", "line 4: not readable as CSV"),
        ('name,anchor\ncat,"d"og\n', "line 2: not readable as CSV"),
        ("name\ncat\u202egod\n", "line 2: name holds what cannot be printed"),
        ("name\n", "no concept below the header"),
        ("", "line 1: no column 'name'"),
        (b"name\nca\xfft\n", "not UTF-8"),
    ],
)
def test_a_broken_row_is_refused_with_its_line(text, fault, tmp_path, recipe):
    (tmp_path / "names.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=fault) as caught:
        recipe(concepts="[names.csv]").cells()
    assert "names.csv" in str(caught.value) and "\n" not in str(caught.value)


def test_of_a_register_only_active_requests_are_erased(tmp_path, recipe):
    register = new_register(tmp_path)
    concept = Concept("cat", synonyms=("kitty",), neighbours=("dog",))
    add(register, concept, languages={"es": ["gato"]}, keep=["a lion"])
    for name in ("tiger", "rose", "owl"):
        add(register, name)
    register.withdraw("R2", reason="a mistake")
    register.refuse("R3", reason="no ground")
    register.redact("R4")
    first, second = (cell.wanted for cell in recipe(concepts="[{register: register.sqlite}]").cells())
    assert first.concepts[0].phrases == ("cat", "kitty", "gato") and first.keep == ("dog", "a lion")
    assert second.concepts[0].name == "owl" and second.title.startswith("redacted-")
    keys = [cell.key for cell in recipe(concepts="[{register: register.sqlite}]").cells()]
    assert keys[0].startswith("cat-uce") and not any("owl" in key for key in keys)
    with pytest.raises(ValueError, match="redacted name, and its card would publish that"):
        recipe(concepts="[{register: register.sqlite}]", push="me/{key}")
    (cell,) = recipe(concepts="[{register: register.sqlite, together: true}]").cells()
    assert [concept.name for concept in cell.concepts] == ["cat", "owl"] and cell.target == "register"
    for request in ("R1", "R4"):
        register.withdraw(request, reason="over")
    with pytest.raises(ValueError, match="no active request"):
        recipe(concepts="[{register: register.sqlite}]").cells()


# --- slips ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ({"output": "[lora]"}, r"output: no such key \(did you mean 'outputs'\?\)"),
        ({"outputs": "[lorra]"}, r"unknown output 'lorra' \(did you mean 'lora'\?\)"),
        ({"outputs": "[{name: lora, rnk: 4}]"}, r"outputs.0.rnk: no such key \(did you mean 'rank'\?\)"),
        ({"outputs": "[{name: lora, rank: 0}]"}, "outputs.0.rank: .*greater than 0; got 0"),
        ({"outputs": "[lora, lora]"}, "'lora' stands twice"),
        ({"evaluate": "quik"}, r"unknown preset 'quik' \(did you mean 'quick'\?\)"),
        ({"evaluate": "{preset: quick, probe: [direct]}"}, r"evaluate.probe: no such key \(did you mean 'probes'\?\)"),
        ({"evaluate": "{preset: quick, probes: [drect]}"}, r"unknown probe 'drect' \(did you mean 'direct'\?\)"),
        ({"evaluate": "{probes: [direct]}"}, "probes belong to a preset"),
        ({"evaluate": "quick", "limit": 3}, "a preset has its own sizes"),
        ({"evaluate": "3"}, "true, false, a preset"),
        ({"push": "me/{concpt}"}, r"unknown placeholder 'concpt' \(did you mean 'concept'\?\)"),
        ({"push": "{repository: me/x, privat: true}"}, r"push.privat: no such key \(did you mean 'private'\?\)"),
        ({"push": "me"}, "organisation/name"),
        ({"push": "me/{concept"}, "a repository is a pattern"),
        ({"push": "me/{concept}", "seeds": "[0, 1]", "methods": "[leco]"}, "would both go to me/cat; put more of"),
        ({"concepts": "[{name: cat, synonym: [kitty]}]"}, r"synonym: no such key \(did you mean 'synonyms'\?\)"),
        ({"concepts": "[{csv: a.csv, tgether: true}]"}, r"csv.tgether: no such key \(did you mean 'together'\?\)"),
        ({"methods": "[{name: uce, presett: x}]"}, r"methods.0.presett: no such key \(did you mean 'preset'\?\)"),
    ],
)
def test_a_slip_is_answered_with_what_was_meant(given, fault, recipe):
    with pytest.raises(ValueError, match=fault) as caught:
        recipe(**given)
    assert "\n" not in str(caught.value) and "recipe.yaml" in str(caught.value)


@pytest.mark.parametrize(
    ("method", "output", "reason"),
    [
        ("spm", "lora", "as far as the prompt resembles the concept"),
        ("spm", "pipeline", "as far as the prompt resembles the concept"),
        ("receler", "delta", "changes no weight"),
        ("sld", "single_file", "changes no weight"),
        ("adv-unlearn", "denoiser", "changes the text encoder"),
        ("{name: esd, preset: official-2025-x}", "lora", "give a rank"),
    ],
)
def test_an_output_that_a_method_cannot_give_is_refused_before_any_work(method, output, reason, recipe, tmp_path):
    with pytest.raises(ValueError, match=f"cannot be written as .*{reason}"):
        recipe(methods=f"[{method}]", outputs=f"[{output}]", concepts="[{name: cat, anchor: dog}]")
    refused = CliRunner().invoke(app, ["batch", "validate", str(tmp_path / "recipe.yaml")])
    assert refused.exit_code != 0 and reason in str(refused.exception)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"methods": "[{name: uce, settings: {lamb: -1}}]"}, "lamb: .*greater than or equal to 0"),
        ({"methods": "[{name: esd, settings: {lr: 0}}]"}, "lr is above 0"),
        ({"methods": "[{name: esd, settings: {clip: 0}}]"}, "clip is a norm above 0"),
        ({"methods": "[{name: stereo, settings: {attack_lr: -1}}]"}, "attack_lr: .*greater than 0; got -1"),
        ({"concepts": "3"}, "concepts: a list is needed; got 3"),
        ({"methods": "[{name: uce, settings: [1]}]"}, "settings: keys and values are needed"),
    ],
)
def test_what_no_model_could_be_erased_with_is_refused_before_one_is_opened(given, reason, recipe):
    with pytest.raises(ValueError, match=reason):
        recipe(**given)


def test_what_a_base_is_decides_what_is_refused(recipe, tmp_path):
    recipe(methods="[adv-unlearn]", outputs="[pipeline, delta, single_file]")
    (tmp_path / "flux").mkdir()
    (tmp_path / "flux" / "model_index.json").write_text('{"_class_name": "FluxPipeline", "transformer": ["a", "b"]}')
    every = "[lora, peft, kohya, comfyui, single_file]"
    assert recipe(bases="[flux]", methods="[esd]", outputs=every).outputs  # trains an adapter there
    assert recipe(bases="[somebody/model]", outputs=ALL).outputs  # nothing is known yet


def test_every_method_says_which_kind_of_erasure_it_leaves():
    from erasure.methods import method_class

    assert all(method_class(name).preset().leaves(part) for name in BUILT_IN for part in ("unet", "transformer"))


def test_the_schema_has_every_form_that_a_recipe_may_take():
    schema = json.loads(CliRunner().invoke(app, ["batch", "schema"]).output)
    text = json.dumps(schema["properties"])
    assert {"outputs", "evaluate", "push"} <= set(schema["properties"])
    assert '{"type": "boolean"}' in text and "FromRegister" in text and '{"type": "string"}' in text


@pytest.mark.parametrize("path", sorted((DOCS / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_recipes_in_the_documentation_are_valid(path):
    assert Recipe.load(path).cells()


def test_the_recipe_on_the_page_is_valid(tmp_path):
    page = (DOCS / "batch.md").read_text("utf-8")
    (tmp_path / "recipe.yaml").write_text(re.search(r"```yaml\n(.*?)```", page, re.DOTALL)[1])
    (tmp_path / "characters.csv").write_text(re.search(r"```\n(name,.*?)```", page, re.DOTALL)[1])
    SUITE.save(tmp_path / "my-suite.yaml")
    add(new_register(tmp_path), "owl")
    (tmp_path / "register.sqlite").rename(tmp_path / "desk.sqlite")
    plan = Recipe.load(tmp_path / "recipe.yaml")
    assert [cell.target for cell in plan.cells()[::2]] == ["superhero", "cat", "rose", "ninja", "taxi", "owl"]


# --- outputs ----------------------------------------------------------------------------------------------------------


def contents(folder):
    skipped = ("result.json", ".lock")  # seconds, and no content
    return {f.relative_to(folder): f.read_bytes() for f in folder.rglob("*") if f.is_file() and f.name not in skipped}


def test_outputs_hold_the_erasure_and_are_each_written_once(recipe, base, monkeypatch):
    plan = recipe(outputs=ALL)
    assert run(plan, console=QUIET) == 0 and states(plan) == ["done"]
    folder = plan.out / plan.cells()[0].key
    edit, pipe = Erasure.from_pretrained(folder / "erasure"), load_base(base)
    edit.apply(pipe)
    expected = weights(pipe)
    edit.remove(pipe)
    folded = load_base(folder / "pipeline")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(folded).items())
    assert plan.cells()[0].key in (folder / "pipeline" / "erasures.json").read_text()
    unet = UNet2DConditionModel.from_pretrained(folder / "denoiser").state_dict()
    assert all(torch.equal(tensor, expected[f"unet.{name}"]) for name, tensor in unet.items())
    delta = Erasure.from_pretrained(folder / "delta").apply(pipe)
    assert all(torch.allclose(t, expected[name], atol=1e-6) for name, t in weights(pipe).items())
    delta.remove(pipe)
    one = StableDiffusionPipeline.from_single_file(folder / "single-file.safetensors", config=str(base))
    assert all(torch.equal(t, expected[f"unet.{name}"]) for name, t in one.unet.state_dict().items())
    pipe.load_lora_weights(folder / "lora")
    pipe.fuse_lora()
    assert load_file(folder / "kohya.safetensors")
    whole = contents(folder)

    monkeypatch.setattr("erasure.batch.stages.erase", lambda *a, **k: pytest.fail("an erasure was made again"))
    (folder / "result.json").unlink()
    monkeypatch.setattr("erasure.batch.outputs.write", lambda *a, **k: pytest.fail("an output was written again"))
    assert run(plan, console=QUIET) == 0 and contents(folder) == whole
    monkeypatch.undo()
    file = folder / "single-file.safetensors"
    for harm in (file.unlink, lambda: file.write_bytes(whole[file.relative_to(folder)][:-1] + b"\x7f")):
        harm()
        assert states(plan) == ["damaged"]
        no_more(monkeypatch, "stages.erase")
        assert run(plan, console=QUIET) == 0 and states(plan) == ["done"] and contents(folder) == whole


def test_an_output_that_is_asked_for_later_costs_no_second_erasure(recipe, monkeypatch):
    run(recipe(), console=QUIET)
    no_more(monkeypatch, "stages.erase")
    plan = recipe(outputs="[delta]")
    assert states(plan) == ["waiting"] and run(plan, console=QUIET) == 0 and states(plan) == ["done"]
    assert (plan.out / plan.cells()[0].key / "delta" / "erasure.safetensors").exists()
    assert run(recipe(), console=QUIET) == 0  # no longer asked for: it stays, and counts for nothing


def test_a_kill_between_outputs_costs_the_one_it_was_at(recipe, monkeypatch):
    plan = recipe(outputs="[delta, denoiser]")
    folder = plan.out / plan.cells()[0].key
    real = FORMATS["denoiser"]

    def killed(edit, pipe, path, rank):
        (path.parent / f".{path.name}.ab12cd34").mkdir()  # as a temporary folder is called
        raise KeyboardInterrupt

    monkeypatch.setitem(FORMATS, "denoiser", dataclasses.replace(real, write=killed))
    with pytest.raises(KeyboardInterrupt):
        run(plan, console=QUIET)
    delta = (folder / "delta" / "erasure.safetensors").stat().st_mtime_ns
    monkeypatch.setitem(FORMATS, "denoiser", real)
    no_more(monkeypatch, "stages.erase")
    assert run(plan, console=QUIET) == 0 and not list(folder.glob(".denoiser.*"))
    assert (folder / "delta" / "erasure.safetensors").stat().st_mtime_ns == delta


def test_an_output_that_fails_leaves_the_other_stages_and_a_changed_recipe_goes_on(recipe, monkeypatch):
    def fails(*args):
        raise ValueError("no such layer")

    monkeypatch.setitem(FORMATS, "delta", dataclasses.replace(FORMATS["delta"], write=fails))
    plan = recipe(outputs="[delta, denoiser]", push="me/{concept}")
    monkeypatch.setattr(Erasure, "push_to_hub", lambda *a, **k: pytest.fail("a failed cell was pushed"))
    assert run(plan, console=QUIET) == 1
    result = json.loads((plan.out / plan.cells()[0].key / "result.json").read_text())
    assert result["error"] == "no such layer" and "stage: delta" in result["traceback"] and result["cost"]
    assert (plan.out / plan.cells()[0].key / "denoiser" / "config.json").exists()
    no_more(monkeypatch, "stages.erase")
    less = recipe(outputs="[denoiser]")
    assert states(less) == ["waiting"] and run(less, console=QUIET) == 0 and states(less) == ["done"]


def test_a_difference_of_an_erasure_is_what_it_does_to_the_weights():
    pipe = tiny_pipeline()
    from erasure import erase

    edit = erase(pipe, "cat", "uce", preset="official-2025", apply=False, progress=False)
    delta = as_delta(edit, pipe)
    assert set(delta.tensors) == set(edit.parameter_names) and as_delta(delta, pipe) is delta
    name = edit.parameter_names[0]
    w = pipe.unet.get_parameter(name).detach()
    assert torch.allclose(w + delta.tensors[name], edit.edit(name, w, 1.0), atol=1e-6)


# --- evaluations ------------------------------------------------------------------------------------------------------

PROBES = "{preset: smoke, probes: [direct, neighbours, unrelated]}"


@pytest.fixture
def judged(recipe, tmp_path, base, monkeypatch):
    """A recipe on a tiny suite, with detectors that go by brightness."""
    dataclasses.replace(SUITE, base=str(base)).save(tmp_path / "suite.yaml")
    fake = lambda **_: lambda suite: ([PixelDetector(), PixelDetector("other pixels")], None)  # noqa: E731
    monkeypatch.setattr("erasure.eval.detectors.choice.Judges", fake)
    two = "[{name: uce, preset: official-2025}, {name: uce, preset: official-2023}]"
    return lambda **given: recipe(**{"concepts": "[suite.yaml]", "methods": two, "evaluate": PROBES, **given})


def test_a_preset_gives_five_verdicts_and_asks_the_base_and_controls_once(judged, monkeypatch, tmp_path):
    from erasure.eval.probes import probe_class

    asked, real = [], probe_class("direct").run

    def counted(self, model, context):
        asked.append(model.name)
        return real(self, model, context)

    monkeypatch.setattr(probe_class("direct"), "run", counted)
    plan = judged()
    assert run(plan, console=QUIET) == 0 and states(plan) == ["done", "done"]
    assert sorted(asked) == ["UCE", "UCE", "base", "random"]
    assert list((plan.out / SHARED).glob("*/probes/direct/base.jsonl"))
    for cell in plan.cells():
        folder = plan.out / cell.key
        result = json.loads((folder / "result.json").read_text())
        assert set(result["answers"]) == {"asked", "words", "attacked", "weights", "rest"}
        assert result["answers"]["attacked"]["verdict"] == "not tested"
        assert {row["group"] for row in result["figures"]} == {"target", "neighbours", "unrelated"}
        assert {row["arm"] for row in result["figures"]} == {"UCE"}
        assert {(e["probe"], e["measure"]) for e in result["evidence"]} == {
            ("neighbours", "change"), ("unrelated", "change"),
        }  # fmt: skip
        assert (folder / "report.html").exists() and (folder / "assessment.json").exists()
    table, page, *_ = collect(plan)
    assert "asked by name" in table.read_text().splitlines()[0] and "not tested" in page.read_text()
    shown = (plan.out / "comparison.md").read_text()
    assert "| method | on | asked by name |" in shown and "`uce official-2023`" in shown


def test_an_evaluation_is_kept_redone_where_another_is_asked_for_and_never_costs_the_erasure(judged, monkeypatch):
    plan = judged(methods="[{name: uce, preset: official-2025}]", evaluate="true")
    assert run(plan, console=QUIET) == 0
    result = plan.out / plan.cells()[0].key / "result.json"
    before = json.loads(result.read_text())
    result.unlink()
    no_more(monkeypatch, "stages.erase")
    with monkeypatch.context() as inner:
        inner.setattr("erasure.batch.stages.judge", lambda *a: pytest.fail("it was evaluated again"))
        assert run(plan, console=QUIET) == 0
    assert json.loads(result.read_text())["figures"] == before["figures"]
    trial = judged(methods="[{name: uce, preset: official-2025}]", evaluate="true", limit=1)
    assert states(trial) == ["waiting"] and run(trial, console=QUIET) == 0
    n = [row["rate"]["n"] for row in json.loads(result.read_text())["figures"]]
    assert max(n) < max(row["rate"]["n"] for row in before["figures"])
    assert states(plan) == ["waiting"]  # the trial never stands for the full one


# --- the hub ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """What was pushed where; a repository in ``down`` cannot be reached."""
    pushed, down = [], set()

    def push(self, repository, *, private=False, **_):
        if repository in down:
            raise ConnectionError("the hub could not be reached")
        self.save_pretrained(tmp_path / "hub" / repository)
        pushed.append((repository, private))
        return f"https://hub/{repository}"

    monkeypatch.setattr(Erasure, "push_to_hub", push)
    return pushed, down, tmp_path / "hub"


@pytest.mark.slow
def test_finished_cells_are_pushed_once_and_privately_with_their_card(judged, hub, monkeypatch):
    pushed, _, folder = hub
    plan = judged(push='"me/{concept}-{method}-{preset}"')
    assert run(plan, console=QUIET) == 0
    assert pushed == [("me/cat-uce-official-2025", True), ("me/cat-uce-official-2023", True)]
    card = (folder / "me" / "cat-uce-official-2025" / "README.md").read_text()
    assert "Is the target kept out when it is asked for by name?" in card
    assert [row.note for row in rows(plan)] == [repository for repository, _ in pushed]
    for cell in plan.cells():
        (plan.out / cell.key / "result.json").unlink()
    assert run(plan, console=QUIET) == 0 and len(pushed) == 2
    public = judged(push="{repository: 'me/{key}', private: false}")
    assert run(public, console=QUIET) == 0 and pushed[2:] == [(f"me/{c.key}", False) for c in public.cells()]


def test_a_failed_push_is_a_failed_stage_and_stops_nothing(recipe, hub, monkeypatch):
    pushed, down, _ = hub
    down.add("me/cat")
    plan = recipe(concepts="[{name: cat}, {name: dog}]", push="me/{concept}")
    assert run(plan, console=QUIET) == 1 and states(plan) == ["failed", "done"] and pushed == [("me/dog", True)]
    result = json.loads((plan.out / plan.cells()[0].key / "result.json").read_text())
    assert "stage: push" in result["traceback"] and result["weights"] and result["error"].startswith("the hub")
    down.clear()
    no_more(monkeypatch, "stages.erase")
    assert run(plan, console=QUIET) == 1 and len(pushed) == 1  # it stays failed until it is asked for
    assert run(plan, console=QUIET, retry_failed=True) == 0 and pushed[1:] == [("me/cat", True)]


def test_another_erasure_is_pushed_again_to_the_same_place(recipe, hub):
    pushed, _, _ = hub
    plan = recipe(push="me/{concept}")
    run(plan, console=QUIET)
    shutil.rmtree(plan.out)
    assert run(recipe(push="me/{concept}", methods="[{name: uce, preset: official-2023}]"), console=QUIET) == 0
    assert pushed == [("me/cat", True)] * 2


def test_an_erasure_without_an_evaluation_has_a_card_without_one():
    pipe = tiny_pipeline()
    from erasure import erase

    edit = erase(pipe, "cat", "uce", preset="official-2025", apply=False, progress=False)
    assert described(edit, {}) is edit and set(COLUMNS) >= {"name", "keep"}
