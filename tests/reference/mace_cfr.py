"""MACE's closed-form refinement as its equation reads: one sum and one explicit inverse for every layer."""

from __future__ import annotations

import torch
from torch import Tensor


def embedded(pipe, prompt: str) -> tuple[Tensor, list[int]]:
    """The embeddings of a prompt by the pipeline's own encode_prompt, and its tokens without padding."""
    return pipe.encode_prompt(prompt, pipe.device, 1, False)[0][0].double(), pipe.tokenizer(prompt).input_ids


def around(pipe, sentence: str, mapped: str) -> list[tuple[Tensor, Tensor]]:
    """The tokens around the concept: those before it, then, one by one from the first word after it, the rest."""
    (x, a), (y, b) = embedded(pipe, sentence), embedded(pipe, mapped)
    i = 0
    while i < min(len(a), len(b)) and a[i] == b[i]:
        i += 1
    j, k = len(a), len(b)
    while j > i and k > i and a[j - 1] == b[k - 1]:
        j, k = j - 1, k - 1
    pairs = [(x[n], y[n]) for n in range(i)]
    while j < len(x) and k < len(y):
        pairs.append((x[j], y[k]))
        j, k = j + 1, k + 1
    return pairs


@torch.no_grad()
def edit(
    pipe,
    sentences: list[tuple[str, str]],
    kept: list[str],
    *,
    general: list[str] = (),
    lamb: float = 0.5,
    s: float = 1.0,
    w_domain: float = 1.0,
    all_words: bool = False,
) -> dict[str, Tensor]:
    """[lamb W + sum (W y) x^T + s sum (W k) k^T] [lamb I + sum x x^T + s sum k k^T]^-1, k being every kept token."""
    pairs = []
    for ours, theirs in sentences:
        everything = list(zip(embedded(pipe, ours)[0], embedded(pipe, theirs)[0], strict=True))
        pairs += everything if all_words else around(pipe, ours, theirs)
    weighted = [(token, s) for prompt in general for token in embedded(pipe, prompt)[0]]
    weighted += [(token, s * w_domain) for prompt in kept for token in embedded(pipe, prompt)[0]]
    x, y = (torch.stack(rows) for rows in zip(*pairs, strict=True))
    k = torch.stack([token for token, _ in weighted])
    weights = torch.tensor([weight for _, weight in weighted], dtype=torch.float64)
    edited = {}
    for name, parameter in pipe.unet.named_parameters():
        if "attn2.to_k" not in name and "attn2.to_v" not in name:
            continue
        w = parameter.detach().double()
        left = lamb * w + (y @ w.T).T @ x + (k @ w.T * weights[:, None]).T @ k
        right = lamb * torch.eye(w.shape[1], dtype=torch.float64) + x.T @ x + (k * weights[:, None]).T @ k
        edited[name] = left @ torch.linalg.inv(right)
    return edited
