"""What is installed is what is on disk: a list written by hand forgets."""

from __future__ import annotations

import ast
import configparser
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.import_everything import FOLDERS, REPOSITORY

MIB = 2**20
WEIGHTS = {".safetensors"}
WORLD = ("erasure.world", "erasure.eval.worldkit")
# Where general code asks for the world's detectors, models and scenes, and only when a suite is about the world.
ENTRIES = {"eval/detectors/choice.py": 1, "eval/run/controls.py": 2}


@pytest.fixture(scope="module")
def config() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(comment_prefixes=("#",))
    parser.read(REPOSITORY / "setup.cfg", encoding="utf-8")
    return parser


def folder(package: str) -> Path:
    """``erasure.eval.detectors`` -> ``<repository>/eval/detectors``, by the longest prefix of package_dir."""
    prefix = max((name for name in FOLDERS if package == name or package.startswith(name + ".")), key=len)
    return REPOSITORY / FOLDERS[prefix] / package.removeprefix(prefix).strip(".").replace(".", "/")


def package_data(config: configparser.ConfigParser) -> list[tuple[str, str]]:
    section = config["options.package_data"]
    return [(package, pattern) for package in section for pattern in section[package].split()]


def shipped(package: str, pattern: str) -> list[Path]:
    # setuptools reads a closing ** as "every file below"; pathlib reads it as folders only.
    pattern = pattern + "/*" if pattern.endswith("**") else pattern
    return [path for path in folder(package).glob(pattern) if path.is_file()]


def test_the_mapping_of_the_folders_is_the_one_in_setup_cfg(config):
    lines = config["options"]["package_dir"].strip().splitlines()
    assert dict(tuple(part.strip() for part in line.split("=")) for line in lines) == FOLDERS


def test_every_package_on_disk_is_listed_and_nothing_else(config):
    on_disk = set()
    for name, top in FOLDERS.items():
        for path in (REPOSITORY / top).rglob("__init__.py"):
            on_disk.add(".".join([name, *path.parent.relative_to(REPOSITORY / top).parts]))
    assert set(config["options"]["packages"].split()) == on_disk


def test_every_python_file_lies_in_a_package():
    for top in FOLDERS.values():
        for path in (REPOSITORY / top).rglob("*.py"):
            assert (path.parent / "__init__.py").exists(), f"{path.parent} holds Python files but no __init__.py"


@pytest.mark.slow  # `make wheel` imports everything where no such name could be found
def test_importing_everything_brings_in_no_top_level_eval_or_pipelines():
    command = [sys.executable, str(REPOSITORY / "tests" / "import_everything.py")]
    # With the repository root on the path, where `import eval` would succeed.
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def imported(tree: ast.AST) -> list[str]:
    """Every module that a piece of code imports, and every name it imports from one, dotted."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def of_the_world(tree: ast.AST) -> list[str]:
    return [name for name in imported(tree) if any(f"{name}.".startswith(f"{world}.") for world in WORLD)]


def test_general_evaluation_does_not_know_the_world():
    for path in sorted((REPOSITORY / "eval").rglob("*.py")):
        name = path.relative_to(REPOSITORY).as_posix()
        if name.startswith("eval/worldkit/"):
            continue
        tree = ast.parse(path.read_text("utf-8"))
        lazy = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        found, inside = of_the_world(tree), [one for node in lazy for one in of_the_world(node)]
        assert len(found) == ENTRIES.get(name, 0), (
            f"{name} imports {found}; what is about the world is in eval/worldkit"
        )
        assert sorted(found) == sorted(inside), f"{name} imports {found} before anybody asks for the world"


def test_every_package_data_pattern_finds_a_file(config):
    for package, pattern in package_data(config):
        assert package in config["options"]["packages"].split()
        top = folder(package) / pattern.split("*")[0]
        assert shipped(package, pattern), f"{package}: {pattern} matches nothing in {top}"


def test_data_files_on_disk_are_all_shipped(config):
    found = {path for package, pattern in package_data(config) for path in shipped(package, pattern)}
    for top in FOLDERS.values():
        for path in (REPOSITORY / top).rglob("*"):
            data = path.is_file() and path.suffix not in {".py", ".pyc"} and not path.name.startswith(".")
            assert not data or path in found, f"{path} is in no package_data pattern of setup.cfg"


def test_only_weights_are_large(config):
    for package, pattern in package_data(config):
        for path in shipped(package, pattern):
            assert path.suffix in WEIGHTS or path.stat().st_size <= MIB, f"{path} is over 1 MiB"


def test_requirements_leave_development_tools_out(config):
    needed = config["options"]["install_requires"].lower()
    for tool in ("pytest", "ruff", "mypy", "build", "jupyter", "nbclient", "ipykernel"):
        assert tool not in needed
    assert "torch>=2.6,!=2.13.0" in needed and "transformers>=5.6,<6" in needed
