"""Which linear layers read the text: measured on a denoiser, whatever its layers are called."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

TEXT = ("encoder_hidden_states", "encoder_hidden_states_t5")
"""Arguments of a denoiser that hold text, one row a token."""


@dataclass(frozen=True)
class Readers:
    """Names of linear layers by what arrives at their input.

    raw: rows of the text itself.  normed: {layer: norm} for rows of the text behind that norm.
    derived: functions of the text alone, such as keys behind a caption projection.
    uncalled: weights that change the output although the layer is never called (read by a functional form).
    silent: layers with a name of text layers ("attn2", "context", ...) whose input is no function of the text alone:
    image or time is in it, or no text is.
    """

    raw: tuple[str, ...]
    normed: dict[str, str]
    derived: tuple[str, ...]
    uncalled: tuple[str, ...]
    silent: tuple[str, ...]


def denoiser_call(
    pipe: Any, prompt: str | list[str] = "a superhero", **arguments: Any
) -> tuple[nn.Module, dict[str, Any]]:
    """The denoiser and the arguments, by name, of the first call that the pipeline makes of it."""
    model = getattr(pipe, "transformer", None) or pipe.unet
    calls = denoiser_calls(pipe, model, prompt, num_inference_steps=2, **arguments)
    return model, calls[0]


def denoiser_calls(pipe: Any, model: nn.Module, prompt: str | list[str], **arguments: Any) -> list[dict[str, Any]]:
    """The arguments, by name, of every call the pipeline makes of its denoiser."""
    names = list(inspect.signature(model.forward).parameters)
    calls: list[dict[str, Any]] = []

    def record(_: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        calls.append(dict(zip(names, positional, strict=False)) | named)

    handle = model.register_forward_pre_hook(record, with_kwargs=True)
    try:
        pipe(prompt=prompt, output_type="latent", generator=torch.Generator().manual_seed(0), **arguments)
    finally:
        handle.remove()
    return calls


def text_readers(model: nn.Module, arguments: dict[str, Any]) -> Readers:
    """Sort the linear layers of `model` by what their inputs do when the text, or everything else, changes.

    `arguments` are those of one call, from denoiser_call. A layer reads the raw text when at least one row of its input
    is bit for bit a row of the text, and behind a norm when it is a row of that norm's output and the norm's input is
    the text. A layer depends on the text alone when its input stays the same bit for bit under other latents and
    another timestep, and changes with the text.
    """
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    texts = [arguments[name] for name in TEXT if arguments.get(name) is not None]
    seen, norms = _inputs(model, linears, arguments, texts)
    other_image, _ = _inputs(model, linears, _change(arguments, image=True), texts)
    other_text, _ = _inputs(model, linears, _change(arguments, image=False), texts)
    raw = {name for name, x in seen.items() if any(_shares_rows(x, text) for text in texts)}
    normed = {
        name: norm for name, x in seen.items() if name not in raw for norm, y in norms.items() if _shares_rows(x, y)
    }
    alone = {n for n, x in seen.items() if torch.equal(x, other_image[n]) and not torch.equal(x, other_text[n])}
    marks = ("attn2", "add_", "context", "text", "caption", "encoder")
    inside = ("to_q", "to_out.0")
    named = {name for name in linears if any(mark in name for mark in marks) and not name.endswith(inside)}
    return Readers(
        raw=tuple(sorted(raw)),
        normed=normed,
        derived=tuple(sorted(alone - raw - normed.keys())),
        uncalled=tuple(sorted(_uncalled(model, linears.keys() - seen.keys(), arguments))),
        silent=tuple(sorted(name for name in named & seen.keys() - alone - raw - normed.keys())),
    )


def _inputs(
    model: nn.Module, linears: dict[str, nn.Module], arguments: dict[str, Any], texts: list[torch.Tensor]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The input of every linear layer that is called, and the output of every norm whose input is a text."""
    seen: dict[str, torch.Tensor] = {}
    norms: dict[str, torch.Tensor] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
            seen[name] = next(iter((*positional, *named.values()))).detach().clone()  # AnimateDiff passes `input=`

        return hook

    def note_norm(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, positional: tuple[Any, ...], output: Any) -> None:
            if positional and torch.is_tensor(output) and any(_shares_rows(positional[0], text) for text in texts):
                norms[name] = output.detach().clone()

        return hook

    handles = [m.register_forward_pre_hook(note(name), with_kwargs=True) for name, m in linears.items()]
    handles += [
        m.register_forward_hook(note_norm(name)) for name, m in model.named_modules() if "Norm" in type(m).__name__
    ]
    try:
        with torch.no_grad():
            model(**arguments)
    finally:
        for handle in handles:
            handle.remove()
    return seen, norms


def _change(arguments: dict[str, Any], *, image: bool) -> dict[str, Any]:
    """The same call with other latents and another timestep, or with another text."""
    generator = torch.Generator().manual_seed(7)

    def other(x: torch.Tensor) -> torch.Tensor:
        return torch.randn(x.shape, generator=generator).to(x.dtype)

    changed = dict(arguments)
    if image:
        latents = "sample" if "sample" in arguments else "hidden_states"
        return changed | {latents: other(arguments[latents]), "timestep": arguments["timestep"] * 0 + 3}
    for name in TEXT:
        if changed.get(name) is not None:
            changed[name] = other(changed[name])
    added = changed.get("added_cond_kwargs") or {}
    if added.get("text_embeds") is not None:
        changed["added_cond_kwargs"] = added | {"text_embeds": other(added["text_embeds"])}
    return changed


def _shares_rows(x: torch.Tensor, text: torch.Tensor) -> bool:
    """Whether a row of `x` is a row of `text`, zeros aside."""
    if not torch.is_tensor(x) or x.ndim < 2 or x.shape[-1] != text.shape[-1]:
        return False
    rows = {row.tobytes() for row in text.detach().float().reshape(-1, text.shape[-1]).numpy() if row.any()}
    return any(row.tobytes() in rows for row in x.detach().float().reshape(-1, x.shape[-1]).numpy())


def _uncalled(model: nn.Module, names: set[str], arguments: dict[str, Any]) -> list[str]:
    """Those of the layers whose weight has a gradient all the same."""
    weights = {name: model.get_submodule(name).weight for name in sorted(names)}
    if not weights:
        return []
    with torch.enable_grad():
        output = model(**arguments | {"return_dict": False})[0]
        gradients = torch.autograd.grad(output.float().square().sum(), list(weights.values()), allow_unused=True)
    return [name for name, slope in zip(weights, gradients, strict=True) if slope is not None and slope.any()]
