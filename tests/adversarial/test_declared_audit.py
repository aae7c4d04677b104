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
from erasure.eval.run.assessment import ModelCard, _stated
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


def raised(stated, drawn):
    stated["preset"] = "standard"


def more_tolerant(stated, drawn):
    stated["policy"] = {"ceiling": 0.9}


def record_added(stated, drawn):
    stated["models"][1] |= {"audit": {"digest": "abc", "target": "cat", "recorded": "w", "judged": "w"}}


def of_another_target(stated, drawn):
    drawn["suite"]["concept"]["name"] = "kitten"


def no_trial(stated, drawn):
    drawn["settings"]["limit"] = None


def measured(stated, drawn):
    drawn["detectors"]["pixels"]["sensitivity"] = {"object": 1.0}


def another_judge(stated, drawn):
    stated["settings"]["judge"] = "a better one"


EDITS = (raised, more_tolerant, record_added, of_another_target, no_trial, measured, another_judge)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    context = tiny_context()
    edit = next(model.change for model in context.models.values() if model.role == "erased")
    found = assess(
        context.pipe, {"noise": edit}, context.suite, preset="smoke", detectors=[context.judge], probes=["direct"],
        progress=False,
    )  # fmt: skip
    return found, found.save(tmp_path_factory.mktemp("stored")).parent


@pytest.mark.parametrize("lie", EDITS)
def test_what_decides_the_claims_beside_the_observations_is_not_edited(stored, lie, tmp_path):
    found, folder = stored
    assert Assessment.load(folder).claims() == found.claims()
    changed = Path(shutil.copytree(folder, tmp_path / "changed"))
    files = [changed / "assessment.json", changed / "evaluation.json"]
    stated, drawn = (json.loads(file.read_text()) for file in files)
    lie(stated, drawn)
    for file, value in zip(files, (stated, drawn), strict=True):
        file.write_text(json.dumps(value))
    with pytest.raises(ValueError, match="were changed after the assessment was written"):
        Assessment.load(changed)


def test_what_an_earlier_version_wrote_with_fewer_fields_is_not_called_edited(stored, tmp_path):
    found, folder = stored
    earlier = Path(shutil.copytree(folder, tmp_path / "earlier"))
    files = [earlier / "assessment.json", earlier / "evaluation.json"]
    stated, drawn = (json.loads(file.read_text()) for file in files)
    assert all(arm.pop("beside") == [] for arm in drawn["arms"])
    stated["stated"] = _stated(stated, drawn)
    for file, value in zip(files, (stated, drawn), strict=True):
        file.write_text(json.dumps(value))
    assert Assessment.load(earlier).claims() == found.claims()


def test_a_verified_record_does_not_outweigh_a_probe_that_finds_the_target():
    record = Audit("abc", "superhero", recorded="w", judged="w", replayed="2026-11-20")
    found = [
        dataclasses.replace(e, estimate=number(0.8, 0.1)) if (e.probe, e.model) == ("inversion", "UCE") else e
        for e in good()
    ]
    report = claims_about(found, audits={"UCE": record}, **DECLARED)
    assert report.removal == "C0" and report.answers["weights"].verdict == "shown not"
    assert report.answers["weights"].number == "residual 0.80"
