"""Losses of fine-tunes as their papers write them, with plain calls of a base and a student UNet."""

from __future__ import annotations

import torch
from torch import Tensor


class Plain:
    """Predictions of one UNet for prompts, one prompt for each row."""

    def __init__(self, pipe, unet) -> None:
        self.pipe, self.unet = pipe, unet

    def __call__(self, x: Tensor, t: Tensor, prompts: list[str]) -> Tensor:
        text = torch.cat([self.pipe.encode_prompt(p, self.pipe.device, 1, False)[0] for p in prompts])
        return self.unet(x, t, encoder_hidden_states=text).sample


def squared(a: Tensor, b: Tensor) -> Tensor:
    return ((a - b) ** 2).mean()


def leco(base, student, x, t, concept, neutral, *, eta):
    """| e_s(c) - [ e(n) - eta (e(c) - e()) ] |^2"""
    empty = [""] * len(x)
    return squared(student(x, t, concept), base(x, t, neutral) - eta * (base(x, t, concept) - base(x, t, empty)))


def onto(base, student, x, t, concept, anchor):
    """| e_s(c) - e(a) |^2: Concept Ablation (model), AGE and SalUn, each on its own x."""
    return squared(student(x, t, concept), base(x, t, anchor))


def denoising(student, x, t, prompts, eps):
    """| e_s(r) - eps |^2"""
    return squared(student(x, t, prompts), eps)


def attention_mass(unet, text: Tensor, x: Tensor, t: Tensor, columns: list[slice]) -> Tensor:
    """Sum over cross-attentions of |A at the words' columns|_F, by diffusers' own attention scores."""
    total, handles = [], []
    for name, module in unet.named_modules():
        if name.endswith("attn2"):

            def heard(layer, args, kwargs):
                hidden = args[0]
                query = layer.head_to_batch_dim(layer.to_q(hidden))
                key = layer.head_to_batch_dim(layer.to_k(kwargs["encoder_hidden_states"]))
                scores = layer.get_attention_scores(query, key).unflatten(0, (len(hidden), -1))
                total.append(
                    torch.cat([row[..., span].flatten() for row, span in zip(scores, columns, strict=True)]).norm()
                )

            handles.append(module.register_forward_pre_hook(heard, with_kwargs=True))
    unet(x, t, encoder_hidden_states=text)
    for handle in handles:
        handle.remove()
    return sum(total)
