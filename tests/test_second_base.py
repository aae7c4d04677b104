"""The second base, on which the defaults are tried: what it is trained on, and that methods and judge fit it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline

import erasure
from erasure.eval.detectors.base import Detector
from studies import second_base, shapes
from studies.second_base import TARGETS, lines_in, main, suite_of


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """The model as it begins, in the folder of a trained one."""
    out = tmp_path_factory.mktemp("shapes")
    torch.manual_seed(0)
    vae = AutoencoderKL(
        latent_channels=4, norm_num_groups=8, block_out_channels=(8, 8, 8), layers_per_block=1, sample_size=shapes.SIDE,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
    )  # fmt: skip
    StableDiffusionPipeline(
        vae=vae, tokenizer=shapes.tokenizer(), scheduler=shapes.noises(), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False, **shapes.new_model(),
    ).save_pretrained(out / "pipeline")  # fmt: skip
    torch.save(shapes.network().state_dict(), out / "classifier.pt")
    return out


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


def test_a_method_is_run_once_and_its_line_is_kept(untrained, monkeypatch, capsys):
    monkeypatch.setattr(second_base, "TARGETS", dict(list(TARGETS.items())[:1]))
    monkeypatch.setattr(second_base, "LIMIT", 1)
    monkeypatch.setattr(second_base, "PICTURES", 1)
    main(str(untrained), "uce")
    assert "| `uce` | star |" in capsys.readouterr().out
    lines = lines_in(untrained)
    assert [line.suite for line in lines] == ["star"] and all(line.size and not line.passes for line in lines)
    assert all(line.before and {"target", "neighbours", "unrelated"} <= line.rates.keys() for line in lines)
    monkeypatch.setattr(erasure, "erase", lambda *a, **k: pytest.fail("a stored line was made again"))
    main(str(untrained), "uce")
    assert lines_in(untrained) == lines


def test_its_classifier_is_a_detector(untrained):
    judge = shapes.Judge(untrained / "classifier.pt")
    assert isinstance(judge, Detector) and judge.labels("style") == ()
    rng = np.random.default_rng(0)
    scores = judge.scores([shapes.draw(rng, *shapes.scene(rng)) for _ in range(3)], "concept")
    assert scores.shape == (3, len(shapes.SHAPES) + 1) and np.allclose(scores.sum(1), 1, atol=1e-5)
