"""What a module is made for a training, and gets back: which weights are trained, and what arithmetic runs in."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from erasure.runtime import fast_bfloat16

Precision = Literal["float32", "bfloat16", "float16", "auto"]
HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def check_trainable(parameters: Mapping[str, Tensor], modules: Iterable[nn.Module] = ()) -> None:
    """Refuse what cannot be trained, before any work.

    Raises:
        ValueError: inside ``torch.inference_mode``, or weights that were created there, are quantised or elsewhere.
    """
    if torch.is_inference_mode_enabled():
        raise ValueError("training needs gradients; got torch.inference_mode; leave it (torch.no_grad is no hindrance)")
    everything = {**{n: p for module in modules for n, p in module.named_parameters()}, **parameters}
    for name, parameter in everything.items():
        if parameter.is_inference():
            raise ValueError(
                f"{name} was created inside torch.inference_mode, which rules gradients out; load the model outside"
            )
    for name, parameter in parameters.items():
        if not parameter.is_floating_point() or parameter.is_meta or hasattr(parameter, "__tensor_flatten__"):
            raise ValueError(
                f"only plain floating-point weights in memory are trained; {name} is {parameter.dtype} on "
                f"{parameter.device} ({type(parameter.data).__name__}); load the model without quantisation or offload"
            )


@contextlib.contextmanager
def trainable(
    parameters: Mapping[str, nn.Parameter],
    modules: Iterable[nn.Module] = (),
    *,
    pure: bool = False,
) -> Iterator[dict[str, Tensor]]:
    """Make parameters trainable for the time of a block, and freeze the rest of some modules; yields the originals.

    Trained parameters become float32 copies. Frozen ones keep their dtype and memory; a module in half precision with
    float32 weights in it runs under autocast inside the block, pictures included. However the block ends, data,
    gradients and flags of all of them are what they were, bit for bit.

    Args:
        parameters: what is trained, by name; none where something else is, such as word vectors.
        modules: frozen but for those.
        pure: train copies in the parameters' own dtype instead, for whoever repeats a script that does. In bfloat16 an
            update below 1/512 of a weight is lost.

    Raises:
        ValueError: as :func:`check_trainable`.
    """
    modules = list(modules)
    check_trainable(parameters, modules)
    trained = set(parameters.values())
    everything = dict.fromkeys([*(p for module in modules for p in module.parameters()), *parameters.values()])
    before = [(p, p.data, p.requires_grad, p.grad) for p in everything]
    originals = {name: parameter.data for name, parameter in parameters.items()}
    with contextlib.ExitStack() as stack:
        stack.callback(_put_back, before, trained)
        for parameter in everything:
            if parameter in trained:
                parameter.grad = None
                own = parameter.dtype
                parameter.data = parameter.data.to(own if pure else torch.promote_types(own, torch.float32), copy=True)
            parameter.requires_grad_(parameter in trained)
        owners = [module for module in modules if not trained.isdisjoint(module.parameters())]
        if (half := half_dtype(owners)) is not None:
            # without the cache: it would go on using the first step's copy of the weights that are being trained
            stack.enter_context(casting(next(iter(trained)).device, half))
        yield originals


def _put_back(before: list[tuple[nn.Parameter, Tensor, bool, Tensor | None]], trained: set[nn.Parameter]) -> None:
    for parameter, data, flag, gradient in before:
        if parameter in trained:
            parameter.grad = None
            parameter.data = data
            parameter.grad = gradient
        parameter.requires_grad_(flag)


@contextlib.contextmanager
def checkpointed(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Gradient checkpointing on those modules of diffusers and transformers that have it, for the time of a block.

    Raises:
        ValueError: none has it.
    """
    able: list[Any] = [m for m in modules if _checkpoints(m)]
    if not able:
        raise ValueError("none of these modules has gradient checkpointing; set gradient_checkpointing=False")
    off = [module for module in able if not module.is_gradient_checkpointing]
    try:
        for module in off:
            if hasattr(module, "enable_gradient_checkpointing"):  # diffusers
                module.enable_gradient_checkpointing()
            else:  # transformers; its default there may lose the gradients of frozen inputs
                module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        yield
    finally:
        for module in off:
            name = "disable_gradient_checkpointing"
            getattr(module, name if hasattr(module, name) else "gradient_checkpointing_disable")()


def _checkpoints(module: Any) -> bool:
    return bool(
        getattr(module, "_supports_gradient_checkpointing", False)
        or getattr(module, "supports_gradient_checkpointing", False)
    )


def half_dtype(modules: Iterable[nn.Module]) -> torch.dtype | None:
    """The half-precision dtype of modules that have weights in one, the larger share's; None for float32."""
    sizes = collections.Counter[torch.dtype]()
    for parameter in (p for module in modules for p in module.parameters()):
        if parameter.dtype in HALVES.values():
            sizes[parameter.dtype] += parameter.numel()
    return sizes.most_common(1)[0][0] if sizes else None


def compute_dtype(precision: Precision, device: torch.device, modules: Iterable[nn.Module]) -> torch.dtype:
    """What a forward pass computes in: see ``Training.precision``."""
    if precision in HALVES:
        return HALVES[precision]
    half = half_dtype(modules)
    if half is None and precision == "auto" and fast_bfloat16(device):
        return torch.bfloat16
    return half or torch.float32


def casting(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[Any]:
    """``torch.autocast`` to a half-precision dtype without its cache; none at all for float32."""
    half = dtype in HALVES.values()
    return torch.autocast(device.type, dtype if half else torch.bfloat16, enabled=half, cache_enabled=False)


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """PyTorch's global generators, of the CPU and of a device, seeded for the time of a block and put back after it."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        torch.default_generator.manual_seed(seed)
        if device.type != "cpu":
            module = torch.get_device_module(device)
            if hasattr(module, "device"):  # of several: this one
                stack.enter_context(module.device(device))
            stack.callback(module.set_rng_state, module.get_rng_state())
            module.manual_seed(seed)
        yield
