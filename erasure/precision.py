"""bfloat16 arithmetic where the processor has it.

Where it has not, bfloat16 is emulated: right, and twenty times as slow as float32.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch


def fast_bfloat16(device: torch.device | str) -> bool:
    """Whether bfloat16 is faster than float32 on a device: GPUs that compute in it, CPUs with instructions for it."""
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
