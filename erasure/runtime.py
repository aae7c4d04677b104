"""Where models run and in what precision."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SHORT = {"fp32": "float32", "fp16": "float16", "half": "float16", "bf16": "bfloat16"}


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
