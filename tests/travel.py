"""Do erasures travel? Each is written in a form, read by another program or by a plain reading of the form, compared.

The table of docs/travel.md and tests/test_travel.py are made of the same cells. A reader hands out every parameter of
the denoisers as it would draw with them; what is expected is the base with the erasure applied by us.
"""

from __future__ import annotations

import copy
import functools
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from safetensors.torch import load_file
from torch import Tensor, nn

from erasure import Concept, Erasure, erase
from erasure.artifact import LoraErasure, export_lora, export_single_file, save_pipeline
from tests.every import backbone, build

EXACT = 1e-5  # of the change: float32's rounding
Weights = dict[str, Tensor]  # by qualified name


@dataclass(frozen=True)
class Cell:
    """What came of one erasure in one form.

    Attributes:
        error: of the change, relative; 0 where every bit is the same; None where the form is refused.
        said: the reason it was refused for.
        strangers: parameters that the reader changed and the erasure does not.
        note: what else is not as it was.
    """

    error: float | None
    said: str = ""
    strangers: tuple[str, ...] = ()
    note: str = ""

    def __str__(self) -> str:
        if self.error is None:
            return f"refused: {self.said}"
        if self.error > 0.05 or self.strangers:
            return f"**wrong**: {self.error:.2g} off"
        if self.error == 0:
            return f"bit for bit{self.note}"
        return ("exact" if self.error <= EXACT else f"within {self.error:.0e}") + self.note


@functools.cache
def case(name: str, kind: str = "operator", dtype: torch.dtype = torch.float32) -> tuple[Any, Any, Erasure, Weights]:
    """A tiny pipeline that nobody changes, its backbone, an erasure of it, and its denoisers' weights erased."""
    pipe = build(name).to(dtype)
    model = backbone(pipe, name)
    edit = KINDS[kind](model)
    before = parameters(compared_parts(pipe, model, kind))
    whole, edit = edit, without_gate(edit)
    expected = {name: edit.edit(name, weight, 1.0) if name in edit.parameter_names else weight
                for name, weight in before.items()}  # fmt: skip
    return pipe, model, whole, expected


def compared_parts(pipe: Any, model: Any, kind: str) -> dict[str, nn.Module]:
    """The denoisers; and the text encoder where that is what is erased."""
    encoder = {"text_encoder": pipe.text_encoder} if kind == "text encoder" else {}
    return {**model.denoiser_parts, **encoder}


def without_gate(edit: Erasure) -> Erasure:
    """A gated adapter as what a LoRA can be of it: on for every prompt."""
    if edit.kind != "gated":
        return edit
    return LoraErasure("open", edit.config, {k: t for k, t in edit.tensors.items() if not k.startswith("gate.")})


def closed_form(model: Any) -> Erasure:
    concept = Concept("superhero", anchor="ninja")
    pooled = {"pooled": True} if "pooled" in model.spaces else {}
    return erase(model, concept, "uce", preset="official-2025", keep=["wizard"], apply=False, progress=False, **pooled)


def trained(model: Any, **settings: Any) -> Erasure:
    quick = {"iterations": 2, "lr": 0.1, "trajectories": 1, "num_inference_steps": 2, "keep_steps": 1, "batch_size": 1}
    return erase(model, "superhero", "esd", keep=["wizard"], apply=False, progress=False, **{**quick, **settings})


KINDS: dict[str, Callable[[Any], Erasure]] = {
    "operator": closed_form,
    "lora": lambda model: trained(model, adapter="lora", rank=3),
    "delta": lambda model: trained(model, variant="x"),
    "gated": lambda model: erase(
        model, "superhero", "spm", apply=False, progress=False, iterations=1, lr=0.01, trajectories=1,
        num_inference_steps=2, batch_size=1, keep=["wizard"],
    ),
    "hooks": lambda model: erase(model, "superhero", "sld", apply=False, progress=False),
    "text encoder": lambda model: erase(
        model, "superhero", "adv-unlearn", apply=False, progress=False, iterations=1, trajectories=1,
        num_inference_steps=2, batch_size=1, keep=["wizard"],
    ),
}  # fmt: skip


def parameters(parts: Mapping[str, nn.Module]) -> Weights:
    """Parameters by qualified name; the first part's are bare."""
    first = next(iter(parts))
    return {
        name if part == first else f"{part}:{name}": parameter.detach().clone()
        for part, module in parts.items()
        for name, parameter in module.named_parameters()
    }


# --- forms: written by us, read by others ----------------------------------------------------------------------------


def diffusers_lora(name: str, pipe: Any, model: Any, edit: Erasure, folder: Path) -> Weights:
    """Read by the pipeline's own ``load_lora_weights``."""
    export_lora(edit, pipe, folder / "lora")
    if not hasattr(pipe, "load_lora_weights"):
        raise ValueError("diffusers has no LoRA loader for this pipeline; what works: PEFT folder, pipeline")
    other = fresh(name, model)
    other.load_lora_weights(str(folder / "lora"))
    if (second := folder / "lora" / "transformer_2").exists():
        other.load_lora_weights(str(second), load_into_transformer_2=True)
    return with_adapters({part: getattr(other, part) for part in model.denoiser_parts})


def peft_folder(name: str, pipe: Any, model: Any, edit: Erasure, folder: Path) -> Weights:
    """Read by PEFT, and merged."""
    from peft import PeftModel

    export_lora(edit, pipe, folder / "peft", layout="peft")
    read = {}
    for part, denoiser in model.denoiser_parts.items():
        place = folder / "peft" if part == model.denoiser_name else folder / "peft" / part
        read[part] = PeftModel.from_pretrained(copy.deepcopy(denoiser), str(place)).merge_and_unload()
    return parameters(read)


def comfyui(name: str, pipe: Any, model: Any, edit: Erasure, folder: Path) -> Weights:
    """Read as ComfyUI does: names of its own model's layers, the rest of the file left out."""
    export_lora(edit, pipe, folder / "c.safetensors", layout="comfyui")
    files = {model.denoiser_name: folder / "c.safetensors", "transformer_2": folder / "c-transformer_2.safetensors"}
    stems = {part: comfyui_names(model, part) for part in model.denoiser_parts}
    return as_engine(model, {part: load_file(files[part]) for part in model.denoiser_parts}, stems)


def kohya(name: str, pipe: Any, model: Any, edit: Erasure, folder: Path) -> Weights:
    """Of U-Nets read by diffusers, which knows kohya's names; of transformers as ComfyUI does."""
    export_lora(edit, pipe, folder / "k.safetensors", layout="kohya")
    if model.denoiser_name == "unet":
        other = fresh(name, model)
        other.load_lora_weights(str(folder / "k.safetensors"))
        return with_adapters({"unet": other.unet})
    files = {model.denoiser_name: folder / "k.safetensors", "transformer_2": folder / "k-transformer_2.safetensors"}
    stems = {
        part: {"lora_unet_" + native.removeprefix("diffusion_model.").replace(".", "_"): module
               for native, module in comfyui_names(model, part).items() if native.startswith("diffusion_model.")}
        for part in model.denoiser_parts
    }  # fmt: skip
    return as_engine(model, {part: load_file(files[part]) for part in model.denoiser_parts}, stems)


def read_parts(opened: Any, pipe: Any, model: Any, edit: Erasure) -> Weights:
    """Of an opened pipeline what is compared."""
    encoders = any(name.startswith("text_encoder:") for name in edit.parameter_names)
    parts = compared_parts(pipe, model, "text encoder" if encoders else "")
    return parameters({part: getattr(opened, part) for part in parts})


def single_file(name: str, pipe: Any, model: Any, edit: Erasure, folder: Path) -> Weights:
    """Read by ``from_single_file`` of the pipeline's or the denoiser's class; by plain names where it has none."""
    file = export_single_file(pipe, folder / "model.safetensors", edit)
    pipe.save_pretrained(folder / "base")  # its configs, which come from the hub otherwise
    if model.architecture in ("sd-unet", "sdxl"):
        opened = type(pipe).from_single_file(
            str(file), config=str(folder / "base"), local_files_only=True, dtype=model.dtype
        )
        return read_parts(opened, pipe, model, edit)
    read = {}
    for part, denoiser in model.denoiser_parts.items():
        place = file if part == model.denoiser_name else file.with_name(f"model-{part}.safetensors")
        if any(kind.__name__ in SINGLE_FILE_LOADABLE_CLASSES for kind in type(denoiser).__mro__):
            read[part] = type(denoiser).from_single_file(
                str(place), config=str(folder / "base"), subfolder=part, local_files_only=True, dtype=model.dtype
            )
        else:
            read[part] = type(denoiser).from_config(denoiser.config)
            read[part].load_state_dict(load_file(place))
    return parameters(read)


def folded(name: str, pipe: Any, model: Any, edit: Erasure, folder: Path) -> Weights:
    """Read by ``from_pretrained`` of the pipeline's class."""
    edit.apply(pipe)
    try:
        save_pipeline(pipe, folder / "pipe")
    finally:
        edit.remove(pipe)
    opened = type(pipe).from_pretrained(str(folder / "pipe"), local_files_only=True, dtype=model.dtype, **given(pipe))
    return read_parts(opened, pipe, model, edit)


TARGETS: dict[str, Callable[..., Weights]] = {
    "diffusers LoRA": diffusers_lora,
    "PEFT folder": peft_folder,
    "ComfyUI keys": comfyui,
    "kohya": kohya,
    "single file": single_file,
    "folded pipeline": folded,
}


# --- readers ---------------------------------------------------------------------------------------------------------


def fresh(name: str, model: Any) -> Any:
    """The same pipeline once more, for a loader that changes it."""
    return build(name).to(model.dtype)


def given(pipe: Any) -> dict[str, Any]:
    """Components that a folder cannot open by itself: classes that stand in a file of diffusers alone."""
    return {k: v for k, v in pipe.components.items() if k in ("text_encoder", "tokenizer") and "chatglm" in
            type(v).__module__ + type(v).__name__.lower()}  # fmt: skip


def with_adapters(parts: Mapping[str, nn.Module]) -> Weights:
    """Weights as they act with PEFT's adapters around the layers, under the names they have without."""
    read, first = {}, next(iter(parts))
    for part, module in parts.items():
        plain = {}
        for name, parameter in module.named_parameters():
            if ".lora_" not in name:
                plain[name.replace(".base_layer.", ".")] = parameter.detach().clone()
        for name, layer in module.named_modules():
            for adapter in getattr(layer, "lora_A", {}):
                delta = layer.get_delta_weight(adapter)
                plain[f"{name}.weight"] = plain[f"{name}.weight"] + delta.to(plain[f"{name}.weight"].dtype)
        read |= {name if part == first else f"{part}:{name}": value.detach() for name, value in plain.items()}
    return read


# The names of ComfyUI's own layers (comfy/ldm, as its checkpoints have them) that text enters by.
NATIVE: dict[str, dict[str, str]] = {
    "sd3": {"context_embedder": "context_embedder", "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1"},
    "flux": {"txt_in": "context_embedder", "vector_in.in_layer": "time_text_embed.text_embedder.linear_1"},
    "chroma": {"txt_in": "context_embedder"},
    "flux2": {"txt_in": "context_embedder"},
    "flux2-klein": {"txt_in": "context_embedder"},
    "qwen-image": {"txt_in": "txt_in"},
    "z-image": {"cap_embedder.1": "cap_embedder.1"},
    "lumina2": {"cap_embedder.1": "time_caption_embed.caption_embedder.1"},
    "wan": {"text_embedding.0": "condition_embedder.text_embedder.linear_1"},
    "auraflow": {"cond_seq_linear": "context_embedder"},
    "pixart": {"y_embedder.y_proj.fc1": "caption_projection.linear_1"},
    "ltx": {"caption_projection.linear_1": "caption_projection.linear_1"},
}
# diffusers' converters that rename layer by layer, so that a part of a checkpoint can be asked.
RENAMING = ("flux2", "flux2-klein", "qwen-image", "z-image", "lumina2", "wan", "ltx")


def comfyui_names(model: Any, part: str) -> dict[str, str]:
    """What may stand before ``.lora_A.weight`` in ComfyUI, to the module that diffusers says it is."""
    denoiser = model.denoiser_parts[part]
    if model.denoiser_name == "unet":
        names = ldm_names(denoiser)
    else:
        names = dict(NATIVE[model.architecture])
        if model.architecture in ("qwen-image", "ltx"):
            names |= {name: name for name, module in denoiser.named_modules() if name.startswith("transformer_blocks.")}
        if model.architecture in RENAMING:
            assert names == by_converter(denoiser, names)
    stems = {f"diffusion_model.{native}": module for native, module in names.items()}
    if model.architecture in ("sd3", "flux", "auraflow", "pixart", "z-image"):  # ComfyUI has a map of diffusers' names
        inside = [name for name, module in denoiser.named_modules() if isinstance(module, nn.Linear)]
        stems |= {f"transformer.{name}": name for name in inside if name.count(".") > 1}
    return stems


def by_converter(denoiser: Any, names: Mapping[str, str]) -> dict[str, str]:
    """Native names to diffusers', by diffusers' own converter for single files."""
    kind = next(k.__name__ for k in type(denoiser).__mro__ if k.__name__ in SINGLE_FILE_LOADABLE_CLASSES)
    convert = SINGLE_FILE_LOADABLE_CLASSES[kind]["checkpoint_mapping_fn"]
    marked = {f"{native}.weight": torch.zeros(1, i + 1) for i, native in enumerate(names)}
    marks = {tensor.shape[1]: name.removesuffix(".weight") for name, tensor in marked.items()}
    found = convert(checkpoint=dict(marked), config=denoiser.config)
    return {marks[tensor.shape[1]]: name.removesuffix(".weight") for name, tensor in found.items()}


def ldm_names(unet: Any) -> dict[str, str]:
    """Native names of a U-Net's layers to diffusers', by diffusers' own converter of a whole checkpoint."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    from erasure.backbone.native import original_unet_names

    native = original_unet_names(unet)
    numbered = {name: torch.full((1,), float(i)) for i, name in enumerate(native.values())}
    asked = {f"model.diffusion_model.{name}": tensor for name, tensor in numbered.items()}
    found = {int(t): name for name, t in convert_ldm_unet_checkpoint(asked, config=dict(unet.config)).items()}
    pairs = {name: found[int(tensor)] for name, tensor in numbered.items()}
    return {name.removesuffix(".weight"): module.removesuffix(".weight") for name, module in pairs.items()
            if name.endswith(".weight")}  # fmt: skip


def as_engine(model: Any, files: Mapping[str, Weights], stems: Mapping[str, Mapping[str, str]]) -> Weights:
    """Weights as ComfyUI makes them: ``W + alpha / rank * up @ down`` for each name it knows; without alpha the scale
    is 1. A name it does not know is left out, without an error."""
    read, first = parameters(model.denoiser_parts), model.denoiser_name
    for part, tensors in files.items():
        for stem, module in stems[part].items():
            name = f"{module}.weight" if part == first else f"{part}:{module}.weight"
            up = tensors.get(f"{stem}.lora_up.weight", tensors.get(f"{stem}.lora_B.weight"))
            down = tensors.get(f"{stem}.lora_down.weight", tensors.get(f"{stem}.lora_A.weight"))
            if up is None or down is None:
                continue
            alpha = tensors.get(f"{stem}.alpha")
            scale = 1.0 if alpha is None else float(alpha) / len(down)
            delta = scale * (up.flatten(1).float() @ down.flatten(1).float())
            read[name] = (read[name].float() + delta.reshape(read[name].shape)).to(read[name].dtype)
    return read


# --- the cell --------------------------------------------------------------------------------------------------------


def cell(name: str, target: str, kind: str = "operator", dtype: torch.dtype = torch.float32) -> Cell:
    """Write, read, compare."""
    pipe, model, edit, expected = case(name, kind, dtype)
    parts = compared_parts(pipe, model, kind)
    before = parameters(parts)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            read = TARGETS[target](name, pipe, model, edit, Path(folder))
        except ValueError as error:
            return Cell(None, str(error))
    assert all(torch.equal(before[key], value) for key, value in parameters(parts).items())
    found = compared(before, expected, read)
    return replace(found, note=", on every prompt") if edit.kind == "gated" else found


def compared(before: Weights, expected: Weights, read: Weights) -> Cell:
    """The relative error of the change over all parameters, and what changed that should not have."""
    assert read.keys() == expected.keys()
    strangers = tuple(k for k in before if torch.equal(before[k], expected[k]) and not torch.equal(before[k], read[k]))
    change = sum(float((expected[k].double() - before[k].double()).square().sum()) for k in before)
    missed = sum(float((expected[k].double() - read[k].double()).square().sum()) for k in before)
    assert change > 0  # or nothing is compared
    return Cell((missed / change) ** 0.5, strangers=strangers)
