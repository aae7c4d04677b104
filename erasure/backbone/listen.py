"""Listening to a pipeline: the calls of its denoisers, and the linear layers that receive the text.

What a pipeline gives its denoiser (scaled latents, shifted timesteps, sizes, position ids, masks, guidance embeddings)
differs between architectures, schedulers and versions. It is recorded here from the pipeline's own call, so that what
is trained and measured is what the pipeline draws with.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a denoiser.

    Attributes:
        part: name of the denoiser on the pipeline.
        inputs: arguments by name.
        output: the first value it returned; None where the call was recorded before it ran.
    """

    part: str
    inputs: dict[str, Any]
    output: Any = None


class Enough(BaseException):
    """Stops a pipeline's call from inside a listener. No ``except Exception`` of the pipeline catches it."""


@contextlib.contextmanager
def listening(parts: Mapping[str, nn.Module], *, before: Any = None, after: Any = None) -> Iterator[None]:
    """Give every call of some modules to ``before(call)`` and, with its output, to ``after(call)``.

    A listener that raises :class:`Enough` ends the block without an error.
    """
    handles = []
    for part, module in parts.items():
        if before is not None:
            handles.append(
                module.register_forward_pre_hook(
                    lambda m, a, k, part=part: before(Call(part, named_arguments(m, a, k))), with_kwargs=True
                )
            )
        if after is not None:
            handles.append(
                module.register_forward_hook(
                    lambda m, a, k, out, part=part: after(Call(part, named_arguments(m, a, k), first(out))),
                    with_kwargs=True,
                )
            )
    try:
        yield
    except Enough:
        pass
    finally:
        for handle in handles:
            handle.remove()


def named_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a module's call by name; what a ``**kwargs`` collects is named like the rest."""
    signature = _signature(module)
    found = dict(signature.bind(*args, **kwargs).arguments)
    if hidden := [name for name in found if signature.parameters[name].kind is inspect.Parameter.VAR_POSITIONAL]:
        raise ValueError(
            f"{type(module).__name__}.forward was replaced by one whose arguments have no names (*{hidden[0]}); which "
            "of them is the text is not known; load the pipeline again, or give its wrapper functools.wraps"
        )
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            found |= found.pop(parameter.name, {})
    return found


def _signature(module: nn.Module) -> inspect.Signature:
    """That of the ``forward`` which names its arguments: a wrapper around it may take whatever it is given."""
    own = inspect.signature(module.forward)
    inherited = (
        inspect.signature(vars(k)["forward"].__get__(module)) for k in type(module).__mro__ if "forward" in vars(k)
    )  # looked at only where the first has no names: this runs at every step
    return next((one for one in itertools.chain([own], inherited) if _names_all(one)), own)


def _names_all(signature: inspect.Signature) -> bool:
    return all(p.kind is not inspect.Parameter.VAR_POSITIONAL for p in signature.parameters.values())


def first(output: Any) -> Any:
    """The prediction in what a denoiser returns: its first value, whatever wraps it."""
    if isinstance(output, Tensor):
        return output
    return output[0] if isinstance(output, list | tuple) else output["sample"]


def says_guided() -> bool | None:
    """Whether the pipeline whose call this is says that it guides; None where no pipeline is calling, or it says not.

    It is looked for among the callers: the same denoiser may stand in several pipelines, and in copies of one.
    """
    name, given = "do_classifier_free_guidance", _locals_of_call()
    said = getattr(given.get("self"), name, given.get(name))  # some keep it to themselves
    return said if isinstance(said, bool) else None


def times_of_call() -> Tensor | None:
    """The times of the pictures that the calling pipeline draws: another object for each of its calls.

    None where no pipeline is calling, or it has none.
    """
    times = _locals_of_call().get("timesteps")
    return times if isinstance(times, Tensor) else None


def _locals_of_call() -> dict[str, Any]:
    """The names in the ``__call__`` of the pipeline that is calling; empty where none is."""
    from diffusers import DiffusionPipeline

    frame = sys._getframe(1)
    while (caller := frame.f_back) is not None:
        frame = caller
        if frame.f_code.co_name == "__call__" and isinstance((given := frame.f_locals).get("self"), DiffusionPipeline):
            return given
    return {}


def half(value: Any, rows: int, which: int) -> Any:
    """Of an argument of a denoiser's call: one half of everything that has a row for each of ``rows``.

    Where guidance makes both predictions in one batch, the first half (0) has no prompt and the second (1) holds the
    prompts.
    """
    if isinstance(value, Tensor) and value.dim() and len(value) == rows:
        return value[rows // 2 :] if which else value[: rows // 2]
    if isinstance(value, dict):
        return {key: half(part, rows, which) for key, part in value.items()}
    if isinstance(value, list | tuple):  # a ControlNet's features
        return type(value)(half(part, rows, which) for part in value)
    return value


def joined(first: Any, second: Any, rows: int) -> Any:
    """The inverse of :func:`half`: an argument of a call from those of its halves."""
    if isinstance(first, Tensor) and isinstance(second, Tensor) and first.dim() and len(first) == rows // 2:
        return torch.cat([first, second]) if len(second) == len(first) else second
    if isinstance(first, dict) and isinstance(second, dict):
        return {key: joined(first[key], part, rows) for key, part in second.items()}
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        return type(second)(joined(a, b, rows) for a, b in zip(first, second, strict=True))
    return second


def separate(pipe: Any) -> Any:
    """The same models under a pipeline of their own, with a scheduler that can be set without a trace on ``pipe``."""
    other = copy.copy(pipe)
    other.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    other.set_progress_bar_config(disable=True)
    return other


@torch.no_grad()
def text_linears(denoiser: nn.Module, texts: list[Tensor], run: Callable[[], Any]) -> dict[str, str | None]:
    """The linear layers of a denoiser that receive the text, and the norm each receives it from, or None.

    Every linear layer whose input holds the rows of one of ``texts`` counts, whether it comes raw or behind one norm,
    whole or among other columns, repeated (for frames, for guidance) or flattened.

    Args:
        texts: ``(n, length, d)`` token embeddings, or ``(n, d)`` pooled ones, as the denoiser receives them.
        run: calls the denoiser at least once with these texts.
    """
    sources: dict[str | None, list[Tensor]] = {None: [text.float() for text in texts]}
    found: dict[str, str | None] = {}

    def reads(x: Any) -> list[str | None]:
        return [norm for norm, rows in sources.items() for text in rows if holds(x, text)]

    def hear(name: str, module: nn.Module, args: Any) -> None:
        if args and isinstance(args[0], Tensor) and (norms := reads(args[0])):
            found.setdefault(name, norms[0])

    def widen(name: str, module: nn.Module, args: Any, output: Any) -> None:
        if args and isinstance(args[0], Tensor) and isinstance(output, Tensor) and None in reads(args[0]):
            sources.setdefault(name, []).append(output.float())

    handles = []
    for name, module in denoiser.named_modules():
        if isinstance(module, nn.Linear):
            handles.append(module.register_forward_pre_hook(lambda m, a, name=name: hear(name, m, a)))
        elif "norm" in type(module).__name__.lower():
            handles.append(module.register_forward_hook(lambda m, a, out, name=name: widen(name, m, a, out)))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return found


def holds(x: Tensor, text: Tensor) -> bool:
    """Whether the rows of ``text`` are among the rows of ``x``, in leading or any other columns of equal width."""
    x, wanted = x.detach().float().reshape(-1, x.shape[-1]), text.reshape(-1, text.shape[-1])
    wanted = wanted[wanted.abs().sum(dim=1) > 0][:4]  # a few rows that are not padding of zeros
    width = wanted.shape[-1] if len(wanted) else 0
    if not len(wanted) or x.shape[-1] < width:
        return False
    for row in wanted:
        scale = 1e-6 * float(row.abs().max())
        windows = x.unfold(1, width, 1) if x.shape[-1] - width <= 64 else x[:, None, :width]
        if not bool(((windows - row).abs().amax(dim=-1) <= scale).any()):
            return False
    return True


__all__ = [
    "Call",
    "Enough",
    "first",
    "half",
    "holds",
    "joined",
    "listening",
    "named_arguments",
    "says_guided",
    "separate",
    "text_linears",
    "times_of_call",
]
