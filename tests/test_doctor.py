"""The doctor must speak up exactly when something else is silent or misleading."""

from __future__ import annotations

import importlib
import importlib.metadata
import shlex
import subprocess
from types import SimpleNamespace

import pytest
from packaging.requirements import Requirement

from erasure.cli import doctor

VERSIONS = {
    "torch": "2.15.0",
    "torchvision": "0.29.2",
    "diffusers": "0.42.1",
    "transformers": "5.23.0",
    "accelerate": "1.15.0",
    "huggingface_hub": "2.4.0",
    "safetensors": "0.8.0",
    "open_clip_torch": "3.3.0",
    "torchmetrics": "1.9.1",
}
WANTED = ["torch!=2.13.0,>=2.6", "torchvision>=0.21", "transformers<6,>=5.6", 'torch-fidelity>=0.3; extra == "fid"']


def fake_torch(*, operators: bool = True) -> SimpleNamespace:
    nms = {"nms": object()} if operators else {}
    no_device = SimpleNamespace(is_available=lambda: False)
    return SimpleNamespace(
        ops=SimpleNamespace(torchvision=SimpleNamespace(**nms)),
        cuda=no_device,
        backends=SimpleNamespace(mps=no_device),
        version=SimpleNamespace(cuda=None),
    )


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A sound environment made of plain data; a test spoils one thing in it."""
    state = SimpleNamespace(versions=dict(VERSIONS), broken={}, torch=fake_torch())
    state.torchvision_needs = "torch (>=2.14.0)"

    def import_module(name):
        if name in state.broken:
            raise state.broken[name]
        return state.torch if name == "torch" else SimpleNamespace(StableDiffusionPipeline=1, CLIPTextModel=1)

    def version(name):
        if name not in state.versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return state.versions[name]

    def requires(name):
        return [state.torchvision_needs, "numpy"] if name == "torchvision" else list(WANTED)

    monkeypatch.setattr(doctor, "import_module", import_module)
    monkeypatch.setattr(doctor, "version", version)
    monkeypatch.setattr(doctor, "requires", requires)
    monkeypatch.setattr(doctor.shutil, "which", lambda program: None)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=100 * doctor.GIB))
    package = tmp_path / "erasure"
    (package / "world" / "emoji-world").mkdir(parents=True)
    (package / "world" / "emoji-world" / "model_index.json").write_text("{}")
    (tmp_path / "eval" / "worldkit" / "weights").mkdir(parents=True)
    (tmp_path / "eval" / "worldkit" / "weights" / "concept.safetensors").write_bytes(b"x")
    state.world, state.weights = package / "world" / "emoji-world", tmp_path / "eval" / "worldkit" / "weights"
    monkeypatch.setattr(doctor, "__file__", str(package / "cli" / "doctor.py"))
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path / "eval")])
    monkeypatch.setattr(doctor, "find_spec", lambda name: spec)
    return state


def findings() -> dict[str, doctor.Finding]:
    found = doctor.diagnose()
    assert len({finding.name for finding in found}) == len(found)
    for finding in found:
        assert bool(finding.remedy) == (finding.status != "ok"), finding
    return {finding.name: finding for finding in found}


def asked_of_pip(remedy: str) -> list[Requirement]:
    """The requirements in a pip command, which must survive a shell."""
    words = shlex.split(remedy, comments=True)
    assert words[1:4] == ["-m", "pip", "install"], remedy
    return [Requirement(word) for word in words[4:] if not word.startswith("-")]


def test_a_sound_environment_has_nothing_to_mend(machine):
    assert {finding.status for finding in findings().values()} == {"ok"}


def test_it_says_where_the_cache_is_and_how_large(machine, monkeypatch, tmp_path):
    monkeypatch.setenv("ERASURE_CACHE", str(tmp_path / "cache"))
    assert findings()["cache"].detail.startswith(f"0 MiB in {tmp_path / 'cache'}")
    (tmp_path / "cache" / "gram").mkdir(parents=True)
    (tmp_path / "cache" / "gram" / "a.safetensors").write_bytes(bytes(3 * 2**20))
    assert findings()["cache"].detail.startswith("3 MiB in")
    monkeypatch.setenv("ERASURE_CACHE", "off")
    assert "off" in findings()["cache"].detail


def test_torch_that_does_not_import_is_reported_and_the_rest_still_runs(machine):
    machine.broken["torch"] = ImportError("libcudart.so.13: cannot open shared object file\nlong trace")
    found = findings()
    assert found["torch"].status == "fail" and "libcudart.so.13" in found["torch"].detail
    assert "long trace" not in found["torch"].detail
    assert found["device"].status == "fail"
    assert found["disk"].status == "ok" and found["Emoji World"].status == "ok"


def test_nothing_installed_at_all(machine):
    machine.versions.clear()
    found = findings()
    for name in VERSIONS:
        assert found[name].status == "fail" and "not installed" in found[name].detail
        assert asked_of_pip(found[name].remedy)[0].name.replace("-", "_") in {name, "torch"}
    assert found["torchmetrics CLIPScore"].status == "fail"


@pytest.mark.parametrize("how", ["import", "operator", "requirement"])
def test_a_torchvision_of_another_build_is_mended_together_with_torch(machine, how):
    if how == "import":
        machine.broken["torchvision"] = RuntimeError("operator torchvision::nms does not exist")
    elif how == "operator":
        machine.torch = fake_torch(operators=False)
    else:
        machine.torchvision_needs = "torch (==2.13.0)"
    finding = findings()["torchvision"]
    assert finding.status == "fail"
    assert {requirement.name for requirement in asked_of_pip(finding.remedy)} == {"torch", "torchvision"}


def test_a_version_outside_the_range_is_named_with_the_range(machine):
    machine.versions["transformers"] = "4.57.0"
    finding = findings()["transformers"]
    assert finding.status == "fail" and "4.57.0" in finding.detail
    (wanted,) = asked_of_pip(finding.remedy)
    assert wanted == Requirement("transformers>=5.6,<6")


def test_the_excluded_torch_is_refused(machine):
    machine.versions["torch"] = "2.13.0+cpu"
    finding = findings()["torch"]
    assert finding.status == "fail" and "2.13.0" not in asked_of_pip(finding.remedy)[0].specifier


@pytest.mark.parametrize(
    ("torchmetrics", "transformers", "status"),
    [("1.9.0", "5.23.0", "warn"), ("1.8.2", "5.6.0", "warn"), ("1.9.1", "5.23.0", "ok"), ("1.9.0", "4.57.0", "ok")],
)
def test_clip_score_clash_is_a_warning_only_for_the_versions_that_clash(machine, torchmetrics, transformers, status):
    machine.versions |= {"torchmetrics": torchmetrics, "transformers": transformers}
    assert findings()["torchmetrics CLIPScore"].status == status


def test_an_unused_nvidia_card_is_pointed_out(machine, monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", {"nvidia-smi": "/usr/bin/nvidia-smi"}.get)
    finding = findings()["device"]
    assert finding.status == "warn" and "built without CUDA" in finding.detail


@pytest.mark.parametrize(("free", "status"), [(100, "ok"), (2, "warn"), (0.1, "fail")])
def test_disk_space(machine, monkeypatch, free, status):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=free * doctor.GIB))
    assert findings()["disk"].status == status


def test_a_cache_folder_not_made_yet_is_no_fault(machine, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "not" / "yet" / "there"))
    assert findings()["disk"].status == "ok"


def without_weights(machine) -> list[doctor.Finding]:
    (machine.world / "model_index.json").unlink()
    (machine.weights / "concept.safetensors").unlink()
    found = findings()
    assert found["Emoji World"].status == found["detectors"].status == "fail"
    return [found["Emoji World"], found["detectors"]]


def test_missing_weights_are_installed_again(machine):
    for finding in without_weights(machine):
        (wanted,) = asked_of_pip(finding.remedy)
        assert wanted.name == "diffusion-erasure" and wanted.url.startswith("git+https://")


def test_missing_weights_come_back_in_a_clone(machine):
    clone = machine.world.parents[2]

    def git(*words):
        subprocess.run(["git", "-C", clone, "-c", "user.name=x", "-c", "user.email=x", *words], check=True)

    git("init", "--quiet"), git("add", "--all"), git("commit", "--quiet", "--message", "all")
    for finding in without_weights(machine):
        subprocess.run(shlex.split(finding.remedy), check=True)
    found = findings()
    assert found["Emoji World"].status == found["detectors"].status == "ok"


def test_a_bare_checkout_is_told_to_install(machine, monkeypatch):
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    finding = findings()["detectors"]
    assert finding.status == "fail" and finding.remedy.endswith("pip install -e .")


def test_this_very_environment_can_run_the_library():
    found = {finding.name: finding for finding in doctor.diagnose()}
    for name in ("python", "torch", "torchvision", "diffusers", "transformers", "open_clip_torch", "torchmetrics"):
        assert found[name].status == "ok", found[name]
