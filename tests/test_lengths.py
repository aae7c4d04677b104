"""Prompts that a text encoder cuts are refused before anything is drawn, or left out with the reason."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from erasure.backbone import backbone_of
from erasure.backbone.text import TooLong
from erasure.concept import Concept, Words
from erasure.eval import assess, evaluate
from erasure.eval.core.lengths import refuse_cut, too_long
from erasure.eval.core.pictures import generate
from erasure.eval.probes import probe_class
from erasure.eval.probes.base import Missing
from tests.eval_helpers import AddNoise, PixelDetector
from tests.every import CALLS, build
from tests.probe_helpers import SUITE, tiny_context
from tests.slow import every_method, first
from tests.tiny import ARCHITECTURES, make, shortest, tiny, tiny_pipeline

LONG = "a cat " * 400


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_names_the_prompts_it_would_cut(architecture):
    pipe = tiny(architecture)
    found = too_long(pipe, ["a cat", LONG, "", f"the {LONG}"])
    assert list(found) == [LONG, f"the {LONG}"]
    assert all("longer than the text encoder reads" in reason for reason in found.values())
    assert not too_long(pipe, ["a cat", ""]) and not too_long(pipe, [])


def test_where_nothing_is_known_that_is_noted():
    (note,) = refuse_cut(object(), ["a cat"])
    assert "is not known" in note
    assert refuse_cut(tiny_pipeline(), ["a cat"]) == []


class NeverDrawn:
    def __call__(self, *args, **kwargs):
        raise AssertionError("a picture was drawn")


@pytest.mark.parametrize("where", ["target", "neighbours", "unrelated"])
@pytest.mark.parametrize("run", [evaluate, assess])
def test_a_suite_that_the_encoder_cuts_is_refused_before_any_drawing(run, where, monkeypatch):
    pipe = tiny_pipeline()
    changes = {
        "target": {"concept": dataclasses.replace(SUITE.concept, templates=("{}", LONG + "{}"))},
        "neighbours": {"concept": dataclasses.replace(SUITE.concept, neighbours=("dog", LONG + "dog"))},
        "unrelated": {"unrelated": (LONG,)},
    }
    suite = dataclasses.replace(SUITE, **changes[where])
    monkeypatch.setattr(type(pipe), "__call__", NeverDrawn.__call__)
    with pytest.raises(TooLong, match="the text encoder cuts . of .*longer than the text encoder reads") as error:
        run(pipe, {"edit": AddNoise()}, suite, detectors=[PixelDetector()], progress=False)
    assert error.value.prompts


def test_prompts_of_a_probe_that_are_cut_are_left_out_with_the_reason():
    words = Words(descriptions=("a pet that meows", LONG.replace("cat", "pet")))
    context = tiny_context()
    context = dataclasses.replace(context, suite=dataclasses.replace(context.suite, words=words))
    rows = probe_class("description")(images_per_prompt=2).run(context.base, context)
    assert {row.value is None for row in rows if len(row.cluster) > 200} == {True}
    assert {row.value in (0.0, 1.0) for row in rows if len(row.cluster) < 200} == {True}
    assert all("longer than the text encoder reads" in row.reason for row in rows if row.value is None)
    (level,) = (
        e.estimate for e in probe_class("description")().weigh({"base": rows}, {"base": "base"}) if e.measure == "rate"
    )
    known = [row.value for row in rows if row.value is not None]
    assert level.value == pytest.approx(sum(known) / len(known)) and level.excluded == len(rows) - len(known)


def test_a_probe_that_draws_them_itself_says_so():
    context = tiny_context()
    with pytest.raises(Missing, match="longer than the text encoder reads"):
        context.draw(context.pipe, context.base, ["a cat", LONG])
    (drawn,) = context.draw(context.pipe, context.base, [LONG], cut=True)
    assert drawn[0].tobytes() == generate(context.pipe, [LONG], num_inference_steps=2, progress=False)[0][0].tobytes()


# --- erasing ---------------------------------------------------------------------------------------------------------

FILL = " ".join(["dog"] * 75)  # 77 of CLIP's 77 tokens


@pytest.fixture(scope="module")
def sd1():
    return tiny("sd1")


def never(*arguments, **keywords):
    raise AssertionError("work was begun")


@pytest.mark.parametrize("method", every_method("uce", "speed", "mace", "esd", "adv-unlearn", "safree"))
@pytest.mark.parametrize("where", ["target", "synonym", "anchor", "first kept", "last kept"])
def test_what_the_encoder_cuts_is_refused_before_any_work(sd1, method, where, monkeypatch):
    long = f"{FILL} cat"
    keep = [f"dog {i}" for i in range(200)]
    concept = {
        "target": Concept(long, anchor="cat"),
        "synonym": Concept("superhero", anchor="cat", synonyms=(long,)),
        "anchor": Concept("superhero", anchor=long),
    }.get(where, Concept("superhero", anchor="cat"))
    keep = {"first kept": [long, *keep], "last kept": [*keep, long]}.get(where, keep)
    monkeypatch.setattr(sd1.text_encoder, "forward", never)
    monkeypatch.setattr(sd1.unet, "forward", never)
    with pytest.raises(TooLong, match="78 tokens of 77") as error:
        make(sd1, concept, method=method, keep=keep, progress=False, **shortest(method))
    assert error.value.prompts == (long,) and ("corpus" in str(error.value)) == ("kept" in where)


@pytest.mark.parametrize("preset", ["recommended", "official-2025", "official-2023"])
def test_a_prompt_of_exactly_the_encoders_length_is_kept_though_its_article_does_not_fit(sd1, preset, recwarn):
    edit = make(sd1, Concept("superhero", anchor="cat"), preset=preset, keep=["ninja", FILL])
    assert edit.config["keep"] == ["ninja", FILL] and "neighbours" in edit.config["report"]
    assert not [w for w in recwarn if "longer than" in str(w.message) or "left out" in str(w.message)]
    alone = make(sd1, Concept("superhero", anchor="cat"), preset=preset, keep=["ninja"])
    assert not torch.equal(edit.tensors["hidden.v"], alone.tensors["hidden.v"])


@pytest.mark.parametrize("method", ["uce", "rece", "speed", "esd"])
def test_a_concept_of_exactly_the_encoders_length_is_erased_without_what_does_not_fit(sd1, method):
    exact = FILL.replace("dog", "cat")
    edit = make(sd1, Concept(exact, anchor="dog"), method=method, keep=["ninja"], progress=False, **shortest(method))
    assert edit.config["prompts"] == [exact]


def test_a_concept_that_fits_in_no_sentence_of_the_method_is_refused(sd1):
    exact = FILL.replace("dog", "cat")
    for method, settings in (("time", {"templates": ("a photo of {}",)}), ("mace-cfr", {"articles": True})):
        with pytest.raises(TooLong, match="longer than the text encoder reads"):
            make(sd1, Concept(exact, anchor="dog"), method=method, keep=["ninja"], **settings)


def test_captions_of_a_corpus_file_are_left_out_with_one_warning(sd1, tmp_path):
    (tmp_path / "retain.txt").write_text("\n".join([LONG, "a dog", "a wizard", *["a bird"] * 99, LONG + "dog"]))
    for settings in ({}, {"prior_filter": True}):
        with pytest.warns(UserWarning) as caught:
            make(sd1, "superhero", method="speed", keep=["ninja"], retain=str(tmp_path / "retain.txt"), **settings)
        assert [str(w.message)[:22] for w in caught if "left out" in str(w.message)] == ["2 captions are longer "]


def test_an_unlisted_neighbour_that_does_not_fit_is_no_part_of_the_quick_report(sd1):
    short, both = (
        make(sd1, Concept("superhero", anchor="cat", neighbours=neighbours), preset="official-2025", keep=[])
        for neighbours in (("ninja",), ("ninja", LONG))
    )
    assert short.config["report"] == both.config["report"]


@pytest.mark.parametrize("architecture", ["sd3", "flux", "qwen-image", "lumina2", "wan", "kolors"])
def test_every_tokenizer_counts(architecture):
    pipe = build(architecture)
    long = "superhero " * 600
    backbone = backbone_of(pipe)
    assert backbone.fitting(["a cat", long, "", "a dog"]) == ["a cat", "", "a dog"]
    backbone.check_lengths([])
    for keep, concept in ((["ninja", long], "superhero"), (["ninja"], long)):
        with pytest.raises(TooLong, match="longer than the text encoder reads"):
            make(pipe, Concept(concept, anchor="cat"), keep=keep)


# --- words that are unknown ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", first(["sd3", "flux"], "flux"))
@pytest.mark.parametrize("concept", [Concept("\u5fcd\u8005"), Concept("superhero", anchor="the \u5fcd\u8005"),
                                     Concept("superhero", synonyms=("a \u5fcd\u8005",))])  # fmt: skip
def test_a_word_that_a_tokenizer_cannot_spell_is_refused_as_target_and_anchor(architecture, concept):
    pipe = tiny(architecture)
    for method in ("uce", "cure"):
        with pytest.raises(ValueError, match="does not know '\u5fcd\u8005'.*one unknown token"):
            make(pipe, concept, method=method, keep=["ninja"])
    make(pipe, "superhero", keep=["ninja", "\u5fcd\u8005"])  # what is kept may be anything


def test_tokenizers_that_spell_know_every_word(sd1):
    assert make(sd1, "\u5fcd\u8005", preset="official-2025", keep=["ninja"]).config["prompts"] == ["\u5fcd\u8005"]


@pytest.mark.parametrize("architecture", ["qwen-image", "z-image", "flux2-klein", "cogview4", "lumina2", "wan"])
def test_ids_stand_where_the_rows_of_their_embeddings_do(architecture):
    backbone = backbone_of(build(architecture))
    prompts = ["a cat", "the ninja and a wizard"]
    (segment,) = backbone.encode(prompts).segments
    assert segment.ids.shape == segment.hidden.shape[:2]
    spans = zip(segment.ids, segment.span("content"), strict=True)
    assert [backbone.words.decode(ids[span]).strip() for ids, span in spans] == prompts


@pytest.mark.parametrize("architecture", ["sd3", "sana", "ltx", "cogvideox", "chroma", "pixart-sigma"])
def test_guidance_draws_at_the_length_that_was_asked_for(architecture):
    pipe = build(architecture)
    backbone = type(backbone_of(pipe))(pipe, max_sequence_length=96, call=CALLS.get(architecture, {}))
    text = backbone.encode(["a superhero"]).text
    noise = torch.randn(1, *backbone.latent_shape)
    step, *_ = backbone.trajectory(text, noise, num_inference_steps=3, guidance_scale=3.0)
    assert text.hidden.shape[1] == 96 + (77 if architecture == "sd3" else 0)
    assert step.unconditional is not None and not torch.equal(step.unconditional, step.conditional)


def test_what_a_pipeline_cuts_behind_its_encoder_is_refused():
    backbone = backbone_of(build("qwen-image"))  # reads 1,024 tokens and gives the denoiser 512
    whole = " ".join(["a"] * 512)
    assert backbone.encode([whole]).span("content") == [slice(0, 512)] and backbone.fitting([whole]) == [whole]
    assert backbone.fitting([f"{whole} a"]) == []
