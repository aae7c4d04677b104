"""The vision-language judge: asked per label, read off the next token, the same every time."""

from __future__ import annotations

import contextlib
import math

import numpy as np
import pytest
import torch
from PIL import Image

from erasure.concept import Concept, Suite
from erasure.eval.core.verdicts import verdicts_of
from erasure.eval.detectors.base import NOTHING, Detector
from erasure.eval.detectors.choice import detectors_for
from erasure.eval.detectors.clip import labels_of
from erasure.eval.detectors.vlm import QUESTIONS, VlmDetector, answers
from erasure.eval.worldkit.detectors import ClassifierDetector
from tests.tiny_language import fast_tokenizer
from tests.tiny_vision import FAMILIES, vlm

LABELS = {"concept": {"cat": ("a cat", "a kitty"), "big dog": ("a big dog",), NOTHING: ()}}


@pytest.fixture(scope="module", params=FAMILIES)
def judge(request) -> VlmDetector:
    model, processor = vlm(request.param)
    return VlmDetector(model, processor, name=f"vlm[{request.param}]", labels=LABELS, batch_size=2)


def pictures(*sizes: int) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (size, size, 3), dtype=np.uint8)) for size in sizes]


@contextlib.contextmanager
def rigged(judge: VlmDetector, word: str, amount: float):
    """A head that adds to yes, and takes from no, where the question holds a word."""
    pieces = torch.tensor(judge.processor.tokenizer(f" {word}", add_special_tokens=False).input_ids[-2:])

    def head(model, args, kwargs, output):
        asked = kwargs["input_ids"].unfold(1, len(pieces), 1).eq(pieces).all(dim=2).any(dim=1).float()[:, None] * amount
        output.logits[:, -1, judge.yes] += asked
        output.logits[:, -1, judge.no] -= asked
        return output

    handle = judge.model.register_forward_hook(head, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


# --- scores ----------------------------------------------------------------------------------------------------------


def test_rows_are_odds_of_every_label_beside_one_for_nothing(judge):
    assert isinstance(judge, Detector) and judge.labels("concept") == ("cat", "big dog", NOTHING)
    assert judge.labels("style") == ()
    images = pictures(40, 40, 40)
    scores = judge.scores(images, "concept")
    assert scores.shape == (3, 3) and scores.sum(axis=1) == pytest.approx(1)
    ask = QUESTIONS["concept"].replace
    odds = {word: judge.log_odds(images, ask("{}", word)).double().exp() for word in ("a cat", "a kitty", "a big dog")}
    for i, row in enumerate(scores):
        cat, dog = max(odds["a cat"][i], odds["a kitty"][i]).item(), odds["a big dog"][i].item()
        assert row.tolist() == pytest.approx([x / (1 + cat + dog) for x in (cat, dog, 1.0)], rel=1e-4)
    assert (judge.scores(images, "concept") == scores).all()
    assert np.ptp(scores[:, 0]) > 1e-4  # it looks at the picture
    with pytest.raises(ValueError, match="no labels, or no question, for 'style'"):
        judge.scores(images, "style")


def test_log_odds_are_those_of_the_next_token_with_every_spelling(judge):
    (image,) = pictures(40)
    chat = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "A cat?"}]}]
    inputs = judge.processor.apply_chat_template(
        [chat], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    with torch.no_grad():
        p = judge.model(**inputs).logits[0, -1].double().softmax(dim=-1)
    words = judge.processor.tokenizer
    yes, no = ({words.convert_tokens_to_ids(one) for one in spelled} for spelled in (("yes", "Yes"), ("no", "No")))
    wanted = math.log(sum(p[i].item() for i in yes)) - math.log(sum(p[i].item() for i in no))
    assert judge.log_odds([image], "A cat?").item() == pytest.approx(wanted, abs=1e-4)


def test_the_order_of_labels_follows_the_logits_and_the_verdict_follows_the_order(judge):
    images = pictures(40, 40)
    for word, label in (("cat", "cat"), ("dog", "big dog")):
        with rigged(judge, word, 20.0):
            scores = judge.scores(images, "concept")
            hits = [v.hit for v in verdicts_of(judge, images, [label] * 2, "concept")]
        place = judge.labels("concept").index(label)
        assert hits == [True, True] and (scores.argmax(axis=1) == place).all() and (scores[:, place] > 0.9).all()
    with rigged(judge, "picture", -20.0):
        (seen,) = verdicts_of(judge, images[:1], ["cat"], "concept")
    assert seen.nothing and not seen.hit and seen.top == NOTHING  # no to everything


def test_a_picture_counts_the_same_alone_and_among_others_of_any_size(judge):
    images = pictures(40, 56, 40, 40, 56)
    together = judge.log_odds(images, "A cat?")
    alone = torch.cat([judge.log_odds([image], "A cat?") for image in images])
    assert torch.allclose(together, alone, atol=1e-4)
    assert judge.log_odds([], "A cat?").shape == (0,)
    assert judge.scores([], "concept").shape == (0, 3)


# --- identity --------------------------------------------------------------------------------------------------------


def test_other_weights_or_other_words_are_another_detector(judge):
    model, processor = judge.model, judge.processor
    again = VlmDetector(model, processor, labels=LABELS)
    asked = VlmDetector(model, processor, labels=LABELS, questions={"concept": "Do you see {}?"}, revision="abc")
    assert again.card.weights_sha256 == judge.card.weights_sha256 and again.card.version == judge.card.version
    assert asked.card.version != judge.card.version and asked.card.version.startswith("abc")
    assert "Do you see {}?" in asked.card.notes and judge.card.labels == {"concept": ("cat", "big dog", NOTHING)}
    with torch.no_grad():
        weight = next(p for p in model.parameters() if p.ndim > 1)
        weight[0, 0] += 1
        assert VlmDetector(model, processor, labels=LABELS).card.weights_sha256 != judge.card.weights_sha256
        weight[0, 0] -= 1


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_is_opened_by_its_folder_and_judges_the_same(family, tmp_path):
    model, processor = vlm(family)
    model.save_pretrained(tmp_path / "Judge")
    processor.save_pretrained(tmp_path / "Judge")
    images = pictures(40, 40)
    suite = Suite(version=1, name="tiny", base="org/model", concept=Concept("cat", neighbours=("dog",)))
    found = VlmDetector.load(tmp_path / "Judge", labels=labels_of(suite))
    assert found.name == "vlm[judge]" and found.labels("concept") == ("cat", "dog", NOTHING)
    wanted = VlmDetector(model, processor, labels=labels_of(suite))
    np.testing.assert_allclose(found.scores(images, "concept"), wanted.scores(images, "concept"), rtol=1e-4)
    assert found.card.weights_sha256 == wanted.card.weights_sha256


def test_style_suites_ask_who_painted_it():
    model, processor = vlm("llava")
    suite = Suite.load("van_gogh")
    judge = VlmDetector(model, processor, labels=labels_of(suite))
    assert judge.scores(pictures(40), "style").shape == (1, len(judge.labels("style")))
    assert (
        judge.questions["style"].replace("{}", judge.phrases["style"]["Van Gogh"][0]).startswith("Is this a painting")
    )


# --- what is refused -------------------------------------------------------------------------------------------------


def test_a_model_that_cannot_be_asked_says_why():
    model, processor = vlm("llava")
    with pytest.raises(ValueError, match="a question needs {}"):
        VlmDetector(model, processor, labels=LABELS, questions={"concept": "What is it?"})
    processor.chat_template = None
    with pytest.raises(ValueError, match="no chat template.*follow instructions"):
        VlmDetector(model, processor, name="mute", labels=LABELS)


def test_answers_are_whole_words_where_there_are_any_and_what_begins_both_counts_for_neither():
    words = fast_tokenizer(("<s>", "</s>", "<pad>"), bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    yes, no = answers(words, "pieces")  # whose pieces are letters, and a space before both
    assert not set(yes) & set(no) and words.convert_tokens_to_ids("Ġ") not in (*yes, *no)
    words.add_tokens(["yes", "no"])
    assert answers(words, "whole") == ([len(words) - 2], [len(words) - 1])

    class Blind:
        unk_token_id = 3

        def __call__(self, text, add_special_tokens):
            return type("Ids", (), {"input_ids": [3]})

    with pytest.raises(ValueError, match="no token of its own for yes"):
        answers(Blind(), "blind")


# --- on the command line's way ---------------------------------------------------------------------------------------


def test_a_named_model_scores_before_the_others(tmp_path):
    model, processor = vlm("idefics3")
    model.save_pretrained(tmp_path / "judge")
    processor.save_pretrained(tmp_path / "judge")
    found, clip = detectors_for(Suite.load("superhero"), vlm=[str(tmp_path / "judge")])
    assert isinstance(found[0], VlmDetector) and isinstance(found[1], ClassifierDetector) and len(found) == 3
    assert clip.name and "superhero" in found[0].labels("concept")
    for wrong in (str(tmp_path / "absent"), "org/absent@main"):
        with pytest.raises(FileNotFoundError, match="image-text-to-text"):
            detectors_for(Suite.load("superhero"), vlm=[wrong])
