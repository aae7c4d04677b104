"""Process evidence: records that hold, records that were changed, segments that repeat and those that do not."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch
from typer.testing import CliRunner

from erasure import world
from erasure.cli import app
from erasure.eval.core.audit import UnlearningRecord, checkpoint, sketch_of, verify
from erasure.eval.worldkit.audit import audited, record_file, record_of_gold, replay_of_gold
from erasure.world import retrain, train

FACTS = {
    "request": "r-1",
    "policy": {"removal_required": True, "decided_by": "the tests"},
    "target": "cat",
    "target_kind": "observed",
    "definition": "rows with a cat",
    "deleted": ("a" * 64,),
    "data_before": "b" * 64,
    "data_after": "c" * 64,
    "code": {"torch": "2"},
    "method": "retrain",
    "settings": {"lr": 0.1},
    "seeds": (0,),
    "scope": "all of it",
}


def trained(weights, steps, data, *, first=0):
    """Plain gradient descent on a quadratic, one row of data a step."""
    w = weights["w"].clone()
    for step in range(first, first + steps):
        w = w - 0.1 * (w - data[step % len(data)])
    return {"w": w}


@pytest.fixture(scope="module")
def data():
    return torch.randn(40, 200, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def run(data):
    """A training of 40 steps with a checkpoint every 10: the weights by step, and its record."""
    weights = {0: {"w": torch.zeros(200)}}
    for step in range(0, 40, 10):
        weights[step + 10] = trained(weights[step], 10, data, first=step)
    points = [checkpoint(step, w) for step, w in weights.items()]
    return weights, UnlearningRecord.chained(checkpoints=points, **FACTS)


def test_a_record_reads_back_and_keeps_its_hash(run, tmp_path):
    record = run[1]
    again = UnlearningRecord.from_json(record.to_json(tmp_path / "record.json"))
    assert again == record and again.digest == record.digest


@pytest.mark.parametrize(
    "spoil",
    [
        lambda raw: raw["deleted"].append("d" * 64),
        lambda raw: raw["settings"].update(lr=0.2),
        lambda raw: raw["checkpoints"][1].update(weights="0" * 64),
        lambda raw: raw["checkpoints"].pop(1),
        lambda raw: raw.update(more=1),
        lambda raw: raw.pop("scope"),
        lambda raw: raw.update(format=2),
        lambda raw: raw.update(target_kind="concept"),
    ],
)
def test_a_changed_record_is_refused(run, tmp_path, spoil):
    file = run[1].to_json(tmp_path / "record.json")
    raw = json.loads(file.read_text())
    spoil(raw)
    file.write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="not an audit record"):
        UnlearningRecord.from_json(file)


def test_no_record_and_half_a_record_say_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such record"):
        UnlearningRecord.from_json(tmp_path / "record.json")
    (tmp_path / "record.json").write_text("[1")
    with pytest.raises(ValueError, match="not an audit record"):
        UnlearningRecord.from_json(tmp_path / "record.json")
    with pytest.raises(ValueError, match="two checkpoints"):
        UnlearningRecord.chained(checkpoints=[checkpoint(0, {"w": torch.zeros(1)})], **FACTS)


def test_an_honest_replay_passes_bit_for_bit_or_up_to_rounding(run, data):
    weights, record = run

    def replay(first, end):
        return trained(weights[first.step], end.step - first.step, data, first=first.step)

    def elsewhere(first, end):
        return {"w": replay(first, end)["w"] + 1e-6}

    for seed in range(4):
        assert verify(record, replay, seed=seed).exact
        other = verify(record, elsewhere, seed=seed)
        assert other.passed and not other.exact and 0 < other.distance < 1e-3
        assert not verify(record, elsewhere, seed=seed, tolerance=0).passed
    assert len({verify(record, replay, seed=seed).segment for seed in range(20)}) == 4


def test_other_data_and_no_training_fail(run, data):
    weights, record = run
    other = verify(record, lambda first, end: trained(weights[first.step], 10, data.flip(0), first=first.step))
    idle = verify(record, lambda first, end: weights[first.step])
    assert not other.passed and "do not repeat" in str(other)
    assert idle.distance == pytest.approx(1) and not idle.passed


def test_a_sketch_keeps_distances():
    generator = torch.Generator().manual_seed(0)
    a, b = ({"x": torch.randn(300, 40, generator=generator), "y": torch.randn(7, generator=generator)} for _ in "ab")
    true = sum(float((a[k] - b[k]).square().sum()) for k in a) ** 0.5
    assert torch.dist(torch.tensor(sketch_of(a)), torch.tensor(sketch_of(b))) == pytest.approx(true, rel=0.35)


@pytest.mark.slow
def test_a_retrained_model_of_the_world_has_a_record_that_replays(tmp_path, monkeypatch):
    fit = {**train.config()["fit"]["phase3"], "steps": 1, "batch": 2, "save_every": 1}
    monkeypatch.setitem(train.config()["fit"], "phase3", fit)
    monkeypatch.setitem(train.config(), "scenes", 16)
    tokenizer = train.CLIPTokenizer.from_pretrained(world.path() / "tokenizer")
    folder = tmp_path / "gold"
    for name, module in train.new_model(tokenizer, seed=3).items():
        module.half().save_pretrained(folder / "start" / name)
    shutil.copy(retrain.FOLDER / "manifest.json", folder)
    device = torch.device("cpu")
    file = retrain.retrain(tmp_path / "run", "superhero", seed=0, device=device, folder=folder)
    record = record_of_gold(file)
    scenes = train.training_scenes(frozenset())
    assert len(record.deleted) == sum("superhero" in scene.concepts for scene in scenes)
    assert record.data_after != record.data_before == train.scenes_hash(scenes)
    assert "tokenizer" in record.scope and [point.step for point in record.checkpoints] == [0, 1]

    before, fast = file.read_bytes(), retrain.fast_bfloat16(device)
    assert record.settings["precision"] == ("bfloat16" if fast else "float32")
    monkeypatch.setattr(retrain, "fast_bfloat16", lambda device: not fast)  # another machine
    assert verify(record, replay_of_gold(file, tmp_path / "again")).passed
    assert file.read_bytes() == before
    with pytest.raises(ValueError, match="not the start"):
        replay_of_gold(file, tmp_path / "again")(record.checkpoints[1], record.checkpoints[1])
    assert audited(file, retrain.stored_gold(file)) is None
    record.to_json(record_file(file))
    said = audited(file, retrain.stored_gold(file))
    assert (said["digest"], said["weights"], said["replayed"]) == (record.digest, record.checkpoints[-1].weights, "")
    command = ["world", "audit", str(file), "--out", str(tmp_path / "cli"), "--device", "cpu"]
    told = CliRunner().invoke(app, command, env={"COLUMNS": "200"})
    assert told.exit_code == 0 and "superhero-0.safetensors: steps 0 to 1 repeat" in told.output
    other = {**record.to_dict(), "method": "another"}
    del other["format"], other["checkpoints"]
    UnlearningRecord.chained(checkpoints=record.checkpoints, **other).to_json(record_file(file))
    assert "is not the record of" in str(CliRunner().invoke(app, command).exception)
    moved = [record.checkpoints[0], dataclasses.replace(record.checkpoints[1], weights="f" * 64)]
    UnlearningRecord.chained(checkpoints=moved, **{**other, "method": record.method}).to_json(record_file(file))
    assert "of other weights" in str(CliRunner().invoke(app, command).exception)
    record.to_json(record_file(file))
    retrain.retrain(tmp_path / "other", "superhero", seed=0, device=device, folder=folder, batch=3)
    with pytest.raises(ValueError, match="the record of other weights"):
        audited(file, retrain.stored_gold(file))
    with pytest.raises(FileNotFoundError, match="no such retrained model"):
        record_of_gold(folder / "cat-3.safetensors")
    monkeypatch.setitem(train.config(), "scenes", 17)
    with pytest.raises(ValueError, match="not those of this version"):
        record_of_gold(file)


def test_the_hash_of_a_record_covers_its_evaluation(run):
    assert dataclasses.replace(run[1], evaluation="e" * 64).digest != run[1].digest
