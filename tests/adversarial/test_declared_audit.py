"""A record is supplied that is none, that of other weights, or one that nobody replayed; a stored file is edited."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from erasure.eval import Assessment, assess
from erasure.eval.core.audit import hash_of, judged
from erasure.eval.core.models import modules_of
from erasure.eval.judge import Audit
from erasure.eval.run.assessment import ModelCard
from tests.made_up import good, number, without
from tests.made_up import judged as claims_about
from tests.probe_helpers import tiny_context
from tests.tiny import tiny_pipeline

DECLARED = {"kinds": {"UCE": "retrained"}, "scopes": {"UCE": "everything"}}


def tensors(pipe):
    return {f"{part}.{k}": v for part in ("unet",) for k, v in modules_of(pipe)[part].state_dict().items()}


def supplied(weights, *, parts=("unet",), target="superhero", replayed="2026-11-20"):
    return {"digest": "abc", "target": target, "weights": weights, "parts": parts, "replayed": replayed}


@pytest.fixture(scope="module")
def pipes():
    return tiny_pipeline(seed=0), tiny_pipeline(seed=1)


def claims(audit):
    record = None if audit is None else Audit(**audit)
    bare = without(good(), "inversion")
    return claims_about(bare, audits={} if record is None else {"UCE": record}, **DECLARED)


@pytest.mark.parametrize("given", ["yes", True, {"digest": "abc"}, ["a", "list"], {"weights": "abc", "parts": []}])
def test_something_that_is_no_record_verifies_nothing(pipes, given):
    report = claims(judged(given, modules_of(pipes[0]), ["unet"]))
    assert report.removal == "C0" and report.answers["weights"].verdict != "shown"
    assert "supplied and not verified" in " ".join(report.needed["removal"])


def test_the_record_of_other_weights_verifies_nothing(pipes):
    mine, theirs = pipes
    stolen = supplied(hash_of(tensors(theirs)))
    report = claims(judged(stolen, modules_of(mine), ["unet"]))
    assert report.removal == "C0" and "the record of other weights" in " ".join(report.needed["removal"])
    assert claims(judged(stolen, modules_of(theirs), ["unet"])).removal == "C6"  # it is theirs


def test_the_record_of_a_training_without_something_else_verifies_nothing(pipes):
    mine, _ = pipes
    cat = supplied(hash_of(tensors(mine)), target="cat")
    report = claims(judged(cat, modules_of(mine), ["unet"]))
    assert report.removal == "C0" and "a training without 'cat'" in " ".join(report.needed["removal"])


def test_a_record_that_was_not_replayed_verifies_nothing(pipes):
    mine, _ = pipes
    record = supplied(hash_of(tensors(mine)), replayed="")
    report = claims(judged(record, modules_of(mine), ["unet"]))
    assert report.removal == "C0" and "was not replayed" in " ".join(report.needed["removal"])


def test_a_record_that_names_fewer_parts_is_compared_in_those(pipes):
    """A record of no parts at all has the hash of nothing, which anybody can write down."""
    mine, _ = pipes
    nothing = supplied(hash_of({}), parts=[])
    assert claims(judged(nothing, modules_of(mine), ["unet"])).removal == "C0"


@pytest.mark.parametrize("kind", ["retrained", "weights"])
def test_a_retrained_model_is_not_held_against_itself_whatever_it_calls_itself(kind):
    names = {"base": "base", "UCE": "erased", "gold 0": "gold", "gold 1": "gold"}
    weights = {"base": "b", "UCE": "g", "gold 0": "g", "gold 1": "h"}
    kinds = {"base": "none", "UCE": kind, "gold 0": "retrained", "gold 1": "retrained"}
    cards = tuple(ModelCard(name, role, kinds[name], weights[name], {}) for name, role in names.items())
    assert Assessment(None, "smoke", cards, (), None, {}).same_as == {"UCE": "gold 0"}


def raised(told, drawn):
    told["preset"] = "standard"


def more_tolerant(told, drawn):
    told["policy"] = {"ceiling": 0.9}


def record_added(told, drawn):
    told["models"][1] |= {"audit": {"digest": "abc", "target": "cat", "recorded": "w", "judged": "w"}}


def of_another_target(told, drawn):
    drawn["suite"]["concept"]["name"] = "kitten"


def no_trial(told, drawn):
    drawn["settings"]["limit"] = None


def measured(told, drawn):
    drawn["detectors"]["pixels"]["sensitivity"] = {"object": 1.0}


def another_judge(told, drawn):
    told["settings"]["judge"] = "a better one"


def a_probe_less(told, drawn):
    told["cells"].pop()


def no_hashes(told, drawn):
    told["cells"] = [cell[:3] for cell in told["cells"]]


def nothing_stated(told, drawn):
    del told["stated"]


def another_verdict(told, drawn):
    drawn["records"][-1]["verdicts"]["pixels"]["target"] = False


def a_picture_less(told, drawn):
    drawn["records"].pop()


def no_warnings(told, drawn):
    drawn["warnings"] = ["nothing to see"]


def of_another_version(told, drawn):
    told["format"] = 2


EDITS = (
    raised, more_tolerant, record_added, of_another_target, no_trial, measured, another_judge, a_probe_less, no_hashes,
    nothing_stated, another_verdict, a_picture_less, no_warnings, of_another_version,
)  # fmt: skip


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    context = tiny_context()
    edit = next(model.change for model in context.models.values() if model.role == "erased")
    found = assess(
        context.pipe, {"noise": edit}, context.suite, preset="smoke", detectors=[context.judge], probes=["direct"],
        progress=False,
    )  # fmt: skip
    return found, found.save(tmp_path_factory.mktemp("stored")).parent


def edited(folder, to, lie):
    """A copy of a stored assessment with an edit of its two files."""
    changed = Path(shutil.copytree(folder, to))
    files = [changed / "assessment.json", changed / "evaluation.json"]
    told, drawn = (json.loads(file.read_text()) for file in files)
    lie(told, drawn)
    for file, value in zip(files, (told, drawn), strict=True):
        file.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")
    return changed


@pytest.mark.parametrize("lie", EDITS)
def test_what_an_assessment_says_or_was_made_of_is_not_edited(stored, lie, tmp_path):
    found, folder = stored
    assert Assessment.load(edited(folder, tmp_path / "same", lambda *_: None)).claims() == found.claims()
    with pytest.raises(ValueError, match="run the same evaluation into the|is the file complete"):
        Assessment.load(edited(folder, tmp_path / "changed", lie))


def test_pictures_are_not_exchanged_line_by_line(stored, tmp_path):
    _, folder = stored
    changed = Path(shutil.copytree(folder, tmp_path / "changed"))
    lines = (changed / "records.jsonl").read_text().splitlines()
    (changed / "records.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    with pytest.raises(ValueError, match="records.jsonl is not what its assessment was made of"):
        Assessment.load(changed)


@pytest.mark.parametrize(
    "damage",
    [
        {"cells": None}, {"cells": [[1, 2]]}, {"models": []}, {"models": [{"name": "base"}]}, {"settings": "none"},
        {"models": None}, {"policy": {"ceiling": "high"}}, {"preset": 3}, {"files": {}}, {"stated": 5},
    ],
    ids=str,
)  # fmt: skip
def test_a_damaged_assessment_is_said_to_be_one_in_a_line(stored, damage, tmp_path):
    _, folder = stored
    with pytest.raises(ValueError, match="assessment.json") as refused:
        Assessment.load(edited(folder, tmp_path / "damaged", lambda told, _: told.update(damage)))
    assert "\n" not in str(refused.value)


def test_a_verified_record_does_not_outweigh_a_probe_that_finds_the_target():
    record = Audit("abc", "superhero", recorded="w", judged="w", replayed="2026-11-20")
    found = [
        dataclasses.replace(e, estimate=number(0.8, 0.1)) if (e.probe, e.model) == ("inversion", "UCE") else e
        for e in good()
    ]
    report = claims_about(found, audits={"UCE": record}, **DECLARED)
    assert report.removal == "C0" and report.answers["weights"].verdict == "shown not"
    assert report.answers["weights"].number == "residual 0.80"
