"""People's files: each kind opens as the same model, or is refused for its true reason in one line."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from erasure.artifact import export_single_file
from erasure.opening import load_base
from erasure.runtime import pick_device, pick_dtype
from tests.slow import first
from tests.tiny import tiny, tiny_pipeline, weights

UNET, TEXT = "unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """The same pipeline as diffusers writes it in each of its ways, and as one file beside its folder."""
    root, pipe = tmp_path_factory.mktemp("bases"), tiny("sd1")
    small = tiny_pipeline()
    small.save_pretrained(root / "plain")
    small.save_pretrained(root / "fp16", variant="fp16")
    small.save_pretrained(root / "sharded", max_shard_size="20KB")
    small.save_pretrained(root / "sharded-fp16", max_shard_size="20KB", variant="fp16")
    small.save_pretrained(root / "pickles", safe_serialization=False)
    pipe.save_pretrained(root / "sd1")
    export_single_file(pipe, root / "file.safetensors")
    return root


@pytest.fixture
def copy(folders, tmp_path) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(folders / name, tmp_path / "model"))


def opened(path: Path, **options: Any) -> Any:
    """Opened on the CPU, without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return load_base(path, device="cpu", **options)


def same(pipe: Any, expected: Any) -> bool:
    found, wanted = weights(pipe), weights(expected)
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def reason(path: Path | str, **options: Any) -> str:
    """Why it is refused: one line."""
    with pytest.raises((ValueError, FileNotFoundError)) as refused:
        load_base(path, device="cpu", **options)
    message = str(refused.value)
    assert "\n" not in message
    return message


def rewrite(file: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    save_file({name: tensor.contiguous() for name, tensor in change(load_file(file)).items()}, file)


def edit_json(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


# --- folders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "fp16", "sharded", "sharded-fp16"])
def test_every_way_diffusers_writes_a_pipeline_opens(folders, name):
    assert same(opened(folders / name), tiny_pipeline())


def test_a_variant_that_is_asked_for_and_absent_is_refused(folders):
    assert "no files of variant 'fp16'" in reason(folders / "plain", variant="fp16")
    assert "'fp16' are opened" in reason(folders / "fp16", variant="bf16")


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod.", "_fsdp_wrapped_module.", "model."])
def test_names_that_a_wrapper_changed_are_taken_back(copy, prefix):
    folder = copy("plain")
    for file in (UNET, TEXT):
        rewrite(folder / file, lambda state: {prefix + name: tensor for name, tensor in state.items()})
    assert same(opened(folder), tiny_pipeline())


def test_a_compiled_block_within_the_model_is_taken_back_too(copy):
    folder = copy("plain")
    rewrite(
        folder / UNET, lambda s: {n.replace("mid_block.", "mid_block._orig_mod."): tensor for n, tensor in s.items()}
    )
    assert same(opened(folder), tiny_pipeline())


def test_files_of_other_names_and_shards_without_an_index_open(copy, folders, tmp_path):
    folder = copy("plain")
    (folder / UNET).rename(folder / "unet/my_unet.safetensors")
    (folder / TEXT).rename(folder / "text_encoder/clip.safetensors")
    assert same(opened(folder), tiny_pipeline())
    sharded = Path(shutil.copytree(folders / "sharded", tmp_path / "sharded"))
    for index in sharded.rglob("*.index.json"):
        index.unlink()
    assert same(opened(sharded), tiny_pipeline())


def test_precision_is_the_one_asked_for_whatever_the_file_has(copy):
    folder = copy("plain")
    rewrite(folder / UNET, lambda state: {name: tensor.bfloat16() for name, tensor in state.items()})
    assert opened(folder).unet.dtype == torch.float32
    assert opened(folder, dtype="float16").text_encoder.dtype == torch.float16
    assert opened(folder, dtype=torch.bfloat16).unet.dtype == torch.bfloat16


def test_float8_is_widened_and_said_and_refused_where_it_has_scales(copy):
    folder = copy("plain")
    rewrite(folder / UNET, lambda state: {name: tensor.to(torch.float8_e4m3fn) for name, tensor in state.items()})
    with pytest.warns(UserWarning, match="float8"):
        pipe = load_base(folder, device="cpu")
    expected = tiny_pipeline().unet.conv_in.weight.to(torch.float8_e4m3fn).float()
    assert torch.equal(pipe.unet.conv_in.weight, expected)
    rewrite(folder / UNET, lambda state: state | {"conv_in.scale_weight": torch.ones(1)})
    assert "quantised (conv_in.scale_weight)" in reason(folder)


def test_quantised_models_are_refused(copy):
    folder = copy("plain")
    edit_json(folder / "unet/config.json", quantization_config={"quant_method": "bitsandbytes"})
    assert "quantised" in reason(folder)


def test_a_vocabulary_that_grew_opens_and_a_word_without_an_embedding_is_said(tmp_path):
    import copy

    pipe = tiny_pipeline()
    pipe.tokenizer = copy.deepcopy(pipe.tokenizer)
    pipe.tokenizer.add_tokens(["<hero>"])
    pipe.save_pretrained(tmp_path / "words-only")
    with pytest.warns(UserWarning, match="'<hero>' and the text encoder has no embedding"):
        load_base(tmp_path / "words-only", device="cpu")
    pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer))
    pipe.save_pretrained(tmp_path / "both")
    assert same(opened(tmp_path / "both"), pipe)
    edit_json(tmp_path / "both/text_encoder/config.json", vocab_size=len(pipe.tokenizer) - 1)  # as trainers leave it
    assert same(opened(tmp_path / "both"), pipe)


def test_a_safety_checker_that_was_deleted_is_left_out_and_said(copy):
    folder = copy("plain")
    edit_json(folder / "model_index.json", safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"])
    with pytest.warns(UserWarning, match="no safety_checker"):
        assert same(load_base(folder, device="cpu"), tiny_pipeline())


FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "Git LFS pointer": (lambda f: (f / UNET).write_bytes(POINTER), "Git LFS pointer"),
    "Git LFS pointer for words": (lambda f: (f / "tokenizer/vocab.json").write_bytes(POINTER), "Git LFS pointer"),
    "cut off": (lambda f: (f / UNET).write_bytes((f / UNET).read_bytes()[:-500]), "is cut off: "),
    "cut off in the header": (lambda f: (f / UNET).write_bytes((f / UNET).read_bytes()[:300]), "is cut off: 300 bytes"),
    "empty": (lambda f: (f / UNET).write_bytes(b""), "is empty"),
    "web page": (lambda f: (f / UNET).write_bytes(b"<!DOCTYPE html><html></html>"), "web page"),
    "noise": (lambda f: (f / UNET).write_bytes(b"x" * 1000), "no safetensors file"),
    "damaged header": (
        lambda f: (f / UNET).write_bytes((20).to_bytes(8, "little") + b'{"a":{"dtype":"F32"}' + b"0" * 9),
        "damaged safetensors header",
    ),
    "huge header": (lambda f: (f / UNET).write_bytes((2**60).to_bytes(8, "little") + b"{}"), "no safetensors file"),
    "pickle under another name": (lambda f: torch.save({"a": torch.ones(1)}, f / UNET), "is a pickle"),
    "tensor missing": (
        lambda f: rewrite(f / UNET, lambda s: {n: t for n, t in s.items() if n != "conv_in.weight"}),
        "not in its files (conv_in.weight",
    ),
    "tensor of the encoder missing": (
        lambda f: rewrite(f / TEXT, lambda s: {n: t for n, t in s.items() if "final_layer_norm.bias" not in n}),
        "final_layer_norm.bias",
    ),
    "width": (lambda f: edit_json(f / "unet/config.json", cross_attention_dim=64), "[16, 64]"),
    "width of the encoder": (lambda f: edit_json(f / "text_encoder/config.json", hidden_size=64), "(77, 64) by its"),
    "index is no JSON": (lambda f: (f / "model_index.json").write_text("{"), "cannot be read as JSON"),
    "config is no JSON": (lambda f: (f / "unet/config.json").write_text("{"), "cannot be read as JSON"),
    "scheduler is no JSON": (lambda f: (f / "scheduler/scheduler_config.json").write_text("{"), "not a valid JSON"),
    "config missing": (lambda f: (f / "unet/config.json").unlink(), "lacks config.json"),
    "component missing": (lambda f: shutil.rmtree(f / "unet"), "lacks the folder unet"),
    "weights missing": (lambda f: (f / UNET).unlink(), "holds no weights"),
    "words missing": (lambda f: [path.unlink() for path in (f / "tokenizer").iterdir()], "holds no vocabulary"),
    "length of prompts missing": (
        lambda f: (f / "tokenizer/tokenizer_config.json").unlink(),
        "lacks tokenizer_config.json",
    ),
    "unknown pipeline": (lambda f: edit_json(f / "model_index.json", _class_name="MyPipeline"), "'MyPipeline'"),
    "pipeline of its own code": (
        lambda f: edit_json(f / "model_index.json", _class_name=["pipeline", "Mine"]),
        "code of the model's own",
    ),
    "no pipeline": (lambda f: edit_json(f / "model_index.json", _class_name="UNet2DConditionModel"), "pipeline class"),
    "unknown component": (
        lambda f: edit_json(f / "model_index.json", unet=["diffusers", "NoUNet"]),
        "no class `NoUNet`",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_folder_is_refused_for_its_reason(copy, fault):
    folder = copy("plain")
    damage, expected = FAULTS[fault]
    damage(folder)
    assert expected in reason(folder)


def test_a_missing_shard_is_named(copy):
    folder = copy("sharded")
    sorted((folder / "unet").glob("*.safetensors"))[1].unlink()
    assert "lacks shard 2 of" in reason(folder)


def test_pickles_are_never_opened(folders, tmp_path):
    assert "is a pickle" in reason(folders / "pickles")
    torch.save({"a": torch.ones(1)}, tmp_path / "model.ckpt")
    assert "is a pickle" in reason(tmp_path / "model.ckpt")


def test_what_is_not_a_pipeline_says_what_to_give(folders, tmp_path):
    assert str(folders / "plain") in reason(folders / "plain" / "unet")
    assert str(folders / "plain") in reason(folders / "plain" / UNET)
    assert "no model_index.json" in reason(tmp_path)
    (tmp_path / "erasure_config.json").write_text("{}")
    assert "an erasure" in reason(tmp_path)
    assert "no model at" in reason("not-a-model")
    assert "no model at" in reason(tmp_path / "missing.safetensors")
    assert "give the hub id 'owner/name'" in reason("https://huggingface.co/owner/name/tree/main")
    assert "could not load 'nobody/nothing'" in reason("nobody/nothing")


# --- one file --------------------------------------------------------------------------------------------------------


def test_a_single_file_opens_with_a_folder_of_configs(folders, tmp_path):
    pipe = opened(folders / "file.safetensors", config=folders / "sd1")
    assert same(pipe, tiny("sd1"))
    assert pipe.config._name_or_path == str(folders / "file.safetensors")
    beside = Path(shutil.copy(folders / "file.safetensors", tmp_path / "sd1.safetensors"))
    shutil.copytree(folders / "sd1", tmp_path / "sd1")
    assert same(opened(beside), tiny("sd1"))
    within = Path(shutil.copy(folders / "file.safetensors", tmp_path / "sd1" / "sd1.safetensors"))
    assert same(opened(within), tiny("sd1"))


def test_a_single_file_without_configs_and_without_a_hub_says_what_to_give(folders):
    message = reason(folders / "file.safetensors")
    assert "stable-diffusion-v1-5" in message and "config=" in message


ORIGINAL = "model.diffusion_model."
NAMINGS: dict[str, Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]] = {
    "in front of all": lambda s: {f"module.{name}": tensor for name, tensor in s.items()},
    "compiled denoiser": lambda s: {n.replace(ORIGINAL, f"{ORIGINAL}_orig_mod."): t for n, t in s.items()},
    "denoiser alone": lambda s: {name: tensor for name, tensor in s.items() if name.startswith(ORIGINAL)},
    "denoiser alone, bare names": lambda s: {
        name.removeprefix(ORIGINAL): tensor for name, tensor in s.items() if name.startswith(ORIGINAL)
    },
    "diffusers' names": lambda s: tiny("sd1").unet.state_dict(),
    "diffusers' names, prefixed": lambda s: {f"unet.{n}": t for n, t in tiny("sd1").unet.state_dict().items()},
    "without the text encoder": lambda s: {n: t for n, t in s.items() if not n.startswith("cond_stage_model.")},
    "without the autoencoder": lambda s: {n: t for n, t in s.items() if not n.startswith("first_stage_model.")},
}


@pytest.mark.parametrize(
    "naming",
    first(
        NAMINGS, "compiled denoiser", "denoiser alone, bare names", "diffusers' names, prefixed",
        "without the text encoder",
    ),
)  # fmt: skip
def test_other_namings_of_a_single_file_are_the_same_model(folders, tmp_path, naming):
    file = Path(shutil.copy(folders / "file.safetensors", tmp_path / "other.safetensors"))
    rewrite(file, NAMINGS[naming])
    assert same(opened(file, config=folders / "sd1"), tiny("sd1"))


@pytest.mark.parametrize("architecture", ["sd3", "flux"])
def test_a_transformer_alone_takes_its_other_parts_from_the_folder(tmp_path, architecture):
    pipe = tiny(architecture)
    pipe.save_pretrained(tmp_path / "folder")
    with torch.no_grad():
        next(pipe.transformer.parameters()).add_(1)  # a fine-tune: not what the folder holds
    save_file(pipe.transformer.state_dict(), tmp_path / "fine-tune.safetensors")
    assert same(opened(tmp_path / "fine-tune.safetensors", config=tmp_path / "folder"), pipe)


NOT_MODELS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], str]] = {
    "LoRA": (lambda s: {"lora_unet_down_blocks_0.lora_down.weight": torch.ones(2, 2)}, "is a LoRA"),
    "textual inversion": (lambda s: {"emb_params": torch.ones(2, 2)}, "is a textual inversion"),
    "autoencoder": (lambda s: {"encoder.conv_in.weight": torch.ones(2, 2)}, "is an autoencoder"),
    "ControlNet": (lambda s: {"control_model.time_embed.0.weight": torch.ones(2, 2)}, "is a ControlNet"),
    "anything else": (lambda s: {"a": torch.ones(2, 2)}, "no weights of a UNet2DConditionModel"),
    "hole in the denoiser": (lambda s: {n: t for n, t in s.items() if n != f"{ORIGINAL}out.2.weight"}, "lacks tensors"),
    "hole in the encoder": (lambda s: {n: t for n, t in s.items() if not n.endswith("layer_norm1.bias")}, "not in it"),
    "integers": (lambda s: {n: t.to(torch.int8) if t.ndim > 1 else t for n, t in s.items()}, "as integers"),
}


@pytest.mark.parametrize("kind", NOT_MODELS)
def test_a_file_that_is_no_whole_model_is_refused_for_its_reason(folders, tmp_path, kind):
    file = Path(shutil.copy(folders / "file.safetensors", tmp_path / "other.safetensors"))
    change, expected = NOT_MODELS[kind]
    rewrite(file, change)
    assert expected in reason(file, config=folders / "sd1")


def test_a_config_that_does_not_fit_is_refused(folders, tmp_path):
    tiny("sdxl").save_pretrained(tmp_path / "sdxl")
    assert "could not open" in reason(folders / "file.safetensors", config=tmp_path / "sdxl")
    assert "no model_index.json" in reason(folders / "file.safetensors", config=tmp_path / "nowhere")
    assert "is a folder" in reason(folders / "plain", config=folders / "sd1")
    assert "is a hub id" in reason("org/name", config=folders / "sd1")
    assert "no model at" in reason(tmp_path / "none.safetensors", config=folders / "sd1")
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + b"0" * 100)
    assert "GGUF" in reason(tmp_path / "model.gguf")


# --- device and dtype ------------------------------------------------------------------------------------------------


def test_a_device_that_is_not_here_is_refused_for_its_reason():
    assert pick_device("cpu") == "cpu" and pick_device(torch.device("cpu")) == "cpu"
    assert pick_device() == pick_device(pick_device())
    with pytest.raises(ValueError, match="called cuda"):
        pick_device("gpu")
    with pytest.raises(ValueError, match="no device 'toaster' here"):
        pick_device("toaster")
    with pytest.raises(ValueError, match="no device 'cuda:99' here"):
        pick_device("cuda:99")


def test_a_dtype_goes_by_torchs_name_or_the_short_one():
    assert pick_dtype() == torch.float32
    assert pick_dtype("fp16") == pick_dtype("float16") == pick_dtype(torch.float16) == torch.float16
    with pytest.raises(ValueError, match="unknown dtype 'int8'"):
        pick_dtype("int8")
