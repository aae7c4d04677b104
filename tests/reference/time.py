"""TIME as its paper and code describe it: layer by layer, explicit inverses, tokens paired by a walk along both."""

from __future__ import annotations

import torch
from torch import Tensor


def match(source: list[int], destination: list[int], length: int) -> list[int]:
    """Destination positions for a source that is the destination with words left out (the paper's case).

    Walk along the destination until the source's token comes; after the end tokens, padding follows padding, and what
    is left over stays on the last position.
    """
    places, j = [], 0
    for token in source:
        while destination[j] != token:
            j += 1
        places.append(j)
        j += 1
    while len(places) < length:
        places.append(min(j, length - 1))
        j += 1
    return places


def edit(
    pipe,
    pairs: list[tuple[str, str]],
    *,
    templates: tuple[str, ...],
    keys: bool,
    lamb: float = 0.1,
    kept: tuple[str, ...] = (),
) -> dict[str, Tensor]:
    """New weights: [lamb W + sum (W y_i) x_i^T + sum (W k) k^T] [lamb I + sum x_i x_i^T + sum k k^T]^-1."""
    length = pipe.tokenizer.model_max_length
    [a], [an] = (pipe.tokenizer(word).input_ids[1:-1] for word in ("a", "an"))

    def embed(prompt: str) -> Tensor:
        return pipe.encode_prompt(prompt, pipe.device, 1, False)[0][0].double()

    def ids(prompt: str) -> list[int]:
        return [a if token == an else token for token in pipe.tokenizer(prompt).input_ids]

    prompts = [(t.format(old), t.format(new)) for old, new in pairs for t in templates]
    rows = [(embed(old), embed(new)[match(ids(old), ids(new), length)]) for old, new in prompts]
    edited = {}
    for name, parameter in pipe.unet.named_parameters():
        if "attn2.to_v" not in name and not (keys and "attn2.to_k" in name):
            continue
        w = parameter.detach().double()
        left, right = lamb * w, lamb * torch.eye(w.shape[1], dtype=torch.float64)
        for x, y in rows:
            left, right = left + (y @ w.T).T @ x, right + x.T @ x
        for prompt in kept:
            k = embed(prompt)
            left, right = left + (k @ w.T).T @ k, right + k.T @ k
        edited[name] = left @ torch.linalg.inv(right)
    return edited
