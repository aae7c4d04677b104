"""Where models run and what they are opened from: device, precision, base models by name, folder or file."""

from __future__ import annotations

import contextlib
import inspect
import json
import re
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from erasure.concept import WORLD
from erasure.weights import (
    FULL_FIRST,
    PARTS_BESIDE,
    Found,
    find_weights,
    in_float8,
    is_pointer,
    not_a_model,
    read_header,
    refuse_quantised,
    unwrapped,
)

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SHORT = {"fp32": "float32", "fp16": "float16", "half": "float16", "bf16": "bfloat16"}
# Components that people delete from the folder and leave in its index; pictures do not depend on them.
DISPENSABLE = ("safety_checker", "feature_extractor", "image_encoder")
# How other tools name a denoiser's tensors before the name itself.
DENOISER_PREFIXES = ("", "model.diffusion_model.", "diffusion_model.", "unet.", "transformer.", "model.")
TOKEN_TABLES = ("token_embedding.weight", "embed_tokens.weight", "shared.weight", "word_embeddings.weight")


# --- device and precision ------------------------------------------------------------------------------------------


def pick_device(device: str | torch.device | None = None) -> str:
    """``device``, or the best one here: cuda, mps, cpu.

    Raises:
        ValueError: the device does not exist here; the message says why.
    """
    here = ["cpu"]
    if torch.backends.mps.is_available():
        here.insert(0, "mps")
    if torch.cuda.is_available():
        here.insert(0, "cuda")
    if device is None:
        return here[0]
    try:
        wanted = torch.device(device)
    except RuntimeError:
        hint = "; GPUs of NVIDIA and AMD are called cuda" if str(device).lower() in ("gpu", "nvidia", "rocm") else ""
        raise ValueError(f"unknown device {str(device)!r}{hint}; choose one of {here}") from None
    if wanted.type not in here:
        reason = ""
        if wanted.type == "cuda":
            reason = f": this torch ({torch.__version__}) is built for the CPU alone; install one built for CUDA"
            if torch.version.cuda or getattr(torch.version, "hip", None):
                reason = ": torch sees no GPU (`nvidia-smi` shows whether the driver does)"
        raise ValueError(f"no device {str(device)!r} here{reason}; choose one of {here}")
    if wanted.type == "cuda" and (wanted.index or 0) >= (count := torch.cuda.device_count()):
        raise ValueError(f"no device {str(device)!r} here; GPUs are counted from 0 and there are {count}")
    return str(device)


def pick_dtype(dtype: str | torch.dtype | None = None) -> torch.dtype:
    """float32 (default), float16 or bfloat16 by name, torch's or the short one ("fp16").

    Raises:
        ValueError: any other.
    """
    name = str(dtype or "float32").removeprefix("torch.")
    if (found := DTYPES.get(SHORT.get(name, name))) is None:
        raise ValueError(f"unknown dtype {name!r}; choose one of {sorted(DTYPES)}")
    return found


def fast_bfloat16(device: torch.device | str) -> bool:
    """Whether bfloat16 is faster than float32 on a device: GPUs that compute in it, CPUs with instructions for it.

    Where a CPU has none, bfloat16 is emulated: right, and twenty times as slow as float32.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # older versions cannot say
    return kind == "cpu" and any(capabilities.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16"))


def autocast_for(module: Any) -> bool:
    """Whether a pipeline or model is worth running in bfloat16: it is float32, on a device that is faster with it."""
    return module.dtype == torch.float32 and fast_bfloat16(module.device)


def autocast(
    device: torch.device | str, enabled: bool | None = None, **options: Any
) -> contextlib.AbstractContextManager[Any]:
    """``torch.autocast`` to bfloat16; by default where that is faster."""
    enabled = fast_bfloat16(device) if enabled is None else enabled
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=enabled, **options)


# --- opening a base model ------------------------------------------------------------------------------------------


def load_base(
    base: str | Path = WORLD,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    variant: str | None = None,
    config: str | Path | None = None,
) -> Any:
    """A pipeline by name: "emoji-world", a diffusers folder, a hub id, or a single .safetensors file.

    Only safetensors are opened, never pickles. Every tensor a model needs must be in its files, whatever wrapper's
    prefix its name carries; nothing is left at random values.

    Args:
        device: cuda, mps or cpu; the best one here by default.
        dtype: float32 (default), float16 or bfloat16. Change it when memory is short.
        variant: "fp16" for the files of that name. By default the plain ones, or those there are.
        config: for a single file, the diffusers folder whose configs (and, where the file holds the denoiser alone,
            whose other components) go with it. By default the folder around the file, the one beside it under the
            same name, or the hub repository that diffusers names for this architecture.

    Raises:
        FileNotFoundError: neither a folder or file nor a model the hub gives.
        ValueError: unknown device or dtype; or what is there cannot be opened, for the reason given.
    """
    import diffusers.utils.logging
    import transformers.utils.logging

    from erasure import world

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()  # one status line says it all
    device, dtype = pick_device(device), pick_dtype(dtype)
    base = str(base)
    source = world.path() if base == WORLD else Path(base).expanduser()
    if source.is_file():
        pipe = _open_file(source, dtype, config=config)
    elif config is not None:
        raise ValueError(f"config= goes with a single file; got {base!r}; leave it out")
    elif source.is_dir():
        pipe = _open_folder(source, dtype, variant=variant)
    else:
        pipe = _open_folder(_download(base, variant), dtype, variant=variant)
        pipe.register_to_config(_name_or_path=base)  # not the cache's folder
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def _download(base: str, variant: str | None) -> Path:
    """The folder of a hub repository in the local cache."""
    import diffusers

    if address := re.match(r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/([^/]+/[^/?#]+)", base):
        raise FileNotFoundError(f"{base!r} is a web address; give the hub id {address[1]!r}, or a downloaded file")
    if base.count("/") != 1 or base.startswith((".", "/", "~")) or Path(base).suffix in (".safetensors", ".ckpt"):
        raise FileNotFoundError(
            f"no model at {base!r}; give {WORLD!r}, a diffusers folder, a .safetensors file, or a hub id "
            "('CompVis/stable-diffusion-v1-4')"
        )
    error: Exception | None = None
    for files in (variant, "fp16") if variant is None else (variant,):
        try:
            return Path(diffusers.DiffusionPipeline.download(base, variant=files, use_safetensors=True))
        except (OSError, ValueError) as failure:  # no plain safetensors there: a ValueError or OSError by version
            error = error or failure
    raise FileNotFoundError(f"could not load {base!r}: {_first_line(error)}") from None


def _open_folder(folder: Path, dtype: torch.dtype, *, variant: str | None = None, given: Any = None) -> Any:
    """A diffusers folder as a pipeline, every model of it checked for completeness; ``given`` components are used."""
    import diffusers

    index = _read_index(folder)
    components: dict[str, Any] = dict(given or {})
    for path in folder.rglob("*"):
        if path.is_file() and path.stat().st_size < 1024 and is_pointer(path):
            raise ValueError(f"{path} is a Git LFS pointer, not the file itself; run `git lfs pull` in {folder}")
    for name, entry in index.items():
        if not isinstance(entry, list) or len(entry) != 2 or None in entry or name in components:
            continue
        if not (folder / name).is_dir():
            if name not in DISPENSABLE:
                raise ValueError(f"{folder} lacks the folder {name} that its model_index.json names; get it again")
            warnings.warn(f"{folder} has no {name}; the pipeline is opened without it", stacklevel=3)
            components[name] = None
        elif (model_class := _model_class(*entry)) is not None:
            components[name] = _open_model(model_class, folder / name, dtype, variant=variant)
    with _reasons(folder):
        pipe = diffusers.DiffusionPipeline.from_pretrained(str(folder), dtype=dtype, use_safetensors=True, **components)
    _warn_unknown_tokens(pipe)
    return pipe


def _read_index(folder: Path) -> dict[str, Any]:
    """``model_index.json``, with a pipeline class that exists."""
    import diffusers

    path = folder / "model_index.json"
    if not path.exists():
        if (folder.parent / "model_index.json").exists():
            raise FileNotFoundError(f"{folder} is one component of a pipeline; give {folder.parent}")
        if (folder / "erasure_config.json").exists():
            raise FileNotFoundError(f"{folder} holds an erasure, not a model; give the base it was made for")
        if (folder / "modular_model_index.json").exists():
            raise FileNotFoundError(f"{folder} is a modular pipeline; open it with diffusers and pass it to erase()")
        files = sorted(folder.glob("*.safetensors"))
        hint = f"; give the file itself: {files[0]}" if files else ""
        raise FileNotFoundError(f"{folder} holds no model_index.json: not a diffusers pipeline{hint}")
    index = _read_json(path)
    name = index.get("_class_name")
    found = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (inspect.isclass(found) and issubclass(found, diffusers.DiffusionPipeline)):
        raise ValueError(
            f"{path} names the pipeline class {name!r}, which diffusers {diffusers.__version__} does not have; update "
            "diffusers, or, for code of the model's own, open it yourself and pass the pipeline to erase()"
        )
    return index


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError, FileNotFoundError) as error:
        raise ValueError(f"{path} cannot be read as JSON ({_first_line(error)}); get it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {type(content).__name__}, not an object; get it again")
    return content


def _model_class(library: str, name: str) -> Any:
    """The class of a component that has weights; None for tokenizers, schedulers, processors."""
    import diffusers
    import transformers

    module = {"diffusers": diffusers, "transformers": transformers}.get(library)
    found = getattr(module or getattr(diffusers.pipelines, library, None), name, None)
    return found if inspect.isclass(found) and issubclass(found, torch.nn.Module) else None


def _open_model(model_class: Any, folder: Path, dtype: torch.dtype, *, variant: str | None) -> Any:
    """One component, whole: no tensor is missing, none has another shape than the config says."""
    settings = _read_json(folder / "config.json")
    if settings.get("quantization_config"):
        raise ValueError(f"{folder} is quantised; {FULL_FIRST}")
    found = find_weights(folder, variant)
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for file in found.files:
        tensors |= read_header(file)
    refuse_quantised(folder, tensors)
    if in_float8(tensors):
        warnings.warn(f"{folder} is stored in float8: opened as {dtype}, with float8's rounding", stacklevel=4)
    names = unwrapped(tensors)
    options: dict[str, Any] = {}
    rows = next((shape[0] for n, (_, shape) in tensors.items() if n.endswith(TOKEN_TABLES)), None)
    if rows is not None and settings.get("vocab_size", rows) != rows:
        options["vocab_size"] = rows  # grew by textual inversions after the config was written
    with _reasons(folder):
        if found.standard and all(old == new for old, new in names.items()):
            model, report = model_class.from_pretrained(
                folder, dtype=dtype, variant=found.variant, use_safetensors=True, output_loading_info=True, **options
            )
        else:
            model, report = _open_by_hand(model_class, folder, found, names, dtype, **options)
    if missing := sorted(report["missing_keys"]):
        raise ValueError(
            f"{folder}: {len(missing)} tensors of a {model_class.__name__} are not in its files ({missing[0]}); "
            "they are not complete, or of another model"
        )
    if extra := sorted(report["unexpected_keys"]):
        warnings.warn(f"{folder}: {len(extra)} tensors are not read ({extra[0]})", stacklevel=4)
    return model.eval()


def _open_by_hand(
    model_class: Any, folder: Path, found: Found, names: dict[str, str], dtype: torch.dtype, **options: Any
) -> tuple[Any, dict[str, Any]]:
    """A component whose files or tensors have other names than the library looks for."""
    import transformers

    state = _read_tensors(found.files, names)
    if issubclass(model_class, transformers.PreTrainedModel):
        settings = model_class.config_class.from_pretrained(folder, **options)
        return model_class.from_pretrained(
            None, config=settings, state_dict=state, dtype=dtype, output_loading_info=True
        )
    model = model_class.from_config(model_class.load_config(folder)).to(dtype)
    missing, unexpected = model.load_state_dict(state, strict=False)
    return model, {"missing_keys": missing, "unexpected_keys": unexpected}


def _read_tensors(files: tuple[Path, ...], names: dict[str, str]) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {names[old]: tensor for file in files for old, tensor in load_file(file).items()}


def _warn_unknown_tokens(pipe: Any) -> None:
    """Say which words a tokenizer knows and its encoder does not: a textual inversion saved without its embedding."""
    for part in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        tokenizer, encoder = getattr(pipe, part, None), getattr(pipe, part.replace("tokenizer", "text_encoder"), None)
        if tokenizer is None or encoder is None:
            continue
        rows = len(encoder.get_input_embeddings().weight)
        added = getattr(tokenizer, "added_tokens_decoder", {})
        if lost := [str(token) for i, token in added.items() if i >= rows and not token.special]:
            warnings.warn(
                f"the {part} knows {lost[0]!r} and the text encoder has no embedding for it ({rows} rows); prompts "
                "with it fail until pipe.load_textual_inversion() has loaded it",
                stacklevel=4,
            )


# --- one file ------------------------------------------------------------------------------------------------------


def _open_file(path: Path, dtype: torch.dtype, *, config: str | Path | None) -> Any:
    """A whole model, or a denoiser, in one safetensors file."""
    import diffusers

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
    index = _read_index(folder)
    pipeline_class = getattr(diffusers, index["_class_name"])
    whole = any(name.startswith(PARTS_BESIDE) for name in tensors) and hasattr(pipeline_class, "from_single_file")
    if whole:
        pipe = _open_whole(pipeline_class, path, names, dtype, folder)
    else:
        part = next(name for name in ("unet", "transformer", "prior") if name in index)
        model = _open_denoiser(_model_class(*index[part]), path, names, dtype, folder / part)
        pipe = _open_folder(folder, dtype, given={part: model})
    pipe.register_to_config(_name_or_path=str(path))
    return pipe


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
            f"({_first_line(error)}); give config= a diffusers folder of the same architecture, or put one beside the "
            f"file as {path.with_suffix('').name}/"
        ) from None


def _open_whole(pipeline_class: Any, path: Path, names: dict[str, str], dtype: torch.dtype, folder: Path) -> Any:
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory(prefix="erasure-") as temporary, _reasons(path):
        source = path
        if any(old != new for old, new in names.items()):  # diffusers takes a path alone
            source = Path(temporary) / path.name
            save_file(_read_tensors((path,), names), source)
        pipe = pipeline_class.from_single_file(str(source), config=str(folder), local_files_only=True, dtype=dtype)
        _refuse_meta(pipe.components, path)
    return pipe


def _open_denoiser(model_class: Any, path: Path, names: dict[str, str], dtype: torch.dtype, folder: Path) -> Any:
    from accelerate import init_empty_weights

    with _reasons(path):
        state = _read_tensors((path,), names)
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


@contextlib.contextmanager
def _reasons(source: Path) -> Iterator[None]:
    """What diffusers, transformers and safetensors raise, as one line that names what was being opened."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        raise ValueError(f"could not open {source}: {_first_line(error)}") from error


def _first_line(error: Exception | None) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = lines[0] if lines else ""
    if isinstance(error, KeyError):
        return f"it lacks the tensor or setting {first}"
    return f"{first[:300]}" or type(error).__name__
