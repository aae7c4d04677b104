"""The text side: encoders in any mode, textual inversions of several vectors, clip_skip, half precision."""

import copy

import pytest
import torch

from erasure import Concept, erase
from erasure.backbone import backbone_of
from erasure.backbone.unet import SDXLBackbone, UNetBackbone
from erasure.methods import BUILT_IN, method_class
from erasure.methods.closed_form import ClosedForm
from tests.slow import first
from tests.tiny import ARCHITECTURES, identical, make, tiny, weights

CLOSED_FORMS = [name for name in sorted(BUILT_IN) if issubclass(method_class(name), ClosedForm)]


def encoders(pipe):
    backbone = backbone_of(pipe)
    return [module for name, module in backbone.components.items() if name not in backbone.denoisers]


# --- mode ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_encoders_in_train_mode_encode_as_in_evaluation_mode_and_stay_in_it(architecture):
    pipe = tiny(architecture)
    prompts = ["a superhero", "", "van gogh"]
    expected = backbone_of(pipe).encode(prompts)
    for module in encoders(pipe):
        module.train()
        next(module.children()).eval()  # modes may differ within one
    modes = [[m.training for m in module.modules()] for module in encoders(pipe)]
    assert any(isinstance(m, torch.nn.Dropout) and m.p and m.training for e in encoders(pipe) for m in e.modules()) == (
        architecture in ("sd3", "flux")
    )
    for _ in range(2):
        found = backbone_of(pipe).encode(prompts)
        assert torch.equal(found.hidden, expected.hidden)
        assert found.pooled is None or torch.equal(found.pooled, expected.pooled)
    with pytest.raises(ValueError, match="longer"):
        backbone_of(pipe).encode(["superhero " * 600])
    assert modes == [[m.training for m in module.modules()] for module in encoders(pipe)]


# --- textual inversions ----------------------------------------------------------------------------------------------


def with_hero(architecture, vectors=2):
    """A pipeline with a textual inversion ``<hero>`` of several vectors, the same at every call."""
    pipe, pairs = tiny(architecture), [("tokenizer", "text_encoder")]
    pairs += [("tokenizer_2", "text_encoder_2")] if architecture == "sdxl" else []
    generator = torch.Generator().manual_seed(1)
    for tokenizer, encoder in pairs:
        setattr(pipe, tokenizer, copy.deepcopy(getattr(pipe, tokenizer)))
        width = getattr(pipe, encoder).get_input_embeddings().weight.shape[1]
        pipe.load_textual_inversion(
            torch.randn(vectors, width, generator=generator),
            token="<hero>",
            text_encoder=getattr(pipe, encoder),
            tokenizer=getattr(pipe, tokenizer),
        )
    return pipe


SDS = ("sd1", "sd2", "sdxl")


@pytest.mark.parametrize("architecture", first(SDS, "sd1", "sdxl"))
@pytest.mark.parametrize("vectors", first([1, 2, 3], 3))
def test_a_textual_inversion_is_encoded_as_the_pipeline_encodes_it(architecture, vectors):
    pipe = with_hero(architecture, vectors)
    prompts = ["a photo of <hero>", "<hero>"]
    given = {"device": pipe.device, "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    found = backbone_of(pipe).encode(prompts)
    torch.testing.assert_close(found.hidden, pipe.encode_prompt(prompts, **given)[0], rtol=1e-4, atol=1e-5)
    assert found.counts == (5 + vectors, 2 + vectors)  # start, "a photo of", the vectors, end
    assert found.span("content")[1] == slice(1, 1 + vectors)
    assert found.span("last_subject")[1] == slice(vectors, 1 + vectors)


@pytest.mark.parametrize("architecture", first(SDS, "sd1"))
def test_both_spellings_of_a_textual_inversion_are_one_erasure(architecture):
    pipe = with_hero(architecture)
    for preset in ("official-2025", "recommended"):
        short, long = (
            make(pipe, name, preset=preset, keep=["a dog"]).tensors for name in ("<hero>", "<hero> <hero>_1")
        )
        assert identical(short, long)
    other = make(pipe, "hero", preset="recommended", keep=["a dog"]).tensors
    assert not identical(short, other)


# --- clip_skip -------------------------------------------------------------------------------------------------------


def skipping(pipe, clip_skip):
    return (SDXLBackbone if pipe.unet.config.addition_embed_type else UNetBackbone)(pipe, clip_skip=clip_skip)


@pytest.mark.parametrize("architecture", SDS)
@pytest.mark.parametrize("skip", [None, 1])
def test_clip_skip_encodes_the_layer_the_pipeline_draws_with(architecture, skip):
    pipe = tiny(architecture)
    given = {"device": pipe.device, "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    vars(pipe.text_encoder).setdefault("text_model", pipe.text_encoder)  # where diffusers looks
    theirs = pipe.encode_prompt(["a superhero"], **given, clip_skip=skip)[0]
    torch.testing.assert_close(skipping(pipe, skip).encode(["a superhero"]).hidden, theirs, rtol=1e-4, atol=1e-5)


def remaining(pipe, edit, skip):
    """How far from the anchor's the target's embedding is, at one layer, as a share of what it was."""
    x, y = skipping(pipe, skip).encode(["superhero", "ninja"]).take("last_subject")
    return ((edit.map(x) - y).norm() / (x - y).norm()).item()


def test_an_erasure_is_at_the_layers_it_was_asked_for():
    pipe, concept = tiny("sd1"), Concept("superhero", anchor="ninja")
    settings = {"preset": "official-2025", "lamb": 1e-4, "keep": ["wizard"], "apply": False}
    last, before, both = (erase(skipping(pipe, skip), concept, **settings) for skip in (None, 1, "both"))
    assert remaining(pipe, last, None) < 0.05 < remaining(pipe, last, 1) - 0.1
    assert remaining(pipe, before, 1) < 0.05 < remaining(pipe, before, None) - 0.1
    assert remaining(pipe, both, None) < 0.05 and remaining(pipe, both, 1) < 0.05
    assert both.tensors["hidden.u"].shape[1] == 2 * last.tensors["hidden.u"].shape[1]
    assert "encoding" not in last.config and "clip_skip" not in last.card()
    assert before.config["encoding"] == {"clip_skip": 1} and "clip_skip=1" in before.card().replace("\\_", "_")
    assert both.config["encoding"] == {"clip_skip": "both"}


@pytest.mark.parametrize("method", first(CLOSED_FORMS, "speed", "mace-cfr", "double-projections"))
def test_every_closed_form_erases_at_both_layers(method):
    pipe = tiny("sd1")
    before = weights(pipe)
    concept = Concept("superhero", anchor="ninja")
    # A tiny encoder is so narrow that the embeddings of the keep list may span all of it.
    settings = {"keep": ["wizard", "batman"], "apply": False} | ({"rank": 8} if method == "double-projections" else {})
    one, both = (erase(skipping(pipe, skip), concept, method, **settings) for skip in (None, "both"))
    assert one.tensors["hidden.u"].shape != both.tensors["hidden.u"].shape or not identical(one.tensors, both.tensors)
    both.apply(pipe).remove(pipe)
    assert identical(before, weights(pipe))


def test_kept_prompts_are_kept_at_both_layers():
    pipe, concept = tiny("sd1"), Concept("superhero", anchor="ninja")
    settings = {"preset": "official-2025", "lamb": 1e-4, "keep": ["wizard"], "apply": False}
    at = {skip: erase(skipping(pipe, skip), concept, **settings) for skip in (None, "both")}

    def moved(edit, skip):
        [x] = skipping(pipe, skip).encode(["wizard"]).take("last_subject")
        return ((edit.map(x) - x).norm() / x.norm()).item()

    assert moved(at["both"], None) < 0.02 and moved(at["both"], 1) < 0.02 < moved(at[None], 1)


def test_what_cannot_be_skipped_is_refused():
    pipe = tiny("sd1")
    for wrong in (-1, 12, "last"):
        with pytest.raises(ValueError, match="clip_skip is a number of layers, or 'both'"):
            UNetBackbone(pipe, clip_skip=wrong)
    for architecture, skip in (("sd1", 3), ("sdxl", 2)):
        with pytest.raises(ValueError, match=f"clip_skip={skip} is more than"):
            skipping(tiny(architecture), skip).encode(["a cat"])
    with pytest.raises(ValueError, match="clip_skip='both' is for closed forms"):
        erase(UNetBackbone(pipe, clip_skip="both"), "superhero", "esd", keep=["wizard"], progress=False)


# --- half precision --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", first(["sd1", "sdxl", "sd3", "flux"], "sd1"))
def test_a_closed_form_of_a_bfloat16_pipeline_is_that_of_the_same_weights_in_float32(architecture):
    pipe = tiny(architecture).to(torch.bfloat16)
    before = weights(pipe)
    pooled = architecture != "sd1"
    settings = {"keep": ["wizard", "batman"], "pooled": pooled}
    half = make(pipe, Concept("superhero", anchor="ninja"), **settings)
    assert identical(before, weights(pipe))
    whole = make(pipe.to(torch.float32), Concept("superhero", anchor="ninja"), **settings)
    for space in whole.spaces:
        ours, theirs = (e.tensors[f"{space}.u"] @ e.tensors[f"{space}.v"].T for e in (half, whole))
        assert (ours - theirs).norm() <= 0.01 * theirs.norm()
