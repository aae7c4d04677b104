"""What README, docs and suites tell people to type works."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from erasure.cli import app
from erasure.pipelines import active_erasures

ROOT = Path(__file__).resolve().parents[1]
DOCS, SUITES = (ROOT / "docs").rglob("*.md"), (ROOT / "erasure" / "suites").glob("*.yaml")
PAGES = [ROOT / "README.md", *sorted(DOCS), *sorted(SUITES)]


def commands():
    """Every line of these pages that starts with `erasure`, as arguments."""
    for page in PAGES:
        for line in re.findall(r"^(?:#\s+)?(erasure [a-z].*)$", page.read_text("utf-8"), flags=re.MULTILINE):
            if "|" not in line:
                yield pytest.param(shlex.split(line, comments=True)[1:], id=f"{page.name}: {line[:60]}")


@pytest.mark.parametrize("arguments", list(commands()))
def test_every_command_on_the_pages_parses(arguments):
    command, name = get_command(app), "erasure"
    while hasattr(command, "commands"):
        name, *arguments = arguments
        command = command.commands[name]
    context = command.make_context(name, arguments)  # raises on an unknown option or a missing argument
    assert context.command is command


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), flags=re.DOTALL)
    first, drop_in, filters = (compile(block, "README.md", "exec") for block in blocks)
    exec(first, {})
    assert (tmp_path / "superhero-uce" / "erasure.safetensors").exists()
    names: dict[str, Any] = {}  # a program of its own: all it needs is the folder that the first one wrote
    exec(drop_in, names)
    assert set(active_erasures(names["pipe"])) == {"superhero-uce"}
    saved = json.loads((tmp_path / "erased" / "model_index.json").read_text("utf-8"))
    assert saved["_class_name"] == "StableDiffusionPipeline"
    exec(filters, names)
    assert names["guarded"].unet is names["pipe"].unet
