"""A U-Net's attentions: those within a picture, and how much those to the text look at each of its tokens."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

if TYPE_CHECKING:
    from erasure.backbone.base import Backbone


def self_attentions(backbone: Backbone) -> list[nn.Module]:
    """The attentions of a U-Net's transformers between the places of a picture alone, ``(n, places, width)``.

    None for other denoisers, whose places and text share one attention, and for those of videos, whose frames do.
    """
    if backbone.denoiser_name != "unet" or len(backbone.latent_shape) != 3:
        return []
    return [
        module
        for module in backbone.denoiser.modules()
        if isinstance(module, Attention) and not module.is_cross_attention and module.group_norm is None
    ]


def cross_attentions(backbone: Backbone) -> dict[str, Any]:
    """The attention modules that read the text alone, by qualified name.

    Raises:
        ValueError: the model has none: its attentions are joint, or the text enters elsewhere.
    """
    sites = {name for name, site in backbone.text_sites().items() if site.role == "key"}
    found = {
        name: module
        for part, denoiser in backbone.denoiser_parts.items()
        for own, module in denoiser.named_modules()
        if f"{(name := backbone.qualified(part, own))}.to_k" in sites and getattr(module, "norm_k", None) is None
    }
    if not found:
        raise ValueError(
            f"maps of the attention to words are those of U-Nets' cross-attentions; {backbone.pipelines} has none of "
            "that form; choose a method that compares predictions, such as esd"
        )
    return found


@contextlib.contextmanager
def attention_maps(backbone: Backbone) -> Iterator[dict[str, Tensor]]:
    """The cross-attentions' probabilities of the last prediction made in the block, by module name, with their graph:

        softmax(Q K^T / sqrt(d))    (n, heads, places, tokens)

    They are computed from queries and keys beside the model's own attention, whatever processor that uses.
    """
    maps: dict[str, Tensor] = {}
    queries: dict[str, Tensor] = {}
    handles = []
    for name, module in cross_attentions(backbone).items():

        def heard_query(layer: nn.Module, given: Any, output: Tensor, name: str = name) -> None:
            queries[name] = output

        def heard_key(layer: nn.Module, given: Any, output: Tensor, name: str = name, module: Any = module) -> None:
            q, k = (t.unflatten(2, (module.heads, -1)).transpose(1, 2) for t in (queries.pop(name), output))
            maps[name] = (q @ k.transpose(2, 3) * module.scale).float().softmax(dim=-1)

        handles += [module.to_q.register_forward_hook(heard_query), module.to_k.register_forward_hook(heard_key)]
    try:
        yield maps
    finally:
        for handle in handles:
            handle.remove()


__all__ = ["attention_maps", "cross_attentions", "self_attentions"]
