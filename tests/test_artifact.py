"""An erasure goes on and comes off without a trace, and a damaged file is refused."""

import dataclasses
import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from erasure import Erasure, save_denoiser
from erasure.artifact.files import CONFIG, WEIGHTS, digest
from erasure.backbone.fingerprint import fingerprint
from erasure.pipelines import active_erasures, set_erasures, unload_erasures
from tests.slow import first
from tests.tiny import identical, make, tiny, tiny_pipeline, weights

ESD = {"iterations": 2, "lr": 1e-3, "trajectories": 2, "num_inference_steps": 3, "keep_steps": 1, "progress": False}


def an_erasure(pipe, kind, concept="superhero"):
    if kind == "operator":
        return make(pipe, concept, "uce", preset="official-2025", keep=["ninja"])
    if kind == "safe-guidance":
        return make(pipe, concept, "sld", warmup=0, threshold=1.0)
    if kind in ("negative-guidance", "filtered-text", "value"):
        method = {"negative-guidance": "negative-prompt", "filtered-text": "safree", "value": "adavd"}[kind]
        return make(pipe, concept, method, **({"midpoint": 0.0} if method == "safree" else {}))
    if kind == "localized":
        drawn = {"generations": 1, "num_inference_steps": 3, "first": 1, "last": 3, "deviations": -20.0}
        return make(pipe, concept, "gloce", keep=["ninja"], **drawn)
    if kind == "residual":
        return make(pipe, concept, "receler", keep=["ninja"], **{**ESD, "rank": 4, "attack_steps": 1})
    if kind == "gated":
        return make(pipe, concept, "spm", keep=["ninja"], **ESD)
    preset = {"preset": "official-2025-x"} if kind == "delta" else {"variant": "x", "adapter": "lora", "rank": 2}
    return make(pipe, concept, "esd", **preset, **ESD)


EVERY_KIND = (
    "operator",
    "delta",
    "lora",
    "gated",
    "residual",
    "localized",
    "safe-guidance",
    "negative-guidance",
    "filtered-text",
    "value",
)
KINDS = pytest.mark.parametrize("kind", ["operator", "delta", "lora"])  # of weights


@KINDS
@pytest.mark.parametrize("dtype", first([torch.float32, torch.float16, torch.bfloat16], torch.float32, torch.bfloat16))
def test_apply_then_remove_restores_every_bit(kind, dtype):
    pipe = tiny_pipeline().to(dtype)
    before = weights(pipe)
    edit = an_erasure(pipe, kind)
    edit.apply(pipe)
    assert not identical(before, weights(pipe))
    edit.remove(pipe)
    assert identical(before, weights(pipe))


@KINDS
def test_scale_is_a_straight_line_from_the_base_to_the_published_edit(kind):
    pipe = tiny_pipeline()
    edit, name = an_erasure(pipe, kind), "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    points = []
    for scale in (0.0, 0.5, 1.0):
        edit.apply(pipe, scale)
        points.append(pipe.unet.get_parameter(name).detach().clone())
    edit.remove(pipe)
    assert torch.equal(points[0], pipe.unet.get_parameter(name))
    torch.testing.assert_close(points[1], (points[0] + points[2]) / 2, rtol=1e-5, atol=1e-7)
    assert not torch.allclose(points[0], points[2])


def test_stacked_erasures_come_off_in_any_order():
    pipe = tiny_pipeline()
    before = weights(pipe)
    a, b = an_erasure(pipe, "operator"), an_erasure(pipe, "delta", "van gogh")
    b.apply(pipe)
    alone = weights(pipe)
    b.remove(pipe)
    a.apply(pipe), b.apply(pipe)
    a.remove(pipe)
    assert identical(alone, weights(pipe))
    b.remove(pipe)
    assert identical(before, weights(pipe))


def of_the_same_name(edit):
    """An erasure with other numbers."""
    return dataclasses.replace(edit, tensors={name: 2 * tensor for name, tensor in edit.tensors.items()})


def test_two_erasures_of_one_name_and_unknown_removal_are_refused():
    pipe = tiny_pipeline()
    a = an_erasure(pipe, "operator")
    b = of_the_same_name(a)
    a.apply(pipe)
    with pytest.raises(ValueError, match="another erasure called"):
        b.apply(pipe)
    a.remove(pipe)
    with pytest.raises(ValueError, match="not on the pipeline"):
        a.remove(pipe)


def test_methods_refuse_to_start_from_an_erased_model():
    pipe = tiny_pipeline()
    an_erasure(pipe, "operator").apply(pipe)
    with pytest.raises(ValueError, match="already carries"):
        an_erasure(pipe, "delta", "van gogh")


def test_fused_is_permanent():
    pipe = tiny_pipeline()
    edit = an_erasure(pipe, "operator")
    edit.apply(pipe)
    erased = weights(pipe)
    edit.fuse(pipe)
    assert identical(erased, weights(pipe))
    with pytest.raises(ValueError, match="fused"):
        edit.remove(pipe)


def test_inference_mode_makes_no_other_erasure(tmp_path):
    pipe = tiny_pipeline()
    before, outside = weights(pipe), an_erasure(pipe, "operator")
    with torch.inference_mode():  # ComfyUI's nodes and many servers run there
        edit = an_erasure(pipe, "operator")
        edit.apply(pipe, 0.5)
        edit.remove(pipe)
        edit.apply(pipe)
    assert identical(edit.tensors, outside.tensors) and not identical(before, weights(pipe))
    edit.apply(pipe, 0.5)
    edit.remove(pipe)
    assert identical(before, weights(pipe))
    with torch.inference_mode():
        loaded = Erasure.from_pretrained(outside.save_pretrained(tmp_path / "e"))
    for each in (edit, loaded):
        x = torch.randn(1, 3, 32, requires_grad=True)
        each.map(x).sum().backward()
        assert x.grad is not None
    text = pipe.encode_prompt("a cat", "cpu", 1, False)[0]
    pipe.unet(torch.zeros(1, 4, 8, 8), 10, encoder_hidden_states=text).sample.sum().backward()


def test_a_failed_apply_changes_nothing():
    pipe = tiny_pipeline()
    edit = an_erasure(pipe, "delta")
    edit.tensors[list(edit.tensors)[-1]] = torch.zeros(3)
    before = weights(pipe)
    with pytest.raises(ValueError, match="shape"):
        edit.apply(pipe)
    assert identical(before, weights(pipe))


@KINDS
def test_saved_and_loaded_is_the_same_erasure(kind, tmp_path):
    pipe = tiny_pipeline()
    edit = an_erasure(pipe, kind)
    folder = edit.save_pretrained(tmp_path / "edit")
    assert {f.name for f in folder.iterdir()} == {CONFIG, WEIGHTS, "README.md"}
    assert [f.name for f in tmp_path.iterdir()] == ["edit"]
    again = Erasure.from_pretrained(folder)
    edit.apply(pipe)
    expected = weights(pipe)
    edit.remove(pipe)
    again.apply(pipe)
    assert identical(expected, weights(pipe))
    assert again.config["concepts"][0]["name"] == "superhero" and again.kind == kind


def test_the_card_says_what_was_done_and_claims_no_removal(tmp_path):
    text = (an_erasure(tiny_pipeline(), "operator").save_pretrained(tmp_path / "e") / "README.md").read_text()
    assert "superhero" in text and "uce" in text and "ninja" in text
    assert "suppresses" in text and "Not assessed" in text


@pytest.mark.parametrize(
    "other", [{"seed": 1}, {"width": 64}, {"prediction_type": "v_prediction", "channels": (16, 32, 32)}]
)
def test_the_wrong_base_is_refused_by_name(other):
    edit = an_erasure(tiny_pipeline(), "operator")
    stranger = tiny_pipeline(**other)
    before = weights(stranger)
    with pytest.raises(ValueError, match="wrong base model"):
        edit.apply(stranger)
    assert identical(before, weights(stranger))


def test_a_part_that_one_of_the_two_lacks_is_said_to_be_lacking():
    with pytest.raises(ValueError, match="which has a unet, and this pipeline has none; use the model"):
        an_erasure(tiny_pipeline(), "operator").apply(tiny("flux"))


def test_the_right_base_is_recognised_in_half_precision():
    edit = an_erasure(tiny_pipeline(), "operator")
    for dtype in (torch.float16, torch.bfloat16):
        pipe = tiny_pipeline().to(dtype)
        before = weights(pipe)
        edit.apply(pipe)
        assert not identical(before, weights(pipe))


def truncate(folder):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-40])


def tamper(folder):
    raw = bytearray((folder / WEIGHTS).read_bytes())
    raw[-1] ^= 1
    (folder / WEIGHTS).write_bytes(raw)


def reconfigure(**changes):
    """Change fields of the config, and its hash with them, as someone would who forges a file."""

    def change(folder):
        config = json.loads((folder / CONFIG).read_text())
        config = {k: v for k, v in {**config, **changes}.items() if v is not None}
        config["sha256"] = {**config["sha256"], WEIGHTS: sha256(folder), CONFIG: digest(config)}
        (folder / CONFIG).write_text(json.dumps(config))

    return change


def sha256(folder):
    return hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()


def retensor(**changes):
    """Change tensors, and every hash with them."""

    def change(folder):
        tensors = {k: v for k, v in {**load_file(folder / WEIGHTS), **changes}.items() if v is not None}
        save_file(tensors, folder / WEIGHTS)
        reconfigure()(folder)

    return change


def poison(folder):
    tensors = load_file(folder / WEIGHTS)
    tensors["hidden.u"][0, 0] = float("nan")
    retensor(**tensors)(folder)


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (truncate, "truncated or was altered"),
        (tamper, "truncated or was altered"),
        (poison, "NaN"),
        (lambda f: (f / WEIGHTS).unlink(), "missing"),
        (lambda f: (f / CONFIG).unlink(), "missing"),
        (lambda f: (f / CONFIG).write_text('{"format": 1, "ki'), "JSON"),
        (lambda f: (f / CONFIG).write_text("[1, 2]"), "not an erasure's config"),
        (reconfigure(format=2), "upgrade"),
        (reconfigure(kind="spell"), "unknown kind"),
        (reconfigure(base=None), "base"),
    ],
)
def test_a_damaged_folder_is_refused(damage, fault, tmp_path):
    folder = an_erasure(tiny_pipeline(), "operator").save_pretrained(tmp_path / "e")
    damage(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=fault):
        Erasure.from_pretrained(folder)


def test_a_missing_folder_is_a_clear_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no erasure at"):
        Erasure.from_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("path", "fault"),
    [("", "an empty path"), (None, "no path; got None"), (5, "no path"), (b"e", "no path"), ("a\0", "no path")],
)
def test_what_is_no_path_is_neither_read_nor_written(path, fault, tmp_path, monkeypatch):
    edit = an_erasure(tiny_pipeline(), "operator")
    edit.save_pretrained(tmp_path)
    monkeypatch.chdir(tmp_path)  # an empty path would be this folder
    for use in (Erasure.from_pretrained, edit.save_pretrained):
        with pytest.raises(ValueError, match=fault):
            use(path)


def test_the_whole_unet_opens_in_plain_diffusers(tmp_path):
    from diffusers import UNet2DConditionModel

    pipe = tiny_pipeline()
    an_erasure(pipe, "operator").apply(pipe)
    loaded = UNet2DConditionModel.from_pretrained(save_denoiser(pipe, tmp_path / "unet"))
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), pipe.unet.parameters(), strict=True))


@pytest.mark.parametrize("content", ["thesis.txt", "erasure_config.json"])
def test_a_folder_that_holds_something_else_is_left_alone(content, tmp_path):
    (tmp_path / content).write_text("precious")
    with pytest.raises(ValueError, match="not empty"):
        save_denoiser(tiny_pipeline(), tmp_path)
    assert (tmp_path / content).read_text() == "precious"


def test_an_interrupted_apply_changes_nothing(monkeypatch):
    pipe = tiny_pipeline()
    first, second = an_erasure(pipe, "operator"), an_erasure(pipe, "delta", "van gogh")
    base = weights(pipe)
    first.apply(pipe)
    before, writes = weights(pipe), iter(range(1000))
    copy = torch.Tensor.copy_

    def interrupted(self, *arguments):
        if next(writes) == 3:
            raise KeyboardInterrupt
        return copy(self, *arguments)

    monkeypatch.setattr(torch.Tensor, "copy_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        second.apply(pipe)
    monkeypatch.undo()
    assert identical(before, weights(pipe))
    first.remove(pipe)
    assert identical(base, weights(pipe))


def test_weights_changed_by_others_are_not_silently_undone():
    pipe = tiny_pipeline()
    edit = an_erasure(pipe, "operator").apply(pipe)
    with torch.no_grad():
        pipe.unet.get_parameter(edit.parameter_names[0]).add_(0.1)
    with pytest.raises(ValueError, match="was changed since"):
        edit.remove(pipe)


def test_an_erasure_goes_on_and_comes_off_under_a_lora_that_was_loaded_later():
    peft = pytest.importorskip("peft", reason="a LoRA is loaded by peft, an optional package")
    pipe = tiny_pipeline()
    before = weights(pipe)
    edit = an_erasure(pipe, "operator").apply(pipe)
    pipe.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_k", "to_v"]))
    set_erasures(pipe, edit.name, 0.5)
    assert active_erasures(pipe) == {edit.name: 0.5}
    edit.remove(pipe)
    pipe.unet.delete_adapters("default")
    assert identical(before, {name.replace(".base_layer.", "."): w for name, w in weights(pipe).items()})


def ip_adapter(unet, *, width=16, tokens=4):
    """The state of an IP-Adapter with random weights, in the layout diffusers loads."""
    cross = unet.config.cross_attention_dim
    attentions = [name.removesuffix(".processor") for name in unet.attn_processors if "attn2" in name]
    keys = {
        f"{2 * i + 1}.to_{k}_ip.weight": torch.randn(unet.get_submodule(name).to_k.out_features, cross)
        for i, name in enumerate(attentions)
        for k in "kv"
    }
    projection = {"proj.weight": torch.randn(tokens * cross, width), "proj.bias": torch.zeros(tokens * cross)}
    return {"image_proj": {**projection, "norm.weight": torch.ones(cross), "norm.bias": torch.zeros(cross)},
            "ip_adapter": keys}  # fmt: skip


@pytest.mark.parametrize("kind", ["operator", "delta"])
def test_an_ip_adapter_makes_no_other_base_of_a_model(kind):
    pipe, adapted = tiny_pipeline(), tiny_pipeline()
    edit = an_erasure(pipe, kind)
    adapted.unet._load_ip_adapter_weights([ip_adapter(adapted.unet)])
    before = weights(adapted)
    assert any("to_k_ip" in name for name in before)
    edit.apply(adapted)
    assert not identical(before, weights(adapted))
    edit.remove(adapted)
    assert identical(before, weights(adapted))
    edit.apply(pipe)  # and the other way round: the adapter comes later
    pipe.unet._load_ip_adapter_weights([ip_adapter(pipe.unet)])
    set_erasures(pipe, edit.name, 0.5)
    edit.remove(pipe)
    assert all(torch.equal(weight, weights(pipe)[name]) for name, weight in weights(tiny_pipeline()).items())


def test_what_an_ip_adapter_adds_to_a_transformer_is_no_part_of_the_model():
    transformer = tiny("sd3").transformer
    before = fingerprint(transformer)
    transformer.image_proj = torch.nn.Linear(4, 4)  # where diffusers' loader of SD3 puts it
    transformer.transformer_blocks[0].attn.processor = torch.nn.Linear(4, 4)
    assert fingerprint(transformer) == before
    transformer.proj_out = torch.nn.Linear(4, 4)
    assert fingerprint(transformer) != before


def test_fused_projections_are_no_place_to_change_an_erasure():
    pipe = tiny_pipeline()
    before = weights(pipe)
    edit = an_erasure(pipe, "operator").apply(pipe)
    pipe.fuse_qkv_projections(vae=False)
    with pytest.raises(ValueError, match="unfuse_qkv_projections"):
        edit.remove(pipe)
    with pytest.raises(ValueError, match="unfuse_qkv_projections"):
        set_erasures(pipe, edit.name, 0.5)
    assert active_erasures(pipe) == {edit.name: 1.0}
    pipe.unfuse_qkv_projections(vae=False)
    edit.remove(pipe)
    after = weights(pipe)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_weights_stored_in_another_form_since_are_named(dtype):
    pipe = tiny_pipeline()
    edit = an_erasure(pipe, "operator").apply(pipe)
    name = edit.parameter_names[0]
    module = pipe.unet.get_submodule(name.removesuffix(".weight"))
    module.weight = torch.nn.Parameter(module.weight.to(dtype), requires_grad=False)
    with pytest.raises(ValueError, match=f"{name} is stored as {dtype}.*load the pipe"):
        edit.remove(pipe)
    module.weight = None
    with pytest.raises(ValueError, match=f"{name} is gone"):
        unload_erasures(pipe)


def test_an_erasure_can_be_removed_after_offloading_and_compiling():
    pipe = tiny_pipeline()
    before = weights(pipe)
    edit = an_erasure(pipe, "operator").apply(pipe)
    pipe.unet.conv_in._hf_hook = object()
    pipe.unet = torch.compile(pipe.unet)
    edit.remove(pipe)
    pipe.unet = pipe.unet._orig_mod
    del pipe.unet.conv_in._hf_hook
    assert identical(before, weights(pipe))


def test_fusing_keeps_the_scale_it_was_applied_at():
    pipe = tiny_pipeline()
    edit = an_erasure(pipe, "operator").apply(pipe, 0.5)
    half = weights(pipe)
    edit.fuse(pipe)
    assert identical(half, weights(pipe))


def test_an_erasure_of_the_same_name_is_not_mistaken_for_this_one():
    pipe = tiny_pipeline()
    one = an_erasure(pipe, "operator")
    one.apply(pipe)
    with pytest.raises(ValueError, match="not on the pipeline"):
        of_the_same_name(one).remove(pipe)


@KINDS
def test_a_composed_erasure_is_one_after_the_other(kind, tmp_path):
    pipe = tiny_pipeline()
    first, second = an_erasure(pipe, kind), an_erasure(pipe, kind, "van gogh")
    joint = first.compose(second)
    joint.save_pretrained(tmp_path / "both")
    first.apply(pipe), second.apply(pipe)
    expected = weights(pipe)
    first.remove(pipe), second.remove(pipe)
    Erasure.from_pretrained(tmp_path / "both").apply(pipe)
    for name, tensor in weights(pipe).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="cannot be composed"):
        first.compose(an_erasure(tiny_pipeline(seed=1), kind))


def test_another_text_encoder_is_another_base():
    edit, pipe = an_erasure(tiny_pipeline(), "operator"), tiny_pipeline()
    pipe.text_encoder = tiny_pipeline(seed=1).text_encoder
    with pytest.raises(ValueError, match="text_encoder"):
        edit.apply(pipe)
