"""Everything else, drawn from the model's own vocabulary."""

import pytest
import torch
from diffusers import StableDiffusionPipeline

from erasure import Concept, erase
from erasure.backbone import backbone_of
from erasure.methods import BUILT_IN, method_class
from erasure.methods.closed_form import EVERYDAY, ClosedForm
from erasure.methods.vocabulary import vocabulary, words_of
from studies.second_base import MODEL
from tests.every import EVERY, build
from tests.slow import first
from tests.tiny import identical, make, tiny

HERO = Concept("superhero", synonyms=("caped hero",), anchor="ninja")
CLOSED_FORMS = [name for name in sorted(BUILT_IN) if issubclass(method_class(name), ClosedForm)]


@pytest.fixture(scope="module")
def sd1():
    return tiny("sd1")


def test_whole_words_are_known_by_their_marks():
    pieces = {"cat</w>": 5, "ca": 1, "▁tree": 4, "Ġriver": 3, "Dog</w>": 2, "an</w>": 6, "c3po</w>": 7, "été</w>": 8}
    pieces |= {"▁": 9, "ing": 10, "Ġcat": 11, "": 12}
    assert words_of(pieces) == {"river": 3, "tree": 4, "cat": 5}
    assert list(words_of(pieces)) == ["river", "tree", "cat"]  # by their ids


def test_a_vocabulary_without_marks_is_one_of_words():
    assert words_of({"[UNK]": 0, "cat": 1, "##ing": 2, "river": 3, "of": 4}) == {"cat": 1, "river": 3}


def test_words_of_the_vocabulary_stand_in_for_everyday_nouns_that_are_unknown():
    pipe = StableDiffusionPipeline.from_pretrained(MODEL / "pipeline")  # whole words, and two everyday nouns among them
    edit = erase(pipe, "star", "uce", keep=["heart"], apply=False)
    assert {"circle", "arrow", "red"} <= {*edit.config["keep_everyday"]} and not {"cat", "star"} & {
        *edit.config["keep_everyday"]
    }
    assert not {*erase(tiny("sd1"), "star", "uce", keep=["heart"], apply=False).config["keep_everyday"]} - {*EVERYDAY}


@pytest.mark.slow
def test_the_same_request_draws_the_same_words(sd1):
    backbone = backbone_of(sd1)
    words = vocabulary(backbone, [HERO], 200)
    assert words == vocabulary(backbone_of(tiny("sd1")), [HERO], 200) and len(set(words)) == 200
    assert words != vocabulary(backbone, [Concept("cat")], 200)
    assert len(vocabulary(backbone, [HERO], 10**6)) > 10_000  # of CLIP's 49,408 pieces
    known = words_of(sd1.tokenizer.get_vocab())
    assert all(sd1.tokenizer(word).input_ids[1:-1] == [known[word]] for word in words)


def test_what_names_the_target_or_lies_next_to_it_is_left_out_and_so_is_what_was_never_trained():
    pipe = tiny("sd1")
    table, known = pipe.text_encoder.get_input_embeddings().weight, words_of(pipe.tokenizer.get_vocab())
    with torch.no_grad():
        table[known["lighthouse"]] = 1.1 * table[known["superhero"]]
        table[known["river"]] *= 0.1
        table[known["garden"]] *= 10
    every = vocabulary(backbone_of(pipe), [HERO], 10**6)
    assert not {"superhero", "hero", "lighthouse", "river", "garden"} & {*every}
    assert {"piano", "mountain", "window"} <= {*vocabulary(backbone_of(tiny("sd1")), [HERO], 10**6)}
    whole = {*every, "superhero", "hero"}
    assert "hero" in vocabulary(backbone_of(pipe), [Concept("lighthouse")], 10**6) and len(whole) > len(every)


def test_words_stand_at_all_distances(sd1):
    table, known = sd1.text_encoder.get_input_embeddings().weight.detach(), words_of(sd1.tokenizer.get_vocab())
    target = sd1.tokenizer("superhero").input_ids[1:-1]

    def similarity(words):
        rows = table[[known[word] for word in words]]
        return torch.nn.functional.cosine_similarity(rows[:, None], table[target][None], dim=-1).amax(dim=1)

    concept = Concept("superhero")
    quarters = torch.tensor([0.25, 0.5, 0.75])
    few, every = (similarity(vocabulary(backbone_of(sd1), [concept], n)).quantile(quarters) for n in (50, 10**6))
    torch.testing.assert_close(few, every, atol=0.03, rtol=0)


@pytest.mark.parametrize("architecture", first(EVERY, "qwen-image", "lumina2", "pixart-sigma"))  # CLIP's are above
def test_every_base_has_words(architecture):
    backbone = backbone_of(build(architecture))
    some = any(words_of(tokenizer.get_vocab()) for tokenizer, _ in backbone.tokenizers().values())
    words = vocabulary(backbone, [Concept("superhero")], 3)
    assert bool(words) == some  # the tiny T5 spells
    assert "superhero" not in words and backbone.fitting(words) == words


def test_where_the_first_tokenizer_has_no_words_the_next_one_gives_them():
    pipe = tiny("flux")
    first, second = (tokenizer for tokenizer, _ in backbone_of(pipe).tokenizers().values())
    assert first is pipe.tokenizer_2 and not words_of(first.get_vocab())  # the tiny T5 spells
    words = vocabulary(backbone_of(pipe), [HERO], 20)
    assert len(words) == 20 and {*words} <= {*words_of(second.get_vocab())}
    assert len(make(pipe, HERO, keep=["wizard"], keep_vocabulary=20).config["keep_everyday"]) >= 20


@pytest.mark.parametrize("method", first(CLOSED_FORMS, "speed"))
def test_every_closed_form_keeps_them_when_asked_to(sd1, method):
    concept = Concept("superhero", anchor="ninja")
    room = {"rank": 8} if method == "double-projections" else {}
    plain, same, more = (make(sd1, concept, method=method, keep=["wizard"], **room, **settings)
                         for settings in ({}, {"keep_vocabulary": 0}, {"keep_vocabulary": 40}))  # fmt: skip
    assert identical(plain.tensors, same.tensors) and not identical(plain.tensors, more.tensors)
    words = vocabulary(backbone_of(sd1), [concept], 40)
    everyday = plain.config["keep_everyday"]
    assert everyday == [noun for noun in EVERYDAY if method_class(method).preset().keep_everyday]
    assert more.config["keep_everyday"] == list(dict.fromkeys([*everyday, *words]))
    assert more.config["settings"]["keep_vocabulary"] == 40
    assert f"{len({*everyday, *words})} everyday words" in more.card()


@pytest.mark.slow
def test_words_that_are_kept_move_less(sd1):
    backbone = backbone_of(sd1)
    words = vocabulary(backbone, [HERO], 150)
    settings = {"keep": ["wizard"], "preset": "recommended", "keep_everyday": False}
    with_words, without = (make(sd1, HERO, **settings, keep_vocabulary=n) for n in (150, 0))

    def moved(edit, prompts):
        x = backbone.encode(prompts).hidden
        return ((edit.map(x) - x).norm() / x.norm()).item()

    others = [word for word in vocabulary(backbone, [HERO], 1000) if word not in words]
    assert moved(with_words, words) < 0.5 * moved(without, words)
    assert moved(with_words, others[::10]) < moved(without, others[::10])  # and it reaches what was not drawn


def test_a_vocabulary_without_words_is_refused(sd1, monkeypatch):
    monkeypatch.setattr(type(sd1.tokenizer), "get_vocab", lambda self: {"ca": 1, "##t": 2})
    with pytest.raises(ValueError, match="no words to keep; leave keep_vocabulary at 0"):
        make(sd1, HERO, keep=["wizard"], keep_vocabulary=5)
