"""Every architecture: conditioning is the pipeline's own, spans are right, and an edit does what the algebra says."""

import dataclasses
import runpy
import types
from pathlib import Path

import open_clip
import pytest
import torch
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm

from erasure import Concept, Erasure, erase, save_denoiser
from erasure.backbone import Backbone, architectures, backbone_of, denoiser_of
from erasure.backbone.flux import FluxBackbone
from erasure.backbone.sd3 import SD3Backbone
from erasure.backbone.unet import SDXLBackbone, UNetBackbone
from erasure.eval import generate
from erasure.eval.core.pictures import image_hash, weights_hash
from erasure.methods import BUILT_IN, method_class
from erasure.methods.base import Request
from erasure.methods.closed_form import ClosedForm
from erasure.train import Draw
from tests.reference import uce as reference
from tests.slow import first
from tests.tiny import ARCHITECTURES, clip_tokenizer, identical, make, t5_tokenizer, tiny, unet, weights

EVERY = pytest.mark.parametrize("architecture", ARCHITECTURES)
# Where a pooled embedding is edited too, the token embeddings are edited as without it; sd2 is edited as sd1 is.
POOLED = pytest.mark.parametrize(
    ("architecture", "pooled"),
    first(
        ((a, p) for a in ARCHITECTURES for p in (False, True) if not p or a not in ("sd1", "sd2")),
        ("sd1", False), ("sd3", True), ("flux", True),
    ),
)  # fmt: skip
TARGETS, GUIDES, KEPT = ["superhero", "Van Gogh style"], ["ninja", ""], ["a wizard", "batman"]
SIZE = {"num_inference_steps": 2, "progress": False}


def double(pipe):
    for module in backbone_of(pipe).components.values():
        module.double()
    return pipe


def official(pipe, targets=TARGETS, guides=GUIDES, kept=KEPT, **settings):
    concepts = [Concept(target, anchor=guide) for target, guide in zip(targets, guides, strict=True)]
    return make(pipe, concepts, "uce", preset="official-2025", keep=kept, **settings)


def listening(pipe):
    """Random layers hardly listen to the text: make them."""
    with torch.no_grad():
        for site in backbone_of(pipe).text_sites().values():
            site.linear.weight.mul_(20)


def edited_weights(pipe, edit):
    """The part of every edited weight that multiplies the embedding."""
    backbone = backbone_of(pipe)
    edit.apply(pipe)
    sites = {f"{name}.weight": site for space in backbone.spaces for name, site in backbone.text_sites(space).items()}
    found = {name: sites[name].weight.double().clone() for name in edit.parameter_names}
    edit.remove(pipe)
    return found


def relative_error(ours, theirs):
    assert ours.keys() == theirs.keys()
    return max(((ours[name] - theirs[name]).norm() / theirs[name].norm()).item() for name in theirs)


# --- tokenizers and spans --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompt",
    [
        "Spiderman",
        "an axolotl",
        "Van Gogh style",
        "hello!!! world",
        "it's 42, ok?",
        "🦸 hero",
        "蜘蛛侠",
        "café",
        "a  b\n c",
        "",
    ],
)
def test_the_tiny_tokenizer_is_clips(prompt):
    theirs = open_clip.tokenize(prompt)[0]
    assert clip_tokenizer()(prompt).input_ids == theirs[: int(theirs.argmax()) + 1].tolist()
    assert len(clip_tokenizer()) == 49408


@pytest.mark.parametrize("architecture", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize(
    ("prompt", "content"),
    [
        ("Spiderman", ["spiderman</w>"]),
        ("Van Gogh style", ["van</w>", "gogh</w>", "style</w>"]),
        ("an axolotl", ["an</w>", "ax", "o", "lot", "l</w>"]),
        ("spider-man's", ["spider</w>", "-</w>", "man</w>", "'s</w>"]),
        ("🦸", ["ðŁ¦", "¸</w>"]),
        ("蜘蛛", ["è", "ľ", "ĺ", "è", "Ľ", "Ľ</w>"]),
        ("", []),
    ],
)
def test_spans_on_clips_vocabulary(architecture, prompt, content):
    pipe = tiny(architecture)
    conditioning = backbone_of(pipe).encode(["a wizard", prompt])
    pieces = pipe.tokenizer.convert_ids_to_tokens(conditioning.ids[1].tolist())
    found = {
        name: pieces[conditioning.span(name)[1]] for name in ("bos", "content", "last_subject", "eos", "tail", "all")
    }
    assert found["bos"] == ["<|startoftext|>"] and found["eos"] == ["<|endoftext|>"] and len(found["all"]) == 77
    assert found["content"] == content
    assert found["last_subject"] == (content[-1:] or ["<|startoftext|>"])
    assert found["tail"] == ["<|endoftext|>", *[pipe.tokenizer.pad_token] * (75 - len(content))]
    assert pieces[conditioning.span("subject_to_end")[1]] == [*found["last_subject"], *found["tail"]]


def test_a_word_that_is_also_padding_is_counted_as_a_word():
    pipe = tiny("sd2")
    conditioning = backbone_of(pipe).encode(["a cat!"])
    assert conditioning.ids[0, :6].tolist() == [*pipe.tokenizer("a cat!").input_ids, 0]
    assert conditioning.ids[0, conditioning.span("last_subject")[0]].tolist() == [0] and conditioning.counts == (5,)


@pytest.mark.parametrize("architecture", ["sd3", "flux"])
def test_spans_where_there_is_no_start_token(architecture):
    conditioning = backbone_of(tiny(architecture)).encode(["a superhero", "cat", ""])
    t5 = conditioning.segments[-1]
    words = t5_tokenizer()
    for i, prompt in enumerate(["a superhero", "cat", ""]):
        pieces, content = words.convert_ids_to_tokens(t5.ids[i].tolist()), words.tokenize(prompt)
        assert pieces[t5.span("content")[i]] == content
        assert pieces[t5.span("last_subject")[i]] == (content[-1:] or ["</s>"])
        assert pieces[t5.span("bos")[i]] == pieces[t5.span("eos")[i]] == ["</s>"]
        assert pieces[t5.span("tail")[i]] == ["</s>", *["<pad>"] * (len(pieces) - len(content) - 1)]
        assert pieces[t5.span("subject_to_end")[i]] == [*content[-1:], "</s>", *["<pad>"] * pieces.count("<pad>")]
    ends = conditioning.take("eos")
    assert [len(rows) for rows in ends] == [len(conditioning.segments)] * 3


def test_a_sequence_of_two_encoders_has_no_single_span():
    conditioning = backbone_of(tiny("sd3")).encode(["a cat"])
    assert [s.hidden.shape[1] for s in conditioning.segments] == [77, 256] and conditioning.ids is None
    with pytest.raises(ValueError, match="2 tokenizers"):
        conditioning.span("eos")
    rows = conditioning.take("last_subject")[0]
    clip, t5 = (segment.take("last_subject")[0] for segment in conditioning.segments)
    assert torch.equal(rows, torch.cat([clip, t5]))


@EVERY
def test_conditioning_is_what_the_pipeline_computes(architecture):
    pipe = tiny(architecture)
    prompts = ["a superhero", "", "Van Gogh style!!! 🦸", "x"] * 5  # more than one batch
    ours = backbone_of(pipe).encode(prompts)
    assert len(ours) == 20
    for i, prompt in enumerate(prompts[:4]):
        given = {"prompt_2": prompt, "prompt_3": prompt} if architecture == "sd3" else {}
        given |= {} if architecture == "flux" else {"do_classifier_free_guidance": False}
        given |= {"device": pipe.device, "num_images_per_prompt": 1}
        hidden, *others = pipe.encode_prompt(prompt, **given)
        torch.testing.assert_close(ours.hidden[i + 16], hidden[0], rtol=1e-4, atol=1e-5)
        if architecture in ("sd1", "sd2"):
            assert ours.pooled is None
        else:
            pooled = others[0] if architecture == "flux" else others[1]
            torch.testing.assert_close(ours.pooled[i + 16], pooled[0], rtol=1e-4, atol=1e-5)
        assert all(torch.equal(a, ours.hidden[i]) for a in [torch.cat([s.hidden[i] for s in ours.segments])])


@EVERY
def test_leaving_out_padding_changes_no_token_before_it(architecture):
    backbone = backbone_of(tiny(architecture))
    prompts = ["spiderman", "", "a painting in the style of van gogh!!!"]
    whole, short = backbone.encode(prompts), backbone.encode(prompts, padded=False)
    for span in ("bos", "content", "last_subject", "eos"):
        for a, b in zip(whole.take(span), short.take(span), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    if whole.pooled is not None:
        torch.testing.assert_close(whole.pooled, short.pooled, rtol=1e-4, atol=1e-5)
    if architecture in ("sd1", "sd2", "sdxl"):
        assert short.hidden.shape[1] < whole.hidden.shape[1]


@EVERY
def test_no_prompts_are_refused(architecture):
    with pytest.raises(ValueError, match="no prompts"):
        backbone_of(tiny(architecture)).encode([])


@pytest.mark.parametrize(
    ("architecture", "prompt", "which"),
    [
        *((architecture, "superhero " * 80, r"of 77 \(tokenizer\)") for architecture in ARCHITECTURES),
        ("sdxl", "!!! " * 30, r"of 77 \(tokenizer_2\)"),  # three tokens each to the encoder that pads with "!"
        ("sd3", "superhero " * 40, r"of 256 \(tokenizer_3\)"),
        ("flux", "superhero " * 74, r"of 512 \(tokenizer_2\)"),
    ],
)
def test_a_prompt_longer_than_any_encoder_is_refused(architecture, prompt, which):
    if architecture in ("sd3", "flux") and "of 77" in which:
        prompt = "a " * 80
    with pytest.raises(ValueError, match=f"longer than the text encoder reads; .* {which}"):
        backbone_of(tiny(architecture)).encode(["a cat", prompt])


def test_t5_can_be_left_out_of_sd3():
    pipe, lean = tiny("sd3"), tiny("sd3")
    lean.text_encoder_3 = lean.tokenizer_3 = None
    conditioning = backbone_of(lean).encode(["a superhero"])
    assert torch.equal(conditioning.hidden[:, :77], backbone_of(pipe).encode(["a superhero"]).hidden[:, :77])
    assert conditioning.hidden.shape[1] == 77 + 256 and not conditioning.hidden[:, 77:].any()
    assert len(conditioning.take("all")[0]) == 77
    edit = official(lean)
    assert edit.tensors["hidden.u"].shape[1] == 2 and official(pipe).tensors["hidden.u"].shape[1] == 4
    before = weights_hash(lean)
    edit.apply(lean)
    assert weights_hash(lean) != before


def test_flux_is_encoded_at_the_length_that_is_drawn_with():
    pipe = tiny("flux")
    assert FluxBackbone(pipe, max_sequence_length=256).encode(["cat"]).hidden.shape[1] == 256
    assert backbone_of(pipe).encode(["cat"]).hidden.shape[1] == 512
    edit = erase(FluxBackbone(pipe, max_sequence_length=256), "superhero", preset="official-2025", keep=["cat"])
    edit.remove(pipe)


# --- which pipelines -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "kind", "prediction_type"),
    [
        ("sd1", UNetBackbone, "epsilon"),
        ("sd2", UNetBackbone, "v_prediction"),
        ("sdxl", SDXLBackbone, "epsilon"),
        ("sd3", SD3Backbone, "velocity"),
        ("flux", FluxBackbone, "velocity"),
    ],
)
def test_a_pipeline_is_recognised(architecture, kind, prediction_type):
    backbone = backbone_of(tiny(architecture))
    assert type(backbone) is kind and backbone.prediction_type == prediction_type
    assert backbone_of(backbone) is backbone
    with pytest.raises(ValueError, match="no nonsense text embeddings"):
        backbone.text_sites("nonsense")


def without(architecture, name):
    pipe = tiny(architecture)
    setattr(pipe, name, None)
    return pipe


def deaf():
    pipe = tiny("sd1")
    pipe.unet = torch.nn.Module()
    pipe.unet.dtype = torch.float32
    return pipe


def with_unet(**settings):
    pipe = tiny("sd1")
    pipe.unet = unet(32, **settings)
    return pipe


def normed():
    pipe = tiny("sd1")
    for module in pipe.unet.modules():
        if getattr(module, "is_cross_attention", False):
            module.norm_cross = torch.nn.LayerNorm(32)
    return pipe


@pytest.mark.parametrize(
    ("pipe", "fault"),
    [
        (
            lambda: types.SimpleNamespace(transformer=torch.nn.Linear(2, 2)),
            "has a Linear; give .*FLUX.1.*Stable Diffusion XL",
        ),
        (lambda: "emoji-world", "a pipeline is needed, not its name 'emoji-world'; open it"),
        (lambda: types.SimpleNamespace(vae=None), "has no denoiser; give .*Stable Diffusion 1.x"),
        (lambda: without("sdxl", "text_encoder"), "StableDiffusionXLPipeline has no text_encoder.*reads 40"),
        (lambda: without("sdxl", "tokenizer"), "not a Stable Diffusion XL pipeline; .* has no tokenizer"),
        (lambda: without("sd3", "text_encoder_2"), "StableDiffusion3Pipeline has no text_encoder_2.*reads 32"),
        (lambda: without("sd3", "tokenizer_2"), "not a Stable Diffusion 3 / 3.5 pipeline; .* has no tokenizer_2"),
        (lambda: without("flux", "text_encoder"), "FLUX.1 pipeline; FluxPipeline has no text_encoder"),
        (lambda: without("flux", "tokenizer_2"), "FLUX.1 pipeline; FluxPipeline has no tokenizer_2"),
        (lambda: tiny("sd1").unet, "UNet2DConditionModel is the denoiser alone; give the pipeline that holds it"),
        (deaf, "does not read text where theirs do"),
        (
            lambda: with_unet(addition_embed_type="text", addition_embed_type_num_heads=2),
            "reads the text a second time",
        ),
        (normed, "a norm of its own in front of the text"),
    ],
)
def test_what_is_not_supported_is_named_with_what_is(pipe, fault):
    with pytest.raises(ValueError, match=fault):
        backbone_of(pipe())


PARTS = [(a, part) for a in ARCHITECTURES for part in backbone_of(tiny(a)).components]


@pytest.mark.parametrize(("architecture", "part"), PARTS)
@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda pipe, part: getattr(pipe, part).half(), "different dtypes"),
        (lambda pipe, part: setattr(getattr(pipe, part), "is_quantized", True), "quantised"),
        (lambda pipe, part: setattr(getattr(pipe, part), "_compiled_call_impl", print), "compiled"),
        (lambda pipe, part: getattr(pipe, part).to("meta"), "meta device"),
        (lambda pipe, part: setattr(next(getattr(pipe, part).children()), "_hf_hook", object()), "offloaded"),
        (lambda pipe, part: setattr(next(getattr(pipe, part).children()), "base_layer", object()), "LoRA"),
    ],
    ids=["dtype", "quantised", "compiled", "meta", "offloaded", "lora"],
)
def test_every_component_of_every_architecture_is_checked(architecture, part, change, fault):
    pipe = tiny(architecture)
    change(pipe, part)
    with pytest.raises(ValueError, match=fault):
        backbone_of(pipe)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda pipe, one, other: setattr(one, "weight", other.weight), "share one weight.*edited twice"),
        (lambda pipe, one, other: setattr(one.weight, "data", other.weight.data), "share one weight.*edited twice"),
        (lambda pipe, one, other: weight_norm(one), "computes its weight from other tensors.*would be lost"),
        (lambda pipe, one, other: prune.random_unstructured(one, "weight", 0.3), "other tensors .weight_orig."),
        (lambda pipe, one, other: weight_norm(pipe.unet.conv_in), "unet.conv_in computes its weight"),
        (lambda pipe, one, other: weight_norm(pipe.text_encoder.encoder.layers[0].mlp.fc1), "text_encoder.* computes"),
    ],
)
@pytest.mark.parametrize("method", ["uce", "esd"])
def test_weights_that_cannot_be_edited_alone_are_refused_before_any_work(method, change, fault):
    pipe = tiny("sd1")
    one, other, *_ = (m.to_k for n, m in pipe.unet.named_modules() if n.endswith("attn2") and m.to_k.out_features == 16)
    change(pipe, one, other)
    with pytest.raises(ValueError, match=fault):
        make(pipe, "superhero", method, keep=["ninja"])


def test_keys_that_are_no_linear_are_refused():
    pipe = tiny("sd1")
    attention = next(m for n, m in pipe.unet.named_modules() if n.endswith("attn2"))
    attention.to_k = torch.nn.Sequential(attention.to_k)
    with pytest.raises(ValueError, match="to_k, which receives the text, is a Sequential and no linear layer"):
        backbone_of(pipe)


@EVERY
def test_fused_projections_and_compiled_denoisers_are_refused(architecture):
    pipe = tiny(architecture)
    denoiser_of(pipe).fuse_qkv_projections()
    with pytest.raises(ValueError, match="fused query-key-value projections.* load the pipeline again"):
        backbone_of(pipe)
    pipe = tiny(architecture)
    name = backbone_of(pipe).denoiser_name
    setattr(pipe, name, torch.compile(denoiser_of(pipe)))
    with pytest.raises(ValueError, match=f"the {name} is compiled"):
        backbone_of(pipe)


# --- edits -----------------------------------------------------------------------------------------------------------


@POOLED
def test_weights_equal_the_per_layer_reference(architecture, pooled):
    pipe = double(tiny(architecture))
    ours = edited_weights(pipe, official(pipe, pooled=pooled))
    assert relative_error(ours, reference.edit(pipe, TARGETS, GUIDES, KEPT, pooled=pooled)) <= 1e-6


@POOLED
def test_recommended_weights_equal_the_per_layer_reference(architecture, pooled):
    """From the last word piece to the end of the sequence, in sentences too; every token of what is kept."""
    pipe = double(tiny(architecture))
    concept = Concept("superhero", anchor="ninja")
    edit = make(pipe, concept, "uce", keep=["wizard"], keep_everyday=False, pooled=pooled)
    theirs = {}
    for name, (w, space) in reference.layers(pipe).items():
        if space == "pooled" and not pooled:
            continue
        pairs, kept = [], []
        sentences = [f"{what} of " for what in ("image", "photo", "portrait", "picture", "painting")]
        for before in ("", "a ", *sentences):
            (x, x_pooled), (y, y_pooled) = (
                reference.embeddings(pipe, before + word) for word in ("superhero", "ninja")
            )
            sequences = zip(x, y, strict=True) if space == "hidden" else [(x_pooled[None], y_pooled[None])]
            pairs += [pair for a, b in sequences for pair in zip(a, b, strict=False)]
        for article in ("", "a "):
            conditioning = backbone_of(pipe).encode([f"{article}wizard"])
            kept += list((conditioning.hidden if space == "hidden" else conditioning.pooled[None])[0])
        theirs[name] = reference.ridge(w, pairs, kept, 0.5, 3.0, 1.0)
    assert relative_error(edited_weights(pipe, edit), theirs) <= 1e-6


@POOLED
@pytest.mark.parametrize("lamb", first([0.5, 1e-6], 1e-6))
def test_the_guide_is_reached_and_the_kept_stay_within_the_ridge_bound(architecture, pooled, lamb):
    """Some D solves D X_e = W (Y_e - X_e), D X_p = 0 exactly, so the ridge leaves at most sqrt(lamb) |D| of either."""
    pipe = double(tiny(architecture))
    edit = official(pipe, ["superhero"], ["ninja"], ["wizard"], lamb=lamb, pooled=pooled)
    edited = edited_weights(pipe, edit)
    originals = {name: w for name, (w, space) in reference.layers(pipe).items() if name in edited}
    spaces = {name: space for name, (_, space) in reference.layers(pipe).items()}
    for name, w in originals.items():
        x, y, kept = (
            torch.stack([part[0] for part in hidden] if spaces[name] == "hidden" else [one]).T
            for hidden, one in (reference.embeddings(pipe, prompt) for prompt in ("superhero", "ninja", "wizard"))
        )
        exact = torch.cat([w @ (y - x), torch.zeros_like(w @ kept)], dim=1) @ torch.linalg.pinv(torch.cat([x, kept], 1))
        rounding = 1e-5 * (w @ y).norm()  # of the factors, which are stored in float32
        bound = lamb**0.5 * exact.norm() + rounding
        assert (edited[name] @ x - w @ y).norm() <= bound
        assert (edited[name] @ kept - w @ kept).norm() <= bound
        if lamb == 1e-6:
            assert (edited[name] @ x - w @ y).norm() <= 0.01 * (w @ x - w @ y).norm()
    assert (len(edited) == len(originals)) and ("pooled.u" in edit.tensors) == pooled


@POOLED
@pytest.mark.parametrize("preset", first(["official-2025", "recommended"], "recommended"))
def test_an_edit_touches_its_layers_alone_and_is_undone_bit_for_bit(architecture, pooled, preset, tmp_path):
    pipe = tiny(architecture)
    backbone, before = backbone_of(pipe), weights(pipe)
    edit = make(pipe, "superhero", "uce", preset=preset, keep=["wizard"], pooled=pooled)
    assert identical(before, weights(pipe))
    sites = {
        name: site for space in ("hidden", "pooled")[: 1 + pooled] for name, site in backbone.text_sites(space).items()
    }
    assert set(edit.parameter_names) == {f"{name}.weight" for name in sites}
    edit.apply(pipe)
    after = weights(pipe)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"{backbone.denoiser_name}.{name}.weight" for name in sites}  # so no bias
    for name, site in sites.items():
        if site.columns:
            start, stop = site.columns
            rest = [w[f"unet.{name}.weight"][:, stop:] for w in (before, after)]
            assert start == 0 and rest[0].shape[1] == 24 and torch.equal(*rest)
    edit.save_pretrained(tmp_path / "edit")
    edit.apply(pipe, 0.0)
    assert identical(before, weights(pipe))
    edit.remove(pipe)
    assert identical(before, weights(pipe))
    loaded = Erasure.from_pretrained(tmp_path / "edit").apply(pipe)
    assert identical(after, weights(pipe))
    loaded.remove(pipe)
    with pytest.raises(ValueError, match="wrong base"):
        loaded.apply(tiny(architecture, seed=1))


@POOLED
@pytest.mark.parametrize("preset", first(["official-2025", "recommended"], "recommended"))
def test_pictures_of_the_target_change_and_come_back(architecture, pooled, preset):
    pipe = tiny(architecture)

    def latents():
        generator = torch.Generator().manual_seed(0)
        return pipe("superhero", num_inference_steps=2, generator=generator, output_type="latent").images

    before = latents()
    edit = erase(pipe, Concept("superhero", anchor="ninja"), preset=preset, keep=["wizard"], pooled=pooled)
    assert (latents() - before).abs().max() > 1e-5
    edit.apply(pipe, 0.0)
    assert torch.equal(latents(), before)
    edit.remove(pipe)
    assert torch.equal(latents(), before)


@EVERY
def test_the_evaluator_sees_the_edit(architecture):
    """Moving every token of a sentence onto another's draws, as nearly as can be, the other's picture."""
    pipe = tiny(architecture)
    listening(pipe)
    before = generate(pipe, ["superhero"], **SIZE)[0][0]
    concept = Concept("superhero", anchor="ninja")
    edit = erase(pipe, concept, preset="official-2025", token_span="all", lamb=1e-6, keep=["wizard"])
    assert image_hash(generate(pipe, ["superhero"], **SIZE)[0][0]) != image_hash(before)
    edit.remove(pipe)
    assert image_hash(generate(pipe, ["superhero"], **SIZE)[0][0]) == image_hash(before)


@pytest.mark.parametrize("architecture", ["sd1", "sd2"])
def test_a_pooled_edit_needs_a_pooled_embedding(architecture):
    with pytest.raises(ValueError, match="no pooled text embedding"):
        official(tiny(architecture), pooled=True)


@pytest.mark.parametrize("architecture", ["sd3", "flux"])
def test_a_method_that_does_not_know_the_architecture_says_so_before_any_work(architecture, monkeypatch):
    pipe = tiny(architecture)
    monkeypatch.setattr(type(pipe), "encode_prompt", lambda *args, **kwargs: pytest.fail("work was done"))
    with pytest.raises(ValueError, match="adv-unlearn does not work on .*; it supports Stable Diffusion 1.x / 2.x"):
        erase(pipe, "superhero", "adv-unlearn", keep=["wizard"])


# --- fine-tunes ------------------------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize(("steps", "guidance"), [(4, 3.0), (1, None), (4, 0.0)])
def test_trajectory_is_what_the_pipelines_own_call_gives_its_denoiser(architecture, steps, guidance):
    pipe = tiny(architecture)
    backbone, seen = backbone_of(pipe), []
    noise = torch.randn(1, *backbone.latent_shape, generator=torch.Generator().manual_seed(3))
    settings = {"num_inference_steps": steps, "guidance_scale": guidance}
    ours = list(backbone.trajectory(backbone.encode(["a superhero"]).text, noise, **settings))
    name = {"sd3": "hidden_states", "flux": "hidden_states"}.get(architecture, "sample")
    handle = denoiser_of(pipe).register_forward_pre_hook(
        lambda module, args, given: seen.append(given.get(name, args[0] if args else None)), with_kwargs=True
    )
    given = {key: value for key, value in settings.items() if value is not None}
    pipe("a superhero", latents=noise, output_type="latent", **given)
    handle.remove()
    assert len(ours) == len(seen) == steps
    for step, theirs in zip(ours, seen, strict=True):
        torch.testing.assert_close(step.x, theirs[-1:], rtol=1e-4, atol=1e-4)
    guided = backbone.guidance == "cfg" and guidance != 0.0
    assert all((step.unconditional is not None) == guided for step in ours)


SDXL_PRESETS = [p for p in method_class("esd").presets if "sdxl" in p]


@pytest.mark.slow
@pytest.mark.parametrize("preset", first(SDXL_PRESETS, "official-2025-sdxl-x-strict", "official-2025-sdxl-u"))
def test_esd_trains_sdxl(preset):
    pipe = tiny("sdxl")
    listening(pipe)
    backbone, before = backbone_of(pipe), weights(pipe)
    quick = {
        "iterations": 40,
        "lr": 1e-3,
        "trajectories": 2,
        "num_inference_steps": 4,
        "keep_steps": 3,
        "batch_size": 2,
    }
    edit = make(pipe, "superhero", "esd", preset=preset, progress=False, **quick)
    assert identical(before, weights(pipe))
    assert ("official-2025-sdxl-u" == preset) == all(".attn2." not in name for name in edit.tensors)
    assert not any("emb" in name for name in edit.tensors)
    method = method_class("esd").preset(preset, **quick)
    request = Request(concepts=(Concept("superhero"),), progress=False)
    loss = method.objective(backbone, method.student(backbone), request, None)
    with torch.no_grad():
        first = sum(loss(Draw(0, i)) for i in range(5))
        edit.apply(pipe)
        # the bank and its targets are of the base: only the student has changed
        assert sum(loss(Draw(0, i)) for i in range(5)) < 0.95 * first
    edit.remove(pipe)
    assert identical(before, weights(pipe))


def test_sdxl_is_told_the_size_of_the_picture():
    """As the pipeline tells it at its own size, which the latents of predictions have."""
    pipe = tiny("sdxl")
    backbone, seen = backbone_of(pipe), []
    text = backbone.encode(["a cat"]).text
    with torch.no_grad():
        handle = pipe.unet.add_embedding.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        backbone.predict(torch.zeros(1, *backbone.latent_shape), torch.tensor([5]), text)
        pipe("a cat", num_inference_steps=1, guidance_scale=1.0, output_type="latent")
        handle.remove()
    assert torch.equal(seen[-2], seen[-1])


# --- the evaluator and files -----------------------------------------------------------------------------------------


@EVERY
def test_a_picture_depends_on_prompt_and_seed_alone(architecture, tmp_path):
    pipe = tiny(architecture)
    together = generate(pipe, ["a cat", "a dog"], seeds=[0, 1], cache_dir=tmp_path, **SIZE)
    alone = generate(pipe, ["a dog"], seeds=[1], batch_size=1, **SIZE)
    ours, theirs = (torch.tensor(list(image.tobytes()), dtype=torch.int) for image in (together[1][1], alone[0][0]))
    assert (ours - theirs).abs().max() <= 1  # batches differ by rounding
    assert len({image_hash(image) for row in together for image in row}) == 4
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize(("architecture", "part"), PARTS)
def test_the_cache_knows_every_component(architecture, part):
    pipe = tiny(architecture)
    before = weights_hash(pipe)
    with torch.no_grad():
        next(iter(getattr(pipe, part).parameters())).flatten()[0] += 1e-3
    assert weights_hash(pipe) != before


@EVERY
def test_the_whole_denoiser_opens_in_plain_diffusers(architecture, tmp_path):
    pipe = tiny(architecture)
    official(pipe).apply(pipe)
    denoiser = denoiser_of(pipe)
    loaded = type(denoiser).from_pretrained(save_denoiser(pipe, tmp_path / "denoiser"))
    assert identical(loaded.state_dict(), denoiser.state_dict())


def test_the_table_in_the_docs_is_what_the_code_says():
    page = Path(__file__).resolve().parents[1] / "docs" / "architectures.md"
    script = runpy.run_path(str(page.with_suffix(".py")))
    written = page.read_text("utf-8").split(script["BEGIN"])[1].split(script["END"])[0].strip()
    assert written == script["table"](), "run: python docs/architectures.py"
    missing = set(architectures()) - {architecture for _, architecture, _ in script["PUBLISHED"]}
    assert not missing, "add a published shape to docs/architectures.py"


CLOSED_FORMS = [name for name in sorted(BUILT_IN) if issubclass(method_class(name), ClosedForm)]
# The everyday words fill a text of 32 dimensions, which would leave nothing to move.
ROOM = {"double-projections": {"rank": 8}}


class OnApple(torch.Tensor):
    """A tensor as Apple silicon has them: no float64 before it is on the CPU."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.Tensor.double or any(given is torch.float64 for given in (*args, *kwargs.values())):
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        out = super().__torch_function__(function, types, args, kwargs)
        return out.as_subclass(torch.Tensor) if function is torch.Tensor.cpu else out


@pytest.mark.parametrize("method", CLOSED_FORMS)
def test_no_closed_form_asks_an_accelerator_for_float64(method, monkeypatch):
    encode = Backbone.encode

    def there(self, prompts, **options):
        found = encode(self, prompts, **options)
        segments = tuple(dataclasses.replace(s, hidden=s.hidden.as_subclass(OnApple)) for s in found.segments)
        return dataclasses.replace(found, hidden=found.hidden.as_subclass(OnApple), segments=segments)

    monkeypatch.setattr(Backbone, "encode", there)
    edit = make(
        tiny("sd1"), Concept("superhero", anchor="ninja"), method, keep=["wizard", "batman"], **ROOM.get(method, {})
    )
    assert edit.config["report"]["target"]["moved"] > 1e-3


def test_a_concept_in_the_span_of_what_is_kept_is_refused():
    with pytest.raises(ValueError, match="what is kept spans the concept.*keep less"):
        make(tiny("sd1"), Concept("superhero", anchor="ninja"), "double-projections", keep=["wizard", "batman"])


@pytest.mark.parametrize("architecture", first(ARCHITECTURES, "sdxl", "flux"))
@pytest.mark.parametrize("method", CLOSED_FORMS)
def test_every_closed_form_works_everywhere(architecture, method):
    pipe = tiny(architecture)
    concept = Concept("superhero", anchor="ninja")
    edit = make(pipe, concept, method, keep=["wizard", "batman"], **ROOM.get(method, {}))
    assert edit.config["report"]["target"]["moved"] > 1e-3
    before = weights(pipe)
    edit.apply(pipe)
    assert not identical(before, weights(pipe))
    edit.remove(pipe)
    assert identical(before, weights(pipe))
