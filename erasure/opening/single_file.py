"""One safetensors file as a pipeline: a whole model, or a denoiser beside the rest of its folder."""

from __future__ import annotations

import re
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

from erasure.opening.faults import UNREACHED, fault, reasons, unreached
from erasure.opening.folder import model_class_of, open_folder, open_model, read_index, read_tensors
from erasure.weights import PARTS_BESIDE, in_float8, not_a_model, read_header, refuse_quantised, unwrapped

# How other tools name a denoiser's tensors before the name itself.
DENOISER_PREFIXES = ("", "model.diffusion_model.", "diffusion_model.", "unet.", "transformer.", "model.")


def open_file(path: Path, dtype: torch.dtype, *, config: str | Path | None) -> Any:
    """A whole model, or a denoiser, in one safetensors file."""
    tensors = read_header(path)
    if (path.parent / "erasure_config.json").exists():
        raise ValueError(f"{path} is part of an erasure, not a model; give the base it was made for")
    if (path.parent.parent / "model_index.json").exists() and (path.parent / "config.json").exists() and config is None:
        raise ValueError(f"{path} is one component of a pipeline; give {path.parent.parent}")
    refuse_quantised(path, tensors)
    names = unwrapped(tensors)
    tensors = {names[name]: entry for name, entry in tensors.items()}
    if what := not_a_model(tensors):
        raise ValueError(f"{path} is {what}")
    if in_float8(tensors):
        warnings.warn(f"{path} is stored in float8: opened as {dtype}, with float8's rounding", stacklevel=3)
    folder = _config_folder(path, tensors, config)
    kind = read_index(folder)["_class_name"]
    try:
        pipe = _opened_as(kind, path, names, dtype, folder)
    except ValueError as error:
        raise ValueError(
            f"{error}; it was opened as a {kind}, by the configs in {folder}; if it is another model, give its own "
            "configs (--config FOLDER; in Python config=)"
        ) from error
    pipe.register_to_config(_name_or_path=str(path))
    return pipe


def _opened_as(kind: str, path: Path, names: dict[str, str], dtype: torch.dtype, folder: Path) -> Any:
    """The file as a pipeline of this class: all of it, or its denoiser among the other parts of the folder."""
    import diffusers

    pipeline_class, index = getattr(diffusers, kind), read_index(folder)
    if any(name.startswith(PARTS_BESIDE) for name in names.values()) and hasattr(pipeline_class, "from_single_file"):
        return _open_whole(pipeline_class, path, names, dtype, folder)
    part = next(name for name in ("unet", "transformer", "prior") if name in index)
    model = _open_denoiser(model_class_of(*index[part]), path, names, dtype, folder / part)
    return open_folder(folder, dtype, given={part: model})


def _config_folder(path: Path, tensors: Any, config: str | Path | None) -> Path:
    """The diffusers folder that says how the tensors of a single file are put together."""
    from diffusers.loaders.single_file_utils import fetch_diffusers_config
    from huggingface_hub import snapshot_download

    if config is not None:
        return Path(config).expanduser()
    for beside in (path.parent, path.with_suffix("")):
        if (beside / "model_index.json").exists():
            return beside
    empty = {name: torch.empty(shape, device="meta") for name, (_, shape) in tensors.items()}
    repository = fetch_diffusers_config(empty)["pretrained_model_name_or_path"]
    try:
        return Path(snapshot_download(repository, allow_patterns=["*.json", "*.txt", "*.model"]))
    except Exception as error:
        raise ValueError(
            f"{path} holds tensors and no configs; those of {repository}, which fit files like it, cannot be had "
            f"({UNREACHED if unreached(error) else fault(error)}); give a diffusers folder of the same "
            f"architecture with --config FOLDER (in Python: config=), or put it beside the file as "
            f"{path.with_suffix('').name}/"
        ) from None


def _open_whole(pipeline_class: Any, path: Path, names: dict[str, str], dtype: torch.dtype, folder: Path) -> Any:
    """Every component that the file holds; the others from the folder, where it has their weights."""
    from diffusers.loaders.single_file_utils import SingleFileComponentError
    from safetensors.torch import save_file

    index = read_index(folder)
    others: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="erasure-") as temporary, reasons(path):
        source = path
        if any(old != new for old, new in names.items()):  # diffusers takes a path alone
            source = Path(temporary) / path.name
            save_file(read_tensors((path,), names), source)
        while True:
            try:
                pipe = pipeline_class.from_single_file(
                    str(source), config=str(folder), local_files_only=True, dtype=dtype, **others
                )
                break
            except SingleFileComponentError as error:
                absent = re.search(r"^(\w+) = ", str(error), re.MULTILINE)
                if absent is None or absent[1] in others:
                    raise
                if not any((folder / absent[1]).glob("*.safetensors")):
                    raise ValueError(
                        f"it holds no {absent[1]} as a {pipeline_class.__name__} has it, nor does {folder}"
                    ) from None
                others[absent[1]] = open_model(
                    model_class_of(*index[absent[1]]), folder / absent[1], dtype, variant=None
                )
        _refuse_meta(pipe.components, path)
    return pipe


def _open_denoiser(model_class: Any, path: Path, names: dict[str, str], dtype: torch.dtype, folder: Path) -> Any:
    from accelerate import init_empty_weights

    with reasons(path):
        state = read_tensors((path,), names)
        with init_empty_weights():
            expected = set(model_class.from_config(model_class.load_config(folder)).state_dict())
        for prefix in DENOISER_PREFIXES:
            inner = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
            if expected <= inner.keys():
                state = {name: inner[name] for name in expected}  # diffusers' own names
                break
        else:
            if any(name.startswith("input_blocks.") for name in state):
                state = {f"model.diffusion_model.{name}": tensor for name, tensor in state.items()}
        model = model_class.from_single_file(
            state, config=str(folder.parent), subfolder=folder.name, local_files_only=True, dtype=dtype
        )
        _refuse_meta({folder.name: model}, path)
    return model


def _refuse_meta(components: dict[str, Any], path: Path) -> None:
    """Refuse a model of which a tensor was never given a value."""
    for part, module in components.items():
        if isinstance(module, torch.nn.Module):
            empty = [name for name, tensor in module.state_dict().items() if tensor.is_meta]
            if empty:
                raise ValueError(f"{len(empty)} tensors of the {part} are not in it ({empty[0]})")


__all__ = ["open_file"]
