"""Filters around pipelines: what they stop, what they pass, and that the pipeline behind them is what it was."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from erasure.eval.core.models import Model, Wraps
from erasure.eval.core.pictures import generate
from erasure.pipelines import (
    AnyOf,
    EmbeddingFilter,
    Guard,
    GuardedPipeline,
    Match,
    OutputFilter,
    Stopped,
    WordFilter,
    calibrated,
    text_embeddings,
)
from tests.eval_helpers import PixelDetector
from tests.tiny import identical, tiny, tiny_pipeline, weights

GREY = (128, 128, 128)
SHORT = {"num_inference_steps": 2, "guidance_scale": 3.0}


class Sees:
    """A detector that sees a cat in every picture, or in none."""

    name = "sees"

    def __init__(self, cat: float) -> None:
        self.cat = cat

    def labels(self, attribute):
        return ("cat", "nothing") if attribute == "concept" else ()

    def scores(self, images, attribute):
        assert all(isinstance(image, Image.Image) for image in images)
        return np.tile([self.cat, 1 - self.cat], (len(images), 1))


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


def noise(count, channels=4):
    return torch.randn(count, channels, 8, 8, generator=torch.Generator().manual_seed(0))


def is_grey(image):
    return image.getcolors() == [(image.width * image.height, GREY)]


# --- what is no number -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [float("nan"), float("inf"), None, "0.5", True])
def test_a_threshold_that_is_no_number_would_let_everything_pass(threshold):
    with pytest.raises(ValueError, match="the threshold of sees must be a finite number; got"):
        OutputFilter(Sees(1.0), "cat", threshold=threshold)


def test_a_picture_that_nobody_could_look_at_is_not_delivered():
    with pytest.raises(ValueError, match="sees gave 1 scores for 1 pictures, or NaN for one; nothing is delivered"):
        OutputFilter(Sees(float("nan")), "cat").matches([Image.new("RGB", (8, 8))])
    assert Match(float("nan"), 0.5).matched


# --- words -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompt",
    [
        "a superhero", "A SUPERHERO!", "two superheroes", "the superhero's cape", "a süperhéro", "a sup3rh3r0",
        "a $uperhero", "a super-hero", "a super hero", "s u p e r h e r o", "a su\u200bperhero", "ｓｕｐｅｒｈｅｒｏ",
        "a caped  hero", "caped heroes", "two elves",
    ],
)  # fmt: skip
def test_words_are_found_however_they_are_written(prompt):
    (match,) = WordFilter(["superhero", "caped hero", "elf"]).matches([prompt])
    assert match.matched and match.score == 1


@pytest.mark.parametrize("prompt", ["", "a superheroine", "a hero", "shelf", "elfin", "a cap ed", "superb heroes"])
def test_other_words_pass(prompt):
    (match,) = WordFilter(["superhero", "caped hero", "elf"]).matches([prompt])
    assert not match.matched and match.phrase is None and match.span is None


def test_leetspeak_and_spacing_can_be_turned_off():
    plain = WordFilter(["cat"], leetspeak=False, spacing=False)
    assert [m.matched for m in plain.matches(["a c4t", "a c-a-t", "a Cat", "cats"])] == [False, False, True, True]


def test_a_match_says_where():
    prompt = "one Ｓúper-Heroes here"
    (match,) = WordFilter(["superhero"]).matches([prompt])
    assert match.phrase == "superhero"
    assert prompt[slice(*match.span)] == "Ｓúper-Heroes"


@pytest.mark.parametrize("phrases", [[], ["cat", " !"]])
def test_a_word_filter_needs_words(phrases):
    with pytest.raises(ValueError, match="needs phrases"):
        WordFilter(phrases)


# --- embeddings ------------------------------------------------------------------------------------------------------


def test_the_embedding_of_the_phrase_itself_is_found_and_where(pipe):
    filter = EmbeddingFilter(text_embeddings(pipe), ["van gogh"], threshold=0.999)
    hit, miss, empty = filter.matches(["the cat in the style of van gogh", "an animal", ""])
    assert hit.matched and hit.score == pytest.approx(1, abs=1e-5)
    assert "the cat in the style of van gogh"[slice(*hit.span)] == "van gogh"
    assert not miss.matched and not empty.matched
    assert miss.score < 0.999


def test_text_embeddings_are_of_the_end_token(pipe):
    embedded = text_embeddings(pipe)(["a cat", "a photo of a superhero"])
    for prompt, row in zip(["a cat", "a photo of a superhero"], embedded, strict=True):
        ids = pipe.tokenizer([prompt], return_tensors="pt").input_ids
        assert torch.allclose(row, pipe.text_encoder(ids).last_hidden_state[0, -1], atol=1e-5)
    text_embeddings(pipe)(["a cat " * 200])  # longer than it reads


@pytest.mark.parametrize("architecture", ["sdxl", "sd3", "flux"])
def test_text_embeddings_of_the_other_architectures(architecture):
    assert text_embeddings(tiny(architecture))(["a cat", "an animal with a hat"]).shape[0] == 2


def test_a_pipeline_without_clip_has_no_text_embeddings():
    class Other:
        text_encoder = tokenizer = None

    with pytest.raises(ValueError, match="no CLIP text encoder"):
        text_embeddings(Other())


def test_calibration_keeps_the_declared_rate(pipe):
    samples = [f"a photo of number {i}" for i in range(200)]
    filter = calibrated(EmbeddingFilter(text_embeddings(pipe), ["cat"]), samples, false_positive_rate=0.05)
    stopped = sum(match.matched for match in filter.matches(samples))
    assert 0 <= stopped <= 10
    lower = EmbeddingFilter(text_embeddings(pipe), ["cat"], threshold=filter.threshold - 1e-4)
    assert sum(match.matched for match in lower.matches(samples)) >= stopped
    with pytest.raises(ValueError, match="samples"):
        calibrated(filter, samples[:5], false_positive_rate=0.05)


def test_any_of_stops_what_one_of_them_stops(pipe):
    words, meaning = WordFilter(["cat"]), EmbeddingFilter(text_embeddings(pipe), ["van gogh"], threshold=0.999)
    both = AnyOf([words, meaning])
    prompts = ["a c4t", "in the style of van gogh", "an animal"]
    assert [m.matched for m in both.matches(prompts)] == [True, True, False]
    assert both.name == "words+embedding"


def test_an_output_filter_needs_a_label_the_detector_knows():
    with pytest.raises(ValueError, match="no label 'lion'"):
        OutputFilter(PixelDetector(), "lion")
    assert OutputFilter(Sees(0.7), "Cat").matches([Image.new("RGB", (8, 8))])[0].matched
    assert not OutputFilter(Sees(0.7), "cat", threshold=0.8).matches([Image.new("RGB", (8, 8))])[0].matched
    assert OutputFilter(Sees(0.7), "cat").matches([]) == []


# --- around a pipeline -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["sd1", "sdxl", "sd3", "flux"])
def test_around_every_architecture(architecture):
    pipe = tiny(architecture)
    before, guarded = weights(pipe), GuardedPipeline(pipe, WordFilter(["superhero"]), OutputFilter(Sees(0.1), "cat"))
    size = {"height": 16, "width": 16} if architecture != "flux" else {}
    given = {"prompt": ["a cat", "a superhero"], **SHORT, **size}
    out = guarded(**given, generator=torch.Generator().manual_seed(0))
    bare = pipe(["a cat", ""], **SHORT, **size, generator=torch.Generator().manual_seed(0))
    assert type(out) is type(bare)
    assert [one.action for one in out.guarded] == ["delivered", "blanked"]
    assert out.images[0].tobytes() == bare.images[0].tobytes()
    assert is_grey(out.images[1]) and out.images[1].size == out.images[0].size
    assert identical(before, weights(pipe))


def test_what_passes_is_bit_for_bit_the_pipelines(pipe):
    guarded = GuardedPipeline(pipe, WordFilter(["superhero"]))
    bare = pipe("a cat", latents=noise(1), output_type="np", **SHORT).images
    out = guarded("a cat", latents=noise(1), output_type="np", **SHORT)
    assert np.array_equal(out.images, bare)
    (decision,) = out.guarded
    assert decision.prompt == "a cat" and decision.action == "delivered" and decision.by is None


@pytest.mark.parametrize("kind", ["pil", "np", "pt"])
def test_every_kind_of_picture_is_blanked_and_looked_at(pipe, kind):
    given = {"latents": noise(4), "num_images_per_prompt": 2, "output_type": kind, **SHORT}
    out = GuardedPipeline(pipe, WordFilter(["superhero"]))(["a cat", "superheroes"], **given)
    assert [one.action for one in out.guarded] == ["delivered"] * 2 + ["blanked"] * 2
    assert type(out.images) is type(pipe(["a cat"] * 2, **given).images)
    if kind != "pil":
        assert (out.images[2:] == 0.5).all() and not (out.images[:2] == 0.5).all()
    else:
        assert [is_grey(image) for image in out.images] == [False, False, True, True]
    seen = GuardedPipeline(pipe, output_filter=OutputFilter(Sees(0.9), "cat"))(["a cat", "a dog"], **given)
    assert {(one.action, one.by) for one in seen.guarded} == {("blanked", "output")}


def test_tuples_and_latents(pipe):
    guarded = GuardedPipeline(pipe, WordFilter(["cat"]))
    images, _ = guarded("a cat", latents=noise(1), return_dict=False, **SHORT)
    assert is_grey(images[0])
    latents = guarded(["a cat", "a dog"], latents=noise(2), output_type="latent", **SHORT).images
    assert (latents[0] == 0).all() and (latents[1] != 0).any()
    with pytest.raises(ValueError, match="looks at pictures"):
        GuardedPipeline(pipe, output_filter=OutputFilter(Sees(0.9), "cat"))("a dog", output_type="latent", **SHORT)


def test_raise_stops_a_prompt_before_and_a_picture_after_drawing(pipe):
    calls = []

    class Counting(StableDiffusionPipeline):
        def __call__(self, prompt=None, **kwargs):
            calls.append(prompt)
            return super().__call__(prompt, **kwargs)

    counting = Counting(**pipe.components, requires_safety_checker=False)
    counting.set_progress_bar_config(disable=True)
    with pytest.raises(Stopped, match="input filter stopped a prompt") as stopped:
        GuardedPipeline(counting, WordFilter(["cat"]), on_match="raise")(["a dog", "a cat"], **SHORT)
    assert calls == [] and [one.by for one in stopped.value.decisions] == [None, "input"]
    with pytest.raises(Stopped, match="output filter stopped a picture"):
        GuardedPipeline(counting, None, OutputFilter(Sees(1.0), "cat"), on_match="raise")(prompt="a dog", **SHORT)
    assert calls == ["a dog"]


def test_replace_draws_the_anchor_in_the_place_of_the_phrase(pipe):
    given = {"latents": noise(1), "output_type": "np", **SHORT}
    guarded = GuardedPipeline(pipe, WordFilter(["superhero"]), on_match="replace", anchor="ninja")
    out = guarded("a sup3rhero and a superhero", **given)
    (decision,) = out.guarded
    assert (decision.action, decision.drawn) == ("replaced", "a ninja and a ninja")
    assert np.array_equal(out.images, pipe("a ninja and a ninja", **given).images)
    stuck = GuardedPipeline(pipe, WordFilter(["superhero"]), on_match="replace", anchor="superhero")
    assert stuck("a superhero", **given).guarded[0].action == "blanked"


def test_the_second_prompt_is_read_too():
    guarded = GuardedPipeline(tiny("sdxl"), WordFilter(["superhero"]))
    out = guarded("a cat", prompt_2="a superhero", height=16, width=16, **SHORT)
    assert out.guarded[0].action == "blanked"


def test_embeddings_are_not_read_and_that_is_said(pipe):
    embeds = pipe.encode_prompt("a superhero", "cpu", 1, True)[0]
    guarded = GuardedPipeline(pipe, WordFilter(["superhero"]))
    out = guarded(prompt_embeds=embeds, negative_prompt_embeds=embeds, num_images_per_prompt=2, **SHORT)
    assert [one.action for one in out.guarded] == ["delivered"] * 2
    assert all("cannot read" in one.note for one in out.guarded)


def test_everything_else_is_the_pipelines(pipe):
    guarded = GuardedPipeline(pipe, WordFilter(["cat"]))
    assert guarded.unet is pipe.unet and guarded.scheduler is pipe.scheduler
    kept = pipe.scheduler
    guarded.scheduler = type(kept).from_config(kept.config)
    assert pipe.scheduler is guarded.scheduler is not kept
    pipe.scheduler = kept
    assert guarded.to("cpu") is guarded
    assert copy.copy(guarded).pipe is pipe
    nested = GuardedPipeline(guarded, WordFilter(["dog"]))
    assert [o.action for o in nested(["a dog", "a bird"], latents=noise(2), **SHORT).guarded] == [
        "blanked",
        "delivered",
    ]
    with pytest.raises(AttributeError):
        _ = guarded.no_such_thing


def test_wrong_settings_are_refused(pipe):
    with pytest.raises(ValueError, match="unknown on_match"):
        GuardedPipeline(pipe, WordFilter(["cat"]), on_match="ignore")
    with pytest.raises(ValueError, match="needs a filter"):
        GuardedPipeline(pipe)
    with pytest.raises(ValueError, match="on_match='raise'"):
        Guard(WordFilter(["cat"]), on_match="raise")


def test_a_guard_is_a_change_for_an_evaluation(pipe):
    guard = Guard(WordFilter(["superhero"]), OutputFilter(Sees(0.1), "cat"))
    model, before = Model("guard", "erased", guard), weights(pipe)
    assert isinstance(guard, Wraps) and model.kind == "filter"
    assert model.config["input_filter"]["phrases"] == ["superhero"]
    decisions = []
    with model.on(pipe) as drawn:
        drawn.log = decisions.append
        pictures = generate(drawn, ["a cat", "a superhero"], seeds=(0, 1), progress=False, batch_size=3, **SHORT)
    bare = generate(pipe, ["a cat"], seeds=(0, 1), progress=False, **SHORT)
    assert [one.action for one in decisions] == ["delivered"] * 2 + ["blanked"] * 2
    assert all(is_grey(image) for image in pictures[1])
    assert [np.asarray(i).tobytes() for i in pictures[0]] == [np.asarray(i).tobytes() for i in bare[0]]
    assert identical(before, weights(pipe))


def test_one_phrase_is_a_phrase_and_not_its_letters():
    assert [m.matched for m in WordFilter("superhero").matches(["a superhero", "a cat"])] == [True, False]
    assert WordFilter("superhero").phrases == ("superhero",)
    assert Guard.of_words("superhero").config["input_filter"]["phrases"] == ["superhero"]


def test_a_guard_around_a_guard_says_what_both_did(pipe):
    inner = GuardedPipeline(pipe, WordFilter(["cat"]))
    outer = GuardedPipeline(inner, WordFilter(["dog"]), on_match="replace", anchor="cat")
    out = outer(["a cat", "a dog", "a ninja"], **SHORT)
    assert [one.action for one in out.guarded] == ["blanked", "blanked", "delivered"]
    assert [one.prompt for one in out.guarded] == ["a cat", "a dog", "a ninja"]
    assert [is_grey(image) for image in out.images] == [True, True, False]


def test_prompts_that_are_no_texts_are_refused_in_a_sentence(pipe):
    guarded = GuardedPipeline(pipe, WordFilter(["cat"]))
    for prompt in (7, [], ["a cat", None]):
        with pytest.raises(ValueError, match="prompt is a text or a list of texts"):
            guarded(prompt, **SHORT)
    two = GuardedPipeline(tiny("sdxl"), WordFilter(["cat"]))
    with pytest.raises(ValueError, match="as many texts of each kind"):
        two(["a dog", "a cat"], prompt_2="a cat", **SHORT)
