"""The command line as a user meets it: in a process of its own, with its exit codes and its one-line errors."""

import dataclasses
import json
import shlex
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from erasure import Erasure, Suite, cli
from erasure.artifact import export_single_file
from erasure.cli.lists import explained
from erasure.eval.core.models import whole_model
from erasure.methods import available, method_class
from erasure.opening import load_base
from tests.tiny import tiny, tiny_pipeline


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "tiny"
    tiny_pipeline().save_pretrained(folder)
    return str(folder)


def run(*arguments, monkeypatch, capsys):
    """Run the program in this process: exit code, output, error stream."""
    monkeypatch.setattr(sys, "argv", ["erasure", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    captured = capsys.readouterr()
    return stopped.value.code or 0, captured.out, captured.err


@pytest.fixture
def erasure(monkeypatch, capsys):
    return lambda *arguments: run(*arguments, monkeypatch=monkeypatch, capsys=capsys)


def test_the_list_of_commands_is_the_same_without_their_options(erasure):
    code, listed, _ = erasure("--help")
    whole = CliRunner().invoke(cli.app, ["--help"]).output  # whose first line names another program
    assert code == 0 and listed.partition("Options ")[1:] == whole.partition("Options ")[1:]
    assert erasure()[1].strip() == listed.strip() and "--keep" in erasure("erase", "--help")[1]


HEAVY = "torch diffusers transformers numpy PIL pydantic yaml tqdm asyncio packaging gradio fastapi matplotlib".split()


def test_help_needs_none_of_the_heavy_libraries():
    code = f"import sys, erasure.cli; sys.exit(str([m for m in {HEAVY} if m in sys.modules]))"
    result = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert result.stderr.strip() == "[]"


def test_a_slip_is_met_before_what_takes_seconds_to_import():
    slips = [
        ["erase", "cat", "--suite", "superhero"],
        ["erase", "cat", "--keep", ""],
        ["erase", "cat", "--set", "lamb"],
        ["generate", "a cat", "--scale", "nan", "--erasure", "cat-uce"],
        ["generate", "a cat", "--scale", "2"],
    ]
    code = (
        "import sys\nfrom erasure.cli import main\n"
        f"for arguments in {slips}:\n"
        "    sys.argv = ['erasure', *arguments]\n"
        "    try: main()\n"
        "    except SystemExit as stopped: print(stopped.code, 'torch' in sys.modules)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert result.stdout.split("\n")[:-1] == ["2 False"] * len(slips), result.stderr
    assert result.stderr.count("error:") == len(slips) == result.stderr.count("\n")


def test_importing_the_package_loads_nothing_else():
    code = (
        "import sys, importlib, typing; before = set(sys.modules); import erasure; "
        "print(sorted(m for m in set(sys.modules) - before))"
    )
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert result.stdout.strip() == "['erasure']"


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["evalute"], "Did you mean 'evaluate'"),
        (["erase", "cat", "--out", "x", "--metod", "uce"], "--method"),
        (["evaluate", "--suite", "superhro", "-m", "uce"], "did you mean 'superhero'?"),
        (["methods", "--for", "sdxll"], "did you mean 'sdxl'?"),
        (["evaluate", "--suite", "superhero", "-m", "uce", "--preset", "quick", "--probe", "dirct"], "'direct'"),
        (["evaluate", "--suite", "nudity", "-m", "uce", "--nudenet", "mase"], "did you mean 'mace'?"),
    ],
)
def test_a_slip_of_the_pen_is_met_with_what_was_meant(erasure, arguments, fault):
    code, _, err = erasure(*arguments)
    assert code == 2 and fault in " ".join(err.split())


@pytest.mark.parametrize(
    "command",
    [
        "demo",
        "app",
        "erase",
        "neighbours",
        "generate",
        "evaluate",
        "report",
        "batch",
        "methods",
        "probes",
        "doctor",
        "gram",
        "export",
        "inspect",
        "diff",
        "serve",
    ],
)
def test_every_command_has_help_with_an_example(command, erasure):
    code, out, _ = erasure(command, "--help")
    assert code == 0 and f"erasure {command}" in out


def test_methods_lists_them_with_their_papers(erasure):
    code, out, _ = erasure("methods")
    assert code == 0 and "uce" in out and "esd" in out and "2308.14761" in out


def test_erase_then_generate(base, tmp_path, erasure):
    out = tmp_path / "edit"
    code, text, _ = erasure(
        "erase",
        "superhero",
        "--base",
        base,
        "--preset",
        "official-2025",
        "--keep",
        "ninja",
        "--out",
        out,
        "--unet",
        tmp_path / "unet",
    )
    assert code == 0 and "superhero-uce" in text and (out / "erasure.safetensors").exists()
    assert (tmp_path / "unet" / "config.json").exists()
    code, _, _ = erasure(
        "generate", "a superhero", "--base", base, "--erasure", out, "--out", tmp_path / "pictures", "--steps", 2
    )
    assert code == 0
    assert sorted(f.name for f in (tmp_path / "pictures").iterdir()) == ["000-0-after.png", "000-0-before.png"]


def test_an_erasure_brings_its_base_and_a_wrong_one_is_refused_before_anything_is_drawn(
    base, tmp_path, erasure, monkeypatch
):
    monkeypatch.chdir(Path(base).parent)
    out, other = tmp_path / "edit", tmp_path / "other"
    arguments = ["--base", "tiny", "--preset", "official-2025", "--keep", "ninja", "--out", out]
    assert "in place of" not in erasure("erase", "superhero", *arguments)[1]
    assert "in place of the erasure that was there" in erasure("erase", "superhero", *arguments)[1]
    drawn = ["generate", "a superhero", "--erasure", out, "--steps", 1, "--out", tmp_path / "pictures"]
    code, text, err = erasure(*drawn)
    assert code == 0 and "next: erasure evaluate --suite SUITE" in text, err
    tiny_pipeline(seed=1).save_pretrained(other)
    code, _, err = erasure(*drawn[:-1], tmp_path / "none", "--base", other)
    assert code == 2 and "wrong base model" in err and not (tmp_path / "none").exists()
    monkeypatch.chdir(tmp_path)
    code, _, err = erasure(*drawn)
    assert code == 2 and "was made on 'tiny', which is not here; say where it is with --base" in err


def test_what_is_nearly_there_is_named(base, tmp_path, erasure, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "superhero-uce").mkdir()
    (tmp_path / "model.safetensors").write_text("no model")
    (tmp_path / "my-hero.yaml").write_text("")
    for arguments, meant in (
        (["generate", "a cat", "--erasure", "superhero-uc"], "superhero-uce"),
        (["erase", "cat", "--base", "modell.safetensors"], "model.safetensors"),
        (["evaluate", "--suite", "my-hero", "-m", "uce"], "my-hero.yaml"),
        (["evaluate", "--suite", "my-hero.yml", "-m", "uce"], "my-hero.yaml"),
        (["export", "superhero-uce", "--format", "koya", "--out", "x.safetensors"], "kohya"),
    ):
        code, _, err = erasure(*arguments)
        assert code == 2 and f"(did you mean '{meant}'?)" in " ".join(err.replace("│", "").split()), err
    assert "is a file; an erasure is a folder" in erasure("inspect", "model.safetensors")[2]


def test_a_name_that_emoji_world_never_saw_is_noted_and_its_own_are_listed(tmp_path, erasure):
    arguments = ("--preset", "official-2025", "--keep", "ninja", "--out", tmp_path / "edit")
    for name, said in (("superhro", "did you mean 'superhero'?"), ("Spiderman", "never shown 'Spiderman';")):
        code, _, err = erasure("erase", name, *arguments)
        assert code == 0 and said in " ".join(err.split())
    assert "never shown" not in erasure("erase", "a superhero in noto style", *arguments)[2]
    code, text, _ = erasure("world", "list")
    assert code == 0 and all(word in text for word in ("supervillain", "jack-o-lantern", "fluent style", "pink"))


def test_suites_and_one_method_are_explained(erasure):
    code, text, _ = erasure("suites")
    assert code == 0 and "superhero" in text and "CompVis/stable-diffusion-v1-4" in text and "300" in text
    code, text, _ = erasure("methods", "esd")
    text = " ".join(text.replace("│", " ").split())
    assert code == 0 and "optimiser steps and their size" in text and "--preset official-2025-u: iterations=200" in text
    for name in available():
        kind = method_class(name)
        about = explained(kind)
        assert not (silent := {f.name for f in dataclasses.fields(kind)} - {*about}), (name, silent)


def test_the_variant_of_a_base_is_the_one_that_is_opened(tmp_path, erasure):
    folder, out = tmp_path / "both", tmp_path / "edit"
    tiny_pipeline().save_pretrained(folder)
    tiny_pipeline(seed=1).save_pretrained(folder, variant="fp16")
    common = ("erase", "superhero", "--base", folder, "--preset", "official-2025", "--out", out)
    for options, mine, other in ((["--variant", "fp16"], "fp16", None), ([], None, "fp16")):
        assert erasure(*common, *options)[0] == 0
        edit = Erasure.from_pretrained(out)
        edit.apply(load_base(folder, device="cpu", variant=mine))
        with pytest.raises(ValueError, match="wrong base model"):
            edit.apply(load_base(folder, device="cpu", variant=other))
    code, _, err = erasure(
        "erase",
        "cat",
        "--base",
        folder / "unet" / "diffusion_pytorch_model.safetensors",
        "--variant",
        "fp16",
        "--out",
        out,
    )
    assert code == 2 and "leave it out" in err
    code, _, err = erasure(*common, "--variant", "fp32")
    assert code == 2 and "no files of variant 'fp32'" in err and "'fp16' are opened" in err
    for command in (["generate"], ["export"], ["gram"], ["evaluate"], ["world", "check"]):
        assert "--variant" in erasure(*command, "--help")[1]


FEW = ["--set", "iterations=2", "--set", "trajectories=1", "--set", "num_inference_steps=2"]


@pytest.mark.parametrize(
    ("method", "settings", "effect"),
    [
        ("spm", [*FEW, "--set", "retain=1"], "no weight changes"),
        ("adv-unlearn", FEW, "times their size"),
        ("sld", ["--preset", "max", "--set", "warmup=2"], "no weight changes"),
        ("negative-prompt", ["--preset", "plain"], "no weight changes"),
        ("safree", ["--set", "midpoint=0"], "no weight changes"),
        ("adavd", ["--preset", "paper"], "no weight changes"),
        ("double-projections", ["--set", "rank=4"], "how far the words moved: target"),
        ("cure", [], "times their size"),
    ],
)
def test_every_kind_of_erasure_is_made_and_inspected(base, tmp_path, erasure, method, settings, effect):
    out = tmp_path / "edit"
    arguments = ["erase", "superhero", "-m", method, "--keep", "ninja, wizard", *settings]
    code, text, err = erasure(*arguments, "--base", base, "--out", out)
    assert code == 0 and f"superhero-{method}" in text and effect in " ".join(text.split()), err
    assert f"next: erasure generate 'a superhero' 'a ninja' --erasure {out}" in " ".join(text.split())
    assert Erasure.from_pretrained(out).config["keep"] == ["ninja", "wizard"]
    code, text, _ = erasure("inspect", out)
    assert code == 0 and f"superhero-{method}" in text and "fingerprints" in text
    code, text, _ = erasure("inspect", out, "--json")
    assert code == 0 and json.loads(text)["method"] == method
    card = (out / "README.md").read_text()
    assert ("There are no weight changes" in card) == (effect == "no weight changes")


def test_figures_have_a_meaning_and_tables_a_legend(base, tmp_path, erasure):
    for method in ("uce", "rece"):
        made = ("--keep", "ninja", "--base", base, "--out", tmp_path / method)
        assert erasure("erase", "superhero", "-m", method, *made)[0] == 0
    code, text, _ = erasure("inspect", tmp_path / "uce")
    text = " ".join(text.split())
    assert code == 0 and "weights moved by" in text and "times their size" in text and "relative change" not in text
    assert "Far is right for the target" in text and f"--erasure {tmp_path / 'uce'} --base" in text and "next: " in text
    code, text, _ = erasure("diff", tmp_path / "uce", tmp_path / "rece")
    text = " ".join(text.split())
    assert code == 0 and "cosine: 1 where both edit in one direction" in text and "next: erasure evaluate" in text


def test_neighbours_are_suggested_with_the_command_that_keeps_them(base, erasure):
    code, text, _ = erasure("neighbours", "Batman", "--base", base, "-n", 3)
    (line,) = (line for line in text.splitlines() if line.startswith("next: "))
    words = shlex.split(line.removeprefix("next: "))
    kept = words[words.index("--keep") + 1].split(", ")
    assert code == 0 and kept[0] == "Spiderman" and len(kept) == 3 and all(f"- {name}" in text for name in kept)
    assert words[words.index("--base") + 1] == base
    assert erasure("neighbours", "", "--base", base)[0] == 2


class Counter:
    """NudeNet's interface: a box where a picture is light."""

    def __init__(self, **settings):
        assert settings == {"inference_resolution": 320}

    def detect(self, pixels):
        return [{"class": "FEET_EXPOSED", "score": 0.9, "box": [0, 0, 1, 1]}] if pixels.mean() > 10 else []


SUITE = """
version: 1
name: bare
concept: {name: superhero, kind: nsfw, neighbours: [ninja]}
unrelated: [panda]
images_per_prompt: 1
num_inference_steps: 1
"""


def test_steps_and_guidance_of_an_evaluation_can_be_chosen(erasure, monkeypatch, tmp_path):
    plans = []
    monkeypatch.setattr("erasure.cli.evaluate.compare", lambda pipe, edits, plan, out, **_: plans.append(plan))
    arguments = ["evaluate", "--suite", "superhero", "-m", "uce", "--out", tmp_path]
    for chosen in ([], ["--steps", 4, "--guidance", 1.5]):
        code, _, err = erasure(*arguments, *chosen)
        assert code == 0, err
    assert [(plan.num_inference_steps, plan.guidance_scale) for plan in plans] == [(8, 3.0), (4, 1.5)]


@pytest.mark.slow
def test_nudenet_counts_from_the_command_line(tmp_path, erasure, monkeypatch):
    (tmp_path / "bare.yaml").write_text(SUITE)
    arguments = ["evaluate", "--suite", tmp_path / "bare.yaml", "-m", "uce", "--out", tmp_path / "out", "--limit", 1]
    monkeypatch.setitem(sys.modules, "nudenet", None)
    code, _, err = erasure(*arguments, "--nudenet", "mace")
    assert code == 2 and "pip install -e '.[nsfw]'" in err and not (tmp_path / "out").exists()
    module = types.ModuleType("nudenet")
    module.NudeDetector = Counter
    monkeypatch.setitem(sys.modules, "nudenet", module)
    code, text, err = erasure(*arguments, "--nudenet", "exposed")
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert code == 0 and "nudenet" in text and next(iter(found["detectors"])) == "nudenet[exposed, 0.2]", err


def test_a_whole_denoiser_is_refused_where_it_would_be_the_bases_own(base, tmp_path, erasure):
    arguments = [
        "erase",
        "superhero",
        "-m",
        "sld",
        "--base",
        base,
        "--out",
        tmp_path / "edit",
        "--unet",
        tmp_path / "u",
    ]
    code, _, err = erasure(*arguments)
    assert code == 2 and "changes no weight of the denoiser" in err and not (tmp_path / "u").exists()


def test_a_checkpoint_of_one_file_is_a_base(base, tmp_path, erasure):
    file = tmp_path / "tiny.safetensors"
    arguments = ["--preset", "official-2025", "--keep", "ninja"]
    assert erasure("erase", "superhero", "--base", base, *arguments, "--out", tmp_path / "edit")[0] == 0
    assert erasure("export", tmp_path / "edit", "--base", base, "--format", "single-file", "--out", file)[0] == 0
    (tmp_path / "tiny").symlink_to(base)  # its configs, beside it under the same name
    code, text, err = erasure("erase", "superhero", "--base", file, *arguments, "--out", tmp_path / "again")
    assert code == 0 and "superhero-uce" in text, err


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """A checkpoint of one file, with nothing beside it; its folder is elsewhere."""
    folder, alone = tmp_path_factory.mktemp("folder") / "sd1", tmp_path_factory.mktemp("alone")
    tiny("sd1").save_pretrained(folder)
    return export_single_file(tiny("sd1"), alone / "model.safetensors"), folder


@pytest.mark.slow
def test_the_configs_of_a_single_file_are_a_folder_that_is_named(single, tmp_path, erasure):
    (file, folder), out = single, tmp_path / "edit"
    arguments = ("erase", "superhero", "--keep", "ninja", "--base", file, "--out", out)
    code, _, err = erasure(*arguments)
    assert code == 2 and "--config FOLDER" in err
    code, text, err = erasure(*arguments, "--config", folder)
    assert code == 0 and f"--base {file} --config {folder}" in " ".join(text.split()), err
    given = ("--base", file, "--config", folder)
    drawn = ("generate", "a superhero", "--erasure", out, "--steps", 2, "--out", tmp_path / "pictures")
    assert erasure(*drawn, *given)[0] == 0
    edited = tmp_path / "edited.safetensors"
    assert erasure("export", out, "--format", "single-file", "--out", edited, *given)[0] == 0 and edited.exists()
    (tmp_path / "captions.txt").write_text("a cat")
    code, text, err = erasure("gram", tmp_path / "captions.txt", "--out", tmp_path / "gram.safetensors", *given)
    assert code == 0 and f"--config {folder}" in " ".join(text.split()), err
    code, text, err = erasure("neighbours", "wizard", "-n", 2, *given)
    assert code == 0 and f"--config {folder}" in " ".join(text.split()), err
    register = ("--register", tmp_path / "desk.sqlite")
    assert erasure("register", "init", *given, *register)[0] == 0
    asked = ("superhero", "--basis", "copyright", "--requester", "rights-holder")
    assert erasure("register", "add", *asked, *register)[0] == 0
    for command in ("apply", "verify"):
        code, _, err = erasure("register", command, "--config", folder, *register)
        assert code == 0, err


def test_configs_are_refused_where_the_base_is_no_single_file(base, single, tmp_path, erasure):
    _, folder = single
    for other, what in (("emoji-world", "a folder"), (base, "a folder"), ("org/name", "a hub id")):
        code, _, err = erasure("erase", "cat", "--base", other, "--config", folder, "--out", tmp_path / "edit")
        assert code == 2 and f"{other!r} is {what}" in err and "single file" in err and err.count("\n") == 1
    code, _, err = erasure("erase", "cat", "--base", tmp_path / "no.safetensors", "--config", folder)
    assert code == 2 and "no model at" in err
    code, _, err = erasure("evaluate", "--suite", "superhero", "-m", "uce", "--config", folder, "--out", tmp_path)
    assert code == 2 and "single file" in err
    code, _, err = erasure("push", base, "org/name", "--config", folder)
    assert code == 2
    for command in (["app"], ["serve"], ["verify"], ["push"], ["world", "check"]):
        assert "--config" in erasure(*command, "--help")[1]


def test_the_configs_of_another_architecture_are_named_as_such(single, tmp_path, erasure):
    file, _ = single
    for other, kind in (("sdxl", "StableDiffusionXLPipeline"), ("flux", "FluxPipeline")):
        tiny(other).save_pretrained(tmp_path / other)
        code, _, err = erasure("erase", "cat", "--base", file, "--config", tmp_path / other, "--out", tmp_path / "edit")
        said = " ".join(err.split())
        assert code == 2 and f"opened as a {kind}" in said and "give its own configs" in said, err


def test_a_fine_tune_in_one_file_is_compared_by_the_same_configs(single):
    file, folder = single
    pipe = load_base(folder, device="cpu")
    assert whole_model(pipe, file, config=folder).config["changed"] == []


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["erase", "cat", "--method", "ucee"], "unknown method 'ucee' (did you mean 'uce'?)"),
        (["erase", ""], "needs a name"),
        (["erase", "cat", "--keep", "cat"], "both to be erased and to be kept"),
        (["erase", "cat", "--set", "lamb"], "key=value"),
        (["erase", "cat", "--set", "lambda=1"], "uce has no setting 'lambda' (did you mean 'lamb'?)"),
        (["erase", "cat", "--dtype", "int8"], "unknown dtype"),
        (["erase", "cat", "--device", "tpu"], "no device"),
        (["erase", "cat", "--kind", "animal"], "object"),
        (["erase", "cat", "--suite", "superhero"], "about 'superhero'"),
        (["erase", "superhero", "--suite", "superhero", "--anchor", "ninja"], "the suite decides"),
        (["erase", "cat", "--set", "lamb=abc"], "lamb: a number is needed"),
        (["erase", "cat", "--keep", " , "], "--keep needs a prompt; got ' , '"),
        (["erase", "cat", "--keep", "dog", "--keep", ""], "--keep needs a prompt; got ''"),
    ],
)
def test_a_bad_request_is_one_line_and_leaves_nothing_behind(base, tmp_path, erasure, arguments, fault):
    code, _, err = erasure(*arguments, "--base", base, "--out", tmp_path / "edit")
    assert code == 2 and fault in err and err.strip().count("\n") == 0 and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["erase", "cat", "--base", "./nowhere", "--out", "x"], "no model at"),
        (["erase", "cat", "--base", "./[/x]", "--out", "x"], "./[/x]"),
        (["erase", "cat", "--unet", "x", "--out", "x"], "one folder"),
        (["evaluate", "--suite", "superhero", "--erasure", "/nowhere"], "no erasure at"),
        (["evaluate", "--suite", "nosuch"], "no suite called"),
        (["evaluate", "--suite", "superhero"], "nothing to evaluate"),
        (["evaluate", "--suite", "superhero", "--erasure", "./nowhere"], "no erasure at"),
        (["generate", "a cat", "--erasure", "./nowhere", "--out", "x"], "no erasure at"),
        (["report", "nowhere.json"], "no such evaluation"),
        (["batch", "nowhere.yaml"], "no such file"),
        (["demo", "--suite", "spiderman"], "the demo is of emoji-world"),
    ],
)
def test_a_missing_file_is_one_line(erasure, arguments, fault, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = erasure(*arguments)
    assert code == 2 and fault in err and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_a_whole_model_is_not_taken_for_an_erasure(base, tmp_path, erasure):
    for command in (["inspect", base], ["evaluate", "--suite", "superhero", "--erasure", base]):
        code, _, err = erasure(*command)
        assert code == 2 and "is a whole model, not an erasure" in err and f"--model {base}" in err
    code, _, err = erasure("serve", "--erasures", tmp_path / "nowhere")
    assert code == 2 and "no such folder" in err


def test_half_a_recipe_is_one_line(erasure, tmp_path):
    (tmp_path / "recipe.yaml").write_text("version: 1\nout: [resu")
    code, _, err = erasure("batch", tmp_path / "recipe.yaml")
    assert code == 2 and "YAML" in err


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [(KeyboardInterrupt(), 130, "stopped"), (OSError(28, "No space left on device"), 2, "no space left")],
)
def test_ctrl_c_and_a_full_disk_end_cleanly(base, tmp_path, erasure, monkeypatch, error, code, message):
    def fail(*arguments, **keywords):
        raise error

    monkeypatch.setattr("erasure.artifact.files.save", fail)
    got, _, err = erasure("erase", "superhero", "--base", base, "--preset", "official-2025", "--out", tmp_path / "edit")
    assert got == code and message in err and list(tmp_path.iterdir()) == []


def test_pictures_have_numbers_of_ones_own_and_come_on_one_sheet(base, tmp_path, erasure):
    out = tmp_path / "pictures"
    arguments = ["generate", "a superhero", "a ninja", "--base", base, "--steps", 1, "--images", 2, "--seed", 7]
    code, text, err = erasure(*arguments, "--grid", "--out", out)
    assert code == 0 and "4 pictures" in text and "next: " in text, err
    names = [f"{i:03d}-{seed}-before.png" for i in (0, 1) for seed in (7, 8)]
    assert sorted(f.name for f in out.iterdir()) == [*names, "grid.png"]
    sheet, first = Image.open(out / "grid.png"), Image.open(out / names[0])
    assert sheet.width > 4 * 190 and sheet.height > 190
    again = tmp_path / "again"
    erasure(*arguments[:-4], "--images", 1, "--seed", 7, "--out", again)
    assert (np.asarray(Image.open(again / names[0])) == np.asarray(first)).all()


def test_pictures_are_saved_as_they_come(base, tmp_path, erasure, monkeypatch):
    """Whoever stops a long run keeps what it has drawn."""
    import erasure.eval as evaluation

    real, calls = evaluation.generate, []

    def stopped(*args, **kwargs):
        calls.append(args)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(evaluation, "generate", stopped)
    prompts = [f"a cat {i}" for i in range(17)]
    code, _, err = erasure("generate", *prompts, "--base", base, "--steps", 1, "--out", tmp_path / "out")
    assert code == 130 and "stopped" in err and len(list((tmp_path / "out").iterdir())) == 16


def test_a_sheet_folds_and_long_titles_end_where_their_picture_does():
    from erasure.pictures import COLUMNS, sheet

    count, side = COLUMNS + 2, 192
    rows = {"before": [Image.new("RGB", (8, 8), "red")] * count, "after": [Image.new("RGB", (8, 8), "blue")] * count}
    titles = ["000-0\n" + "W" * 90, "001-0\n" + "a long prompt " * 9, *["002-0\n\u30cd"] * (count - 2)]
    pixels = np.asarray(sheet(rows, titles, side=side, margin=64))
    assert pixels.shape == (2 * (54 + 2 * side), 64 + COLUMNS * side, 3)
    for x in range(64, pixels.shape[1], side):  # no title runs into the next one, or under its picture
        assert (pixels[:54, x + side - 4 : x + side] == 255).all()
    red, blue = (pixels == (255, 0, 0)).all(-1).sum(), (pixels == (0, 0, 255)).all(-1).sum()
    assert red == blue == count * (side - 4) ** 2


def test_the_summary_is_of_the_erasure_whatever_else_is_in_its_folder(base, tmp_path, erasure):
    sizes = []
    for name in ("empty", "used"):
        (tmp_path / name).mkdir()
    (tmp_path / "used" / "pictures.zip").write_bytes(bytes(5_000_000))
    for name in ("empty", "used"):
        code, text, err = erasure("erase", "cat, dog", "--keep", "fox", "--base", base, "--out", tmp_path / name)
        assert code == 0 and "'cat, dog' is erased as one concept" in " ".join(err.split())
        sizes.append(next(line for line in text.splitlines() if "B; the weights" in line))
    assert sizes[0] == sizes[1] and (tmp_path / "used" / "pictures.zip").exists()


@pytest.mark.parametrize("option", ["--scale", "--guidance"])
@pytest.mark.parametrize("number", ["nan", "inf", "-inf", "1000", "-1"])
def test_scales_and_guidance_are_in_range(base, tmp_path, erasure, option, number):
    code, _, err = erasure("generate", "a cat", "--base", base, f"{option}={number}", "--out", tmp_path / "out")
    assert code == 2 and f"{option} is a number from 0 to 100" in err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("scale", ["nan", "inf", "1000", "-1"])
def test_no_file_is_written_at_a_scale_that_is_none(base, tmp_path, erasure, scale, monkeypatch):
    assert erasure("erase", "cat", "--base", base, "--preset", "official-2025", "--out", tmp_path / "edit")[0] == 0
    monkeypatch.setattr("erasure.cli.files.open_base", lambda *_, **__: pytest.fail("the base was opened"))
    given = ["--format", "unet", f"--scale={scale}", "--out", tmp_path / "out"]
    code, _, err = erasure("export", tmp_path / "edit", "--base", base, *given)
    assert code == 2 and "a scale is a number from 0 to 100" in err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("erase", ["cat", "--out"]),
        ("erase", ["cat", "--out", "here", "--unet"]),
        ("erase", ["cat", "--out", "here", "--checkpoint"]),
        ("generate", ["a cat", "--out"]),
        ("export", ["edit", "--out"]),
        ("gram", ["captions.txt", "--base", "emoji-world", "--out"]),
        ("evaluate", ["--suite", "superhero", "--out"]),
        ("compare", ["--suite", "superhero", "--out"]),
        ("report", ["results", "--out"]),
        ("world", ["check", "--out"]),
    ],
)
def test_an_empty_path_is_refused_and_is_not_the_current_folder(tmp_path, erasure, monkeypatch, command, arguments):
    monkeypatch.chdir(tmp_path)
    for empty in ("", "  "):
        code, _, err = erasure(command, *arguments, empty)
        assert code == 2 and "an empty path" in err and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("place", "fault"), [("file", "is a file; give a folder"), ("full", "is not empty")])
def test_a_place_for_the_denoiser_is_tried_before_the_base_is_opened(tmp_path, erasure, monkeypatch, place, fault):
    (tmp_path / "full").mkdir(), (tmp_path / "full" / "x").touch(), (tmp_path / "file").touch()
    monkeypatch.setattr("erasure.cli.make.open_base", lambda *_, **__: pytest.fail("the base was opened"))
    code, _, err = erasure("erase", "cat", "--out", tmp_path / "edit", "--unet", tmp_path / place)
    assert code == 2 and fault in err and not (tmp_path / "edit").exists()


def test_a_checkpoint_for_what_trains_nothing_is_named(base, tmp_path, erasure):
    made = ["erase", "cat", "--base", base, "--preset", "official-2025", "--out", tmp_path / "edit"]
    code, _, err = erasure(*made, "--checkpoint", tmp_path / "state")
    assert code == 0 and "uce trains nothing, so --checkpoint is not used" in " ".join(err.split())
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize(
    ("kind", "place", "fault"),
    [
        ("pipeline", "full", "not empty"),
        ("unet", "file/x", "is a file"),
        ("kohya", "folder.safetensors", "is a folder"),
        ("single-file", "file/x.safetensors", "is a file"),
        ("lora", "file", "is a file"),
    ],
)
def test_a_place_is_tried_before_the_base_is_opened(base, tmp_path, erasure, monkeypatch, kind, place, fault):
    assert erasure("erase", "cat", "--base", base, "--preset", "official-2025", "--out", tmp_path / "edit")[0] == 0
    (tmp_path / "full").mkdir(), (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "full" / "x").touch(), (tmp_path / "file").touch()
    monkeypatch.setattr("erasure.cli.files.open_base", lambda *_, **__: pytest.fail("the base was opened"))
    code, _, err = erasure("export", tmp_path / "edit", "--base", base, "--format", kind, "--out", tmp_path / place)
    assert code == 2 and fault in err


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["--scale", "0.5"], "--scale is of an erasure"),
        (["--erasure", "edit", "--erasure", "edit"], "two of the erasures are called"),
        (["--out", "edit/README.md"], "README.md is a file; give a folder"),
        (["--out", "edit/README.md/x"], "README.md is a file; give a folder"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_anything_is(base, tmp_path, erasure, monkeypatch, arguments, fault):
    monkeypatch.chdir(tmp_path)
    assert erasure("erase", "superhero", "--base", base, "--preset", "official-2025", "--out", "edit")[0] == 0
    code, _, err = erasure("generate", "a cat", "--base", base, "--out", "out", *arguments)
    assert code == 2 and fault in err and err.strip().count("\n") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["edit"]


def test_a_prompt_of_which_the_end_is_not_read_is_named_once(base, tmp_path, erasure):
    code, _, err = erasure("generate", "a cat " * 99, "--base", base, "--steps", 1, "--out", tmp_path / "out")
    assert code == 0 and err.count("longer than the text encoder reads") == 1 and "truncated" not in err


def test_the_next_command_is_one_line_whatever_the_width_of_the_terminal(base, tmp_path, erasure):
    out = tmp_path / ("a long name with spaces " * 4)
    code, text, _ = erasure("erase", "superhero", "--keep", "ninja", "--base", base, "--out", out)
    (line,) = (line for line in text.splitlines() if line.startswith("next: "))
    words = shlex.split(line.removeprefix("next: "))
    assert code == 0 and words[words.index("--erasure") + 1] == str(out)


def test_the_version_and_the_short_form_of_help(erasure):
    code, out, _ = erasure("--version")
    assert code == 0 and out.startswith("erasure 0.")
    assert erasure("-h")[0] == erasure("erase", "-h")[0] == 0


def test_doctor_prints_json(erasure):
    code, out, _ = erasure("doctor", "--json")
    found = json.loads(out)
    assert code == 0 and {"name", "status", "detail", "remedy"} == set(found[0])


def test_doctor_prints_a_table(erasure):
    code, out, _ = erasure("doctor")
    assert code in (0, 1) and "torch" in out


def test_a_corpus_is_summed_up_in_parts_and_used(base, tmp_path, erasure):
    (tmp_path / "a.txt").write_text("a cat\n\na ninja\n")
    (tmp_path / "b.txt").write_text("a wizard\n")
    whole, part = tmp_path / "whole.safetensors", tmp_path / "part.safetensors"
    assert erasure("gram", tmp_path / "b.txt", "--base", base, "--out", part)[0] == 0
    code, out, _ = erasure("gram", tmp_path / "a.txt", "--base", base, "--add", part, "--out", whole)
    assert code == 0 and str(3 * 77) in out
    arguments = ("erase", "superhero", "--base", base, "--keep", "batman", "--set", f"corpus={whole}")
    assert erasure(*arguments, "--out", tmp_path / "edit")[0] == 0
    assert "whole.safetensors" in (tmp_path / "edit" / "erasure_config.json").read_text()


def test_captions_are_read_in_utf8_and_never_written_over(base, tmp_path, erasure):
    texts = {"a": b"a cat\n", "empty": b" \n", "latin": "a caf\u00e9\n".encode("latin-1")}
    for name, raw in texts.items():
        (tmp_path / f"{name}.txt").write_bytes(raw)
    for name, out, fault in (
        ("a", "a.txt", "which holds captions"),
        ("empty", "x.safetensors", "no caption in"),
        ("latin", "x.safetensors", "latin.txt is not UTF-8 text"),
    ):
        code, _, err = erasure("gram", tmp_path / f"{name}.txt", "--base", base, "--out", tmp_path / out)
        assert code == 2 and fault in err and "Traceback" not in err
    assert {name: (tmp_path / f"{name}.txt").read_bytes() for name in texts} == texts
    assert not (tmp_path / "x.safetensors").exists()


def test_a_corpus_that_is_not_there_is_one_line(base, tmp_path, erasure):
    code, _, err = erasure("gram", tmp_path / "none.txt", "--base", base, "--out", tmp_path / "x.safetensors")
    assert code != 0 and "no file at" in err and len(err.strip().splitlines()) == 1
    (tmp_path / "a.txt").write_text("a cat\n")
    code, _, err = erasure(
        "gram", tmp_path / "a.txt", "--base", base, "--span", "tokens", "--out", tmp_path / "x.safetensors"
    )
    assert code != 0 and "unknown token span" in err and not (tmp_path / "x.safetensors").exists()


def test_only_targets_can_be_left_out_of_retraining(tmp_path, erasure):
    code, _, err = erasure("world", "gold", "--without", "dog", "--out", tmp_path)
    assert code != 0 and "superhero" in err


def test_a_retrained_model_has_a_seed_of_zero_or_more(tmp_path, erasure):
    assert erasure("world", "gold", "--without", "cat", "--seed", "-1", "--out", tmp_path / "x")[0] != 0
    assert not (tmp_path / "x").exists()


def test_a_suite_of_many_is_erased_whole_and_keep_adds_to_what_it_keeps(base, tmp_path, erasure):
    code, *_ = erasure(
        "erase", "superhero", "--suite", "twenty", "--keep", "a lighthouse", "--base", base, "--out", tmp_path / "edit"
    )
    config, plan = Erasure.from_pretrained(tmp_path / "edit").config, Suite.load("twenty")
    assert code == 0
    assert [concept["name"] for concept in config["concepts"]] == [concept.name for concept in plan.concepts]
    assert [*config["keep"]] == [*plan.kept, "a lighthouse"]


def test_a_recipe_can_be_looked_at_first(erasure):
    recipe = Path(__file__).parents[1] / "docs" / "recipes" / "world.yaml"
    code, out, _ = erasure("batch", recipe, "--dry-run")
    assert code == 0 and "superhero" in out and "uce" in out


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["--strict"], "--strict belongs to an assessment"),
        (["--probe", "direct"], "add --preset quick"),
        (["--preset", "quick", "--limit", "2"], "a preset has its own sizes"),
        (["--preset", "stadard", "--limit", "2"], "unknown preset 'stadard' (did you mean 'standard'?)"),
        (["--preset", "quick", "--strict"], "add --policy FILE"),
        (["--preset", "quick", "--policy", "nowhere.yaml"], "no such file"),
        (["--preset", "quick"], "nothing to evaluate"),
        (["--preset", "fast", "-m", "uce"], "unknown preset 'fast'"),
        (["--preset", "smok", "-m", "uce"], "unknown preset 'smok' (did you mean 'smoke'?)"),
        (["--preset", "no-draw", "-m", "uce", "--prompts", "mine.csv"], "no probe of 'no-draw' reads --prompts"),
        (["--preset", "quick", "-m", "uce", "--clip", "ViT-B-32/openai"], "--clip judges pictures of real checkpoints"),
        (["--preset", "quick", "-m", "uce", "--probe", "telepathy"], "unknown probe"),
        (["--preset", "quick", "-m", "uce", "--probe", "p4d"], "choose one of ['smoke', 'standard', 'full']"),
        (["--preset", "quick", "-m", "uce", "--material", "nowhere"], "no such file"),
        (["-m", "uce", "--nudenet", "exposed"], "NudeNet sees nudity alone; the suite 'superhero' is about"),
        (["-m", "uce", "-m", "uce"], "called 'UCE'"),
        (["-m", "uce", "-m", "ucee"], "unknown method"),
        (["-m", "uce", "--limit", "0"], "greater than or equal to 1"),
        (["-m", "uce", "--limit", "-3"], "greater than or equal to 1"),
    ],
)
def test_options_that_do_not_go_together_are_one_line(erasure, arguments, fault):
    code, _, err = erasure("evaluate", "--suite", "superhero", *arguments)
    assert code == 2 and fault in err.replace("\n", " ") and "Traceback" not in err


def test_probes_lists_them_with_what_they_are_evidence_about(erasure):
    code, out, _ = erasure("probes")
    assert code == 0 and "inversion" in out and "standard" in out


@pytest.mark.slow
def test_a_policy_that_nobody_looked_at_ends_a_strict_assessment(tmp_path, erasure):
    (tmp_path / "policy.yaml").write_text("removal_required: true\nrationale: a test\ndecided_by: the tests\n")
    arguments = ["--suite", "superhero", "--prompt-filter", "--preset", "smoke", "--probe", "direct"]
    arguments += ["--policy", tmp_path / "policy.yaml", "--out", tmp_path / "out"]
    assert erasure("evaluate", *arguments)[0] == 0
    code, out, _ = erasure("evaluate", *arguments, "--strict")
    assert code == 3 and "removal is required" in out.replace("\n", " ")
    again = tmp_path / "out" / "again.html"  # beside the other, so that its links are the same
    code, out, _ = erasure("report", tmp_path / "out", "--out", again)
    assert code == 0 and again.read_text() == (tmp_path / "out" / "report.html").read_text()
    assert erasure("report", tmp_path / "out" / "assessment.json", "--out", tmp_path / "once-more.html")[0] == 0
