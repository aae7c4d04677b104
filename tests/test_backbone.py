import copy

import pytest
import torch

from erasure.backbone import backbone_of
from erasure.backbone.fingerprint import fingerprint, matches
from tests.tiny import tiny_pipeline


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


def test_selectors_divide_the_layers(pipe):
    backbone = backbone_of(pipe)
    names = {
        s: set(backbone.parameters(s)) for s in ("cross_attention", "cross_attention_kv", "not_cross_attention", "all")
    }
    assert names["cross_attention_kv"] < names["cross_attention"]
    assert names["cross_attention"] | names["not_cross_attention"] == names["all"]
    assert not names["cross_attention"] & names["not_cross_attention"]
    assert not any("norm" in name.split(".")[-2] for name in names["all"])
    assert {f"{site}.weight" for site in backbone.text_sites()} == names["cross_attention_kv"]


def test_trajectory_is_the_pipelines_own_sampling(pipe):
    backbone = backbone_of(pipe)
    noise = torch.randn(1, *backbone.latent_shape, generator=torch.Generator().manual_seed(3))
    encoded = backbone.encode(["a superhero", ""]).text
    steps = list(backbone.trajectory(encoded[:1], encoded[1:], noise, num_inference_steps=4, guidance_scale=3.0))
    seen = []
    pipe("a superhero", num_inference_steps=4, guidance_scale=3.0, latents=noise, output_type="latent",
         callback_on_step_end=lambda p, i, t, kw: seen.append(kw["latents"]) or kw)  # fmt: skip
    for (x, _, _, _), latents in zip(steps[1:], seen[:-1], strict=True):
        torch.testing.assert_close(x, latents, rtol=1e-4, atol=1e-4)


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


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda p: p.fuse_qkv_projections(vae=False), "unfuse_qkv_projections"),
        (lambda p: p.unet.half(), "different dtypes"),
        (lambda p: setattr(p, "unet", torch.compile(p.unet)), "compiled"),
        (lambda p: p.unet.to("meta"), "meta device"),
        (lambda p: setattr(p.unet, "is_quantized", True), "quantised"),
        (lambda p: setattr(p.unet.conv_in, "_hf_hook", object()), "offloaded"),
        (lambda p: setattr(p, "text_encoder", None), "no text_encoder"),
    ],
)
def test_a_pipeline_on_which_the_edit_would_be_lost_is_refused(change, fault):
    with pytest.raises(ValueError, match=fault):
        backbone_of(broken(change))


def test_a_loaded_lora_is_refused():
    peft = pytest.importorskip("peft", reason="LoRA guards need peft, an optional package")
    pipe = tiny_pipeline()
    pipe.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_k", "to_v"]))
    with pytest.raises(ValueError, match="LoRA"):
        backbone_of(pipe)
