"""Base models by name, and the device to run them on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from erasure.concept import WORLD


def pick_device(device: str | None = None) -> str:
    """``device``, or the best one here: cuda, mps, cpu.

    Raises:
        ValueError: the device does not exist here.
    """
    import torch

    here = ["cpu"]
    if torch.backends.mps.is_available():
        here.insert(0, "mps")
    if torch.cuda.is_available():
        here.insert(0, "cuda")
    if device is None:
        return here[0]
    if device.split(":")[0] not in here:
        raise ValueError(f"no device {device!r} here; choose one of {here}")
    return device


def load_base(base: str = WORLD, *, device: str | None = None, dtype: str | None = None) -> Any:
    """A pipeline by name: "emoji-world", a folder, or a hub id.

    Args:
        device: cuda, mps or cpu; the best one here by default.
        dtype: float32 (default), float16 or bfloat16.

    Raises:
        FileNotFoundError: neither a folder nor a model the hub gives.
        ValueError: unknown device or dtype.
    """
    import diffusers.utils.logging
    import torch
    import transformers.utils.logging

    from erasure import world

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()  # one status line says it all

    device = pick_device(device)
    dtypes = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if (dtype or "float32") not in dtypes:
        raise ValueError(f"unknown dtype {dtype!r}; choose one of {sorted(dtypes)}")
    source = world.path() if base == WORLD else Path(base).expanduser()
    if not source.exists() and (base.count("/") != 1 or base.startswith((".", "/", "~"))):
        raise FileNotFoundError(
            f"no model at {base!r}; give {WORLD!r}, a diffusers folder, or a hub id ('CompVis/stable-diffusion-v1-4')"
        )
    if source.exists() and not (source / "model_index.json").exists():
        raise FileNotFoundError(
            f"{source} holds no model_index.json: not a diffusers pipeline; convert single-file checkpoints first"
        )
    try:
        pipe = diffusers.DiffusionPipeline.from_pretrained(
            str(source) if source.exists() else base, dtype=dtypes[dtype or "float32"]
        )
    except OSError as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FileNotFoundError(f"could not load {base!r}: {first}") from None
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)
