"""Opening a base model: a diffusers folder, a hub repository or one file, each whole or refused for its reason.

Models are opened one by one before the pipeline is, because diffusers and transformers leave a tensor that no file
holds at random values and say so in a log line.
"""

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
from erasure.io import first_line
from erasure.runtime import pick_device, pick_dtype
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
    shared_prefix,
    unwrapped,
)

# Components that people delete from the folder and leave in its index; pictures do not depend on them.
DISPENSABLE = ("safety_checker", "feature_extractor", "image_encoder")
# How other tools name a denoiser's tensors before the name itself.
DENOISER_PREFIXES = ("", "model.diffusion_model.", "diffusion_model.", "unet.", "transformer.", "model.")
# One of these holds a tokenizer's words; without any, transformers makes a tokenizer that knows none.
VOCABULARIES = (
    "tokenizer.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tokenizer.model",
    "sentencepiece.bpe.model",
)
TOKEN_TABLES = ("token_embedding.weight", "embed_tokens.weight", "shared.weight", "word_embeddings.weight")


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
    from erasure import world  # only the world's own pipeline needs it

    device, dtype = pick_device(device), pick_dtype(dtype)
    base = str(base)
    source = world.path() if base == WORLD else Path(base).expanduser()
    with quiet():
        if source.is_file():
            if variant is not None:
                raise ValueError(f"variant= chooses among a folder's files; {base!r} is one file; leave it out")
            pipe = open_file(source, dtype, config=config)
        elif source.is_dir():
            if config is not None:
                raise ValueError(f"config= goes with a single file; {base!r} is a folder with its own; leave it out")
            pipe = open_folder(source, dtype, variant=variant)
        else:
            pipe = open_folder(download(base, variant), dtype, variant=variant)
            pipe.register_to_config(_name_or_path=base)  # not the cache's folder
        pipe.set_progress_bar_config(disable=True)
        return pipe.to(device)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """diffusers and transformers without bars and tables: what they report is checked here, or of no use."""
    import diffusers.utils.logging
    import transformers.utils.logging

    libraries = [library.utils.logging for library in (diffusers, transformers)]
    before = [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, (verbosity, bar) in zip(libraries, before, strict=True):
            library.set_verbosity(verbosity)
            if bar:
                library.enable_progress_bar()


def download(base: str, variant: str | None) -> Path:
    """The folder of a hub repository in the local cache."""
    import diffusers

    if address := re.match(r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/([^/]+/[^/?#]+)", base):
        raise FileNotFoundError(f"{base!r} is a web address; give the hub id {address[1]!r}, or a downloaded file")
    if base.count("/") != 1 or base.startswith((".", "/", "~")) or Path(base).suffix in (".safetensors", ".ckpt"):
        raise FileNotFoundError(
            f"no model at {base!r}; give {WORLD!r}, a diffusers folder, a .safetensors file, or a hub id "
            "('CompVis/stable-diffusion-v1-4')"
        )
    errors: list[Exception] = []
    for files in (variant, "fp16") if variant is None else (variant,):
        try:
            return Path(diffusers.DiffusionPipeline.download(base, variant=files, use_safetensors=True))
        except (OSError, ValueError) as failure:  # no plain safetensors there: a ValueError or OSError by version
            errors.append(failure)
    error = errors[0]
    kinds = {type(e).__name__ for e in (error, error.__cause__, error.__context__)}
    reason = _fault(error)
    if "GatedRepoError" in kinds:
        reason = f"it is gated: accept its terms on https://huggingface.co/{base}, then run `hf auth login`"
    elif "RepositoryNotFoundError" in kinds:
        reason = "the hub has no such repository, or it is private (`hf auth login`)"
    raise FileNotFoundError(f"could not load {base!r}: {reason}") from None


def open_folder(folder: Path, dtype: torch.dtype, *, variant: str | None = None, given: Any = None) -> Any:
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
        elif name.startswith("tokenizer") and not any((folder / name / file).exists() for file in VOCABULARIES):
            raise ValueError(f"{folder / name} holds no vocabulary ({', '.join(VOCABULARIES)}); get it again")
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
    if not path.exists():
        raise ValueError(f"{path.parent} lacks {path.name}; the download is not complete: get it again")
    try:
        content = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON ({_fault(error)}); get it again") from None
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
            model, report = _open_by_name(model_class, folder, found, dtype, **options)
        else:
            model, report = _open_by_hand(model_class, folder, found, names, dtype, **options)
        if report["missing_keys"] and (prefix := shared_prefix(names.values())):  # a wrapper of another kind
            names = {old: new.removeprefix(prefix) for old, new in names.items()}
            model, report = _open_by_hand(model_class, folder, found, names, dtype, **options)
    if mismatched := sorted(report.get("mismatched_keys") or ()):
        name, here, wanted = mismatched[0]
        raise ValueError(f"{folder}: {name} is {tuple(here)} in its files and {tuple(wanted)} by its config.json")
    if missing := sorted(report["missing_keys"]):
        raise ValueError(
            f"{folder}: tensors of a {model_class.__name__} are not in its files ({missing[0]} and {len(missing) - 1} "
            "more); they are not complete, or of another model"
        )
    if extra := sorted(report["unexpected_keys"]):
        warnings.warn(f"{folder}: {len(extra)} tensors are not read ({extra[0]})", stacklevel=4)
    return model.eval()


def _open_by_name(
    model_class: Any, folder: Path, found: Found, dtype: torch.dtype, **options: Any
) -> tuple[Any, dict[str, Any]]:
    """A component as diffusers and transformers write it, and what did not fit."""
    import transformers

    if issubclass(model_class, transformers.PreTrainedModel):
        options["ignore_mismatched_sizes"] = True  # reported instead
    return model_class.from_pretrained(
        folder, dtype=dtype, variant=found.variant, use_safetensors=True, output_loading_info=True, **options
    )


def _open_by_hand(
    model_class: Any, folder: Path, found: Found, names: dict[str, str], dtype: torch.dtype, **options: Any
) -> tuple[Any, dict[str, Any]]:
    """A component whose files or tensors have other names than the library looks for."""
    import transformers

    state = _read_tensors(found.files, names)
    if issubclass(model_class, transformers.PreTrainedModel):
        settings = model_class.config_class.from_pretrained(folder, **options)
        loading: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True}
        return model_class.from_pretrained(None, config=settings, state_dict=state, dtype=dtype, **loading)
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


def open_file(path: Path, dtype: torch.dtype, *, config: str | Path | None) -> Any:
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
        pipe = open_folder(folder, dtype, given={part: model})
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
            f"({_fault(error)}); give config= a diffusers folder of the same architecture, or put one beside the "
            f"file as {path.with_suffix('').name}/"
        ) from None


def _open_whole(pipeline_class: Any, path: Path, names: dict[str, str], dtype: torch.dtype, folder: Path) -> Any:
    """Every component that the file holds; the others from the folder, where it has their weights."""
    from diffusers.loaders.single_file_utils import SingleFileComponentError
    from safetensors.torch import save_file

    index = _read_index(folder)
    others: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="erasure-") as temporary, _reasons(path):
        source = path
        if any(old != new for old, new in names.items()):  # diffusers takes a path alone
            source = Path(temporary) / path.name
            save_file(_read_tensors((path,), names), source)
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
                others[absent[1]] = _open_model(
                    _model_class(*index[absent[1]]), folder / absent[1], dtype, variant=None
                )
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
        raise ValueError(f"could not open {source}: {_fault(error)}") from error


def _fault(error: Exception) -> str:
    """The sentence of an error that says what is wrong."""
    first = re.split(r"(?<=[\w\])`'\"])\. (?=[A-Z])", first_line(error))[0].rstrip(".")
    if isinstance(error, KeyError):
        return f"it lacks the tensor or setting {first}"
    if absent := re.match(r"Failed to load (\w+)$", first):  # diffusers' words for a file without such a part
        return f"it holds no weights of a {absent[1]} under names that diffusers knows"
    if "meta tensor" in first:
        return "it lacks tensors that its config asks for; it is not complete, or of another model"
    return first[:300]


__all__ = ["download", "open_file", "open_folder", "quiet"]
