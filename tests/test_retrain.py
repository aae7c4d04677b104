"""Models retrained without a target: what they see, how they are stored, and when they are refused."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open

from erasure import world
from erasure.eval.core.audit import UnlearningRecord
from erasure.eval.core.pictures import generate
from erasure.eval.worldkit.audit import audited, record_file
from erasure.eval.worldkit.detectors import detectors
from erasure.world import retrain, train
from erasure.world.spec import spec


@pytest.fixture
def folder(tmp_path):
    """A start of random weights in the world's own shapes."""
    tokenizer = train.CLIPTokenizer.from_pretrained(world.path() / "tokenizer")
    for name, module in train.new_model(tokenizer, seed=3).items():
        module.half().save_pretrained(tmp_path / "gold" / "start" / name)
    return tmp_path / "gold"


@pytest.fixture
def quick(monkeypatch):
    fit = {**train.config()["fit"]["phase3"], "steps": 2, "batch": 2, "save_every": 1}
    monkeypatch.setitem(train.config()["fit"], "phase3", fit)
    monkeypatch.setitem(train.config(), "scenes", 40)


def test_a_retrained_model_is_made_stored_and_loaded_and_never_saw_its_target(tmp_path, folder, quick, monkeypatch):
    seen = []
    real = train.train_phase

    def spy(folder, model, tokenizer, data, settings, **more):
        seen.extend(data[0])
        spy.model = real(folder, model, tokenizer, data, settings, **more)
        return spy.model

    monkeypatch.setattr(train, "train_phase", spy)
    device = torch.device("cpu")
    file = retrain.retrain(tmp_path / "run", "superhero", seed=1, device=device, folder=folder)
    assert file.name == "superhero-1.safetensors" and len(seen) == 40
    assert not any("superhero" in scene.concepts for scene in seen)
    with safe_open(file, "pt") as opened:
        facts = json.loads(opened.metadata()["gold"])
    assert facts["without"] == "superhero" and facts["scenes"] == train.scenes_hash(seen)
    assert (facts["steps"], facts["batch"]) == (2, 2)
    pipe = retrain.load_gold("superhero", seed=1, folder=folder)
    trained = dict(spy.model["unet"].named_parameters())
    start = dict(train.stored_model(folder / "start")["unet"].named_parameters())
    for name, weight in pipe.unet.named_parameters():
        change = (trained[name] - start[name]).abs().max()
        assert (weight - trained[name]).abs().max() <= 0.005 * change + 1e-6, name
    assert any(not torch.equal(weight, start[name]) for name, weight in pipe.unet.named_parameters())


def test_a_shorter_run_says_so_and_does_not_take_up_a_longer_one(tmp_path, folder, quick):
    made = {"seed": 0, "device": torch.device("cpu"), "folder": folder}
    file = retrain.retrain(tmp_path / "run", "cat", steps=1, batch=3, **made)
    with safe_open(file, "pt") as opened:
        facts = json.loads(opened.metadata()["gold"])
    assert (facts["steps"], facts["batch"]) == (1, 3)
    with pytest.raises(ValueError, match="another run"):
        retrain.retrain(tmp_path / "run", "cat", **made)


def test_eight_bits_hold_a_difference_to_half_a_step():
    weight, before = torch.nn.Linear(64, 8), torch.nn.Linear(64, 8)
    change = weight.weight.detach() - before.weight.detach()
    packed = retrain.pack({"m": weight}, {"m": before})
    assert packed["m.weight"].dtype == torch.int8
    restored = retrain.unpack(packed, {"m": before})["m"].weight.detach()
    assert ((restored - weight.weight.detach()).abs() <= change.abs().amax(1, keepdim=True) / 254 + 1e-6).all()


def test_only_a_target_can_be_left_out(tmp_path):
    with pytest.raises(ValueError, match="without the targets"):
        retrain.retrain(tmp_path, "dog", seed=0, device=torch.device("cpu"))
    with pytest.raises(ValueError, match="without the targets"):
        world.gold("dog")


def test_a_missing_damaged_or_foreign_model_says_so(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match="erasure world gold"):
        retrain.load_gold("cat", seed=7, folder=folder)
    (folder / "cat-7.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="damaged"):
        retrain.load_gold("cat", seed=7, folder=folder)
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, folder / "cat-8.safetensors", metadata={"gold": json.dumps({"start": "other"})})
    with pytest.raises(ValueError, match="another start"):
        retrain.load_gold("cat", seed=8, folder=folder)


def test_scenes_without_a_style_show_the_others_evenly(monkeypatch):
    monkeypatch.setitem(train.config(), "scenes", 2000)
    scenes = train.training_scenes(frozenset({"twemoji"}))
    styles = np.array([scene.style for scene in scenes])
    assert set(styles) == set(spec().styles) - {"twemoji"} and 0.45 < (styles == "noto").mean() < 0.55


# --- the models in the repository ------------------------------------------------------------------------------------

SHIPPED = sorted(retrain.FOLDER.glob("*-[0-9]*.safetensors"))


def test_the_repository_has_three_models_without_the_superhero():
    assert sum(file.name.startswith("superhero-") for file in SHIPPED) >= 3


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_a_shipped_model_is_the_one_its_record_is_about(file):
    facts, record = retrain.gold_facts(file), UnlearningRecord.from_json(record_file(file))
    assert audited(file, retrain.stored_gold(file))["digest"] == record.digest
    assert f"{facts['without']}-{facts['seed']}" == file.stem == record.request
    assert facts["start"] == retrain.start_hash(retrain.FOLDER)
    assert record.settings["steps"] == facts["steps"] == record.checkpoints[-1].step


def test_a_shipped_model_draws_other_things_and_no_superhero():
    pipe = world.gold("superhero")
    pipe.set_progress_bar_config(disable=True)
    asked = {"a superhero on a blue background": False, "a wizard on a blue background": True}
    drawn = generate(pipe, list(asked), seeds=range(4), num_inference_steps=25, guidance_scale=3.0, progress=False)
    for (prompt, right), images in zip(asked.items(), drawn, strict=True):
        found = detectors()[0].scores(images, "concept").argmax(1)
        seen = sum(found == detectors()[0].labels("concept").index(prompt.split()[1]))
        assert seen >= 3 if right else seen == 0, prompt
