"""Erasures in other programs' forms, read by other programs; and what each program is given or refused."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import erasure
from erasure.artifact import export_for, export_lora, export_single_file
from erasure.artifact.engines import ENGINES, VLLM_RANKS, plan
from erasure.artifact.factors import factors, filled
from erasure.cli import app
from erasure.opening import load_base, open_file
from tests import travel
from tests.every import EVERY
from tests.slow import first
from tests.tiny import identical, tiny, weights

CELLS = [(name, target) for name in EVERY for target in travel.TARGETS]
# Every form, of U-Nets, of transformers and of two denoisers where each has a way of its own; the others with -m slow.
QUICK = [("sdxl", "diffusers LoRA"), ("wan2.2", "diffusers LoRA"), ("flux", "PEFT folder"), ("wan2.2", "PEFT folder"),
         ("sdxl", "ComfyUI keys"), ("flux", "ComfyUI keys"), ("wan2.2", "ComfyUI keys"), ("sd1", "kohya"),
         ("z-image", "kohya"), ("sd1", "single file"), ("flux", "single file"), ("wan2.2", "single file"),
         ("wan2.2", "folded pipeline")]  # fmt: skip
NONE = {
    ("pixart-sigma", "diffusers LoRA"): "no LoRA loader",
    **{(name, form): "none of ComfyUI's own" for name in ("kolors", "sana", "cogview4", "cogvideox")
       for form in ("ComfyUI keys", "kohya")},
}  # fmt: skip


@pytest.mark.parametrize(("name", "target"), first(CELLS, *QUICK))
def test_a_closed_form_travels(name, target):
    found = travel.cell(name, target)
    if (name, target) in NONE:
        assert found.error is None and NONE[name, target] in found.said
    else:
        assert found.error is not None and found.error <= travel.EXACT and not found.strangers, str(found)


def test_a_reader_that_drops_a_layer_is_noticed():
    """The comparison itself: a layer left out is no exact cell, and one changed too much is a stranger."""
    pipe, model, edit, expected = travel.case("sd1")
    before = travel.parameters(model.denoiser_parts)
    dropped = {**expected, edit.parameter_names[0]: before[edit.parameter_names[0]]}
    assert str(travel.compared(before, expected, dropped)).startswith("**wrong**")
    other = next(key for key in before if key not in edit.parameter_names)
    assert travel.compared(before, expected, {**expected, other: before[other] + 1}).strangers == (other,)
    tensors = {"diffusion_model.nowhere.lora_A.weight": torch.ones(1, 2)}
    read = travel.as_engine(model, {"unet": tensors}, {"unet": travel.comfyui_names(model, "unet")})
    assert all(torch.equal(read[key], before[key]) for key in before)  # an unknown name is left out without a word


# --- what each program is given --------------------------------------------------------------------------------------


def made(name, kind="operator"):
    pipe, _, edit, _ = travel.case(name, kind)
    return pipe, edit


@pytest.mark.parametrize(
    ("engine", "name", "form"),
    [
        ("diffusers", "sd1", "lora"),
        ("diffusers", "pixart-sigma", "pipeline"),  # no LoRA loader
        ("peft", "flux", "peft"),
        ("comfyui", "flux", "comfyui"),
        ("comfyui", "sdxl", "comfyui"),
        ("forge", "sdxl", "kohya"),
        ("a1111", "sd1", "kohya"),
        ("vllm-omni", "sdxl", "peft"),
        ("vllm-omni", "flux", "pipeline"),  # its LoRA does not reach the layer by which text enters
        ("sglang", "flux", "lora"),
        ("nunchaku", "flux", "lora"),
        ("nunchaku", "qwen-image", "pipeline"),  # LoRAs of FLUX.1 alone
        ("fp8", "flux", "pipeline"),
        ("gguf", "flux", "single-file"),
    ],
)
def test_a_program_gets_the_first_form_that_it_reads(engine, name, form):
    pipe, edit = made(name)
    found = plan(edit, pipe, engine)
    assert found.form == form and form in ENGINES[engine].load
    assert set(found.passed_over) == set(ENGINES[engine].forms[: ENGINES[engine].forms.index(form)])


@pytest.mark.parametrize(
    ("engine", "name", "form", "reason", "works"),
    [
        ("vllm-omni", "flux", "peft", "left out without a word", "--format pipeline"),
        ("fp8", "sd1", "lora", "merged into fp8 weights breaks", "--format pipeline"),
        ("gguf", "sd1", "kohya", "cannot be fused into GGUF", "--format single-file"),
        ("comfyui", "sd1", "lora", "it reads comfyui and single-file alone", "--format comfyui"),
        ("diffusers", "pixart-sigma", "lora", "no LoRA loader for PixArt", "--format pipeline"),
        ("a1111", "flux", None, "opens sd-unet, sdxl and not flux", "--for diffusers --format pipeline"),
        ("forge", "qwen-image", None, "and not qwen-image", "--for diffusers --format pipeline"),
        ("comfyui", "cogview4", None, "none of ComfyUI's own", "--for diffusers --format pipeline"),
        ("nunchaku", "z-image", "lora", "FLUX.1 alone", "--format pipeline"),
        ("spell", "sd1", None, "choose one of", "comfyui"),
    ],
)
def test_what_a_program_cannot_read_is_refused_with_what_works(engine, name, form, reason, works, tmp_path):
    pipe, edit = made(name)
    with pytest.raises(ValueError, match=re.escape(reason)) as caught:
        export_for(edit, pipe, tmp_path / "x", engine, form=form)
    assert works in str(caught.value) and not list(tmp_path.iterdir())


def test_what_stands_in_no_weight_travels_nowhere(tmp_path):
    pipe, edit = made("sd1", "hooks")
    for engine in ENGINES:
        with pytest.raises(ValueError, match="changes no weight.*erasure serve"):
            export_for(edit, pipe, tmp_path / "x", engine)
    pipe, edit = made("sd1", "gated")
    with pytest.raises(ValueError, match="acts on every prompt"):
        export_for(edit, pipe, tmp_path / "x.safetensors", "comfyui")
    assert not list(tmp_path.iterdir())


def test_a_text_encoders_erasure_is_given_as_the_whole_model():
    pipe, edit = made("sd1", "text encoder")
    assert plan(edit, pipe, "diffusers").form == "pipeline" and plan(edit, pipe, "comfyui").form == "single-file"
    assert "changes the text_encoder" in plan(edit, pipe, "comfyui").passed_over["comfyui"]


def test_a_fine_tune_of_full_rank_is_given_as_the_whole_model_or_cut():
    pipe, edit = made("sd1", "delta")
    assert plan(edit, pipe, "a1111").form == "single-file"
    assert plan(edit, pipe, "a1111", rank=2).form == "kohya"


# --- vLLM-Omni's ranks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rank", "padded"), [(1, 1), (2, 8), (8, 8), (33, 64), (257, 320), (512, 512)])
def test_ranks_are_filled_up_to_those_that_vllm_omni_has(rank, padded):
    up, down = torch.randn(4, rank), torch.randn(rank, 6)
    [(wider, longer)] = filled({"layer": (up, down)}, VLLM_RANKS).values()
    assert longer.shape == (padded, 6) and wider.shape == (4, padded)
    torch.testing.assert_close(wider @ longer, up @ down)
    with pytest.raises(ValueError, match="513, and 512 is the highest"):
        filled({"layer": (torch.zeros(4, 513), torch.zeros(513, 6))}, VLLM_RANKS)


def test_vllm_omnis_folder_has_one_rank_of_its_list_and_is_exact(tmp_path):
    pipe, edit = made("flux", "lora")
    export_for(edit, pipe, tmp_path / "peft", "vllm-omni")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert config["r"] == config["lora_alpha"] == 8 and {len(t) for n, t in tensors.items() if "lora_A" in n} == {8}
    assert {f"base_model.model.{m}.lora_A.weight" for m in config["target_modules"]} <= set(tensors)
    pairs, _ = factors(edit, travel.case("flux", "lora")[1])
    for module, (up, down) in pairs.items():
        a, b = (tensors[f"base_model.model.{module}.lora_{k}.weight"] for k in "AB")
        torch.testing.assert_close(b @ a, up @ down)


def test_hidden_and_pooled_layers_get_one_rank(tmp_path):
    """Readers tell rank and scale from one layer; with several ranks some would be drawn at another scale."""
    pipe, edit = made("sdxl")
    found = load_file(export_lora(edit, pipe, tmp_path / "lora"))
    assert len({len(tensor) for name, tensor in found.items() if "lora_A" in name}) == 1


# --- quantised weights -----------------------------------------------------------------------------------------------


def test_a_lora_cannot_be_added_to_fp8_weights_and_a_folded_model_can_be_made_fp8():
    pipe, edit = made("flux")
    name = edit.parameter_names[0]
    weight = pipe.transformer.get_parameter(name).detach()
    wanted = edit.edit(name, weight, 1.0)
    [(up, down), *_] = factors(edit, travel.case("flux")[1])[0].values()
    with pytest.raises((RuntimeError, NotImplementedError)):
        weight.to(torch.float8_e4m3fn).add_((up @ down).to(torch.float8_e4m3fn))
    folded = wanted.to(torch.float8_e4m3fn).float()
    assert (folded - wanted).norm() <= 0.04 * wanted.norm()


# --- a single file, patched ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", first(["sd1", "sdxl", "qwen-image"], "sdxl"))
def test_of_a_file_that_was_opened_the_edited_tensors_alone_differ(name, tmp_path):
    pipe = travel.build(name)
    pipe.save_pretrained(tmp_path / "model")
    source = export_single_file(pipe, tmp_path / "model.safetensors")
    opened = load_base(source, device="cpu")
    edit = erasure.erase(opened, "superhero", preset="official-2025", keep=["wizard"], apply=False, progress=False)
    before = weights(opened)
    file = export_single_file(opened, tmp_path / "out.safetensors", edit)
    assert identical(weights(opened), before)
    old, new = load_file(source), load_file(file)
    changed = [key for key in old if not torch.equal(old[key], new[key])]
    assert old.keys() == new.keys() and len(changed) == len(edit.parameter_names)
    assert all(old[key].dtype == new[key].dtype for key in old)
    edit.apply(opened)
    (tmp_path / "out").symlink_to(tmp_path / "model")
    again = open_file(file, torch.float32, config=tmp_path / "model")
    assert identical(weights(again), weights(opened))
    fused = load_file(export_single_file(opened, tmp_path / "applied.safetensors"))  # what is on it now
    assert all(torch.equal(fused[key], new[key]) for key in new)


def test_an_edit_of_a_text_encoder_is_not_left_out_of_a_patched_file(tmp_path):
    pipe, edit = made("sd1", "text encoder")
    pipe.save_pretrained(tmp_path / "model")
    export_single_file(tiny("sd1"), tmp_path / "model.safetensors")
    opened = load_base(tmp_path / "model.safetensors", device="cpu")
    with pytest.raises(ValueError, match="text_encoder is edited.*--format pipeline"):
        export_single_file(opened, tmp_path / "out.safetensors", edit)
    with pytest.raises(ValueError, match="changes the text_encoder.*--format pipeline"):
        plan(edit, opened, "a1111")
    assert not (tmp_path / "out.safetensors").exists()


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    pipe, edit = made("sd1")
    pipe.save_pretrained(tmp_path / "base")
    edit.save_pretrained(tmp_path / "edit")
    return tmp_path


def command(saved, *arguments):
    line = ["export", str(saved / "edit"), "--base", str(saved / "base"), *map(str, arguments)]
    return CliRunner().invoke(app, line, catch_exceptions=True)


def test_the_command_writes_what_the_program_reads_and_says_so(saved):
    result = command(saved, "--for", "a1111", "--out", saved / "hero.safetensors")
    assert result.exit_code == 0 and "for A1111 as kohya" in result.output.replace("\n", " ")
    assert any(name.startswith("lora_unet_") for name in load_file(saved / "hero.safetensors"))
    result = command(saved, "--for", "fp8", "--out", saved / "folded")
    assert (
        result.exit_code == 0
        and "in its weights already" in result.output.replace("\n", " ")
        and (saved / "folded" / "model_index.json").exists()
    )
    result = command(saved, "--for", "vllm-omni", "--out", saved / "adapter")
    assert result.exit_code == 0 and "drawn by the base model" in result.output.replace("\n", " ")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--for", "comfyui", "--out", "folder"], "end it in .safetensors"),
        (["--for", "peft", "--out", "x.safetensors"], "writes a folder"),
        (["--for", "gguf", "--format", "lora", "--out", "x"], "cannot be fused into GGUF"),
        (["--for", "diffusers", "--format", "official", "--out", "x.safetensors"], "--for chooses among"),
        (["--for", "a1111", "--scale", "0.5", "--out", "x.safetensors"], "has its scale where it is used"),
    ],
)
def test_the_command_refuses_what_would_not_be_read(arguments, said, saved):
    place = [str(saved / one) if i == len(arguments) - 1 else one for i, one in enumerate(arguments)]
    result = command(saved, *place)
    assert result.exit_code != 0 and said in str(result.exception) and not Path(place[-1]).exists()


def test_the_pages_table_is_the_exporters():
    page = (Path(__file__).resolve().parents[1] / "docs" / "travel.md").read_text("utf-8")
    for name in EVERY:
        assert f"| `{name}` |" in page
    for key, engine in ENGINES.items():
        assert f"| `{key}` | {engine.title} | {', '.join(f'`{form}`' for form in engine.forms)} |" in page
    assert "**wrong**" not in page
