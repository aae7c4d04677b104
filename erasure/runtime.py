"""Where models run and what they are opened from: device, precision, base models by name, folder or file."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch

from erasure.concept import WORLD

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SHORT = {"fp32": "float32", "fp16": "float16", "half": "float16", "bf16": "bfloat16"}


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
        raise ValueError(f"no device {str(device)!r} here{hint}; choose one of {here}") from None
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
    from erasure import world
    from erasure.opening import download, open_file, open_folder, quiet

    device, dtype = pick_device(device), pick_dtype(dtype)
    base = str(base)
    source = world.path() if base == WORLD else Path(base).expanduser()
    with quiet():
        if source.is_file():
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
