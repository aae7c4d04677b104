"""A diffusers folder as a pipeline, every model of it whole."""

from __future__ import annotations

import inspect
import json
import warnings
from pathlib import Path
from typing import Any

import torch

from erasure.opening.faults import fault, reasons
from erasure.weights import (
    FULL_FIRST,
    Found,
    check_variant,
    find_weights,
    in_float8,
    is_pointer,
    read_header,
    refuse_quantised,
    shared_prefix,
    unwrapped,
)

# Components that people delete from the folder and leave in its index; pictures do not depend on them.
DISPENSABLE = ("safety_checker", "feature_extractor", "image_encoder")
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


def open_folder(folder: Path, dtype: torch.dtype, *, variant: str | None = None, given: Any = None) -> Any:
    """A diffusers folder as a pipeline, every model of it checked for completeness; ``given`` components are used."""
    import diffusers

    index = read_index(folder)
    if variant is not None:
        check_variant(folder, variant)
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
        elif (model_class := model_class_of(*entry)) is not None:
            components[name] = open_model(model_class, folder / name, dtype, variant=variant)
        elif name.startswith("tokenizer"):
            _check_tokenizer(folder / name)
    with reasons(folder):
        pipe = diffusers.DiffusionPipeline.from_pretrained(str(folder), dtype=dtype, use_safetensors=True, **components)
    _warn_unknown_tokens(pipe)
    return pipe


def _check_tokenizer(folder: Path) -> None:
    """Refuse a tokenizer without its words, or without the length that its text encoder reads."""
    if not any((folder / file).exists() for file in VOCABULARIES):
        raise ValueError(f"{folder} holds no vocabulary ({', '.join(VOCABULARIES)}); get it again")
    _read_json(folder / "tokenizer_config.json")


def read_index(folder: Path) -> dict[str, Any]:
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
        raise ValueError(f"{path} cannot be read as JSON ({fault(error)}); get it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {type(content).__name__}, not an object; get it again")
    return content


def model_class_of(library: str, name: str) -> Any:
    """The class of a component that has weights; None for tokenizers, schedulers, processors."""
    import diffusers
    import transformers

    module = {"diffusers": diffusers, "transformers": transformers}.get(library)
    found = getattr(module or getattr(diffusers.pipelines, library, None), name, None)
    return found if inspect.isclass(found) and issubclass(found, torch.nn.Module) else None


def open_model(model_class: Any, folder: Path, dtype: torch.dtype, *, variant: str | None) -> Any:
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
    with reasons(folder):
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

    state = read_tensors(found.files, names)
    if issubclass(model_class, transformers.PreTrainedModel):
        settings = model_class.config_class.from_pretrained(folder, **options)
        loading: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True}
        return model_class.from_pretrained(None, config=settings, state_dict=state, dtype=dtype, **loading)
    model = model_class.from_config(model_class.load_config(folder)).to(dtype)
    missing, unexpected = model.load_state_dict(state, strict=False)
    return model, {"missing_keys": missing, "unexpected_keys": unexpected}


def read_tensors(files: tuple[Path, ...], names: dict[str, str]) -> dict[str, torch.Tensor]:
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


__all__ = ["model_class_of", "open_folder", "open_model", "read_index", "read_tensors"]
