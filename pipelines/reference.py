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
from erasure.backbone.listen import named_arguments, second_half


@dataclasses.dataclass
class _Call:
    """What one call of the pipeline looks at, and what was seen at each attention in the current step.

    Attributes:
        x0: ``(k, n, c, h, w)`` latents of k references for each of n pictures.
        eps: their noise, of the same shape.
        weights: ``(n, k)``; 0 where a picture has fewer than k.
        seen: attention to the tokens of its references, ``(n, k L, d)``.
        writing: while the references go through the denoiser.
    """

    x0: Tensor
    eps: Tensor
    weights: Tensor
    seen: dict[nn.Module, Tensor] = dataclasses.field(default_factory=dict)
    writing: bool = False


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
        attentions = self.backbone.self_attentions()
        if not attentions or len(self.backbone.latent_shape) != 3:
            raise ValueError(
                f"reference attention needs a U-Net that draws pictures; got {type(pipe).__name__}; use image-to-image "
                "(strength) alone"
            )
        self._state = threading.local()
        denoiser = self.backbone.denoiser
        hooks = [module.register_forward_pre_hook(self._attend, with_kwargs=True) for module in attentions]
        hooks.append(denoiser.register_forward_pre_hook(self._begin, with_kwargs=True))
        hooks.append(denoiser.register_forward_hook(self._end, always_call=True))
        self._handles = Handles(hooks)

    @contextlib.contextmanager
    def looking_at(
        self, references: Sequence[Sequence[Image.Image]], *, size: tuple[int, int], seed: int = 0
    ) -> Iterator[None]:
        """Inside the block, the pictures this thread draws look at theirs.

        Args:
            references: for each picture of the batch one or more.
            size: width and height of the pictures in pixels.
            seed: of the noise on the references.
        """
        count = max(map(len, references))
        flat = [row[min(j, len(row) - 1)] for j in range(count) for row in references]
        x0 = self.backbone.latents(flat, size=size).unflatten(0, (count, len(references)))
        noise = torch.randn(x0[:, :1].shape, generator=torch.Generator().manual_seed(seed)).to(x0)
        weights = [[self.weight * (j < len(row)) for j in range(count)] for row in references]
        self._state.call = _Call(x0, noise.expand_as(x0), torch.tensor(weights))
        try:
            yield
        finally:
            self._state.call = None

    def remove(self) -> None:
        """Take the hooks off. Calling it again does nothing."""
        self._handles.remove()

    @property
    def _call(self) -> _Call | None:
        return getattr(self._state, "call", None)

    def _begin(self, denoiser: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a step: see the references at its time."""
        if (call := self._call) is None:
            return
        inputs = named_arguments(denoiser, args, kwargs)
        x = inputs[self.backbone.latent_argument]
        n = call.x0.shape[1]
        if len(x) not in (n, 2 * n):
            raise ValueError(
                f"references for {n} pictures, but the denoiser got a batch of {len(x)}; reference attention works on "
                "pipelines with two predictions a picture or one"
            )
        if len(x) == 2 * n:  # the prompts' half
            inputs = {name: second_half(value, 2 * n) for name, value in inputs.items()}
        t = torch.as_tensor(inputs[self.backbone.time_argument], device=x.device).reshape(-1).expand(n)
        call.seen, call.writing = {}, True
        try:
            for x0, eps in zip(call.x0, call.eps, strict=True):
                noised = self.backbone.noise.mix(x0, eps, t).to(x)
                # not through the hooks on the denoiser, which are about the pictures
                denoiser.forward(**{**inputs, self.backbone.latent_argument: noised})
        finally:
            call.writing = False

    def _end(self, denoiser: nn.Module, args: Any, output: Any) -> None:
        if (call := self._call) is not None:
            call.seen = {}

    def _attend(self, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """At an attention: note the tokens of a reference, or have the picture's read them."""
        if (call := self._call) is None:
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


__all__ = ["ReferenceAttention"]
