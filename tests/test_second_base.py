"""The second base, on which the defaults are tried: what it is trained on, and that methods and judge fit it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

import erasure
from erasure.eval.detectors.base import Detector
from studies import second_base, shapes
from studies.second_base import MODEL, TARGETS, lines_in, main, suite_of


@pytest.fixture(scope="module")
def pipe():
    found = StableDiffusionPipeline.from_pretrained(MODEL / "pipeline")
    found.set_progress_bar_config(disable=True)
    return found


def test_the_model_that_ships_is_of_this_code_and_draws_what_it_is_asked_for(pipe):
    made = shapes.new_model()
    for part, module in made.items():
        theirs = getattr(pipe, part).state_dict()
        assert {name: tensor.shape for name, tensor in module.state_dict().items()} == {
            name: tensor.shape for name, tensor in theirs.items()
        }
    assert pipe.scheduler.config.prediction_type == "v_prediction" and len(pipe.tokenizer) == len(shapes.tokenizer())
    prompts = [f"a red {shape} on a white background" for shape in shapes.SHAPES]
    drawn = pipe(prompts, num_inference_steps=8, guidance_scale=3.0, generator=torch.Generator().manual_seed(0)).images
    judge = shapes.Judge(MODEL / "classifier.pt")
    seen = [judge.labels("concept")[i] for i in judge.scores(drawn, "concept").argmax(1)]
    assert sum(one == shape for one, shape in zip(seen, shapes.SHAPES, strict=True)) >= 14


def test_captions_are_made_of_known_words_and_pictures_of_what_they_say():
    rng, words = np.random.default_rng(0), shapes.tokenizer()
    scenes = [shapes.scene(rng) for _ in range(300)]
    texts = [shapes.caption(rng, *scene) for scene in scenes]
    ids = words(texts).input_ids
    assert not any(words.unk_token_id in row for row in ids) and max(map(len, ids)) <= shapes.LENGTH
    assert all(scene[0] in text for text, scene in zip(texts, scenes, strict=True) if text)
    assert words("a dog").input_ids[2] == words.unk_token_id
    picture = np.asarray(shapes.draw(rng, "square", "red", "white", "large"))
    assert tuple(picture[16, 16]) == shapes.COLOURS["red"] and tuple(picture[0, 0]) == shapes.GROUNDS["white"]


@pytest.mark.parametrize("target", TARGETS)
def test_a_suite_is_about_shapes_and_judges_nothing_that_methods_were_told_to_keep(target):
    suite = suite_of(target)
    judged = {*suite.concept.neighbours, *suite.unrelated}
    assert judged | {target, suite.concept.anchor} <= shapes.SHAPES.keys() and target not in judged
    assert not set(suite.keep) & judged and len(suite.unrelated) == 6


def test_a_method_is_run_once_and_its_line_is_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(second_base, "TARGETS", dict(list(TARGETS.items())[:1]))
    monkeypatch.setattr(second_base, "LIMIT", 1)
    monkeypatch.setattr(second_base, "PICTURES", 1)
    main(str(tmp_path), "uce")
    assert "| `uce` | star |" in capsys.readouterr().out
    lines = lines_in(tmp_path)
    assert [line.suite for line in lines] == ["star"] and all(line.size and not line.passes for line in lines)
    assert all(line.before and {"target", "neighbours", "unrelated"} <= line.rates.keys() for line in lines)
    monkeypatch.setattr(erasure, "erase", lambda *a, **k: pytest.fail("a stored line was made again"))
    main(str(tmp_path), "uce")
    assert lines_in(tmp_path) == lines


def test_its_classifier_is_a_detector():
    judge = shapes.Judge(MODEL / "classifier.pt")
    assert isinstance(judge, Detector) and judge.labels("style") == ()
    rng = np.random.default_rng(0)
    scores = judge.scores([shapes.draw(rng, *shapes.scene(rng)) for _ in range(3)], "concept")
    assert scores.shape == (3, len(shapes.SHAPES) + 1) and np.allclose(scores.sum(1), 1, atol=1e-5)
