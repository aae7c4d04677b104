"""Somebody's own fine-tune, or a pipeline that was erased elsewhere, judged as an arm like any other."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from erasure import cli, erase, world
from erasure.cli.evaluate import evaluate as evaluate_command
from erasure.eval import Assessment, evaluate
from erasure.eval.core.models import Model, check_alike, name_of, whole_model
from erasure.eval.core.pictures import generate, image_hash, weights_hash
from erasure.opening import declared_parts
from tests.eval_helpers import PixelDetector
from tests.every import build
from tests.probe_helpers import SUITE
from tests.tiny import tiny, tiny_pipeline

QUICK = {"num_inference_steps": 2, "progress": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A fine-tune of which denoiser, text encoder and autoencoder are other ones."""
    folder = tmp_path_factory.mktemp("models") / "my-fine-tune"
    pipe = tiny_pipeline(seed=1)
    with torch.no_grad():
        for module in (pipe.text_encoder, pipe.vae):
            for parameter in module.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    pipe.save_pretrained(folder)
    return folder


def test_it_draws_what_it_draws_by_itself_and_the_base_comes_back(folder):
    from erasure.opening import load_base

    pipe = tiny_pipeline()
    before, change = weights_hash(pipe), whole_model(pipe, folder)
    model = Model("mine", "erased", change)
    assert (change.name, model.kind, change.config["source"]) == ("my-fine-tune", "weights", "my-fine-tune")
    assert change.config["changed"] == ["unet", "text_encoder", "vae"]
    with model.on(pipe) as drawn:
        through = generate(drawn, ["a cat"], **QUICK)[0][0]
    alone = generate(load_base(folder, device="cpu"), ["a cat"], **QUICK)[0][0]
    base = generate(pipe, ["a cat"], **QUICK)[0][0]
    assert image_hash(through) == image_hash(alone) != image_hash(base)
    assert weights_hash(pipe) == before


@pytest.mark.parametrize("architecture", ["sd3", "flux"])
def test_it_is_an_arm_like_any_other_on_every_architecture(architecture, tmp_path):
    build(architecture, seed=1).save_pretrained(tmp_path / "other")
    pipe = build(architecture)
    change = whole_model(pipe, tmp_path / "other")
    found = evaluate(pipe, {"other": change}, SUITE, detectors=[PixelDetector()], limit=1, progress=False).evaluation
    (arm,) = found.erased
    assert arm.name == "other" and arm.weights != found.arms[0].weights
    hashes = [{r.image_hash for r in found.select(name)} for name in ("base", "other")]
    assert not hashes[0] & hashes[1]
    assert found.warnings and not any("other was made with" in note for note in found.warnings)  # nobody knows


def test_a_copy_of_the_base_is_named_as_unchanged(tmp_path):
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path / "copy")
    assert whole_model(pipe, tmp_path / "copy").config["changed"] == []


@pytest.mark.parametrize("other", ["sd2", "sdxl", "sd3"])
def test_another_architecture_is_refused_in_one_sentence(other, tmp_path):
    tiny(other).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"other is another architecture than the base \(its? .*\)") as caught:
        whole_model(tiny("sd1"), tmp_path / "other")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ("sdxl", "its text_encoder_2 is CLIPTextModelWithProjection, the base's nothing"),
        ("sd3", "its unet is nothing, the base's UNet2DConditionModel"),
    ],
)
def test_the_command_line_sees_another_architecture_before_it_opens_a_model(other, said, tmp_path, monkeypatch):
    tiny(other).save_pretrained(tmp_path / "other")
    monkeypatch.setattr("erasure.opening.load_base", lambda *_, **__: pytest.fail("the base was opened"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=rf"other is another architecture than the base \(.*{said}"):
        evaluate_command("superhero", model=["other"])


def test_what_the_files_say_of_one_architecture_is_alike(tmp_path):
    for name in ("base", "other"):
        tiny_pipeline().save_pretrained(tmp_path / name)
    check_alike(tmp_path / "base", tmp_path / "other")
    check_alike("emoji-world", tmp_path / "other")  # the sizes are compared once both are open
    check_alike("org/model", tmp_path / "other")
    assert declared_parts("org/model") == {} != declared_parts(tmp_path / "base")


def test_another_prediction_is_another_architecture(tmp_path):
    pipe = tiny_pipeline()
    pipe.scheduler.register_to_config(prediction_type="v_prediction")
    pipe.save_pretrained(tmp_path / "velocity")
    with pytest.raises(ValueError, match="its scheduler has prediction_type 'v_prediction', the base's 'epsilon'"):
        whole_model(tiny_pipeline(), tmp_path / "velocity")


def test_names_are_those_of_folders_hub_ids_and_files(tmp_path):
    assert name_of("org/some-model") == "some-model"
    assert name_of("models/merged.safetensors") == "merged"
    assert name_of(f"{tmp_path}/") == tmp_path.name


@pytest.mark.slow
def test_the_command_line_judges_an_erased_pipeline_of_emoji_world(tmp_path, monkeypatch, capsys):
    pipe = world.load()
    erase(pipe, "superhero", "uce", keep=["ninja"], apply=False).fuse(pipe)
    pipe.save_pretrained(tmp_path / "erased elsewhere")
    arguments = ["--suite", "superhero", "--model", tmp_path / "erased elsewhere", "--preset", "smoke"]
    arguments += ["--probe", "direct", "--out", tmp_path / "out", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["erasure", "evaluate", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert not stopped.value.code and "erased elsewhere" in capsys.readouterr().out
    found = Assessment.load(tmp_path / "out")
    card = next(card for card in found.models if card.name == "erased elsewhere")
    assert (card.role, card.kind) == ("erased", "weights")
    assert card.weights != found.models[0].weights and card.config["changed"] == ["unet"]
    assert [claim.model for claim in found.claims()] == ["erased elsewhere"]
    assert (tmp_path / "out" / "report.html").exists()


def test_a_tokenizer_that_exchanges_words_is_another_architecture(tmp_path):
    """With its embeddings exchanged as well it is the base to its own tokenizer, and another model to the base's."""
    pipe = tiny_pipeline()
    ours, other = (pipe.tokenizer(word, add_special_tokens=False).input_ids[-1] for word in ("superhero", "cat"))
    weight = pipe.text_encoder.get_input_embeddings().weight
    with torch.no_grad():
        weight[[ours, other]] = weight[[other, ours]].clone()
    pipe.save_pretrained(tmp_path / "exchanged")
    for name in ("tokenizer.json", "vocab.json"):
        if (file := tmp_path / "exchanged" / "tokenizer" / name).exists():
            words = (whole := json.loads(file.read_text("utf-8"))).get("model", {}).get("vocab", whole)
            of = {number: word for word, number in words.items()}
            words[of[ours]], words[of[other]] = other, ours
            file.write_text(json.dumps(whole), "utf-8")
    with pytest.raises(ValueError, match="its tokenizer reads words as other numbers"):
        whole_model(tiny_pipeline(), tmp_path / "exchanged")
