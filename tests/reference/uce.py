"""UCE as its paper and 2025 code describe it: one explicit inverse for every layer."""

from __future__ import annotations

import torch
from torch import Tensor


def last_subject(pipe, prompt: str) -> Tensor:
    """The embedding of the last word piece, by the pipeline's own encode_prompt."""
    hidden, _ = pipe.encode_prompt(prompt, pipe.device, 1, False)
    return hidden[0, len(pipe.tokenizer(prompt).input_ids) - 2].double()


def edit(
    pipe,
    erased: list[str],
    guides: list[str],
    kept: list[str],
    *,
    lamb: float = 0.5,
    erase_scale: float = 1.0,
    preserve_scale: float = 1.0,
) -> dict[str, Tensor]:
    """New key and value weights: [lamb W + e sum v c^T + p sum (W k) k^T] [lamb I + e sum c c^T + p sum k k^T]^-1."""
    edited = {}
    for name, parameter in pipe.unet.named_parameters():
        if "attn2.to_k" not in name and "attn2.to_v" not in name:
            continue
        w = parameter.detach().double()
        left, right = lamb * w, lamb * torch.eye(w.shape[1], dtype=torch.float64)
        for concept, guide in zip(erased, guides, strict=True):
            c, v = last_subject(pipe, concept), w @ last_subject(pipe, guide)
            left, right = left + erase_scale * torch.outer(v, c), right + erase_scale * torch.outer(c, c)
        for prompt in kept:
            k = last_subject(pipe, prompt)
            left, right = left + preserve_scale * torch.outer(w @ k, k), right + preserve_scale * torch.outer(k, k)
        edited[name] = left @ torch.linalg.inv(right)
    return edited
