"""UCE as its paper and 2025 code describe it: one explicit inverse for every layer."""

from __future__ import annotations

import torch
from torch import Tensor


def last_subject(pipe, prompt: str) -> Tensor:
    """The embedding of the last word piece, by the pipeline's own encode_prompt."""
    hidden, _ = pipe.encode_prompt(prompt, pipe.device, 1, False)
    return hidden[0, len(pipe.tokenizer(prompt).input_ids) - 2].double()


def embeddings(pipe, prompt: str) -> tuple[list[Tensor], Tensor | None]:
    """Token embeddings ``(length, d)`` from the last word piece on, for each sequence of tokens; the pooled embedding.

    Every architecture by its own rule: which tokenizer's tokens stand where, and what an empty prompt begins with.
    """
    kind, words = type(pipe).__name__, len(pipe.tokenizer(prompt).input_ids)
    if kind == "StableDiffusionPipeline":
        hidden, _ = pipe.encode_prompt(prompt, pipe.device, 1, False)
        return [hidden[0, words - 2 :].double()], None
    if kind == "StableDiffusionXLPipeline":
        hidden, _, pooled, _ = pipe.encode_prompt(prompt, do_classifier_free_guidance=False)
        return [hidden[0, words - 2 :].double()], pooled[0].double()
    if kind == "StableDiffusion3Pipeline":
        hidden, _, pooled, _ = pipe.encode_prompt(prompt, prompt, prompt, do_classifier_free_guidance=False)
        pieces = len(pipe.tokenizer_3(prompt).input_ids)
        clip, t5 = hidden[0, words - 2 : 77], hidden[0, 77 + max(pieces - 2, 0) :]
        return [clip.double(), t5.double()], pooled[0].double()
    hidden, pooled, _ = pipe.encode_prompt(prompt)  # FLUX
    pieces = len(pipe.tokenizer_2(prompt).input_ids)
    return [hidden[0, max(pieces - 2, 0) :].double()], pooled[0].double()


def layers(pipe) -> dict[str, tuple[Tensor, str]]:
    """Weights ``(out, d)`` that text embeddings are multiplied by, and what they see: ``hidden`` or ``pooled``."""
    if hasattr(pipe, "unet"):
        found = {
            name: (parameter.detach().double(), "hidden")
            for name, parameter in pipe.unet.named_parameters()
            if "attn2.to_k" in name or "attn2.to_v" in name
        }
        if hasattr(pipe, "text_encoder_2"):
            width = pipe.text_encoder_2.config.projection_dim
            weight = pipe.unet.add_embedding.linear_1.weight.detach().double()
            found["add_embedding.linear_1.weight"] = weight[:, :width], "pooled"
        return found
    t = pipe.transformer
    return {
        "context_embedder.weight": (t.context_embedder.weight.detach().double(), "hidden"),
        "time_text_embed.text_embedder.linear_1.weight": (
            t.time_text_embed.text_embedder.linear_1.weight.detach().double(),
            "pooled",
        ),
    }


def ridge(
    w: Tensor, pairs: list[tuple[Tensor, Tensor]], kept: list[Tensor], lamb: float, erase_scale: float, scale: float
) -> Tensor:
    """[lamb W + e sum (W y) x^T + p sum (W k) k^T] [lamb I + e sum x x^T + p sum k k^T]^-1."""
    left, right = lamb * w, lamb * torch.eye(w.shape[1], dtype=torch.float64)
    for x, y in pairs:
        left, right = left + erase_scale * torch.outer(w @ y, x), right + erase_scale * torch.outer(x, x)
    for k in kept:
        left, right = left + scale * torch.outer(w @ k, k), right + scale * torch.outer(k, k)
    return left @ torch.linalg.inv(right)


def edit(
    pipe,
    erased: list[str],
    guides: list[str],
    kept: list[str],
    *,
    lamb: float = 0.5,
    erase_scale: float = 1.0,
    preserve_scale: float = 1.0,
    pooled: bool = False,
) -> dict[str, Tensor]:
    """The new weights of every layer, for the last word piece of every prompt (or its pooled embedding)."""
    edited = {}
    for name, (w, space) in layers(pipe).items():
        if space == "pooled" and not pooled:
            continue
        rows = {}
        for prompt in {*erased, *guides, *kept}:
            hidden, one = embeddings(pipe, prompt)
            rows[prompt] = [part[0] for part in hidden] if space == "hidden" else [one]
        pairs = [pair for x, y in zip(erased, guides, strict=True) for pair in zip(rows[x], rows[y], strict=True)]
        preserved = [k for prompt in kept for k in rows[prompt]]
        edited[name] = ridge(w, pairs, preserved, lamb, erase_scale, preserve_scale)
    return edited
