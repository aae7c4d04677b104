"""What README, docs and suites tell people to type works: commands parse, how-tos and Python blocks run.

Each page runs in a folder of its own, where the checkpoints that it names are tiny ones. A page may hold its setup in
a comment, ``<!-- setup`` on a line, Python, ``-->``.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
from typer.main import get_command
from typer.testing import CliRunner

import erasure
from erasure.artifact import export_single_file
from erasure.cli import app
from erasure.pipelines import OpenClipEmbedder, active_erasures
from tests.slow import first
from tests.tiny import identical, tiny, unet, weights

ROOT = Path(__file__).resolve().parents[1]
DOCS, SUITES = (ROOT / "docs").rglob("*.md"), (ROOT / "erasure" / "suites").glob("*.yaml")
PAGES = [ROOT / "README.md", *sorted(DOCS), *sorted(SUITES)]
HOW_TO = sorted((ROOT / "docs" / "howto").glob("*.md"))
# Their Python runs on Emoji World; their commands, of which some take minutes, are parsed above.
PYTHON = [
    ROOT / "README.md",
    *(
        ROOT / "docs" / f"{name}.md"
        for name in ("index", "artefact", "guardrails", "register", "retrieval", "serving", "world")
    ),
]


def commands(page: Path) -> Iterator[str]:
    """Every line of a page that starts with `erasure`, continued lines joined."""
    text = page.read_text("utf-8").replace("\\\n", " ")
    for line in re.findall(r"^(?:#\s+)?(erasure [a-z].*)$", text, flags=re.MULTILINE):
        if "|" not in line:
            yield line


def id_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


COMMANDS = get_command(app)  # which takes a tenth of a second to make
EVERY = [pytest.param(line, id=f"{id_of(page)}: {line[:60]}") for page in PAGES for line in commands(page)]


@pytest.mark.parametrize("line", EVERY)
def test_every_command_on_the_pages_parses(line):
    arguments = shlex.split(line, comments=True)[1:]
    command, name = COMMANDS, "erasure"
    while hasattr(command, "commands"):
        if arguments[0] not in command.commands:
            assert name == "batch"  # whose first argument may be a recipe
            arguments = ["run", *arguments]
        name, *arguments = arguments
        command = command.commands[name]
    context = command.make_context(name, arguments)  # raises on an unknown option or a missing argument
    assert context.command is command


# --- how-tos, with tiny checkpoints in the place of those they name ---------------------------------------------------


def inpainting() -> Any:
    """A tiny inpainting model with the text encoder of the tiny Stable Diffusion 1."""
    parts = {**tiny("sd1").components, "unet": unet(32, in_channels=9)}
    return diffusers.StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)


STAND_INS: dict[str, Callable[[], Any]] = {
    "stabilityai/stable-diffusion-xl-base-1.0": lambda: tiny("sdxl"),
    "CompVis/stable-diffusion-v1-4": lambda: tiny("sd1"),
    "runwayml/stable-diffusion-inpainting": inpainting,
}
# The first draws hundreds of pictures of a real checkpoint and judges them by open_clip, whose weights are not here.
# The second runs until it is stopped; tests/test_app.py clicks through it.
PARSED_ONLY = ("erasure evaluate", "erasure app")


def prepare(folder: Path, text: str) -> None:
    """Put what a page takes for granted into its folder."""
    for name, build in STAND_INS.items():
        if name in text:
            build().save_pretrained(folder / name)
    if "--base model.safetensors" in text:
        export_single_file(tiny("sd1"), folder / "model.safetensors")
        tiny("sd1").save_pretrained(folder / "model")  # its configs, which come from the hub otherwise
    for name in ("superhero-uce", "my-name/superhero-uce"):
        if name in text:
            made = erasure.erase(erasure.world.load(), "superhero", keep=["ninja"], apply=False, progress=False)
            made.save_pretrained(folder / name)


def parts(page: Path) -> Iterator[tuple[str, str]]:
    """What a page runs, in its order: ``("python", code)`` and ``("command", line)``."""
    text = page.read_text("utf-8").replace("\\\n", " ")
    found = re.finditer(
        r"^<!-- setup\n(.*?)^-->|^```python\n(.*?)^```|^(erasure [a-z][^\n]*)$", text, flags=re.M | re.S
    )
    for match in found:
        setup, code, line = match.groups()
        yield ("command", line) if line else ("python", setup or code)


LONG = {"hub", "artist-sdxl", "single-file", "other-pipelines", "serving", "artefact"}


def quick(pages: list[Path]) -> list[Any]:
    return first(pages, *(page for page in pages if page.stem not in LONG))


@pytest.mark.parametrize("page", quick(HOW_TO), ids=id_of)
@pytest.mark.filterwarnings("ignore")
def test_a_how_to_works_as_it_is_written(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(erasure.Erasure, "push_to_hub", lambda self, name, **_: f"https://huggingface.co/{name}")
    prepare(tmp_path, page.read_text("utf-8"))
    names: dict[str, Any] = {}
    for kind, what in parts(page):
        if kind == "python":
            exec(compile(what, page.name, "exec"), names)
        elif not what.startswith(PARSED_ONLY):
            result = CliRunner().invoke(app, small(shlex.split(what, comments=True)[1:]))
            assert result.exit_code == 0, f"{what}\n{result.output}\n{result.exception!r}"


@pytest.mark.parametrize("page", quick(PYTHON), ids=id_of)
@pytest.mark.filterwarnings("ignore")
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    judge = ROOT / "eval" / "worldkit" / "weights" / "clip"
    load = OpenClipEmbedder.load
    monkeypatch.setattr(OpenClipEmbedder, "load", lambda model, weights: load(judge))  # those weights are not here
    names: dict[str, Any] = {}
    for kind, code in parts(page):
        if kind == "python":
            exec(compile(code.replace("num_inference_steps=8", "num_inference_steps=2"), page.name, "exec"), names)
    if page.name == "README.md":
        assert (tmp_path / "superhero-uce" / "erasure.safetensors").exists()
        assert not active_erasures(names["pipe"]) and identical(weights(names["pipe"]), weights(erasure.world.load()))


def small(arguments: list[str]) -> list[str]:
    """A command with few steps: on tiny checkpoints nobody looks at the pictures."""
    if arguments[0] == "generate":
        return [*arguments, "--steps", "2"]
    if "esd" in arguments:
        return [*arguments, "--set", "iterations=2", "--set", "trajectories=2", "--set", "num_inference_steps=3"]
    return arguments


def test_a_how_to_was_found():
    assert len(HOW_TO) >= 6 and any(list(parts(page)) for page in HOW_TO)


def test_every_file_a_page_names_is_there():
    folders = "tests|benchmarks|studies|erasure|eval|pipelines|notebooks"
    named = rf"`((?:{folders})/[\w./-]+\.(?:py|yaml|ipynb))`"
    pages = sorted((ROOT / "docs").rglob("*.md"))
    found = {(id_of(page), name) for page in pages for name in re.findall(named, page.read_text("utf-8"))}
    assert found and not [(page, name) for page, name in sorted(found) if not (ROOT / name).exists()]
