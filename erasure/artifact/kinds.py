"""The kinds of erasures, found by the name that stands in a config.

Third parties add theirs through the entry-point group ``erasure.kinds``: name to ``module:Class``.
"""

from __future__ import annotations

from typing import Any

from erasure.registry import Registry

KINDS = Registry(
    "kind of erasure",
    "erasure.kinds",
    {
        "operator": "erasure.artifact.operator:OperatorErasure",
        "delta": "erasure.artifact.delta:DeltaErasure",
        "lora": "erasure.artifact.lora:LoraErasure",
        "gated": "erasure.artifact.gated:GatedErasure",
        "residual": "erasure.artifact.residual:ResidualErasure",
        "text-lora": "erasure.artifact.text_lora:TextLoraErasure",
        "localized": "erasure.artifact.localized:LocalizedErasure",
        "safe-guidance": "erasure.pipelines.sld:SafeGuidance",
        "negative-guidance": "erasure.pipelines.negative_prompt:NegativeGuidance",
        "filtered-text": "erasure.pipelines.filtered_text:FilteredText",
        "value": "erasure.pipelines.adavd:ValueErasure",
    },
)


def weightless(kind: str) -> str:
    """Why an erasure of a kind that changes no weight is in no LoRA and in no model."""
    if kind == "gated":
        return "it acts as far as the prompt resembles the concept, and a file of weights acts on every prompt"
    if kind == "text-lora":
        return "it acts on the text alone in layers that read the picture too, and a LoRA in a file acts on both"
    return f"a {kind} erasure changes no weight; it acts while pictures are drawn, and only its own file holds it"


def kind_class(name: str) -> Any:
    """The class of a kind.

    Raises:
        ValueError: unknown name; the message lists the known ones.
    """
    return KINDS.load(name)
