"""Reference attention as its equation reads: one picture at a time, one call for each prediction, no mask."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor


class Plain:
    """An attention processor: ``softmax([Q K(h)^T / sqrt(d), Q K(r)^T / sqrt(d) + log w]) [V(h); V(r)]``.

    With ``write`` the tokens are noted; with ``read`` those noted are looked at, each reference's with the weight.
    """

    def __init__(self, weight: float) -> None:
        self.weight, self.mode, self.noted = weight, "off", []

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None, **kwargs):
        h = hidden_states[0]
        if encoder_hidden_states is None and self.mode == "write":
            self.noted.append(h)
        others = self.noted if encoder_hidden_states is None and self.mode == "read" else []
        sources = [h if encoder_hidden_states is None else encoder_hidden_states[0], *others]
        q = attn.to_q(h)
        heads = []
        for part in range(attn.heads):
            d = q.shape[1] // attn.heads
            own = slice(part * d, (part + 1) * d)
            logits, values = [], []
            for i, source in enumerate(sources):
                scores = q[:, own] @ attn.to_k(source)[:, own].T / math.sqrt(d)
                logits.append(scores + (math.log(self.weight) if i else 0.0))
                values.append(attn.to_v(source)[:, own])
            heads.append(torch.cat(logits, dim=1).softmax(dim=1) @ torch.cat(values))
        return attn.to_out[0](torch.cat(heads, dim=1))[None]


@torch.no_grad()
def latents(
    unet, scheduler, x: Tensor, references: list[Tensor], eps: list[Tensor], texts: dict[str, Tensor], *,
    steps: int, guidance: float | None, weight: float,
) -> Tensor:  # fmt: skip
    """Final latents of one picture.

    Args:
        x: ``(1, c, h, w)`` initial latents. references: ``(1, c, h, w)`` each, clean. eps: the noise of each.
        texts: "prompt" and "empty", ``(1, length, d)``. guidance: None for the prompt's prediction alone.
    """
    unet = copy.deepcopy(unet)
    processors = {name: Plain(weight) for name in unet.attn_processors}
    unet.set_attn_processor(dict(processors))

    def predict(x, t, text, mode):
        for processor in processors.values():
            processor.mode = mode
        return unet(x, t, encoder_hidden_states=text).sample

    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        a = scheduler.alphas_cumprod[t]
        for processor in processors.values():
            processor.noted = []
        for x0, noise in zip(references, eps, strict=False):
            predict(a.sqrt() * x0 + (1 - a).sqrt() * noise, t, texts["prompt"], "write")
        e = predict(x, t, texts["prompt"], "read")
        if guidance is not None:
            nothing = predict(x, t, texts["empty"], "off")
            e = nothing + guidance * (e - nothing)
        x = scheduler.step(e, t, x).prev_sample
    return x
