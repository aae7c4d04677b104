"""What a file of weights is, from its header alone: nothing is loaded, and nothing but safetensors is opened."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LONGEST_HEADER = 100_000_000  # bytes; the safetensors format's own limit
PICKLES = (".bin", ".ckpt", ".pt", ".pth")
FULL_FIRST = "erase the full-precision model first, quantise afterwards"
FLOAT8 = ("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
# Tensors that stand beside quantised weights and say how to read them: bitsandbytes, ComfyUI's scaled fp8, GPTQ.
QUANTISED = re.compile(
    r"(\.absmax|\.quant_map|\.quant_state\..+|\.SCB|\.(scale_weight|weight_scale(_\d)?)|(^|\.)scaled_fp8|\.(qweight|qzeros))$"
)
# Written into parameter names by torch.compile, FSDP and activation checkpointing.
WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
LORA = re.compile(r"(\.lora_(down|up|A|B)\.|\.lora\.(down|up)\.|^lora_(unet|te|transformer)|\.hada_w1_|\.lokr_w1)")
# What stands before the names of each part of a whole model in one file (the original codes' and ComfyUI's names).
PARTS_BESIDE = ("cond_stage_model.", "conditioner.", "first_stage_model.", "text_encoders.", "vae.")

Tensors = Mapping[str, tuple[str, tuple[int, ...]]]
"""Each tensor's dtype, as safetensors names it ("F32"), and shape."""


@dataclass(frozen=True)
class Found:
    """The files that hold one model in a folder.

    Attributes:
        files: one, or all shards.
        variant: "fp16" where the files are named so, None for plain names.
        standard: diffusers and transformers find them by themselves.
    """

    files: tuple[Path, ...]
    variant: str | None
    standard: bool


def read_header(path: Path) -> Tensors:
    """Names, dtypes and shapes in a safetensors file, of which the length is checked.

    Raises:
        ValueError: it is something else, or not whole; the message says what.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(512)
        if reason := _other_kind(path, start):
            raise ValueError(reason)
        length = int.from_bytes(start[:8], "little")
        if length > LONGEST_HEADER or start[8:9] != b"{":
            named = path.suffix == ".safetensors"
            hint = ", whatever its name says; get it again" if named else "; give a .safetensors checkpoint"
            raise ValueError(f"{path} is no safetensors file{hint}")
        if length + 8 > size:
            raise ValueError(_truncated(path, size, length + 8, "at least "))
        file.seek(8)
        text = file.read(length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        tensors = {name: (str(e["dtype"]), tuple(int(n) for n in e["shape"])) for name, e in header.items()}
        end = 8 + length + max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        raise ValueError(f"{path} has a damaged safetensors header; get it again") from None
    if size < end:
        raise ValueError(_truncated(path, size, end))
    if not tensors:
        raise ValueError(f"{path} holds no tensors; get it again, or save the model again")
    return tensors


def _truncated(path: Path, size: int, wanted: int, more: str = "") -> str:
    return f"{path} is cut off: {size:,} bytes of {more}{wanted:,}; the download or the copy broke off: get it again"


def is_pointer(path: Path) -> bool:
    """Whether a file is a Git LFS pointer: three lines of text where the real file should be."""
    with path.open("rb") as file:
        return file.read(40).startswith(b"version https://git-lfs")


def _other_kind(path: Path, start: bytes) -> str:
    """Why a file that begins like this cannot be a safetensors file; empty if it can."""
    if not start:
        return f"{path} is empty; get it again"
    if start.startswith(b"version https://git-lfs"):
        return f"{path} is a Git LFS pointer, not the file itself; run `git lfs pull` in the clone it came from"
    if start.startswith(b"GGUF"):
        return f"{path} is GGUF: quantised for inference; give the full-precision model, quantise after erasing"
    if path.suffix in PICKLES or start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x04")):
        return (
            f"{path} is a pickle, which can run code when it is opened; only safetensors files are opened: "
            "get that form of the model, or, where you trust it, load it with diffusers and save_pretrained() it"
        )
    if start.lstrip()[:15].lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return f"{path} is a web page, not a model: the address was a page's; download the file itself"
    return ""


def find_weights(folder: Path, variant: str | None = None) -> Found:
    """The safetensors files of the model in a component's folder.

    Args:
        folder: holds ``config.json`` and the weights.
        variant: which of several sets of files, "fp16". None: those with plain names, else the only set there is (of
            several, fp16 before bf16). A set that is asked for and is not here gives way to the plain one, as in
            diffusers: most repositories have only some components in half precision.

    Raises:
        ValueError: only pickles, no weights, a shard missing, or several sets and none to prefer.
    """
    sets: dict[tuple[str | None, str], dict[int, tuple[int, Path]]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        stem, which, part, parts = _parse(path.name)
        sets.setdefault((which, stem), {})[part] = (parts, path)
    if not sets:
        for path in sorted(folder.iterdir()):
            if path.suffix in (*PICKLES, ".gguf"):
                with path.open("rb") as file:
                    raise ValueError(_other_kind(path, file.read(512)) or f"{path} is in no format that is opened here")
        raise ValueError(f"{folder} holds no weights (.safetensors): the download is not complete; get it again")
    which, stem = _choose(folder, list(sets), variant)
    shards = sets[which, stem]
    wanted = max(parts for parts, _ in shards.values())
    if gone := sorted(set(range(1, wanted + 1)) - set(shards)):
        raise ValueError(
            f"{folder} lacks shard {gone[0]} of {wanted} of {stem}; the download is not complete: get it again"
        )
    index = f"{stem}.safetensors.index.{which + '.' if which else ''}json"
    named = stem in ("diffusion_pytorch_model", "model") and (wanted == 1 or (folder / index).exists())
    return Found(tuple(path for _, (_, path) in sorted(shards.items())), which, named)


def check_variant(folder: Path, variant: str) -> None:
    """Raise unless some component of a pipeline's folder has files of the variant."""
    there = {_parse(path.name)[1] for path in folder.glob("*/*.safetensors")}
    if variant not in there:
        kinds = ", ".join(repr(which) for which in sorted(filter(None, there)))
        others = f"the plain files or {kinds}" if kinds else "the plain files"
        raise ValueError(f"{folder} has no files of variant {variant!r}; leave it out, and {others} are opened")


def _choose(folder: Path, sets: Sequence[tuple[str | None, str]], variant: str | None) -> tuple[str | None, str]:
    # the names that diffusers and transformers give come first, other names only where those are missing
    standard = [s for s in sets if s[1] in ("diffusion_pytorch_model", "model")] or list(sets)
    for wanted in dict.fromkeys((variant, None, *(("fp16", "bf16") if variant is None else ()))):
        if len(found := [s for s in standard if s[0] == wanted]) == 1:
            return found[0]
    if len(standard) == 1 and variant is None:
        return standard[0]
    names = ", ".join(sorted(f"{stem}.{which}" if which else stem for which, stem in standard))
    asked = f"variant={variant!r} is not among them" if variant else "none has the plain name"
    raise ValueError(f"{folder} holds {names}, and {asked}; choose one with variant=, or leave one file there")


def _parse(name: str) -> tuple[str, str | None, int, int]:
    """``model.fp16-00001-of-00002.safetensors`` -> ("model", "fp16", 1, 2); unsharded files are shard 1 of 1."""
    stem, part, parts = name.removesuffix(".safetensors"), 1, 1
    if shard := re.search(r"-(\d{5})-of-(\d{5})", stem):
        stem, part, parts = stem.replace(shard[0], ""), int(shard[1]), int(shard[2])
    for standard in ("diffusion_pytorch_model", "model"):
        if stem.startswith(f"{standard}."):
            return standard, stem.removeprefix(f"{standard}."), part, parts
    return stem, None, part, parts


def unwrapped(names: Iterable[str]) -> dict[str, str]:
    """Each name to what it was before wrappers (torch.compile, FSDP, DDP) put theirs into it.

    ``module.`` is taken off only where every name begins with it: models may have a part of that name.
    """
    names = list(names)
    plain = {name: WRAPPERS.sub("", name) for name in names}
    while plain and all(new.startswith("module.") for new in plain.values()):
        plain = {name: new.removeprefix("module.") for name, new in plain.items()}
    return plain


def shared_prefix(names: Iterable[str]) -> str:
    """The first part of every name, "model.", where all begin with the same one; else empty."""
    firsts = {name.partition(".")[0] for name in names}
    return f"{firsts.pop()}." if len(firsts) == 1 else ""


def refuse_quantised(where: Any, tensors: Tensors) -> None:
    """Refuse weights that mean nothing without a quantiser's scales.

    Raises:
        ValueError: naming the tensor that shows it.
    """
    if marks := [name for name in tensors if QUANTISED.search(name)]:
        raise ValueError(f"{where} is quantised ({marks[0]}); {FULL_FIRST}")
    whole = [name for name, (dtype, shape) in tensors.items() if dtype in ("I8", "U8", "F4") and len(shape) > 1]
    if whole:
        raise ValueError(f"{where} holds {whole[0]} as integers; {FULL_FIRST}")


def in_float8(tensors: Tensors) -> bool:
    return any(dtype in FLOAT8 for dtype, _ in tensors.values())


def not_a_model(tensors: Tensors) -> str:
    """What a file holds that is not a base model, and what to do with it; empty for anything else."""
    names = list(tensors)
    if any(LORA.search(name) for name in names):
        return "a LoRA; give the base it was made for, and load it there with pipe.load_lora_weights()"
    if len(names) <= 2 and set(names) <= {"emb_params", "clip_l", "clip_g", "emb_params_out"}:
        return "a textual inversion; give the base, and load it there with pipe.load_textual_inversion()"
    if any(name.startswith(("control_model.", "controlnet_cond_embedding.")) for name in names):
        return "a ControlNet; give the base it steers"
    if all(name.startswith(("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")) for name in names):
        return "an autoencoder; give the whole model"
    return ""


__all__ = [
    "FULL_FIRST",
    "PARTS_BESIDE",
    "Found",
    "Tensors",
    "check_variant",
    "find_weights",
    "in_float8",
    "is_pointer",
    "not_a_model",
    "read_header",
    "refuse_quantised",
    "shared_prefix",
    "unwrapped",
]
