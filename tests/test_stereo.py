"""STEREO: words learnt as textual inversion learns them, and both stages against plain readings of their equations."""

import copy

import pytest
import torch

from erasure import Concept
from erasure.backbone import backbone_of
from erasure.methods import stereo
from erasure.methods.base import Request
from erasure.methods.learnt_words import LearntWords, inversion_error, learn_word
from erasure.methods.sentences import EXPANSIONS
from erasure.methods.stereo import STEREO, sentences
from erasure.train import Draw, Training
from tests.reference.finetunes import Plain, squared
from tests.tiny import identical, make, tiny, tiny_pipeline, weights

HERO = Concept("superhero", templates=("{}", "a photo of {}", "{} at sea"))
CAT = Concept("cat")
QUICK = {
    "iterations": 2, "rounds": 2, "variant": "u", "search_iterations": 2, "search_lr": 1e-3, "attack_iterations": 2,
    "attack_lr": 0.1, "pictures_each": 2, "trajectories": 2, "keep_steps": 2, "num_inference_steps": 3, "batch_size": 3,
    "lr": 1e-3,
}  # fmt: skip


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- words -----------------------------------------------------------------------------------------------------------


def test_a_learnt_word_is_read_as_a_token_that_was_added_to_the_vocabulary():
    pipe, v = tiny_pipeline(), random(32)
    before = weights(pipe)
    backbone, learnt = backbone_of(pipe), LearntWords(backbone_of(pipe), 2, besides=["a photo of a cat"])
    word, other = learnt.words
    learnt.vectors[word] = v
    asked = [f"a photo of a {word}", f"{word} {other}", "a cat"]
    with learnt.read():
        ours = backbone.encode(asked).hidden
    assert identical(before, weights(pipe))
    tokenizer, encoder = copy.deepcopy(pipe.tokenizer), copy.deepcopy(pipe.text_encoder)
    tokenizer.add_tokens(["<new>"])
    encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        encoder.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids("<new>")] = v
    ids = tokenizer([p.replace(word, "<new>") for p in asked], padding="max_length", return_tensors="pt").input_ids
    torch.testing.assert_close(ours, encoder(ids).last_hidden_state, rtol=1e-5, atol=1e-6)
    plain = backbone.encode(asked).hidden
    assert (plain[0] - ours[0]).abs().max() > 1e-3 and torch.equal(plain[2], ours[2])


def test_the_words_that_stand_for_vectors_are_in_no_prompt():
    pipe = tiny_pipeline()
    many = ["a photo of a superhero", "a ninja and a wizard", "the cat in the style of van gogh", "spiderman, batman"]
    learnt = LearntWords(backbone_of(pipe), 1, besides=many)
    assert not any(word in prompt.split() for word in learnt.words for prompt in many)
    with pytest.raises(ValueError, match="fewer rounds"):
        LearntWords(backbone_of(pipe), 50, besides=many)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_attacks_error_is_the_denoising_error_with_the_word(prediction_type):
    pipe = tiny_pipeline(prediction_type=prediction_type)
    backbone, pictures = backbone_of(pipe), random(3, 4, 8, 8)
    text = backbone.encode(["a superhero", "a ninja"]).text
    ours = inversion_error(backbone, pictures, text, 4, Draw(0, 0).generator)
    generator = Draw(0, 0).generator
    chosen = torch.randint(3, (4,), generator=generator)
    t, eps = (torch.rand(4, generator=generator) * 1000).long(), random(0)
    eps = torch.randn(4, 4, 8, 8, generator=generator)
    x0, a = pictures[chosen], pipe.scheduler.alphas_cumprod[t][:, None, None, None]
    x = a.sqrt() * x0 + (1 - a).sqrt() * eps
    truth = eps if prediction_type == "epsilon" else a.sqrt() * eps - (1 - a).sqrt() * x0
    asked = [["a superhero", "a ninja"][i % 2] for i in chosen]
    torch.testing.assert_close(ours, squared(Plain(pipe, pipe.unet)(x, t, asked), truth), rtol=1e-5, atol=1e-6)


def test_a_word_is_learnt_and_nothing_else_moves():
    pipe = tiny_pipeline()
    before, backbone = weights(pipe), backbone_of(pipe)
    learnt, pictures = LearntWords(backbone, 1, besides=["a photo of a cat"]), random(2, 4, 8, 8)
    (word,) = learnt.words
    start = learnt.embedding(pipe.tokenizer, "cat")
    training = Training(15, 0.1, batch_size=4, optimizer="adamw")

    def error(vector):
        learnt.vectors[word] = vector
        with learnt.read():
            text = backbone.encode([f"a photo of {word}"]).text
        with torch.no_grad():
            return sum(inversion_error(backbone, pictures, text, 8, Draw(1, i).generator) for i in range(4)).item()

    first = error(start)
    learn_word(
        backbone, learnt, word, pictures, ["a photo of {}"], start=start, training=training, progress=False
    )  # fmt: skip
    assert error(learnt.vectors[word]) < first and identical(before, weights(pipe))
    assert all(p.grad is None for p in (*pipe.unet.parameters(), *pipe.text_encoder.parameters()))


# --- the stages ------------------------------------------------------------------------------------------------------


class Found(STEREO):
    """With fixed vectors for what the first stage finds."""

    def search(self, backbone, request, learnt):
        return {word: random(32, seed=i) for i, word in enumerate(learnt.words)}


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_second_stage_is_the_papers(prediction_type):
    pipe, request = tiny_pipeline(prediction_type=prediction_type), Request((HERO,), progress=False)
    method, backbone = Found(**{**QUICK, "g": 3.0}), backbone_of(pipe)
    loss = method.objective(backbone, method.student(backbone), request, None)
    learnt = method.learnt_words(backbone, request)
    learnt.vectors.update(method.search(backbone, request, learnt))
    negatives = ["superhero", *learnt.words]
    bank, generator = None, Draw(0, 0).generator
    with learnt.read(), torch.no_grad():
        bank = method.bank(backbone, backbone.encode(negatives).text, request, None, "again")
        chosen = bank.pick(3, generator)
        x, t, base = bank.x[chosen], bank.t[chosen], Plain(pipe, pipe.unet)
        empty = base(x, t, [""] * 3)
        towards = torch.stack([base(x, t, [a] * 3) - empty for a in ("a photo of superhero", "superhero at sea")])
        away = torch.stack([base(x, t, [n] * 3) - empty for n in negatives])
        target = empty + 2.0 * towards.mean(0) - 4.0 * away.mean(0)
        student = tiny_pipeline(prediction_type=prediction_type, seed=7).unet
        theirs = squared(Plain(pipe, student)(x, t, [negatives[i] for i in bank.prompt[chosen]]), target)
    pipe.unet = student
    torch.testing.assert_close(loss(Draw(0, 0)), theirs, rtol=1e-5, atol=1e-6)


def test_each_concept_is_pushed_from_its_own_words_alone():
    pipe, request = tiny_pipeline(), Request((HERO, CAT), progress=False)
    method, backbone = Found(**QUICK), backbone_of(pipe)
    learnt = method.learnt_words(backbone, request)
    learnt.vectors.update(method.search(backbone, request, learnt))
    asked, owner = method.asked(backbone, request, learnt)
    a, b, c, d = learnt.words
    assert asked == ["superhero", a, c, "cat", b, d] and owner.tolist() == [0, 0, 0, 1, 1, 1]
    with learnt.read():
        text = backbone.encode(asked).text
    bank = method.bank(backbone, text, request, None, "bank")
    both = method.targets(backbone, bank, text, owner, request.concepts)
    rows = owner[bank.prompt] == 1
    assert rows.any() and not rows.all()
    cat = method.targets(backbone, bank, text, torch.tensor([1, 1, 1, 0, 0, 0]), (CAT, HERO))
    torch.testing.assert_close(both[rows], cat[rows])


def test_the_first_stage_erases_the_last_word_from_the_last_model(monkeypatch):
    """What each round asks, of which weights, and that its loss is the distance to its own empty prompt."""
    pipe, request = tiny_pipeline(), Request((HERO,), progress=False)
    method, backbone = STEREO(**QUICK), backbone_of(pipe)
    name, heard = next(iter(backbone.select(method.selector))), []
    before, real = weights(pipe), stereo.train
    started = backbone.select(method.selector)[name].detach().clone()

    def listening(parameters, loss, **given):
        base = copy.deepcopy(pipe.unet)
        other = tiny_pipeline(seed=7).unet
        value = loss(Draw(0, 0))  # the base of the round is still the student
        heard.append((parameters[name].detach().clone(), value.item(), base, other))
        return real(parameters, loss, **given)

    monkeypatch.setattr(stereo, "train", listening)
    learnt = method.learnt_words(backbone, request)
    found = method.search(backbone, request, learnt)
    assert list(found) == learnt.words and identical(before, weights(pipe))
    (first, value, base, _), (second, _, _, _) = heard
    assert torch.equal(first, started) and not torch.equal(second, started)
    bank, generator = (
        method.bank(backbone, backbone.encode(["superhero"]).text, request, None, "x"),
        Draw(0, 0).generator,
    )
    chosen = bank.pick(3, generator)
    x, t, plain = bank.x[chosen], bank.t[chosen], Plain(pipe, base)
    with torch.no_grad():
        theirs = squared(plain(x, t, ["superhero"] * 3), plain(x, t, [""] * 3))
    assert value == pytest.approx(theirs.item(), rel=1e-4)


def test_it_is_made_resumed_and_leaves_the_model_alone(tmp_path, monkeypatch):
    pipe, short = tiny_pipeline(), {**QUICK, "rounds": 1, "iterations": 1}
    before = weights(pipe)
    edit = make(pipe, [HERO, CAT], "stereo", keep=["wizard"], retain=1.0, checkpoint=tmp_path, progress=False, **short)
    assert edit.kind == "delta" and identical(before, weights(pipe))
    assert not any("attn2" in name for name in edit.tensors)
    assert edit.config.prompts == ["superhero", "cat", "a superhero", "a cat"]
    monkeypatch.setattr(STEREO, "search", lambda *args: pytest.fail("searched again"))
    again = make(pipe, [HERO, CAT], "stereo", keep=["wizard"], retain=1.0, checkpoint=tmp_path, progress=False, **short)
    assert identical(edit.tensors, again.tensors)


def test_a_concept_without_sentences_gets_plain_ones():
    assert sentences(HERO) == ["a photo of {}", "{} at sea"]
    assert sentences(CAT) == list(EXPANSIONS["other"])
    assert sentences(Concept("van gogh", kind="style")) == list(EXPANSIONS["style"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rounds": 0}, "rounds"),
        ({"g": 0.5}, "g"),
        ({"pictures_each": 0}, "pictures_each"),
        ({"variant": "y"}, "variant"),
    ],
)
def test_settings_that_make_no_sense_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        make(tiny("sd1"), HERO, "stereo", progress=False, **{**QUICK, **given})


@pytest.mark.parametrize("architecture", ["sdxl", "sd3", "flux"])
def test_models_with_several_encoders_are_refused(architecture):
    with pytest.raises(ValueError, match="stereo does not work on .*choose another"):
        make(tiny(architecture), HERO, "stereo", progress=False, **QUICK)
