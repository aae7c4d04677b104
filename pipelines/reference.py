"""Reference attention: a picture that is being drawn looks at other pictures too. No weight changes."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from erasure.artifact.hooks import Handles
from erasure.backbone import backbone_of
from erasure.backbone.attention import self_attentions
from erasure.backbone.listen import half, named_arguments
from erasure.backbone.noise import NoiseModel


@dataclasses.dataclass
class _Call:
    """What one call of the pipeline looks at, and what was seen at each attention in the current step.

    Attributes:
        noise: how the model mixes latents with noise.
        x0: ``(k, n, c, h, w)`` latents of k references for each of n pictures.
        eps: their noise, of the same shape.
        weights: ``(n, k)``; 0 where a picture has fewer than k.
        seen: attention to the tokens of its references, ``(n, k L, c)``.
        writing: while the references go through the denoiser.
    """

    noise: NoiseModel
    x0: Tensor
    eps: Tensor
    weights: Tensor
    seen: dict[nn.Module, Tensor] = dataclasses.field(default_factory=dict)
    writing: bool = False


class _State(threading.local):
    """The call that a thread is in. A copy of a model, with its hooks, is in none."""

    call: _Call | None = None

    def __reduce__(self) -> Any:
        return _State, ()


@dataclasses.dataclass
class _Hooks:
    """The hooks on a denoiser and its self-attentions. They hold no model, so that a model can be copied with them.

    Attributes:
        latents, time: arguments of the denoiser.
    """

    latents: str
    time: str
    state: _State = dataclasses.field(default_factory=_State)

    def begin(self, denoiser: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a step: see the references at its time."""
        if (call := self.state.call) is None:
            return
        inputs = named_arguments(denoiser, args, kwargs)
        x, n = inputs[self.latents], call.x0.shape[1]
        if len(x) not in (n, 2 * n):
            raise ValueError(
                f"references for {n} pictures, but the denoiser got a batch of {len(x)}; reference attention works on "
                "pipelines with two predictions a picture or one"
            )
        if len(x) == 2 * n:  # the prompts' half
            inputs = {name: half(value, 2 * n, 1) for name, value in inputs.items()}
        t = torch.as_tensor(inputs[self.time], device=x.device).reshape(-1).expand(n)
        call.seen, call.writing = {}, True
        try:
            for x0, eps in zip(call.x0, call.eps, strict=True):
                # not through the hooks on the denoiser, which are about the pictures
                denoiser.forward(**{**inputs, self.latents: call.noise.mix(x0, eps, t).to(x)})
        finally:
            call.writing = False

    def end(self, denoiser: nn.Module, args: Any, output: Any) -> None:
        """After a step."""
        if (call := self.state.call) is not None:
            call.seen = {}

    def attend(self, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """At an attention: note the tokens of a reference, or have the picture's read them."""
        if (call := self.state.call) is None:
            return None
        inputs = named_arguments(attention, args, kwargs)
        h = inputs["hidden_states"]
        if call.writing:
            seen = call.seen.get(attention)
            call.seen[attention] = h if seen is None else torch.cat([seen, h], dim=1)
            return None
        r = call.seen[attention]
        copies = len(h) // len(r)  # 2: those without the prompt come first, and look at nothing
        weights = torch.cat([torch.zeros_like(call.weights)] * (copies - 1) + [call.weights])
        bias = weights.log().repeat_interleave(h.shape[1], dim=1).to(h)
        inputs["encoder_hidden_states"] = torch.cat([h, r.repeat(copies, 1, 1)], dim=1)
        inputs["attention_mask"] = torch.cat([torch.zeros_like(bias[:, : h.shape[1]]), bias], dim=1)[:, None]
        return (), inputs


class ReferenceAttention:
    """Hooks on a U-Net by which its self-attentions read the tokens of references beside the picture's own.

    With h ``(L, c)`` the tokens of the picture at an attention, r ``(k L, c)`` those of its k references there, noised
    to the same time and under the same prompt, w the weight and d the width of a head:

        softmax([Q(h) K(h)^T / sqrt(d), Q(h) K(r)^T / sqrt(d) + log w]) [V(h); V(r)]

    Where guidance makes two predictions, only that of the prompt looks at the references, so that guidance points to
    them: with e for predictions, ``e() + s (e(p, r) - e())``. Each step costs k further passes of the prompts' half.
    Without references the hooks do nothing, so they may stay while other threads draw; put them on before.

    Args:
        pipe: a pipeline with a U-Net that draws pictures.
        weight: w. 1 counts the tokens of a reference as the picture's own; more follows it more closely.

    Raises:
        ValueError: its denoiser has no self-attentions without text, it draws videos, or its backbone refuses it.
    """

    def __init__(self, pipe: Any, *, weight: float) -> None:
        self.backbone, self.weight = backbone_of(pipe), weight
        attentions = self_attentions(self.backbone)
        if not attentions:
            raise ValueError(
                f"reference attention needs a U-Net that draws pictures; got {type(pipe).__name__}; use image-to-image "
                "(strength) alone"
            )
        denoiser, hooks = self.backbone.denoiser, _Hooks(self.backbone.latent_argument, self.backbone.time_argument)
        self._state = hooks.state
        self._handles = Handles(
            [
                *(module.register_forward_pre_hook(hooks.attend, with_kwargs=True) for module in attentions),
                denoiser.register_forward_pre_hook(hooks.begin, with_kwargs=True),
                denoiser.register_forward_hook(hooks.end, always_call=True),
            ]
        )

    @contextlib.contextmanager
    def looking_at(self, references: Sequence[Sequence[Image.Image]], *, size: tuple[int, int]) -> Iterator[None]:
        """Inside the block, the pictures this thread draws look at theirs.

        Args:
            references: for each picture of the batch one or more.
            size: width and height of the pictures in pixels.
        """
        count = max(map(len, references))
        flat = [row[min(j, len(row) - 1)] for j in range(count) for row in references]
        x0 = self.backbone.latents(flat, size=size).unflatten(0, (count, len(references)))
        noises = [torch.randn(x0.shape[2:], generator=torch.Generator().manual_seed(j)) for j in range(count)]
        noise = torch.stack(noises).to(x0)[:, None]  # the same whoever else is in the batch
        weights = [[self.weight * (j < len(row)) for j in range(count)] for row in references]
        self._state.call = _Call(self.backbone.noise, x0, noise.expand_as(x0), torch.tensor(weights))
        try:
            yield
        finally:
            self._state.call = None

    def remove(self) -> None:
        """Take the hooks off. Calling it again does nothing."""
        self._handles.remove()


__all__ = ["ReferenceAttention"]
