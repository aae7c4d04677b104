"""Which layers of a model a fine-tune trains, chosen by what they do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from erasure.backbone.base import Backbone


def selected(backbone: Backbone, selector: str) -> dict[str, nn.Module]:
    """The linears and convolutions of a selector, by qualified name; see :meth:`Backbone.select`."""
    if selector == "text_encoder":
        return layers(backbone, backbone.encoders)
    wanted = selectors(backbone)
    if selector not in wanted:
        known = [*wanted, "text_encoder"]
        raise ValueError(f"unknown parameter selector; got {selector!r}; choose one of {known}")
    return {n: m for n, m in layers(backbone, backbone.denoiser_parts).items() if wanted[selector](n)}


def layers(backbone: Backbone, parts: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Every linear and convolution of some parts, by qualified name."""
    return {
        backbone.qualified(part, name): layer
        for part, module in parts.items()
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.Conv3d)
    }


def blocks(backbone: Backbone) -> set[str]:
    """Qualified names of the transformers in a U-Net, or of the blocks of a transformer."""
    return {
        backbone.qualified(part, name)
        for part, module in backbone.denoiser_parts.items()
        for name, child in module.named_modules()
        if (type(child).__name__.startswith("Transformer") and name)
        or (isinstance(child, nn.ModuleList) and "." not in name and part.startswith("transformer"))
    }


def selectors(backbone: Backbone) -> dict[str, Callable[[str], bool]]:
    """Which layers of the denoisers each selector takes, by qualified name."""
    sites = backbone.text_sites()
    reading = {name.rpartition(".")[0] for name, site in sites.items() if site.role in ("key", "value")}
    attentions = {
        backbone.qualified(part, name)
        for part, module in backbone.denoiser_parts.items()
        for name, child in module.named_modules()
        if "Attention" in type(child).__name__ and any(isinstance(c, nn.Linear) for c in child.children())
    }
    reading = reading or attentions
    roots = blocks(backbone)

    def within(name: str, roots: set[str]) -> bool:
        return any(name.startswith(f"{root}.") for root in roots)

    return {
        "cross_attention": lambda name: within(name, reading),
        "cross_attention_kv": lambda name: name in sites if reading is not attentions else _is_kv(name, attentions),
        "not_cross_attention": lambda name: not within(name, reading),
        "attention": lambda name: within(name, attentions),
        "blocks": lambda name: within(name, roots),
        "all": lambda name: True,
    }


def _is_kv(name: str, attentions: set[str]) -> bool:
    """Keys and values of a joint attention, the text stream's own (``add_``) included."""
    last = name.rpartition(".")[2]
    return last in ("to_k", "to_v", "add_k_proj", "add_v_proj") and name.rpartition(".")[0] in attentions


__all__ = ["selected"]
