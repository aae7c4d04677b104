"""The Gram of what every erasure keeps, on disk: encoded once for a text encoder, read by all later erasures.

Encoding is nearly all that a closed form takes, and most of what it encodes are the same everyday nouns. A file is
named after what their embeddings depend on: every bit of the text encoders' weights, the tokens of each prompt, the
layer, the span, the versions, the kind of device. It is used only if one prompt that is encoded now has the embeddings
it had then. Whatever is wrong with a file or folder, the Gram is computed, with one warning.

A file has 8 d^2 bytes for embeddings of width d (4.7 MB for Stable Diffusion 1, 34 MB for SDXL, 134 MB for FLUX.1), and
at most 8 * 2,048 d where they are wider than 4,096 (252 MB for FLUX.2 dev). The folder holds at most ``LARGEST`` bytes;
the files that were not used for longest go first. To clear it, delete it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from erasure.backbone import Backbone, Space
from erasure.backbone.fingerprint import content, matches
from erasure.backbone.text import PADDED, Span, converted
from erasure.io import cache_folder, parse_json, printable, sha256, sha256_json, tensor_bytes
from erasure.methods import kept
from erasure.methods.gram import Gram, embeddings, encoder_prints

LARGEST = 2**31  # bytes of the folder
VALUES = 64  # of one prompt's embeddings, to compare
UNRELATED = ("_name_or_path", "name_or_path", "transformers_version", "_attn_implementation_autoset")


def gram_with(backbone: Backbone, prompts: Sequence[str], common: Sequence[str], *, span: Span, space: Space) -> Gram:
    """The Gram of prompts, of which those that are ``common`` to all erasures are encoded once.

    A few common prompts that are not among them (an everyday noun that is to be erased) are subtracted, or, where
    embeddings are so wide that the Gram is a sketch, all prompts are encoded.
    """
    missing = [prompt for prompt in common if prompt not in prompts]
    sketch = backbone.width(space) > kept.WIDE
    if not common or 2 * len(missing) > len(common) or (missing and sketch):
        return Gram.of(backbone, prompts, span=span, spaces=(space,))
    total = cached_gram(backbone, common, span=span, space=space)
    if missing:
        total = total.less(Gram.of(backbone, missing, span=span, spaces=(space,)))
    rest = [prompt for prompt in prompts if prompt not in common]
    return total + Gram.of(backbone, rest, span=span, spaces=(space,)) if rest else total


def cached_gram(backbone: Backbone, prompts: Sequence[str], *, span: Span, space: Space) -> Gram:
    """``Gram.of`` the prompts, from a file if there is one of just these text encoders and prompts.

    Warns:
        UserWarning: a file could not be used, or none written.
    """
    fault, path, mark = "", None, dict[str, Any]()
    try:
        if (folder := cache_folder()) is not None and not _altered(backbone):
            mark = _mark(backbone, prompts, span, space)
            path = folder / "gram" / f"{mark['layout'][:32]}.safetensors"
            gram = _read(path, mark)
            return dataclasses.replace(gram, encoders=encoder_prints(backbone))
    except FileNotFoundError:
        pass  # the first erasure with these encoders
    except Exception as error:  # an erasure does not depend on what somebody's disk holds
        fault = f"{type(error).__name__}: {error}"
    gram = Gram.of(backbone, prompts, span=span, spaces=(space,))
    try:
        if path is not None:
            gram.save(path, notes={"cache": json.dumps({"mark": mark, "sha256": _digest(gram)})})
            _prune(path)
    except OSError as error:
        fault = fault or f"{type(error).__name__}: {error}"
    if fault:
        warnings.warn(
            f"the everyday nouns were encoded again: their cache cannot be used ({printable(fault)}); set "
            "ERASURE_CACHE to a folder that can be written, or to off",
            stacklevel=2,
        )
    return gram


# --- what the embeddings depend on -----------------------------------------------------------------------------------


def _mark(backbone: Backbone, prompts: Sequence[str], span: Span, space: Space) -> dict[str, Any]:
    """A fingerprint: ``layout`` of all that decides the embeddings, and ``samples`` of those of the first prompt."""
    norm = next(iter(backbone.text_sites().values())).norm
    layers = [one.read(prompts[:1], padded=span in PADDED) for one in backbone.read_at()]
    facts = {
        "versions": {name: version(name) for name in ("torch", "transformers", "diffusers")},
        "encoders": {name: [content(module), _config(module)] for name, module in backbone.encoders.items()},
        "norm": None if norm is None else [repr(norm), content(norm)],
        "backbone": f"{type(backbone).__module__}:{type(backbone).__qualname__}",
        "encoding": backbone.encoding,
        "tokens": {
            name: [length, *(tokenizer([p]).input_ids for p in converted(backbone.pipe, tokenizer, prompts))]
            for name, (tokenizer, length) in backbone.tokenizers().items()
        },
        "laid out": [[s.ids.tolist(), s.starts, s.ends, s.stops] for one in layers for s in one.segments],
        "prompts": list(prompts),
        "take": [span, space, backbone.width(space) > kept.WIDE and kept.SKETCH],
        "arithmetic": [
            str(layers[0].hidden.dtype),
            backbone.device.type,
            torch.get_float32_matmul_precision(),
            torch.is_autocast_enabled(backbone.device.type),
        ],
    }
    values = embeddings(layers, span, space).flatten().double().cpu()
    places = torch.linspace(0, len(values) - 1, VALUES).long()
    return {"layout": sha256_json(facts, default=str), "samples": values[places].tolist()}


def _config(module: Any) -> dict[str, Any]:
    """What a text encoder computes with its weights (activations, epsilons), wherever they were loaded from."""
    to_dict = getattr(getattr(module, "config", None), "to_dict", dict)
    return {key: value for key, value in to_dict().items() if key not in UNRELATED}


def _altered(backbone: Backbone) -> bool:
    """Whether something else than its weights decides what an encoder says: hooks, or another forward pass.

    transformers leaves hooks of its own behind, which record hidden states.
    """
    modules = [m for encoder in backbone.encoders.values() for m in encoder.modules()]
    hooks = [hook for m in modules for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    foreign = any(not str(getattr(hook, "__module__", "")).startswith("transformers.") for hook in hooks)
    return foreign or any("forward" in vars(m) for m in modules)


# --- the files -------------------------------------------------------------------------------------------------------


def _read(path: Path, mark: dict[str, Any]) -> Gram:
    if not path.is_file():
        raise FileNotFoundError(path)
    gram = Gram.load(path)
    with safe_open(path, "pt") as file:
        notes = parse_json(file.metadata()["cache"])
    if not matches(notes["mark"], mark):
        raise ValueError(f"{path} is of other embeddings than these text encoders give now")
    if notes["sha256"] != _digest(gram):
        raise ValueError(f"{path} is damaged")
    with contextlib.suppress(OSError):
        os.utime(path)  # it was used
    return gram


def _digest(gram: Gram) -> str:
    facts = {space: (one.low_rank, one.lost, gram.counts[space]) for space, one in gram.kept.items()}
    pieces = (piece for space, one in gram.kept.items() for piece in tensor_bytes(space, one.data))
    return sha256(piece for part in (iter([repr((gram.span, facts)).encode()]), pieces) for piece in part)


def _prune(newest: Path) -> None:
    """Delete the files that were not used for longest, until the folder is within its bound."""
    left, files = LARGEST - newest.stat().st_size, []
    for file in newest.parent.glob("*.safetensors"):
        with contextlib.suppress(FileNotFoundError):  # another process deleted it
            files += [(file.stat(), file)] if file != newest else []
    for stat, file in sorted(files, key=lambda each: -each[0].st_mtime):
        left -= stat.st_size
        if left < 0:
            file.unlink(missing_ok=True)


__all__ = ["cached_gram", "gram_with"]
