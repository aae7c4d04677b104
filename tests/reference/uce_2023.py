"""UCE as its 2023 code describes it: the concept's last token and all that follow, layer by layer."""

from __future__ import annotations

import torch
from torch import Tensor


def edit(
    pipe, erased: list[str], guides: list[str], kept: list[str], *, technique: str = "replace", lamb: float = 0.5
) -> dict[str, Tensor]:
    """New key and value weights.

    A target's tokens run from its last word piece to the end of the sequence, and so do its guide's; where one starts
    later, the other loses as many tokens at the end. Kept prompts, the empty one among them, count with every token.
    """
    length = pipe.tokenizer.model_max_length

    def embed(prompt: str) -> tuple[Tensor, int]:
        hidden, _ = pipe.encode_prompt(prompt, pipe.device, 1, False)
        return hidden[0].double(), len(pipe.tokenizer(prompt).input_ids) - 2

    retained = ["", *kept]
    share = max(0.1, 1 / len(retained))
    edited = {}
    for name, parameter in pipe.unet.named_parameters():
        if "attn2.to_k" not in name and "attn2.to_v" not in name:
            continue
        w = parameter.detach().double()
        left, right = lamb * w, lamb * torch.eye(w.shape[1], dtype=torch.float64)
        for concept, guide in zip(erased, guides, strict=True):
            (old, i), (new, j) = embed(concept), embed(guide)
            far = max(i, j)
            old, new = old[i : length - (far - i)], new[j : length - (far - j)]
            value, before = new @ w.T, old @ w.T
            if technique == "tensor":
                unit = before / before.norm()
                value = value - (value * unit).sum() * unit
            left, right = left + value.T @ old, right + old.T @ old
        for prompt in retained:
            k, _ = embed(prompt)
            left, right = left + share * (k @ w.T).T @ k, right + share * k.T @ k
        edited[name] = left @ torch.linalg.inv(right)
    return edited
