"""Pipelines on which an edit would silently do nothing, or something else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from erasure.weights import WRAPPERS

EDITABLE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
AROUND_A_MODEL = (nn.parallel.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by the names they have without a PEFT adapter around their layers."""
    return {name.replace(".base_layer.", "."): parameter for name, parameter in module.named_parameters()}


def refuse_unsafe(components: Mapping[str, Any]) -> None:
    """Refuse components (denoiser first, then text encoders, by name) on which an edit would be lost or wrong."""
    for part, module in components.items():
        refuse_wrapper(part, module)
        _refuse_module(part, module)
    dtypes = {part: module.dtype for part, module in components.items()}
    if len(set(dtypes.values())) > 1:
        raise ValueError(
            f"the components have different dtypes; {', '.join(f'{part} {dtype}' for part, dtype in dtypes.items())}; "
            "bring them together with pipe.to(dtype) before erasing"
        )


def refuse_wrapper(part: str, module: Any) -> None:
    """Refuse what stands around a model, or is none."""
    module = getattr(module, "_orig_mod", module)  # that it is compiled is said behind this
    if isinstance(module, AROUND_A_MODEL):
        raise ValueError(
            f"the {part} is wrapped in {type(module).__name__}; put its .module back on the pipeline, erase, and wrap "
            "it again afterwards"
        )
    if not isinstance(module, nn.Module) or not hasattr(module, "dtype"):
        raise ValueError(
            f"the {part} is a {type(module).__name__}, no model of diffusers or transformers; load it anew"
        )


def _refuse_module(part: str, module: Any) -> None:
    if is_compiled(module):
        raise ValueError(
            f"the {part} is compiled (torch.compile) and may go on using old weights; erase first, compile afterwards"
        )
    if getattr(module, "is_quantized", False) or getattr(module, "hf_quantizer", None) is not None:
        raise _quantised(f"the {part} is quantised")
    for name, child in module.named_modules():
        if isinstance(child, AROUND_A_MODEL):
            refuse_wrapper(f"{part}.{name}", child)
        if type(child).__module__.startswith(("torch.ao.nn.", "torch.nn.quantized")):  # no parameter is left to look at
            raise _quantised(f"{part}.{name} is quantised ({type(child).__name__})")
        refuse_unread(f"{part}.{name}", child)
        if attribute(child, "base_layer") is not None:
            raise ValueError(
                f"{part}.{name} carries a LoRA adapter; unload it, erase, and load it again, or make it a part of the "
                "model before erasing with fuse_lora() and unload_lora_weights()"
            )
        # FLUX and its relatives leave an empty registry behind whenever they draw.
        registered = getattr(attribute(child, "_diffusers_hook"), "hooks", None)
        if attribute(child, "_hf_hook") is not None or registered:
            raise ValueError(
                f"{part} is offloaded or hooked; erase before enable_model_cpu_offload() and its relatives "
                "(or call pipe.remove_all_hooks() first)"
            )
    for name, parameter in module.named_parameters():
        if WRAPPERS.search(name):
            raise ValueError(
                f"{part}.{name} has the name of a wrapper (FSDP, checkpointing), which no other copy of the model has; "
                "erase first, wrap afterwards"
            )
        if wrapper := quantised(parameter):
            raise _quantised(f"{part}.{name} is quantised ({wrapper})")
        if parameter.is_inference():
            raise ValueError(
                f"{part}.{name} was created under torch.inference_mode(), where no weight can be changed later; load "
                "the pipeline outside of it"
            )
        if parameter.is_meta:
            raise ValueError(
                f"{part}.{name} has no data (meta device); erase before offloading, or load without device_map"
            )
        if parameter.dtype not in EDITABLE:
            raise ValueError(
                f"{part}.{name} is stored as {parameter.dtype}; erase the full-precision model, quantise afterwards"
            )


def is_compiled(module: nn.Module) -> bool:
    """Whether a model or a part of it is compiled, in place or in a wrapper."""
    return any(attribute(m, "_orig_mod") is not None or m._compiled_call_impl is not None for m in module.modules())


def attribute(module: nn.Module, name: str) -> Any:
    """A layer's attribute, or None: getattr with a default, many times as fast where there is none."""
    known = name in module.__dict__ or name in module._modules or hasattr(type(module), name)
    return getattr(module, name) if known else None


def unwrapped(module: Any) -> Any:
    """A model without what torch.compile, DataParallel, DDP or an average of weights put around it."""
    module = getattr(module, "_orig_mod", module)
    return module.module if isinstance(module, AROUND_A_MODEL) else module


def _quantised(what: str) -> ValueError:
    return ValueError(f"{what}; erase the full-precision model first, quantise afterwards")


def refuse_unread(name: str, layer: nn.Module) -> None:
    """Refuse an attention that reads other keys and values than its own."""
    if attribute(layer, "fused_projections"):
        raise ValueError(
            f"{name} has fused query-key-value projections, so its own keys and values are not used; load the pipeline "
            "again and erase before fusing (unfuse_qkv_projections() may leave traces)"
        )
    if own := own_projections(layer):
        raise ValueError(
            f"{name} uses keys and values of its attention processor ({own}), so its own are not read and an edit of "
            "them would do nothing; put the default processors back (set_default_attn_processor()) first"
        )


def refuse_nan(components: Mapping[str, Any]) -> None:
    """Refuse components (by name) that hold NaN or infinity: whatever is computed with them is nothing."""
    for part, module in components.items():
        for name, parameter in module.named_parameters():
            total = parameter.detach().sum(dtype=torch.float32)  # quicker than a look at each
            if not torch.isfinite(total) and not torch.isfinite(parameter).all():
                raise ValueError(
                    f"{part}.{name} holds NaN or infinity: the model is broken, or was overflowed in half precision; "
                    "load it again"
                )


def refuse_computed(components: Mapping[str, Any]) -> None:
    """Refuse components (by name) in which a layer's weight is no parameter: an edit of it would be lost."""
    for part, module in components.items():
        for name, layer in module.named_modules():
            if made_of := computed_weight(layer):
                raise ValueError(
                    f"{part}.{name} computes its weight from other tensors ({made_of}), so an edit of the weight would "
                    "be lost; make it plain first (remove_parametrizations, prune.remove), or load the pipeline again"
                )


def refuse_unreachable(module: nn.Module, names: Iterable[str]) -> None:
    """Refuse a denoiser on which erasures stand when these parameters are no longer there, or no longer read."""
    parameters, wanted = parameters_of(module), list(names)
    for name in wanted:
        parameter = parameters.get(name)
        if parameter is None or parameter.dtype not in EDITABLE or quantised(parameter):
            now = "gone" if parameter is None else f"stored as {quantised(parameter) or parameter.dtype}"
            raise ValueError(
                f"{name} is {now}: the model was changed since the erasures were applied (quantised, cast); "
                "they cannot be changed any more: load the pipeline again and apply what should stand on it"
            )
        if parameter.is_meta:
            raise ValueError(
                f"{name} has no data (meta device); switch sequential offloading off before changing erasures"
            )
    for prefix, child in module.named_modules():
        if reads_fused(child) and (hidden := [name for name in wanted if name.startswith(f"{prefix}.")]):
            raise ValueError(
                f"{hidden[0]} is not used while query-key-value projections are fused: a change would do nothing; "
                "call pipe.unfuse_qkv_projections() first, or load the pipeline again"
            )


def refuse_shared(sites: Mapping[str, nn.Module]) -> None:
    """Refuse layers that receive the text (by name) and are no plain linears, or share a weight: each is edited alone.

    A layer's own ``forward`` (a LoRA of kohya's or LyCORIS) may add what no edit of the weight reaches.
    """
    owner: dict[int, str] = {}
    for name, layer in sites.items():
        if not isinstance(layer, nn.Linear):
            raise ValueError(
                f"{name}, which receives the text, is a {type(layer).__name__} and no linear layer; this model is not "
                "supported"
            )
        if getattr(layer.forward, "__func__", None) is not nn.Linear.forward:
            raise ValueError(
                f"{name}, which receives the text, computes more than its weight says (another forward: a LoRA put in "
                "by kohya's code or LyCORIS, say); merge or unload that, erase, and load it again"
            )
        memory = layer.weight.data_ptr() or id(layer.weight)  # a DTensor has no address
        if (other := owner.setdefault(memory, name)) != name:
            raise ValueError(
                f"{other} and {name}, which receive the text, share one weight, which would be edited twice; give each "
                "a copy of its own first"
            )


def computed_weight(layer: nn.Module) -> str | None:
    """The tensors from which a linear or convolution computes its weight (weight norm, pruning), or None."""
    if not isinstance(layer, nn.Linear | nn.Conv2d) or "weight" in layer._parameters:
        return None
    return ", ".join(name for name, _ in layer.named_parameters()) or "none of which is a parameter"


def quantised(parameter: nn.Parameter) -> str | None:
    """The class of a quantised tensor (torchao's report an ordinary dtype), or None."""
    tensor = parameter.data
    if is_traceable_wrapper_subclass(tensor) and not isinstance(parameter, torch.distributed.tensor.DTensor):
        return type(tensor).__name__
    return None


def own_projections(attention: nn.Module) -> str | None:
    """A layer of an attention processor that may be used in the place of the attention's keys and values, or None.

    An IP-Adapter's (``to_k_ip``) read pictures and stand beside the attention's own, which go on reading the text.
    """
    processor = attribute(attention, "processor")
    children = processor.named_children() if isinstance(processor, nn.Module) else ()
    names = [name for name, child in children if any(isinstance(m, nn.Linear) for m in child.modules())]
    return next((n for n in names if not n.startswith(("to_q", "to_out")) and "_ip" not in n), None)


def reads_fused(attention: nn.Module) -> bool:
    """Whether fused projections are used in the place of an attention's own.

    Transformers take the flag back when they unfuse; a UNet puts its former processors back and leaves the flag.
    """
    fused = "Fused" in type(attribute(attention, "processor")).__name__
    return bool(attribute(attention, "fused_projections")) and (fused or hasattr(attention, "unfuse_projections"))
