"""Models retrained without a target: what they see, how they are stored, and when they are refused."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open

from erasure import Suite, world
from erasure.eval.core.audit import UnlearningRecord
from erasure.eval.core.pictures import generate
from erasure.eval.worldkit.audit import audited, bits_of, record_file, record_of_gold
from erasure.eval.worldkit.controls import controls_of_world
from erasure.eval.worldkit.detectors import detectors
from erasure.world import retrain, train
from erasure.world.spec import spec
from tests.slow import first


@pytest.fixture
def folder(tmp_path):
    """A start of random weights in the world's own shapes."""
    tokenizer = train.CLIPTokenizer.from_pretrained(world.path() / "tokenizer")
    for name, module in train.new_model(tokenizer, seed=3).items():
        module.half().save_pretrained(tmp_path / "gold" / "start" / name)
    write_manifest(tmp_path / "gold", spec().targets)
    return tmp_path / "gold"


def write_manifest(folder, without):
    phases = {phase: {"without": sorted(without)} for phase in ("phase1", "phase2")}
    (folder / "manifest.json").write_text(json.dumps({"phases": phases, "scope": train.SCOPE}))


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
    assert (facts["steps"], facts["batch"]) == (2, 2) and facts["precision"] in ("float32", "bfloat16")
    pipe = retrain.load_gold("superhero", seed=1, folder=folder)
    trained = dict(spy.model["unet"].named_parameters())
    start = dict(train.stored_model(folder / "start")["unet"].named_parameters())
    for name, weight in pipe.unet.named_parameters():
        change = (trained[name] - start[name]).abs().max()
        assert (weight - trained[name]).abs().max() <= max(0.5 * change, 1e-6), name
    assert any(not torch.equal(weight, start[name]) for name, weight in pipe.unet.named_parameters())


@pytest.mark.slow
def test_a_shorter_run_says_so_and_does_not_take_up_a_longer_one(tmp_path, folder, quick):
    made = {"seed": 0, "device": torch.device("cpu"), "folder": folder}
    file = retrain.retrain(tmp_path / "run", "cat", steps=1, batch=3, **made)
    with safe_open(file, "pt") as opened:
        facts = json.loads(opened.metadata()["gold"])
    assert (facts["steps"], facts["batch"]) == (1, 3)
    with pytest.raises(ValueError, match="another run"):
        retrain.retrain(tmp_path / "run", "cat", **made)


@pytest.mark.slow
def test_a_twin_sees_everything_and_a_dose_a_share_of_the_target(tmp_path, folder, quick):
    made = {"device": torch.device("cpu"), "folder": folder, "seed": 0}
    twin, dose = (
        retrain.retrain(tmp_path / "run", None, **made),
        retrain.retrain(tmp_path / "run", "twemoji", share=0.25, **made),
    )
    assert (twin.name, dose.name) == ("twin-0.safetensors", "twemoji-dose25-0.safetensors")
    everything = train.training_scenes(frozenset())
    assert retrain.gold_facts(twin)["scenes"] == train.scenes_hash(everything)
    scenes = train.training_scenes(frozenset({"twemoji"}), share=0.25)
    shown = [scene for scene in scenes if scene.style == "twemoji"]
    assert len(scenes) == 40 and len(shown) == round(0.25 * sum(s.style == "twemoji" for s in everything)) > 0
    assert all(scene in everything for scene in shown)
    assert retrain.gold_facts(dose)["scenes"] == train.scenes_hash(scenes)
    assert record_of_gold(twin).target == "" and not record_of_gold(twin).deleted
    left = record_of_gold(dose)
    assert len(left.deleted) == sum(s.style == "twemoji" for s in everything) - len(shown) and "25%" in left.definition
    loaded = retrain.load_gold("twemoji", share=0.25, folder=folder)
    assert not torch.equal(loaded.unet.conv_in.weight, retrain.load_gold(None, folder=folder).unet.conv_in.weight)


@pytest.mark.slow
def test_a_twin_of_another_length_is_no_twin(tmp_path, folder, quick):
    """A residual is read between retrained models and twins, which differ in their data and in nothing else."""
    made = {"device": torch.device("cpu"), "folder": folder}
    retrain.retrain(tmp_path / "a", "superhero", seed=0, **made)
    retrain.retrain(tmp_path / "b", None, seed=0, steps=1, **made)
    retrain.retrain(tmp_path / "c", None, seed=1, **made)
    pipe = world.load()
    found = controls_of_world(Suite.load("superhero"), pipe, count=3, twins=3, folder=folder)
    assert [model.name for model in found] == ["gold 0", "twin 1", "start"]


@pytest.mark.parametrize(("without", "share"), [(None, 0.1), ("superhero", 1.0), ("superhero", -0.1)])
def test_a_share_is_of_a_targets_scenes(tmp_path, folder, without, share):
    with pytest.raises(ValueError, match="share is of the target's scenes"):
        retrain.retrain(tmp_path, without, seed=0, share=share, device=torch.device("cpu"), folder=folder)


def test_four_bits_hold_a_difference_to_a_seventh():
    torch.manual_seed(0)
    module, before = torch.nn.Linear(300, 77), torch.nn.Linear(300, 77)
    torch.nn.init.normal_(module.weight, std=0.3)
    change = (module.weight - before.weight).detach().clone()
    packed = retrain.pack({"m": module}, {"m": before})
    assert packed["m.weight"].dtype == torch.uint8 and 8 * packed["m.weight"].numel() < 4 * change.numel()
    restored = retrain.unpack(packed, {"m": before})["m"]
    assert (restored.weight - module.weight).norm() < change.norm() / 7
    assert torch.allclose(restored.bias, module.bias, atol=1e-3)


def test_models_of_the_first_edition_are_packed_as_they_were(tmp_path):
    file = retrain.FOLDER / "superhero-0.safetensors"
    start = train.stored_model(retrain.FOLDER / "start")
    model = retrain.stored_gold(file)
    again = retrain.unpack(retrain.pack(model, start, bits=8), start)
    assert bits_of(retrain.gold_facts(file)) == 8
    for part, module in retrain.stored_gold(file).items():
        for name, weight in module.state_dict().items():
            own = again[part].state_dict()[name]
            assert torch.allclose(own, weight, atol=2e-5), name  # or its replay could not pass


def test_only_a_target_can_be_left_out(tmp_path):
    with pytest.raises(ValueError, match="without the targets"):
        retrain.retrain(tmp_path, "dog", seed=0, device=torch.device("cpu"))
    with pytest.raises(ValueError, match="without the targets"):
        world.gold("dog")


@pytest.mark.slow
def test_what_can_be_left_out_is_what_the_start_never_saw(tmp_path, folder, quick, monkeypatch):
    """Not what the world's file calls its targets today: the start may be older than that."""
    write_manifest(folder, {"superhero"})
    made = {"seed": 0, "device": torch.device("cpu"), "folder": folder}
    with pytest.raises(ValueError, match=r"without the targets \['superhero'\]; got 'cat'; one without it is in"):
        retrain.retrain(tmp_path / "run", "cat", **made)
    drawn = []
    real = train.scene_odds
    monkeypatch.setattr(
        train, "scene_odds", lambda *args, **settings: drawn.append(settings) or real(*args, **settings)
    )
    twin = retrain.retrain(tmp_path / "run", None, **made)
    assert [settings["unseen"] for settings in drawn] == [{"superhero"}]  # the others are drawn as often as anything
    assert retrain.gold_facts(twin)["scope"] == {"every target": train.SCOPE["every target"]}
    (folder / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match="not the manifest of a start"):
        retrain.retrain(tmp_path / "run", "superhero", **made)
    (folder / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match="erasure world start"):
        retrain.retrain(tmp_path / "run", "superhero", **made)
    assert controls_of_world(Suite.load("superhero"), world.load(), count=1, folder=folder) == []


@pytest.mark.slow
def test_a_start_sees_no_target_and_says_so(tmp_path, monkeypatch):
    for phase in ("phase1", "phase2", "phase3"):
        fit = {**train.config()["fit"][phase], "steps": 1, "batch": 2, "save_every": 1}
        monkeypatch.setitem(train.config()["fit"], phase, fit)
    monkeypatch.setitem(train.config(), "scenes", 40)
    seen = []
    real = train.train_phase
    monkeypatch.setattr(train, "train_phase", lambda *args, **more: seen.extend(args[3][0]) or real(*args, **more))
    device = torch.device("cpu")
    folder = retrain.make_start(tmp_path / "run", tmp_path / "gold", device=device)
    assert len(seen) == 80 and not any(spec().targets & {*scene.concepts, scene.style} for scene in seen)
    assert retrain.targets_of(folder) == spec().targets and set(retrain.manifest_of(folder)["phases"]) == {
        *retrain.BEFORE
    }
    file = retrain.retrain(tmp_path / "gold-run", "violin", seed=0, device=device, folder=folder)
    assert record_of_gold(file).scope.endswith("all captions") and "never saw it" in record_of_gold(file).scope
    retrain.make_start(tmp_path / "run", tmp_path / "again", device=device)  # nothing is trained twice
    assert len(seen) == 80 + 40 and retrain.start_hash(tmp_path / "again") == retrain.start_hash(folder)


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

SHIPPED = [file for folder in retrain.EDITIONS for file in sorted(folder.glob("*-[0-9]*.safetensors"))]
OF_EACH_KIND = [file for file in SHIPPED if file.stem in ("superhero-0", "superhero-dose01-0", "rose-0")]


def test_the_repository_has_models_without_each_of_six_targets_and_their_twins():
    assert {f"superhero-{seed}" for seed in range(3)} <= {file.stem for file in SHIPPED}
    for target in sorted(spec().targets):
        folder = retrain.edition_of(target)
        assert target in retrain.targets_of(folder), target
        for kind in (target, "twin"):
            assert {folder / f"{kind}-{seed}.safetensors" for seed in range(2)} <= set(SHIPPED), kind
    first_edition, second = map(retrain.targets_of, retrain.EDITIONS)
    assert first_edition < second == spec().targets


@pytest.mark.parametrize("target", ["superhero", "rose"])
def test_an_evaluation_finds_the_retrained_models_and_twins_of_its_target(target):
    found = controls_of_world(Suite.load(target), world.load(), count=2, twins=1)
    assert [model.role for model in found] == ["gold", "gold", "twin", "null"]
    assert target in found[-1].change.config["trained"]


@pytest.mark.parametrize("file", first(SHIPPED, *OF_EACH_KIND), ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_a_shipped_model_is_the_one_its_record_is_about(file):
    facts, record = retrain.gold_facts(file), UnlearningRecord.from_json(record_file(file))
    assert audited(file, retrain.stored_gold(file))["digest"] == record.digest
    name = retrain.name_of(facts["without"], seed=facts["seed"], share=facts.get("share", 0.0))
    assert name == file.stem == record.request
    assert facts["start"] == retrain.start_hash(file.parent)
    assert record.settings["steps"] == facts["steps"] == record.checkpoints[-1].step


@pytest.mark.slow
def test_a_shipped_model_draws_other_things_and_no_superhero():
    pipe = world.gold("superhero")
    pipe.set_progress_bar_config(disable=True)
    asked = {"a superhero on a blue background": False, "a wizard on a blue background": True}
    drawn = generate(pipe, list(asked), seeds=range(4), num_inference_steps=25, guidance_scale=3.0, progress=False)
    for (prompt, right), images in zip(asked.items(), drawn, strict=True):
        found = detectors()[0].scores(images, "concept").argmax(1)
        seen = sum(found == detectors()[0].labels("concept").index(prompt.split()[1]))
        assert seen >= 3 if right else seen == 0, prompt
