"""Pushing and loading against a hub on this machine that answers 401, 429, 500 and breaks off."""

import itertools
import json
import os
import subprocess
import sys

import pytest
from PIL import Image
from typer.testing import CliRunner

from erasure import Erasure
from erasure.artifact.files import CARD, CONFIG, SYSTEM, WEIGHTS
from erasure.cli import app
from erasure.eval import assessment_of
from tests.eval_helpers import demo_evaluation
from tests.fake_hub import TOKEN, Fault, hub, running
from tests.slow import first
from tests.test_operator import uce
from tests.tiny import identical, tiny_pipeline

__all__ = ["hub"]  # the fixture
NAME = "org/superhero"


@pytest.fixture(scope="module")
def edit():
    return uce(tiny_pipeline())


def test_a_push_is_one_commit_and_comes_back_whole(hub, edit):
    image = Image.new("RGB", (8, 8), "red")
    address = edit.push_to_hub(NAME, token=TOKEN, private=True, pictures={"before | after": image}, system=True)
    [commit] = hub.pushed(NAME)
    assert address == f"{hub.url}/{NAME}/commit/{commit.oid}" and NAME in hub.private
    assert set(commit.files) - {".gitattributes"} == {CONFIG, WEIGHTS, SYSTEM, CARD, "images/0.png"}
    card = commit.files[CARD].decode()
    assert "](images/0.png)" in card and "before \\| after" in card
    back = Erasure.from_pretrained(NAME, token=TOKEN)
    assert identical(back.tensors, edit.tensors) and identical(back.system, edit.system) and back.config == edit.config
    assert not any("0.png" in request for request in hub.asked if request.startswith("GET"))  # pictures are not loaded
    edit.push_to_hub(NAME, token=TOKEN, commit_message="again")
    assert [one.title for one in hub.pushed(NAME)][1:] in ([], ["again"])  # nothing new: a commit or none


def test_nobody_reads_what_is_private(hub, edit):
    edit.push_to_hub(NAME, token=TOKEN, private=True)
    with pytest.raises(OSError, match=r"wants a login|no org/superhero, or it is private") as caught:
        Erasure.from_pretrained(NAME)
    assert "hf auth login" in str(caught.value)


STEPS = {
    "making the repository": "POST /api/repos/create",
    "asking how to upload": "POST .*/preupload",
    "large files": "POST .*objects/batch",
    "uploading": "PUT /lfs",
    "the commit": "POST .*/commit/",
}
SAID = {
    401: (PermissionError, r"wants a login .*401"),
    403: (PermissionError, "may not do that .*403"),
    429: (ConnectionError, "too many requests .429"),
    500: (ConnectionError, "at fault: it answered 500"),
    0: (ConnectionError, "broke off"),
}


@pytest.mark.parametrize(
    ("status", "step"),
    first(
        itertools.product(SAID, STEPS),
        *((status, step) for status in SAID for step in STEPS if status in (401, 500) or step == "the commit"),
    ),
)
def test_each_fault_of_a_push_is_one_sentence_and_nothing_is_published(status, step, hub, edit):
    hub.faults.append(Fault(STEPS[step], status))
    kind, said = SAID[status]
    with pytest.raises(kind, match=said) as caught:
        edit.push_to_hub(NAME, token=TOKEN)
    text = str(caught.value)
    assert "nothing was published" in text and "\n" not in text and TOKEN not in text
    assert not hub.pushed(NAME)
    hub.faults.clear()
    edit.push_to_hub(NAME, token=TOKEN)
    assert len(hub.pushed(NAME)) == 1


@pytest.mark.parametrize("status", [429, 500, 0])
@pytest.mark.parametrize("step", ["asking how to upload", "uploading"])
def test_what_may_be_asked_twice_is(status, step, hub, edit):
    hub.faults.append(Fault(STEPS[step], status, times=1))
    edit.push_to_hub(NAME, token=TOKEN)
    assert len(hub.pushed(NAME)) == 1
    assert sum(request.startswith(STEPS[step].split()[0]) for request in hub.asked) >= 2


@pytest.mark.parametrize("status", [500, 0])
def test_a_commit_whose_answer_is_lost_is_found_and_not_made_twice(status, hub, edit):
    hub.faults.append(Fault(STEPS["the commit"], status, times=1, late=True))
    assert edit.push_to_hub(NAME, token=TOKEN) == f"{hub.url}/{NAME}"
    assert len(hub.pushed(NAME)) == 1


def test_a_commit_that_cannot_be_looked_up_afterwards_is_said_to_be_unknown(hub, edit):
    hub.faults += [Fault(STEPS["the commit"], 0, late=True), Fault("GET /api/models", 500)]
    with pytest.raises(ConnectionError, match="look at .*/org/superhero whether it was published"):
        edit.push_to_hub(NAME, token=TOKEN)


@pytest.mark.parametrize("name", ["no-org", "org/two/three", "org/with space", ""])
def test_a_name_that_is_none_is_refused_before_anything_is_asked(name, hub, edit):
    with pytest.raises(ValueError, match="name of a repository"):
        edit.push_to_hub(name, token=TOKEN)
    assert not hub.asked


# --- loading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "status", "kind", "said"),
    [
        ("GET /api/models", 401, PermissionError, "wants a login"),
        ("GET /api/models", 429, ConnectionError, "too many requests"),
        ("GET /api/models", 500, ConnectionError, "answered 500"),
        ("GET /api/models", 0, ConnectionError, "broke off"),
        ("(GET|HEAD) .*/resolve/", 429, ConnectionError, "too many requests"),
        ("(GET|HEAD) .*/resolve/", 500, ConnectionError, "answered 500"),
        ("GET .*/resolve/.*safetensors", 0, ConnectionError, "broke off"),
    ],
)
def test_each_fault_of_loading_is_one_sentence(where, status, kind, said, hub, edit):
    edit.push_to_hub(NAME, token=TOKEN)
    hub.faults.append(Fault(where, status))
    with pytest.raises(kind, match=said) as caught:
        Erasure.from_pretrained(NAME)
    assert "\n" not in str(caught.value) and NAME in str(caught.value)
    hub.faults.clear()
    assert identical(Erasure.from_pretrained(NAME).tensors, edit.tensors)


def test_a_file_that_breaks_off_once_is_loaded_on(hub, edit):
    edit.push_to_hub(NAME, token=TOKEN)
    hub.faults.append(Fault("GET .*/resolve/.*safetensors", 0, times=1))
    assert identical(Erasure.from_pretrained(NAME).tensors, edit.tensors)


def test_what_is_in_the_cache_is_loaded_while_the_hub_is_down(hub, edit):
    edit.push_to_hub(NAME, token=TOKEN)
    Erasure.from_pretrained(NAME)
    hub.faults.append(Fault(".*", 500))
    assert identical(Erasure.from_pretrained(NAME).tensors, edit.tensors)


def test_a_repository_or_revision_that_is_not_there(hub, edit):
    edit.push_to_hub(NAME, token=TOKEN)
    with pytest.raises(FileNotFoundError, match="hub has no org/nobody, or it is private"):
        Erasure.from_pretrained("org/nobody", token=TOKEN)


def test_the_token_and_the_revision_are_the_ones_that_were_given(hub, edit):
    edit.push_to_hub(NAME, token=TOKEN, private=True)
    first = hub.pushed(NAME)[0].oid
    assert identical(Erasure.from_pretrained(NAME, token=TOKEN, revision=first).tensors, edit.tensors)
    assert any(f"/resolve/{first}/" in request for request in hub.asked)


def test_a_path_is_never_asked_for(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("../name", "./name", "~/name", "/a/b", "name", "a/b/c"):
        with pytest.raises(FileNotFoundError, match="no erasure at"):
            Erasure.from_pretrained(path)
    assert not hub.asked


def test_another_repository_than_an_erasure_is_said_to_be_none(hub, edit):
    edit.push_to_hub(NAME, token=TOKEN)
    del hub.files(NAME)[CONFIG]
    with pytest.raises(FileNotFoundError, match=CONFIG):
        Erasure.from_pretrained(NAME)


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_puts_verdicts_and_pictures_into_the_card(hub, tmp_path, monkeypatch):
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path / "base")
    edit = uce(pipe)
    edit.name = "uce"
    edit.save_pretrained(tmp_path / "hero")
    assessment_of(demo_evaluation()).save(tmp_path / "results")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    command = ["push", str(tmp_path / "hero"), NAME, "--evaluation", str(tmp_path / "results"),
               "--preview", "a superhero", "--base", str(tmp_path / "base"), "--device", "cpu"]  # fmt: skip
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert f"{hub.url}/{NAME}/commit/" in result.output.replace("\n", "") and TOKEN not in result.output
    files = hub.files(NAME)
    card = files[CARD].decode()
    assert "Is the target kept out when it is asked for by name?" in card and "images/1.png" in card
    for name in ("images/0.png", "images/1.png"):
        (tmp_path / "x.png").write_bytes(files[name])
        assert Image.open(tmp_path / "x.png").width > 100
    back = Erasure.from_pretrained(NAME, token=TOKEN)
    assert {row["verdict"] for row in back.config["evaluation"]} <= {"shown", "shown not", "undecided", "not tested"}
    assert len(back.config["evaluation"]) == 5 and not edit.config.get("evaluation")

    edit.name = "another"
    edit.save_pretrained(tmp_path / "other")
    command[1] = str(tmp_path / "other")
    with pytest.raises(ValueError, match="no evaluation of 'another'; it is of .*uce"):
        CliRunner().invoke(app, command, catch_exceptions=False)


@pytest.mark.slow
def test_the_command_in_a_process_of_its_own(tmp_path, edit):
    """As it is typed: HF_ENDPOINT and HF_TOKEN in the environment, exit codes, one line on the error stream."""
    edit.save_pretrained(tmp_path / "hero")
    with running() as hub:
        environment = {
            **os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(tmp_path / "home"),
        }  # fmt: skip

        def run(*command):
            line = [sys.executable, "-m", "erasure.cli", *command]
            return subprocess.run(line, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)

        assert run("push", "hero", NAME).returncode == 0 and len(hub.pushed(NAME)) == 1
        shown = run("inspect", NAME, "--json")
        assert shown.returncode == 0 and json.loads(shown.stdout)["name"] == edit.name
        environment["HF_TOKEN"] = "hf_wrong"
        failed = run("push", "hero", "org/other")
        assert failed.returncode == 2 and failed.stderr.count("\n") <= 3 and "wants a login" in failed.stderr
        assert "Traceback" not in failed.stderr and "org/other" not in hub.repositories
