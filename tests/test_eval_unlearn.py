"""Our methods as a technique of Eval-Unlearn, and its own evaluation of them in an environment of its own."""

import csv
import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import pytest
import torch

import erasure
from erasure.eval.worldkit import detectors
from erasure.pipelines.eval_unlearn import Technique
from tests import world_clip

ROOT = Path(__file__).resolve().parents[1]
WORLD = {"model_id": "emoji-world", "device": "cpu", "num_inference_steps": 4}
HERO = {**WORLD, "erase_concept": "superhero", "keep": ["ninja"]}


def same(a, b):
    return all(np.array_equal(np.asarray(x), np.asarray(y)) for x, y in zip(a, b, strict=True))


@pytest.mark.slow
def test_the_technique_draws_what_an_erased_pipeline_draws(tmp_path):
    technique = Technique(**HERO, batch_size=2)
    prompts = ["a superhero", "a ninja", "a superhero on a red background"]
    images = technique.generate(prompts=prompts, seed=3)
    pipe = erasure.world.load()
    edit = erasure.erase(pipe, "superhero", keep=["ninja"], progress=False)
    own = [
        pipe(prompt, num_inference_steps=4, guidance_scale=3.0, generator=torch.Generator().manual_seed(3 + i)).images[
            0
        ]
        for i, prompt in enumerate(prompts)
    ]
    gaps = [np.abs(np.asarray(a, float) - np.asarray(b, float)).max() for a, b in zip(images, own, strict=True)]
    assert len(images) == 3 and max(gaps) <= 2  # of 255: a batch rounds otherwise
    assert same(technique.generate(prompts=prompts, seed=3), images)
    assert not same(technique.generate(prompts=prompts, seed=4), images)
    edit.save_pretrained(tmp_path / "hero")
    again = Technique(**WORLD, erasure=str(tmp_path / "hero"), batch_size=2).generate(prompts=prompts, seed=3)
    assert same(again, images)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({**WORLD}, "neither erase_concept nor erasure"),
        ({**HERO, "erase_concpt": "x"}, "did you mean 'erase_concept'"),
        ({**HERO, "method": "spell"}, "spell"),
    ],
)
def test_a_bad_configuration_is_refused(config, said):
    with pytest.raises(ValueError, match=said):
        Technique(**config)


def test_the_entry_point_is_declared():
    text = (ROOT / "setup.cfg").read_text("utf-8")
    assert "eval_unlearn.techniques =\n    erasure = erasure.pipelines.eval_unlearn:Technique" in text


def test_the_worlds_clip_sees_the_same_in_transformers_form(tmp_path):
    from transformers import CLIPModel, CLIPProcessor

    world_clip.save(tmp_path)
    model, processor = CLIPModel.from_pretrained(tmp_path), CLIPProcessor.from_pretrained(tmp_path)
    pipe = erasure.world.load()
    images = pipe(["a superhero", "a ninja"], num_inference_steps=8, guidance_scale=3.0,
                  generator=torch.Generator().manual_seed(0)).images  # fmt: skip
    with torch.no_grad():
        inputs = processor(text=["a superhero", "a ninja"], images=images, return_tensors="pt", padding=True)
        seen = model(**inputs).logits_per_image.softmax(1)
    assert seen.argmax(1).tolist() == [0, 1]
    judge = detectors.clip()
    ours = torch.nn.functional.normalize(judge.image_features(images).float(), dim=-1)
    theirs = model.get_image_features(inputs["pixel_values"])
    theirs = getattr(theirs, "pooler_output", theirs)
    assert (ours * torch.nn.functional.normalize(theirs, dim=-1)).sum(-1).min() > 0.98  # images are scaled otherwise


# --- its own evaluation ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """An environment with Eval-Unlearn from PyPI and this library; what is installed here already is lent to it."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder / "env", with_pip=True)
    python = folder / "env" / "bin" / "python"
    [own] = (folder / "env" / "lib").glob("python3*/site-packages")
    (own / "lent.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")) + "\n")
    source = folder / "source"
    for name in ("erasure", "pipelines", "eval"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source)
    for what in (["eval-unlearn==1.1.2"], ["--no-deps", "--no-build-isolation", str(source)]):
        done = subprocess.run([python, "-m", "pip", "install", *what], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return python


@pytest.mark.slow
def test_eval_unlearn_scores_our_erasure_and_the_base(environment, tmp_path):
    """UA: pictures asked for the target that are not the target; IRA: pictures of what is kept that still are."""
    world_clip.save(tmp_path / "openai" / "clip-vit-base-patch32")  # a name that it allows
    for name, prompts in (("target", "superhero"), ("retain", "ninja")):
        with (tmp_path / f"{name}.csv").open("w", newline="") as file:
            rows = [[f"a {prompts} on a {colour} background"] for colour in ("red", "blue", "green", "white")]
            csv.writer(file).writerows([["prompt"], *rows])
    scores = {}
    for scale in (1.0, 0.0):
        config = {
            "technique": {"name": "erasure", "config": {**HERO, "num_inference_steps": 8, "scale": scale}},
            "metric": {"name": "ua_ira", "config": {
                "clip_model_name": "openai/clip-vit-base-patch32", "device": "cpu",
                "target_prompts_path": "target.csv", "retain_prompts_path": "retain.csv",
                "target_concept": "superhero", "retain_concept": "ninja",
            }},
            "output_dir": f"results-{scale}",
        }  # fmt: skip
        (tmp_path / "config.json").write_text(json.dumps(config))
        command = [environment.parent / "eval-unlearn", "run", "--config", "config.json"]
        settings = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
        done = subprocess.run(command, cwd=tmp_path, env=settings, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        [report] = (tmp_path / f"results-{scale}").rglob("*_latest_report.json")
        found = json.loads(report.read_text())
        details = found["metric_result"]["details"]
        assert details["target_total"] == details["retain_total"] == 4 and found["erase_concept"] == "superhero"
        scores[scale] = details["ua_score"], details["ira_score"]
        assert len(list((tmp_path / f"results-{scale}").rglob("*.png"))) == 8
    assert scores[1.0][0] > scores[0.0][0] and scores[0.0][1] == 1.0, scores
