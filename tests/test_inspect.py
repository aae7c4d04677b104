"""The card, the hub, and the commands that look into erasures and write other programs' files."""

import dataclasses
import json

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file

import erasure as library
from erasure import Concept, Erasure
from erasure.artifact import compare_erasures, compare_models
from erasure.artifact.files import CARD, SYSTEM, WEIGHTS
from tests.test_artifact import an_erasure
from tests.test_cli import run
from tests.test_operator import matrix, uce
from tests.tiny import identical, make, tiny, tiny_pipeline, weights


@pytest.fixture
def cli(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    return lambda *arguments: run(*arguments, monkeypatch=monkeypatch, capsys=capsys)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A base with a card, and three erasures of it."""
    root, pipe = tmp_path_factory.mktemp("saved"), tiny_pipeline()
    pipe.save_pretrained(root / "base")
    (root / "base" / "README.md").write_text("---\nlicense: creativeml-openrail-m\ntags: [x]\n---\nA base.")
    pipe = DiffusionPipeline.from_pretrained(root / "base")
    uce(pipe, Concept("superhero", synonyms=("hero",), anchor="ninja")).save_pretrained(root / "hero", system=True)
    uce(pipe, "van gogh").save_pretrained(root / "gogh")
    an_erasure(pipe, "delta").save_pretrained(root / "delta")
    return root


def header(folder):
    text = (folder / CARD).read_text()
    return yaml.safe_load(text.split("---")[1]), text


# --- card ------------------------------------------------------------------------------------------------------------


def test_the_card_holds_what_was_measured_and_inherits_the_licence(saved, tmp_path):
    facts, text = header(saved / "hero")
    assert (
        facts["license"] == "creativeml-openrail-m" and "uce" in facts["tags"] and facts["library_name"] == "diffusers"
    )
    assert "base_model" not in facts  # a folder is no hub id
    report = Erasure.from_pretrained(saved / "hero").config["report"]
    assert f"| target | {report['target']['moved']:.3f} | {report['target']['cosine']:.3f} |" in text
    assert f"condition {report['condition']:.3g}" in text and f"rank {report['rank']}" in text
    assert "superhero (hero) -> ninja" in text and "| kept | wizard |" in text and "| preset | official-2025 |" in text
    assert "Inherited from the base model, base: creativeml-openrail-m." in text
    assert "## Evaluation" not in text and "erasure evaluate" in text
    pooled = uce(tiny("sdxl"), pooled=True).card()
    assert "| pooled target |" in pooled and "inherits the licence of its base model" in pooled


def test_an_evaluation_stands_in_the_card_and_in_the_file(saved, tmp_path, cli):
    edit = Erasure.from_pretrained(saved / "hero")
    rows = [{"group": "target", "seen": 0.03, "change": "-0.91"}, {"group": "a | b", "n": 3}]
    edit = dataclasses.replace(edit, config=edit.config.with_facts(evaluation=rows))
    folder = edit.save_pretrained(tmp_path / "e")
    text = header(folder)[1]
    assert "| group | seen | change | n |" in text and "| target | 0.03 | -0.91 |  |" in text and "a \\| b" in text
    assert "Run `erasure evaluate`" not in text
    assert Erasure.from_pretrained(folder).config["evaluation"] == edit.config["evaluation"]
    assert "0.03" in cli("inspect", folder)[1]


def test_names_cannot_break_the_card(tmp_path):
    edit = make(tiny_pipeline(), Concept('a: "b" | c'), "uce", preset="official-2025", keep=["ninja"], name="hero: [y]")
    base = {**edit.config["base"], "name": "org/na:me"}
    edit = dataclasses.replace(edit, config=edit.config.with_facts(base=base))
    facts, text = header(edit.save_pretrained(tmp_path / "e"))
    assert facts["base_model"] == "org/na:me" and 'a: "b" \\| c' in text


def test_a_readme_that_is_no_card_is_left_alone(tmp_path):
    (tmp_path / CARD).write_text("precious")
    edit = an_erasure(tiny_pipeline(), "operator")
    with pytest.raises(ValueError, match="not an erasure's card"):
        edit.save_pretrained(tmp_path)
    assert (tmp_path / CARD).read_text() == "precious" and len(list(tmp_path.iterdir())) == 1


def test_a_whole_model_gets_no_erasure_into_its_folder(tmp_path):
    pipe = tiny_pipeline()
    edit = an_erasure(pipe, "operator")
    pipe.save_pretrained(tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match="holds a whole model"):
        edit.save_pretrained(tmp_path)
    assert sorted(tmp_path.iterdir()) == before


# --- hub -------------------------------------------------------------------------------------------------------------


# --- inspect and diff ------------------------------------------------------------------------------------------------


def test_inspect_prints_what_is_in_it(saved, cli):
    code, out, _ = cli("inspect", saved / "hero")
    assert code == 0
    for words in ("base", "uce", "superhero (hero) -> ninja", "wizard", "moved: target", "condition", WEIGHTS, SYSTEM):
        assert words in out
    code, out, _ = cli("inspect", saved / "delta", "--json")
    facts = json.loads(out)
    assert code == 0 and facts["kind"] == "delta" and facts["concepts"][0]["name"] == "superhero"
    assert facts["files"][WEIGHTS][0] == (saved / "delta" / WEIGHTS).stat().st_size
    assert set(facts["tensors"]) == set(facts["sites"])
    code, _, err = cli("inspect", saved / "nowhere")
    assert code == 2 and "no erasure at" in err


def test_the_distance_of_two_operators_is_that_of_their_matrices(saved):
    a, b = (Erasure.from_pretrained(saved / name) for name in ("hero", "gogh"))
    found = compare_erasures(a, b)
    s, t = (matrix(edit) - torch.eye(32, dtype=torch.float64) for edit in (a, b))
    n = len(found["sites"]) ** 0.5  # the same at every site
    assert found["distance"] == pytest.approx(n * (s - t).norm().item())
    assert found["cosine"] == pytest.approx(((s * t).sum() / s.norm() / t.norm()).item())
    assert next(iter(found["sites"].values()))["distance"] == pytest.approx((s - t).norm().item())
    assert found["same_base"] and not found["same_concepts"]
    assert (found["only_a"], found["only_b"]) == (["superhero"], ["van gogh"])
    itself = compare_erasures(a, a)
    assert itself["distance"] == pytest.approx(0, abs=1e-6) and itself["cosine"] == pytest.approx(1)
    assert itself["same_concepts"] and not compare_erasures(a, uce(tiny_pipeline(seed=1)))["same_base"]


def test_the_distance_of_two_fine_tunes_is_that_of_their_differences():
    pipe = tiny_pipeline()
    a, b = an_erasure(pipe, "delta"), an_erasure(pipe, "delta", "van gogh")
    first, *rest = b.tensors
    b.tensors = {name: b.tensors[name] for name in rest}  # zero there
    found = compare_erasures(a, b)
    gaps = [a.tensors[first], *(a.tensors[name] - b.tensors[name] for name in rest)]
    assert found["distance"] == pytest.approx(sum(gap.square().sum().item() for gap in gaps) ** 0.5)
    assert found["sites"][first]["cosine"] is None
    with pytest.raises(ValueError, match="compare what they draw"):
        compare_erasures(a, uce(pipe))


def test_diff_of_erasures_and_of_models(saved, tmp_path, cli):
    names = Erasure.from_pretrained(saved / "hero").parameter_names
    code, out, _ = cli("diff", saved / "hero", saved / "gogh", "--limit", "1")
    assert code == 0 and "same base model: yes" in out and f"and {len(names) - 1} more" in out
    assert (
        cli("export", saved / "hero", "--format", "unet", "--base", saved / "base", "--out", tmp_path / "unet")[0] == 0
    )
    assert (
        cli("export", saved / "hero", "--format", "pipeline", "--base", saved / "base", "--out", tmp_path / "pipe")[0]
        == 0
    )
    for a, b, prefix in (("base/unet", "unet", ""), ("base", "pipe", "unet.")):
        code, out, _ = cli("diff", saved / a, tmp_path / b, "--json")
        found = json.loads(out)
        assert code == 0 and set(found["different"]) == {f"{prefix}{name}" for name in names} and found["same"] > 100
        assert not found["only_a"] and not found["only_b"]
    code, out, _ = cli("diff", saved / "base", saved / "base")
    assert code == 0 and "different: 0" in out
    code, _, err = cli("diff", saved / "base", saved / "hero")
    assert code == 2 and "is a model" in err


def test_a_comparison_of_models_measures_every_tensor(tmp_path):
    pipe = tiny_pipeline()
    a, b = tmp_path / "a", tmp_path / "b"
    pipe.unet.save_pretrained(a)
    with torch.no_grad():
        pipe.unet.conv_in.bias.fill_(1.0)
        pipe.unet.conv_out.weight.mul_(1.1)
    pipe.unet.save_pretrained(b)
    found = compare_models(a, b)
    assert set(found["different"]) == {"conv_in.bias", "conv_out.weight"}
    assert found["different"]["conv_out.weight"]["relative"] == pytest.approx(0.1, rel=1e-3)
    with pytest.raises(FileNotFoundError, match="no safetensors"):
        compare_models(a, tmp_path)


# --- export from the command line ------------------------------------------------------------------------------------


def test_every_format_can_be_exported_from_the_command_line(saved, tmp_path, cli):
    pipe = StableDiffusionPipeline.from_pretrained(saved / "base")
    edit = Erasure.from_pretrained(saved / "hero").apply(pipe)
    erased = weights(pipe)
    names = {"lora": "lora", "unet": "unet", "pipeline": "pipe"}
    for form in ("lora", "kohya", "official", "unet", "pipeline", "single-file"):
        out = tmp_path / names.get(form, f"{form}.safetensors")
        code, said, err = cli("export", saved / "hero", "--format", form, "--base", saved / "base", "--out", out)
        assert code == 0 and f"as {form}" in said, err
    whole = UNet2DConditionModel.from_pretrained(tmp_path / "unet").state_dict()
    assert all(torch.equal(tensor, erased[f"unet.{name}"]) for name, tensor in whole.items())
    assert identical(weights(StableDiffusionPipeline.from_pretrained(tmp_path / "pipe")), erased)
    opened = StableDiffusionPipeline.from_single_file(
        str(tmp_path / "single-file.safetensors"), config=str(saved / "base"), local_files_only=True
    )
    assert identical(weights(opened), erased)
    assert set(load_file(tmp_path / "official.safetensors")) == set(edit.parameter_names)
    assert any("lora_down" in name for name in load_file(tmp_path / "kohya.safetensors"))


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (["--format", "kohya"], "end it in .safetensors"),
        (["--format", "lora", "--scale", "0.5"], "no scale"),
        (["--format", "unet", "--rank", "3"], "--rank is for"),
        (["--format", "spell"], "spell"),
        (["--base", "nowhere"], "no model at"),
    ],
)
def test_bad_requests_to_export_are_one_line(saved, tmp_path, options, fault, cli):
    code, _, err = cli("export", saved / "hero", "--base", saved / "base", "--out", tmp_path / "x", *options)
    assert code == 2 and fault in err and not (tmp_path / "x").exists()


@pytest.mark.parametrize("command", ["export", "inspect", "diff"])
def test_the_commands_have_help_with_an_example(command, cli):
    code, out, _ = cli(command, "--help")
    assert code == 0 and f"erasure {command}" in out


def test_resolve_is_at_the_top():
    assert library.resolve.__module__ == "erasure.methods.resolve"


def test_a_pipeline_is_never_written_over_another_one(saved, tmp_path, cli):
    def export(out, form):
        return cli("export", saved / "hero", "--format", form, "--base", saved / "base", "--out", out)

    files = {file: file.read_bytes() for file in (saved / "base").rglob("*") if file.is_file()}
    for out, form in ((saved / "base", "pipeline"), (saved / "base" / "unet", "unet")):
        code, _, err = export(out, form)
        assert code == 2 and "new folder" in err or "another folder" in err
    assert files == {file: file.read_bytes() for file in (saved / "base").rglob("*") if file.is_file()}
    (tmp_path / "empty").mkdir()
    assert export(tmp_path / "empty", "pipeline")[0] == 0
    assert (tmp_path / "empty" / "model_index.json").exists() and len(list(tmp_path.iterdir())) == 1


def test_a_lora_of_an_operator_is_exact_and_takes_no_rank(saved, tmp_path, cli):
    code, _, err = cli("export", saved / "hero", "--rank", "1", "--base", saved / "base", "--out", tmp_path / "lora")
    assert code == 2 and "leave it out" in err


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_resolved_is_what_was_solved(dtype):
    pipe = tiny_pipeline().to(dtype)
    edit = make(pipe, "superhero", "uce", keep=["ninja"], erase_scale=3.0, keep_everyday=False)
    again = library.resolve([edit])
    u, v, s, t = (e.tensors[f"hidden.{part}"].double() for e in (edit, again) for part in ("u", "v"))
    assert (u @ v.T - s @ t.T).norm() <= 1e-4 * (u @ v.T).norm()
