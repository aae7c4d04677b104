"""Files other programs read: each is opened by the other program, or by a plain reading of its format."""

import json

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from erasure import Concept, Erasure
from erasure.artifact import (
    DeltaErasure,
    LoraErasure,
    OperatorErasure,
    export_lora,
    export_official,
    export_single_file,
    import_official,
    save_denoiser,
    save_pipeline,
)
from erasure.backbone import backbone_of
from erasure.backbone.native import original_unet_names
from tests.slow import first
from tests.test_operator import assert_same, draw, uce
from tests.tiny import identical, make, tiny, tiny_pipeline, weights
from tests.tiny_joint import draw as draw_joint
from tests.tiny_joint import tiny_joint

QUICK = {"iterations": 2, "lr": 1e-2, "trajectories": 1, "num_inference_steps": 2, "keep_steps": 1, "progress": False}
PROMPT = "a photo of a superhero"
LAYOUTS = pytest.mark.parametrize("layout", ["diffusers", "kohya"])


def esd(pipe, preset="official-2025-x-strict", **settings):
    return make(pipe, "superhero", "esd", preset=preset, **QUICK, **settings)


def low_rank(
    pipe,
    rank=2,
    names=("attn2.to_k.weight", "ff.net.2.weight", "resnets.0.conv1.weight", "time_embedding.linear_1.weight"),
):
    """A fine-tune whose changes happen to have a low rank, convolutions among them."""
    edit, random = esd(pipe), torch.Generator().manual_seed(0)
    tensors = {
        name: 0.1
        * (torch.randn(p.shape[0], rank, generator=random) @ torch.randn(rank, p[0].numel(), generator=random)).reshape(
            p.shape
        )
        for name, p in pipe.unet.named_parameters()
        if name.endswith(names)
    }
    return DeltaErasure(edit.name, edit.config.with_facts(sites=list(tensors)), tensors)


def metadata(file):
    with safe_open(file, "pt") as opened:
        return json.loads(opened.metadata()["erasure"])


def kohya_weights(file, scale):
    """What A1111 and ComfyUI add to a layer: scale * alpha / rank * up @ down, by kohya's name of it."""
    tensors = load_file(file)
    stems = {name.split(".")[0] for name in tensors}
    changes = {}
    for stem in stems:
        up, down, alpha = (tensors.pop(f"{stem}.{part}") for part in ("lora_up.weight", "lora_down.weight", "alpha"))
        changes[stem] = scale * alpha / len(down) * (up.flatten(1) @ down.flatten(1))
    assert not tensors
    return changes


# --- LoRA ------------------------------------------------------------------------------------------------------------


@LAYOUTS
@pytest.mark.parametrize("architecture", ["sd1", "sdxl"])
@pytest.mark.parametrize("scale", first([1.0, 0.5], 0.5))
def test_an_operator_is_a_lora_to_diffusers(architecture, layout, scale, tmp_path):
    pipe = tiny(architecture)
    edit = uce(pipe, pooled=architecture == "sdxl")
    base = draw(pipe)
    edit.apply(pipe, scale)
    expected = draw(pipe)
    edit.remove(pipe)
    before = weights(pipe)
    target = tmp_path / ("lora" if layout == "diffusers" else "lora.safetensors")
    file = export_lora(edit, pipe, target, layout=layout)
    assert identical(before, weights(pipe)) and metadata(file)["relative_error"] == 0
    pipe.load_lora_weights(str(target), adapter_name="erasure")
    pipe.set_adapters("erasure", scale)
    assert_same(draw(pipe), expected)
    pipe.unload_lora_weights()
    assert torch.equal(draw(pipe), base) and (expected - base).abs().max() > 1e-3


@pytest.mark.parametrize("architecture", ["sd3", "flux"])
def test_transformers_take_the_lora_too(architecture, tmp_path):
    pipe = tiny(architecture)
    edit = uce(pipe)
    edit.apply(pipe)
    expected = draw(pipe)
    edit.remove(pipe)
    export_lora(edit, pipe, tmp_path)
    pipe.load_lora_weights(str(tmp_path))
    assert_same(draw(pipe), expected)


def test_kohya_readers_get_the_edited_weights(tmp_path):
    pipe = tiny("sdxl")
    edit = uce(pipe, pooled=True)
    file = export_lora(edit, pipe, tmp_path / "k.safetensors", layout="kohya")
    names = {f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}": name for name in edit.parameter_names}
    names["lora_unet_label_emb_0_0"] = names.pop("lora_unet_add_embedding_linear_1")
    for scale in (0.3, 1.0):
        changes = kohya_weights(file, scale)
        assert set(changes) == set(names)
        for stem, change in changes.items():
            w = pipe.unet.get_parameter(names[stem]).detach()
            torch.testing.assert_close(w + change, edit.edit(names[stem], w, scale), rtol=1e-5, atol=1e-6)


@LAYOUTS
def test_a_low_rank_fine_tune_is_a_lora(layout, tmp_path):
    pipe = tiny_pipeline()
    edit = low_rank(pipe)
    edit.apply(pipe)
    expected = draw(pipe)
    edit.remove(pipe)
    target = tmp_path / ("lora" if layout == "diffusers" else "lora.safetensors")
    assert metadata(export_lora(edit, pipe, target, layout=layout))["relative_error"] < 1e-5
    pipe.load_lora_weights(str(target))
    torch.testing.assert_close(draw(pipe), expected, rtol=0, atol=1e-3 * expected.abs().max().item())


TRAINED = {**QUICK, "lr": 0.3, "iterations": 4, "keep": ["wizard"], "batch_size": 1}
FOUR = pytest.mark.parametrize("architecture", first(["sd1", "sdxl", "sd3", "flux"], "sd1", "flux"))


@FOUR
def test_a_low_rank_adapter_is_a_lora_exactly_and_draws_the_same(architecture, tmp_path):
    pipe = tiny(architecture)
    before, base = weights(pipe), draw(pipe)
    edit = make(pipe, "superhero", "esd", adapter="lora", rank=3, **TRAINED)
    assert edit.kind == "lora"
    edit.apply(pipe)
    expected = draw(pipe)
    edit.remove(pipe)
    file = export_lora(edit, pipe, tmp_path)
    assert metadata(file)["relative_error"] == 0 and "gate" not in metadata(file)
    found = load_file(file)
    for site in edit.config["sites"]:
        for factor in ("lora_A", "lora_B"):
            name = f"{'unet' if hasattr(pipe, 'unet') else 'transformer'}.{site}.{factor}.weight"
            assert torch.equal(found.pop(name), edit.tensors[f"{site}.{factor}"])
    assert not found
    pipe.load_lora_weights(str(tmp_path))
    assert_same(draw(pipe), expected)
    pipe.unload_lora_weights()
    assert (expected - base).abs().max() > 1e-3 and torch.equal(draw(pipe), base) and identical(before, weights(pipe))
    with pytest.raises(ValueError, match="of its own rank, exactly"):
        export_lora(edit, pipe, tmp_path, rank=1)


def test_a_second_denoisers_lora_has_a_folder_of_its_own(tmp_path):
    """Wan 2.2 draws its first steps with one transformer and the others with another."""
    pipe = tiny_joint("wan2.2")
    base = draw_joint(pipe, PROMPT)
    edit = make(pipe, PROMPT, preset="official-2025", token_span="all", lamb=1e-3)
    assert any(name.startswith("transformer_2:") for name in edit.parameter_names)
    edit.apply(pipe)
    expected = draw_joint(pipe, PROMPT)
    edit.remove(pipe)
    assert export_lora(edit, pipe, tmp_path).parent == tmp_path and (tmp_path / "transformer_2").is_dir()
    pipe.load_lora_weights(str(tmp_path))
    half = draw_joint(pipe, PROMPT)
    pipe.load_lora_weights(str(tmp_path / "transformer_2"), load_into_transformer_2=True)
    assert_same(draw_joint(pipe, PROMPT), expected)
    assert not torch.equal(half, base) and (half - expected).abs().max() > 1e-5 * expected.abs().max()


def test_composed_adapters_of_two_ranks_are_one_lora(tmp_path):
    pipe = tiny_pipeline()
    one = make(pipe, "superhero", "esd", adapter="lora", rank=1, variant="x", **TRAINED)
    two = make(pipe, "van gogh", "esd", adapter="lora", rank=2, variant="x-strict", **TRAINED)
    joint = one.compose(two)
    one.apply(pipe), two.apply(pipe)
    expected = draw(pipe)
    one.remove(pipe), two.remove(pipe)
    export_lora(joint, pipe, tmp_path)
    pipe.load_lora_weights(str(tmp_path))
    assert_same(draw(pipe), expected)


@FOUR
def test_a_gated_adapter_is_a_lora_without_its_gate_and_says_so(architecture, tmp_path):
    pipe = tiny(architecture)
    base = draw(pipe, ["spiderman"], guidance_scale=1.0)
    edit = make(pipe, "superhero", "spm", **{**TRAINED, "lr": 0.03})
    with pytest.warns(UserWarning, match="acts on every prompt"):
        file = export_lora(edit, pipe, tmp_path)
    assert metadata(file)["gate"] == "left out"
    edit.apply(pipe)
    gated = draw(pipe, ["spiderman"], guidance_scale=1.0)
    edit.remove(pipe)
    open_gate = LoraErasure(
        "open", edit.config, {name: t for name, t in edit.tensors.items() if not name.startswith("gate.")}
    )
    open_gate.apply(pipe)
    expected = draw(pipe, ["spiderman"], guidance_scale=1.0)
    open_gate.remove(pipe)
    pipe.load_lora_weights(str(tmp_path))
    torch.testing.assert_close(
        draw(pipe, ["spiderman"], guidance_scale=1.0), expected, rtol=0, atol=1e-4 * expected.abs().max().item()
    )
    moved = [(picture - base).abs().max().item() for picture in (gated, expected)]
    assert 0 < moved[0] < moved[1]


def test_what_is_no_change_of_the_denoiser_is_no_lora(tmp_path):
    pipe = tiny("sd1")
    encoder = make(pipe, "superhero", "adv-unlearn", **{**TRAINED, "iterations": 1})
    with pytest.raises(ValueError, match="changes the text_encoder .*pipe.text_encoder.save_pretrained"):
        export_lora(encoder, pipe, tmp_path)
    with pytest.raises(ValueError, match="changes no layer"):
        export_lora(make(pipe, "superhero", "sld"), pipe, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_full_rank_fine_tune_is_refused_or_cut_on_request(tmp_path):
    pipe = tiny_pipeline()
    edit = esd(pipe, "official-2025-x")
    with pytest.raises(ValueError, match="rank="):
        export_lora(edit, pipe, tmp_path)
    errors = [metadata(export_lora(edit, pipe, tmp_path, rank=rank))["relative_error"] for rank in (1, 4, 16)]
    assert 1 > errors[0] > errors[1] > errors[2] > 0  # biases are lost at any rank
    deltas = {name: tensor for name, tensor in edit.tensors.items() if name.endswith("weight")}
    tensors, lost = load_file(tmp_path / "pytorch_lora_weights.safetensors"), 0.0
    for name, delta in deltas.items():
        stem = f"unet.{name.removesuffix('.weight')}"
        lost += (delta - tensors[f"{stem}.lora_B.weight"] @ tensors[f"{stem}.lora_A.weight"]).square().sum().item()
    lost += sum(tensor.square().sum().item() for name, tensor in edit.tensors.items() if name not in deltas)
    whole = sum(tensor.square().sum().item() for tensor in edit.tensors.values())
    assert abs(errors[-1] - (lost / whole) ** 0.5) < 1e-4


@pytest.mark.parametrize(("arguments", "fault"), [({"layout": "ckpt"}, "choose one of"), ({"rank": 0}, "1 or more")])
def test_bad_requests_for_a_lora_are_refused(arguments, fault, tmp_path):
    pipe = tiny_pipeline()
    with pytest.raises(ValueError, match=fault):
        export_lora(uce(pipe), pipe, tmp_path / "x", **arguments)
    with pytest.raises(ValueError, match="wrong base"):
        export_lora(uce(pipe), tiny_pipeline(seed=1), tmp_path / "x")
    assert not (tmp_path / "x").exists()


# --- the official codes' files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["operator", "delta"])
def test_official_files_hold_the_edited_tensors_and_come_back(kind, tmp_path):
    pipe = tiny_pipeline()
    concepts = ["superhero", Concept("van gogh", anchor="ninja")]
    edit = esd(pipe, "official-2025-x")
    if kind == "operator":
        edit = make(pipe, concepts, "uce", preset="official-2025", keep=["wizard"])  # one row a concept: rank 2
    base = weights(pipe)
    file = export_official(edit, pipe, tmp_path / "official.safetensors")
    edit.apply(pipe)
    edited = weights(pipe)
    edit.remove(pipe)
    tensors = load_file(file)
    assert set(tensors) == set(edit.parameter_names)
    assert all(torch.equal(tensor, edited[f"unet.{name}"]) for name, tensor in tensors.items())
    # as the official scripts load it
    assert not pipe.unet.load_state_dict(tensors, strict=False).unexpected_keys
    pipe.unet.load_state_dict({name.removeprefix("unet."): t for name, t in base.items() if name.startswith("unet.")})

    again = import_official(file, pipe, concept="superhero", method=edit.config["method"], keep=["ninja"])
    assert again.kind == kind and again.name == f"superhero-{edit.config['method']}"
    if kind == "operator":
        assert isinstance(again, OperatorErasure) and again.tensors["hidden.u"].shape == edit.tensors["hidden.u"].shape
    again.apply(pipe)
    for name, tensor in weights(pipe).items():
        torch.testing.assert_close(tensor, edited[name], rtol=1e-5, atol=1e-6)
    again.remove(pipe)
    again.save_pretrained(tmp_path / "again")
    assert identical(weights(pipe), base)


def test_an_official_file_in_half_precision_or_of_some_layers_stays_a_difference(tmp_path):
    pipe = tiny_pipeline()
    file = export_official(uce(pipe), pipe, tmp_path / "uce.safetensors")
    tensors = load_file(file)
    save_file({name: tensor.half() for name, tensor in tensors.items()}, tmp_path / "half.safetensors")
    save_file({n: t for n, t in tensors.items() if n.endswith("to_v.weight")}, tmp_path / "some.safetensors")
    for name in ("half", "some"):
        edit = import_official(tmp_path / f"{name}.safetensors", pipe, concept=Concept("superhero"), method="uce")
        assert isinstance(edit, DeltaErasure)


class Harmful:
    """What a pickle can do to whoever opens it."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


def test_no_code_in_a_pickle_runs(tmp_path):
    pipe = tiny_pipeline()
    torch.save({"x": Harmful(tmp_path / "ran")}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="that runs their code"):
        import_official(tmp_path / "x.pt", pipe, concept="superhero", method="rece")
    assert not (tmp_path / "ran").exists()


def float32_uce(pipe):
    """Edited weights as the published code makes them: in every layer, products and an explicit inverse in float32."""
    x, y = (backbone_of(pipe).encode([word]).take("last_subject")[0][0] for word in ("superhero", "ninja"))
    edited = {}
    for name, site in backbone_of(pipe).text_sites().items():
        w, eye = site.weight.detach(), torch.eye(len(x))
        mat1, mat2 = 0.5 * w + torch.outer(w @ y, x), 0.5 * eye + torch.outer(x, x)
        edited[f"{name}.weight"] = mat1 @ torch.inverse(mat2)
    return edited


def test_a_file_with_the_error_of_a_float32_inverse_is_an_operator_and_says_its_error(tmp_path):
    pipe = tiny_pipeline(width=128)
    edited = float32_uce(pipe)
    save_file(edited, tmp_path / "uce.safetensors")
    edit = import_official(tmp_path / "uce.safetensors", pipe, concept="superhero", method="uce")
    assert isinstance(edit, OperatorErasure) and edit.config["report"]["rank"] == 1
    base = {name: pipe.unet.get_parameter(name).detach() for name in edited}
    rounding = 2**-23 * sum(float(w.double().square().sum()) for w in base.values()) ** 0.5
    change = sum(float((edited[n] - w).double().square().sum()) for n, w in base.items()) ** 0.5
    missed = sum(float((edit.edit(n, w, 1.0) - edited[n]).double().square().sum()) for n, w in base.items()) ** 0.5
    assert 8 * rounding < missed <= 1e-3 * change
    assert edit.config["report"]["relative_error"] == pytest.approx(missed / change, rel=0.05)


def test_a_change_that_is_one_matrix_only_roughly_stays_a_difference(tmp_path):
    pipe = tiny_pipeline()
    tensors, random = load_file(export_official(uce(pipe), pipe, tmp_path / "x")), torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        change = tensor - pipe.unet.get_parameter(name).detach()
        noise = torch.randn(tensor.shape, generator=random)
        tensor += 0.01 * noise * change.norm() / noise.norm()
    save_file(tensors, tmp_path / "noisy.safetensors")
    edit = import_official(tmp_path / "noisy.safetensors", pipe, concept="superhero", method="uce")
    assert isinstance(edit, DeltaErasure) and "relative_error" not in edit.config["report"]


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("kind", ["operator", "delta"])
def test_a_whole_denoiser_in_torchs_own_format_keeps_only_what_changed(kind, wrapped, tmp_path):
    pipe = tiny_pipeline()
    edit = make(pipe, "superhero", "uce", preset="official-2025", keep=["wizard"])
    edit = edit if kind == "operator" else esd(pipe, "official-2025-x")
    edit.apply(pipe)
    whole = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    edit.remove(pipe)
    torch.save({"unet": {f"module.{n}": t for n, t in whole.items()}} if wrapped else whole, tmp_path / "edited.pt")
    again = import_official(tmp_path / "edited.pt", pipe, concept="superhero", method="rece")
    assert again.kind == kind and set(again.parameter_names) == set(edit.parameter_names)
    again.apply(pipe)
    for name, tensor in pipe.unet.state_dict().items():
        torch.testing.assert_close(tensor, whole[name], rtol=1e-5, atol=1e-6)
    again.remove(pipe)
    half = {name: tensor.half() for name, tensor in whole.items()}
    torch.save(half, tmp_path / "half.pt")
    again = import_official(tmp_path / "half.pt", pipe, concept="superhero", method="rece")
    assert set(again.parameter_names) == set(edit.parameter_names)  # the base rounded to float16 is no change


def test_strange_official_files_are_refused(tmp_path):
    pipe, file = tiny_pipeline(), tmp_path / "x.safetensors"
    name = uce(pipe).parameter_names[0]
    weight = pipe.unet.get_parameter(name).detach()
    broken = weight.clone()
    broken[0, 0] = float("nan")
    for tensors, fault in (
        ({"down.to_k.weight": weight.clone()}, "no down.to_k.weight"),
        ({name: torch.zeros(3, 3)}, "has shape"),
        ({name: broken}, "NaN"),
        ({name: weight.clone()}, "equals the model"),
        ({}, "no tensors"),
    ):
        save_file(tensors, file)
        with pytest.raises(ValueError, match=fault):
            import_official(file, pipe, concept="superhero", method="uce")
    for content in (weight, {name: [1.0]}, {1: weight}, {"unet": {"state_dict": [weight]}}):
        torch.save(content, tmp_path / "x.pt")
        with pytest.raises(ValueError, match="no dictionary of tensors by name"):
            import_official(tmp_path / "x.pt", pipe, concept="superhero", method="uce")
    (tmp_path / "garbage.pt").write_bytes(b"PK not a zip")
    with pytest.raises(ValueError, match="neither a safetensors file nor a torch.save"):
        import_official(tmp_path / "garbage.pt", pipe, concept="superhero", method="uce")
    with pytest.raises(FileNotFoundError):
        import_official(tmp_path / "nowhere", pipe, concept="superhero", method="uce")


# --- one file in the original layout ---------------------------------------------------------------------------------


def sd2(**settings):
    """A pipeline with the text encoder of Stable Diffusion 2: open_clip's activation, hence its names."""
    pipe = tiny_pipeline(prediction_type="v_prediction", **settings)
    pipe.text_encoder.config.hidden_act = "gelu"
    for layer in pipe.text_encoder.encoder.layers:
        layer.mlp.activation_fn = torch.nn.GELU()
    return pipe


@pytest.mark.parametrize(
    "pipeline",
    [pytest.param(tiny_pipeline, marks=pytest.mark.slow), sd2, lambda: tiny_pipeline(channels=(16, 32, 32, 32))],
    ids=["sd1", "sd2", "four-levels"],
)
def test_diffusers_opens_the_single_file_as_the_same_pipeline(pipeline, tmp_path):
    pipe = pipeline()
    pipe.save_pretrained(tmp_path / "base")
    edit = uce(pipe)
    before = weights(pipe)
    file = export_single_file(pipe, tmp_path / "model.safetensors", edit)
    assert identical(before, weights(pipe)) and [f.name for f in tmp_path.glob("*.part")] == []
    edit.apply(pipe)
    opened = StableDiffusionPipeline.from_single_file(str(file), config=str(tmp_path / "base"), local_files_only=True)
    opened.set_progress_bar_config(disable=True)
    assert identical(weights(opened), weights(pipe))
    vae = opened.vae.state_dict()
    assert all(torch.equal(vae[name], tensor) for name, tensor in pipe.vae.state_dict().items())
    assert_same(draw(opened), draw(pipe))


def test_the_names_of_stable_diffusion_are_the_original_ones():
    """A few everybody knows, of the layout with two resnets a level and four levels."""
    unet = tiny_pipeline(channels=(16, 32, 32, 32)).unet
    names = original_unet_names(unet)
    assert len(set(names.values())) == len(unet.state_dict())
    known = {
        "conv_in.weight": "input_blocks.0.0.weight",
        "time_embedding.linear_2.bias": "time_embed.2.bias",
        "down_blocks.0.resnets.0.conv1.weight": "input_blocks.1.0.in_layers.2.weight",
        "down_blocks.0.attentions.1.norm.weight": "input_blocks.2.1.norm.weight",
        "down_blocks.0.downsamplers.0.conv.weight": "input_blocks.3.0.op.weight",
        "down_blocks.1.resnets.0.conv_shortcut.weight": "input_blocks.4.0.skip_connection.weight",
        "down_blocks.3.resnets.1.time_emb_proj.weight": "input_blocks.11.0.emb_layers.1.weight",
        "mid_block.attentions.0.proj_in.weight": "middle_block.1.proj_in.weight",
        "mid_block.resnets.1.norm2.bias": "middle_block.2.out_layers.0.bias",
        "up_blocks.0.upsamplers.0.conv.weight": "output_blocks.2.1.conv.weight",
        "up_blocks.1.upsamplers.0.conv.weight": "output_blocks.5.2.conv.weight",
        "up_blocks.3.attentions.2.proj_out.bias": "output_blocks.11.1.proj_out.bias",
        "conv_out.weight": "out.2.weight",
    }
    assert {name: names[name] for name in known} == known


def test_what_the_original_layout_has_no_name_for_is_refused(tmp_path):
    pipe = tiny_pipeline()
    pipe.unet.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="no name for extra.weight"):
        export_single_file(pipe, tmp_path / "x.safetensors")
    pipe = tiny_pipeline()
    edit = uce(pipe).apply(pipe)
    with pytest.raises(ValueError, match="already"):
        export_single_file(pipe, tmp_path / "x.safetensors", edit)
    assert not list(tmp_path.iterdir())


EXPORTS = {
    "kohya": lambda edit, pipe, path: export_lora(edit, pipe, path, layout="kohya"),
    "comfyui": lambda edit, pipe, path: export_lora(edit, pipe, path, layout="comfyui"),
    "official": lambda edit, pipe, path: export_official(edit, pipe, path),
    "single-file": lambda edit, pipe, path: export_single_file(pipe, path, edit),
}


@pytest.mark.parametrize("form", EXPORTS)
def test_no_file_takes_the_place_of_an_erasure_or_of_the_base(form, tmp_path):
    pipe = tiny("sd1")
    edit = uce(pipe)
    edit.save_pretrained(tmp_path / "e", system=True)
    (tmp_path / "base.safetensors").write_bytes(b"the base")
    (tmp_path / "base").mkdir()
    for name in ("model_index.json", "unet.safetensors"):
        (tmp_path / "base" / name).write_text("the base")
    (tmp_path / "blob").write_text("the base")
    (tmp_path / "base" / "linked.safetensors").symlink_to(tmp_path / "blob")  # as in a hub's cache
    files = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    for base, place, fault in (
        ("", "e/erasure.safetensors", "part of the erasure"),
        ("", "e/system.safetensors", "part of the erasure"),
        ("base.safetensors", "base.safetensors", "what the base model was loaded from"),
        ("base", "base/unet.safetensors", "what the base model was loaded from"),
        ("base", "base/linked.safetensors", "what the base model was loaded from"),
    ):
        pipe.register_to_config(_name_or_path=str(tmp_path / base) if base else "")
        with pytest.raises(ValueError, match=fault):
            EXPORTS[form](edit, pipe, tmp_path / place)
    assert files == {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    pipe.register_to_config(_name_or_path="")
    for _ in range(2):  # a file of its own may be written again
        EXPORTS[form](edit, pipe, tmp_path / "e" / "out.safetensors")
    Erasure.from_pretrained(tmp_path / "e")


def test_an_official_file_and_what_is_said_of_it_are_checked(tmp_path):
    pipe = tiny("sd1")
    good, bad = export_official(esd(pipe), pipe, tmp_path / "good.safetensors"), tmp_path / "bad.safetensors"
    bad.write_text("hi")
    facts = {"concept": "superhero", "method": "esd"}
    for path, change, fault in (
        (bad, {}, "neither a safetensors file nor"),
        (good, {"concept": None}, "a concept is a name"),
        (good, {"concept": []}, "no concepts"),
        (good, {"method": ""}, "how was the file made"),
        (good, {"method": 5}, "how was the file made"),
        (good, {"name": "../x"}, "unsafe name"),
    ):
        with pytest.raises(ValueError, match=fault):
            import_official(path, pipe, **{**facts, **change})
    assert import_official(good, pipe, **facts, keep="a dog").config["keep"] == ["a dog"]


def test_a_model_in_hooks_or_in_a_wrapper_is_written_by_nobody(tmp_path):
    pipe = tiny("sd1")
    hooked = make(pipe, "superhero", "sld").apply(pipe)
    writers = (save_pipeline, save_denoiser, export_single_file)
    for write in writers:
        with pytest.raises(ValueError, match="'superhero-sld' cannot be in this file: .* its own file holds it"):
            write(pipe, tmp_path / "out.safetensors")
    hooked.remove(pipe)
    pipe.unet = torch.nn.DataParallel(pipe.unet)
    for write in writers:
        with pytest.raises(ValueError, match="wrapped in DataParallel"):
            write(pipe, tmp_path / "out.safetensors")
    assert not list(tmp_path.iterdir())
