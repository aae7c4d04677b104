"""Prompts as the denoiser receives them, layers by what they do, and pipelines that are refused before any work."""

import copy
import warnings

import pytest
import torch
from diffusers import StableDiffusionPAGPipeline
from diffusers.models.attention_processor import CustomDiffusionAttnProcessor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from erasure.backbone import backbone_of
from erasure.backbone.fingerprint import fingerprint, matches
from erasure.pipelines import set_erasures
from tests.tiny import clip_encoder, clip_tokenizer, identical, make, t5_encoder, tiny, tiny_pipeline, unet, weights
from tests.tiny_relatives import RELATIVES


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


def test_conditioning_is_what_the_pipeline_computes(pipe):
    prompts = ["a superhero", "", "the cat in the style of van gogh"]
    ours = backbone_of(pipe).encode(prompts)
    theirs, _ = pipe.encode_prompt(prompts, pipe.device, 1, False)
    assert torch.equal(ours.hidden, theirs)


def test_spans_point_at_the_right_tokens(pipe):
    conditioning = backbone_of(pipe).encode(["a superhero", "", "zzz"])
    pieces = [pipe.tokenizer.convert_ids_to_tokens(row.tolist()) for row in conditioning.ids]
    last = [words[span][0] for words, span in zip(pieces, conditioning.span("last_subject"), strict=True)]
    assert last == ["superhero</w>", "<|startoftext|>", "z</w>"]  # the empty prompt falls back to its start token
    assert [words[span] for words, span in zip(pieces, conditioning.span("content"), strict=True)] == [
        ["a</w>", "superhero</w>"],
        [],
        ["z", "z", "z</w>"],
    ]
    for words, span in zip(pieces, conditioning.span("tail"), strict=True):
        assert set(words[span]) == {"<|endoftext|>"} and span.stop == len(words)
    with pytest.raises(ValueError, match="unknown token span"):
        conditioning.span("middle")


def test_a_prompt_longer_than_the_encoder_is_refused(pipe):
    with pytest.raises(ValueError, match="longer than the text encoder"):
        backbone_of(pipe).encode(["superhero " * 80])


def test_padding_in_front_is_refused():
    pipe = tiny_pipeline()
    pipe.tokenizer = copy.deepcopy(pipe.tokenizer)
    pipe.tokenizer.padding_side = "left"
    with pytest.raises(ValueError, match="the tokenizer pads on the left"):
        make(pipe, "superhero", keep=["ninja"])


@pytest.mark.parametrize("method", ["uce", "esd"])
def test_a_model_that_predicts_something_else_is_not_taken_for_one_of_v(method):
    with pytest.raises(ValueError, match="DDIMScheduler has prediction_type='sample'; models of epsilon or v"):
        make(tiny_pipeline(prediction_type="sample"), "superhero", method, keep=["ninja"])


def test_selectors_divide_the_layers(pipe):
    backbone = backbone_of(pipe)
    names = {
        s: set(backbone.select(s)) for s in ("cross_attention", "cross_attention_kv", "not_cross_attention", "all")
    }
    assert names["cross_attention_kv"] < names["cross_attention"]
    assert names["cross_attention"] | names["not_cross_attention"] == names["all"]
    assert not names["cross_attention"] & names["not_cross_attention"]
    assert not any("norm" in name.split(".")[-2] for name in names["all"])
    assert {f"{site}.weight" for site in backbone.text_sites()} == names["cross_attention_kv"]


def test_trajectory_is_the_pipelines_own_sampling(pipe):
    backbone = backbone_of(pipe)
    noise = torch.randn(1, *backbone.latent_shape, generator=torch.Generator().manual_seed(3))
    text = backbone.encode(["a superhero"]).text
    steps = list(backbone.trajectory(text, noise, num_inference_steps=4, guidance_scale=3.0))
    seen = []
    pipe("a superhero", num_inference_steps=4, guidance_scale=3.0, latents=noise, output_type="latent",
         callback_on_step_end=lambda p, i, t, kw: seen.append(kw["latents"]) or kw)  # fmt: skip
    assert [step.index for step in steps] == [0, 1, 2, 3]
    for step, latents in zip(steps[1:], seen[:-1], strict=True):
        torch.testing.assert_close(step.x, latents, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        for step in steps:
            ours = backbone.predict(step.x, step.t, text)
            torch.testing.assert_close(ours, step.conditional, rtol=1e-4, atol=1e-5)
            empty = backbone.predict(step.x, step.t, backbone.encode([""]).text)
            torch.testing.assert_close(empty, step.unconditional, rtol=1e-4, atol=1e-5)
    first = list(backbone.trajectory(text, noise, num_inference_steps=4, guidance_scale=3.0, stop=2))
    assert len(first) == 2 and torch.equal(first[1].x, steps[1].x)
    [alone] = backbone.trajectory(text, noise, num_inference_steps=4, guidance_scale=1.0, stop=1)
    assert alone.unconditional is None and torch.allclose(alone.conditional, steps[0].conditional, atol=1e-5)


def test_fingerprint_knows_a_model_in_any_dtype_and_tells_a_fine_tune(pipe):
    base = fingerprint(pipe.unet)
    for dtype in (torch.float16, torch.bfloat16):
        assert matches(base, fingerprint(copy.deepcopy(pipe.unet).to(dtype)))
    tuned = copy.deepcopy(pipe.unet)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.mul_(1.03)
    assert not matches(base, fingerprint(tuned))
    assert not matches(base, fingerprint(tiny_pipeline(seed=1).unet))
    assert not matches(base, fingerprint(tiny_pipeline(width=64).unet))


def test_fingerprint_reads_tensors_of_more_elements_than_float32_can_count():
    large = torch.nn.Linear(4100, 4100, bias=False)
    assert matches(fingerprint(large), fingerprint(copy.deepcopy(large).bfloat16()))


def broken(change):
    pipe = tiny_pipeline()
    change(pipe)
    return pipe


def own_keys(pipe):
    """Custom Diffusion: the attention processors have keys and values of their own."""
    processors = {}
    for name in pipe.unet.attn_processors:
        attention = pipe.unet.get_submodule(name.removesuffix(".processor"))
        text = "attn2" in name
        shape = {"hidden_size": attention.to_q.out_features, "cross_attention_dim": 32} if text else {}
        processors[name] = CustomDiffusionAttnProcessor(train_kv=text, train_q_out=False, **shape)
    pipe.unet.set_attn_processor(processors)


class Packed(torch.Tensor):
    """A quantised tensor as torchao makes them: it reports a floating dtype and holds integers."""

    @staticmethod
    def __new__(cls, numbers, scale):
        return torch.Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=scale.dtype)

    def __init__(self, numbers, scale):
        self.numbers, self.scale = numbers, scale

    def __tensor_flatten__(self):
        return ["numbers", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, meta, size, stride):
        return cls(inner["numbers"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0].numbers, args[0].scale)
        raise NotImplementedError(function)


def pack(module):
    w = module.weight.detach()
    scale = w.abs().amax() / 127
    module.weight = torch.nn.Parameter(Packed((w / scale).round().to(torch.int8), scale), requires_grad=False)


def dynamic(pipe, part):
    """The linears of PyTorch's own quantisation, which have no parameters."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        setattr(pipe, part, torch.ao.quantization.quantize_dynamic(getattr(pipe, part), {torch.nn.Linear}))


BLOCK = "down_blocks.0.attentions.0"
ATTENTION = f"{BLOCK}.transformer_blocks.0.attn2"


def own_forward(pipe):
    """kohya's code and LyCORIS put their LoRA in by another forward."""
    layer = pipe.unet.get_submodule(f"{ATTENTION}.to_k")
    own = layer.forward
    layer.forward = lambda x: own(x) + 1


class LoraLinear(torch.nn.Linear):
    """A LoRA as a class of linear layers."""

    def forward(self, x):
        return super().forward(x) + 1


class OtherKeys(torch.nn.Module):
    """A processor with keys of its own under another name."""

    def __init__(self, attention):
        super().__init__()
        self.context_proj = torch.nn.Linear(attention.to_k.in_features, attention.to_k.out_features)


def other_keys(pipe):
    attention = pipe.unet.get_submodule(ATTENTION)
    attention.set_processor(OtherKeys(attention))


def around_a_block(pipe, wrapper):
    pipe.unet.set_submodule(BLOCK, wrapper(pipe.unet.get_submodule(BLOCK)))


def made_in_inference_mode(pipe):
    with torch.inference_mode():
        pipe.unet = tiny_pipeline().unet


REFUSED = [
    (lambda p: p.fuse_qkv_projections(vae=False), "unfuse_qkv_projections"),
    (lambda p: p.unet.half(), "different dtypes"),
    (lambda p: setattr(p, "unet", torch.compile(p.unet)), "compiled"),
    (lambda p: p.unet.to("meta"), "meta device"),
    (lambda p: setattr(p.unet, "is_quantized", True), "quantised"),
    (lambda p: setattr(p.unet.conv_in, "_hf_hook", object()), "offloaded"),
    (lambda p: setattr(p, "text_encoder", None), "no text_encoder"),
    (own_keys, r"attn2 uses keys and values of its attention processor \(to_k_custom_diffusion\).*set_default_attn"),
    (lambda p: pack(p.unet.get_submodule(f"{ATTENTION}.to_k")), r"to_k.weight is quantised \(Packed\)"),
    (lambda p: pack(p.text_encoder.get_submodule("encoder.layers.0.mlp.fc1")), r"text_encoder.*quantised \(Packed\)"),
    (lambda p: dynamic(p, "text_encoder"), r"text_encoder\..* is quantised \(Linear\)"),
    (lambda p: dynamic(p, "unet"), r"unet\..* is quantised \(Linear\)"),
    (lambda p: setattr(p, "unet", torch.nn.DataParallel(p.unet)), "the unet is wrapped in DataParallel; .*module"),
    (lambda p: setattr(p, "unet", torch.optim.swa_utils.AveragedModel(p.unet)), "wrapped in AveragedModel; .*module"),
    (made_in_inference_mode, "created under torch.inference_mode"),
    (lambda p: around_a_block(p, torch.compile), "the unet is compiled"),
    (lambda p: around_a_block(p, torch.nn.DataParallel), f"unet.{BLOCK} is wrapped in DataParallel"),
    (lambda p: around_a_block(p, checkpoint_wrapper), "has the name of a wrapper"),
    (lambda p: p.unet.to(torch.float8_e4m3fn), "stored as torch.float8_e4m3fn"),
    (own_forward, "to_k, which receives the text, computes more than its weight says"),
    (lambda p: setattr(p.unet.get_submodule(ATTENTION), "to_v", LoraLinear(32, 16)), "to_v, .*computes more"),
    (other_keys, r"attn2 uses keys and values of its attention processor \(context_proj\)"),
]


@pytest.mark.parametrize(("change", "fault"), REFUSED)
def test_a_pipeline_on_which_the_edit_would_be_lost_is_refused_before_any_work(change, fault, monkeypatch):
    pipe, edit = broken(change), make(tiny_pipeline(), "superhero", preset="official-2025", keep=["ninja"])
    monkeypatch.setattr(type(pipe), "encode_prompt", lambda *args, **kwargs: pytest.fail("work was done"))
    for work in (backbone_of, edit.apply, lambda p: make(p, "superhero"), lambda p: make(p, "superhero", "esd")):
        with pytest.raises(ValueError, match=fault):
            work(pipe)


def test_an_edit_is_not_changed_once_its_weights_are_quantised():
    pipe = tiny_pipeline()
    edit = make(pipe, "superhero", preset="official-2025", keep=["ninja"]).apply(pipe)
    pack(pipe.unet.get_submodule(edit.parameter_names[0].removesuffix(".weight")))
    for change in (lambda: edit.remove(pipe), lambda: set_erasures(pipe, edit.name, 0.5)):
        with pytest.raises(ValueError, match="stored as Packed: the model was changed since"):
            change()


def test_an_edit_is_scaled_and_taken_off_after_the_denoiser_was_wrapped():
    pipe = tiny_pipeline()
    before = weights(pipe)
    edit = make(pipe, "superhero", preset="official-2025", keep=["ninja"]).apply(pipe)
    pipe.unet = torch.nn.DataParallel(pipe.unet)
    edit.apply(pipe, 0.5)
    edit.remove(pipe)
    pipe.unet = pipe.unet.module
    assert identical(before, weights(pipe))


def test_a_trajectory_with_more_than_two_predictions_is_refused():
    parts = {**tiny_pipeline().components, "pag_applied_layers": "mid"}
    backbone = backbone_of(StableDiffusionPAGPipeline(**parts, requires_safety_checker=False))
    text = backbone.encode(["a superhero"]).text
    noise = torch.randn(1, *backbone.latent_shape)
    with pytest.raises(ValueError, match="StableDiffusionPAGPipeline makes more than two predictions"):
        list(backbone.trajectory(text, noise, num_inference_steps=1))


def test_attention_processors_of_an_ip_adapter_stand_beside_the_texts_and_are_fine():
    assert backbone_of(RELATIVES["ip-adapter"]()).text_sites()


def sdxl_without(*parts):
    pipe = tiny("sdxl")
    for part in parts:
        setattr(pipe, part, None)
    return pipe


def sd_with_sdxls_unet():
    pipe = tiny("sd1")
    pipe.unet = tiny("sdxl").unet
    return pipe


def other_encoder(architecture, part, module):
    pipe = tiny(architecture)
    setattr(pipe, part, module)
    return pipe


@pytest.mark.parametrize(
    ("pipe", "made", "read"),
    [
        (lambda: sdxl_without("text_encoder_2"), 16, 40),
        (lambda: sdxl_without("text_encoder", "tokenizer"), 24, 40),
        (sd_with_sdxls_unet, 32, 40),
        (lambda: other_encoder("sd1", "unet", unet(48)), 32, 48),
        (lambda: other_encoder("flux", "text_encoder_2", t5_encoder(32)), 32, 48),
        (lambda: other_encoder("sd3", "text_encoder_3", t5_encoder(32)), 32, 48),
        (lambda: other_encoder("flux", "text_encoder", clip_encoder(clip_tokenizer(), 40)), 40, 24),
    ],
)
def test_encoders_of_another_width_are_refused_with_both_widths(pipe, made, read, monkeypatch):
    pipe = pipe()
    monkeypatch.setattr(type(pipe), "encode_prompt", lambda *args, **kwargs: pytest.fail("work was done"))
    with pytest.raises(ValueError, match=f"do not fit.*width {made}.* reads {read}"):
        make(pipe, "superhero", keep=["ninja"])


def test_the_refiner_is_refused_for_what_it_is():
    with pytest.raises(ValueError, match="SDXL's refiner: .*text_encoder_2 alone.*erase from the base model"):
        make(RELATIVES["refiner"](), "superhero", keep=["ninja"])


def test_a_loaded_lora_is_refused():
    peft = pytest.importorskip("peft", reason="LoRA guards need peft, an optional package")
    pipe = tiny_pipeline()
    pipe.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_k", "to_v"]))
    with pytest.raises(ValueError, match="LoRA"):
        backbone_of(pipe)
