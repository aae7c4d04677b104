"""Pipelines on which an edit would silently do nothing, or something else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def refuse_unsafe(components: Mapping[str, Any]) -> None:
    """Refuse components (denoiser first, then text encoders, by name) on which an edit would be lost or wrong."""
    for part, module in components.items():
        _refuse_module(part, module)
    dtypes = {part: module.dtype for part, module in components.items()}
    if len(set(dtypes.values())) > 1:
        raise ValueError(
            f"the components have different dtypes; {', '.join(f'{part} {dtype}' for part, dtype in dtypes.items())}; "
            "bring them together with pipe.to(dtype) before erasing"
        )


def _refuse_module(part: str, module: Any) -> None:
    if hasattr(module, "_orig_mod") or any(getattr(m, "_compiled_call_impl", None) for m in module.modules()):
        raise ValueError(
            f"the {part} is compiled (torch.compile) and may go on using old weights; erase first, compile afterwards"
        )
    if getattr(module, "is_quantized", False) or getattr(module, "hf_quantizer", None) is not None:
        raise ValueError(f"the {part} is quantised; erase the full-precision model first, quantise afterwards")
    for name, child in module.named_modules():
        if getattr(child, "fused_projections", False):
            raise ValueError(
                f"{part}.{name} has fused query-key-value projections, so its own keys and values are not used; "
                "load the pipeline again and erase before fusing (unfuse_qkv_projections() may leave traces)"
            )
        if hasattr(child, "base_layer"):
            raise ValueError(
                f"{part}.{name} carries a LoRA adapter; call fuse_lora() and unload_lora_weights() before erasing"
            )
        # FLUX and its relatives leave an empty registry behind whenever they draw.
        registered = getattr(getattr(child, "_diffusers_hook", None), "hooks", None)
        if getattr(child, "_hf_hook", None) is not None or registered:
            raise ValueError(
                f"{part} is offloaded or hooked; erase before enable_model_cpu_offload() and its relatives "
                "(or call pipe.remove_all_hooks() first)"
            )
    for name, parameter in module.named_parameters():
        if parameter.is_meta:
            raise ValueError(
                f"{part}.{name} has no data (meta device); erase before offloading, or load without device_map"
            )
        if not parameter.is_floating_point():
            raise ValueError(
                f"{part}.{name} is stored as {parameter.dtype}; erase the full-precision model, quantise afterwards"
            )
