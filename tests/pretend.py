"""A GPU that is not there: CPU tensors that carry a pretended device, and raise where a real one would.

>>> with pretend():                                                        # doctest: +SKIP
...     pipe = pipe.to("cuda")                  # pipe.device is cuda:0 from here on
...     erase(pipe, "superhero", "uce")         # raises DeviceFault where tensors of two devices meet

The device belongs to the storage, so views, parameters and ``.data`` have it without being asked. Two modes keep it
right: one below autograd, which sees every operation with its tensors (also those of a backward pass) and hands the
device on to what comes out; and one at Python's surface, where devices are asked for (``device=``, ``.to``, ``.cpu``)
and read (``.device``). The rules are those of torch:

- tensors of one operation are on one device, but for CPU tensors without dimensions, which join any;
- CPU tensors may index others, not the other way round; ``copy_`` may cross;
- ``numpy()`` takes a CPU tensor;
- random numbers come from a generator of the device they are drawn on.

What it cannot see: kernels that only a GPU has, memory, speed, streams.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CPU = torch.device("cpu")
CROSSES = ("copy_", "_to_copy", "_copy_from", "set_", "is_same_size")
INDEXES = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put")
MASK = "_pretended"  # the attribute of a storage that holds its device
REAL_GENERATOR = torch.Generator


class DeviceFault(RuntimeError):
    """Tensors, or a tensor and a generator, are on two devices. A RuntimeError, as in torch."""


class NumpyFault(TypeError):
    """``numpy()`` on a tensor that is not on the CPU. A TypeError, as in torch."""


@contextlib.contextmanager
def pretend(device: str = "cuda:0") -> Iterator[None]:
    """``device`` exists while this lasts; everything else, and everything outside, is on the CPU."""
    wanted = torch.device(device)
    # numbers "drawn there" come from the CPU's generator, so its state is the one to keep
    states = {"get_rng_state": lambda *a: torch.get_rng_state(), "set_rng_state": lambda state, *a: None}
    nothing = dict.fromkeys(("manual_seed", "manual_seed_all", "synchronize", "empty_cache"), lambda *a: None)
    with (
        mock.patch.object(torch, "Generator", _generator_class(wanted)),
        mock.patch.multiple(torch.cuda, current_device=lambda: 0, device=contextlib.nullcontext, **states, **nothing),
        _Surface(wanted) as surface,
        _Operations(surface),
    ):
        yield


def device_of(tensor: torch.Tensor) -> torch.device:
    """The device a tensor claims to be on, inside or outside of :func:`pretend`."""
    with torch._C.DisableTorchFunction():
        if tensor.device != CPU:
            return tensor.device  # meta
        return getattr(tensor.untyped_storage(), MASK, CPU)


def _put(tensor: torch.Tensor, device: torch.device) -> None:
    with torch._C.DisableTorchFunction():
        if tensor.device == CPU:
            setattr(tensor.untyped_storage(), MASK, device)


def _tensors(*trees: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(trees) if isinstance(leaf, torch.Tensor)]


def _seen(tensor: torch.Tensor) -> bool:
    with torch._C.DisableTorchFunction():
        return tensor.device != CPU or hasattr(tensor.untyped_storage(), MASK)


class _Operations(TorchDispatchMode):
    """Every operation below autograd: its tensors are on one device, and its results come out there."""

    def __init__(self, surface: _Surface) -> None:
        super().__init__()
        self.surface = surface

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = _tensors(args, kwargs)
        name = func.__name__.split(".")[0]
        device = self._device(name, args, given)
        with torch._C.DisableTorchFunction():
            old = {tensor.untyped_storage()._cdata for tensor in given if tensor.device == CPU}
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            with torch._C.DisableTorchFunction():
                fresh = tensor.device == CPU and tensor.untyped_storage()._cdata not in old
            if fresh:
                _put(tensor, device)
        return result

    def _device(self, name: str, args: Any, given: list[torch.Tensor]) -> torch.device:
        if not given:
            return self.surface.device  # made from nothing inside of a function that works there
        devices = [device_of(tensor) for tensor in given]
        if name in CROSSES:
            return devices[0]
        if name in INDEXES:
            indices = [device_of(tensor) for tensor in _tensors(args[1]) if tensor.ndim]
            if devices[0] == CPU and any(device != CPU for device in indices):
                raise DeviceFault(f"{name}: indices on {indices[0]} of a tensor on the CPU")
            values = [device_of(tensor) for tensor in _tensors(args[2:]) if tensor.ndim]
            if any(device != devices[0] for device in values):
                raise DeviceFault(f"{name}: values on {values[0]} into a tensor on {devices[0]}")
            return devices[0]
        count = {d for d, tensor in zip(devices, given, strict=True) if tensor.ndim or d != CPU}
        if len(count) > 1:
            what = ", ".join(f"{d}{list(t.shape)}" for d, t in zip(devices, given, strict=True))
            raise DeviceFault(f"{name}: expected all tensors to be on the same device, but found {what}")
        return count.pop() if count else CPU


class _Surface(TorchFunctionMode):
    """Where Python asks for devices and reads them."""

    def __init__(self, pretended: torch.device) -> None:
        super().__init__()
        self.pretended = pretended
        self.device = CPU  # of the function that runs now

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name == "__get__" and (answer := self._read(func.__self__, args[0])) is not None:
            return answer[0]
        if name in ("numpy", "__array__") and device_of(args[0]) != CPU:
            raise NumpyFault(f"can't convert {device_of(args[0])} device type tensor to numpy; use Tensor.cpu() first")
        if name == "_parse_to":  # only reads what Module.to was called with
            return func(*args, **kwargs)
        if func is torch.Tensor.backward:
            return self._backward(*args, **kwargs)
        plain = args, dict(kwargs)
        wanted, args, kwargs = self._asked(name, args, kwargs)
        if wanted is not None and wanted.type not in (CPU.type, self.pretended.type):
            return func(*plain[0], **plain[1])  # meta
        if name == "cuda":
            func, name = torch.Tensor.contiguous, "to"  # the real one looks for a driver
        here = [device_of(tensor) for tensor in _tensors(args, kwargs)]
        device = wanted or next((d for d in here if d != CPU), CPU)
        self._check_generator(kwargs.get("generator"), device)
        before, self.device = self.device, device
        try:
            result = func(*args, **kwargs)
        finally:
            self.device = before
        if name in ("to", "cpu", "cuda", "as_tensor", "asarray") and wanted is not None:
            return _moved(result, args, wanted)
        for tensor in _tensors(result):
            if not _seen(tensor) or (wanted is not None and name != "__set__"):
                _put(tensor, device)
        return result

    def _read(self, attribute: Any, tensor: Any) -> tuple[Any] | None:
        device = device_of(tensor) if isinstance(tensor, torch.Tensor) else CPU
        if attribute is torch.Tensor.device:
            return (device,)
        if attribute in (torch.Tensor.is_cuda, torch.Tensor.is_cpu, torch.Tensor.is_mps):
            return (device.type == attribute.__name__.removeprefix("is_"),)
        return None

    def _asked(self, name: str, args: Any, kwargs: dict[str, Any]) -> tuple[torch.device | None, Any, dict[str, Any]]:
        """The device that a call asks for, and the call without it."""
        if name in ("cpu", "cuda"):
            return (CPU if name == "cpu" else self.pretended), args[:1], {}
        if name == "to":
            return self._asked_of_to(*args, **kwargs)
        asked = kwargs.get("device")
        if asked is None:
            return (device_of(args[0]) if name == "new_tensor" else None), args, kwargs
        return self._parse(kwargs.pop("device")), args, kwargs

    def _asked_of_to(
        self, tensor: torch.Tensor, *rest: Any, **kwargs: Any
    ) -> tuple[torch.device | None, Any, dict[str, Any]]:
        """``to`` takes a device, a dtype, or another tensor for both, by place or by name."""
        device, dtype, other = kwargs.pop("device", None), kwargs.pop("dtype", None), kwargs.pop("other", None)
        for value in (other, *rest):
            if isinstance(value, torch.Tensor):
                device, dtype = device_of(value), value.dtype
            elif isinstance(value, torch.dtype):
                dtype = value
            elif isinstance(value, str | torch.device | int) and not isinstance(value, bool):
                device = value
        return (None if device is None else self._parse(device)), (tensor, dtype or tensor.dtype), kwargs

    def _parse(self, device: Any) -> torch.device:
        parsed = torch.device(self.pretended.type, device) if isinstance(device, int) else torch.device(device)
        return self.pretended if parsed.type == self.pretended.type else torch.device(parsed.type)

    def _check_generator(self, generator: Any, device: torch.device) -> None:
        if generator is not None and generator.device.type != device.type:
            raise DeviceFault(f"expected a {device.type} device type for generator but found {generator.device.type}")

    def _backward(self, tensor: torch.Tensor, gradient: Any = None, *args: Any, **kwargs: Any) -> None:
        # hooks and recomputed blocks run inside: they are to see this mode, which a handled function does not
        before, self.device = self.device, device_of(tensor)
        try:
            with self:
                torch.autograd.backward(tensor, gradient, *args, **kwargs)
        finally:
            self.device = before


def _moved(result: torch.Tensor, args: Any, wanted: torch.device) -> torch.Tensor:
    """A conversion's result on the wanted device: the same tensor if it is there already, else a copy."""
    if device_of(result) == wanted:
        return result
    same = any(result is tensor for tensor in _tensors(args))
    shared = same or any(_storage(result) == _storage(tensor) for tensor in _tensors(args))
    if shared:
        result = result.clone()
    _put(result, wanted)
    return result


def _storage(tensor: torch.Tensor) -> int:
    with torch._C.DisableTorchFunction():
        return tensor.untyped_storage()._cdata if tensor.device == CPU else id(tensor)


def _generator_class(pretended: torch.device) -> Any:
    """``torch.Generator`` that can be on the pretended device."""

    class Meta(type(REAL_GENERATOR)):  # type: ignore[misc]
        def __instancecheck__(cls, instance: Any) -> bool:
            return isinstance(instance, REAL_GENERATOR)

    class Generator(REAL_GENERATOR, metaclass=Meta):  # type: ignore[misc]
        def __new__(cls, device: Any = "cpu") -> Any:
            made = super().__new__(cls, "cpu")
            kind = torch.device(device).type
            made._where = pretended if kind == pretended.type else torch.device(kind)
            return made

        def __init__(self, device: Any = "cpu") -> None:
            super().__init__()

        @property
        def device(self) -> torch.device:
            return self._where

    return Generator
