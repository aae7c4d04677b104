"""What an erasure records when it is made: who made it, of what, and the fingerprints of its base model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from erasure.artifact.card import licence_of
from erasure.artifact.config import FORMAT, Config
from erasure.artifact.provenance import names_in
from erasure.artifact.stack import stack_of
from erasure.backbone import Backbone
from erasure.backbone.fingerprint import fingerprint
from erasure.concept import Concept


def new_config(
    backbone: Backbone,
    *,
    method: str,
    settings: dict[str, Any],
    concepts: Sequence[Concept],
    keep: Sequence[str],
    **facts: Any,
) -> Config:
    """The config of a freshly made erasure, with further facts of the method."""
    from erasure import __version__

    pipe = backbone.pipe
    return Config.of(
        {
            "format": FORMAT,
            "library_version": __version__,
            "method": method,
            "settings": settings,
            "concepts": [dataclasses.asdict(concept) for concept in concepts],  # type: ignore[call-overload]
            "keep": list(keep),
            "base": {
                "name": base_name(pipe),
                "architecture": backbone.architecture,
                "prediction_type": backbone.prediction_type,
                "components": component_prints(backbone),
                "licence": licence_of(pipe),
                **({"erased": erased} if (erased := names_in(stack_of(backbone).fused)) else {}),
            },
            **facts,
        }
    )


def component_prints(backbone: Backbone) -> dict[str, Any]:
    """Fingerprints of denoiser and text encoders as they are without the erasures on them."""
    stack = stack_of(backbone)
    return {
        name: fingerprint(module, originals={**_own_words(backbone, name), **stack.originals_of(name)})
        for name, module in backbone.components.items()
    }


def _own_words(backbone: Backbone, name: str) -> dict[str, Tensor]:
    """A text encoder's token table without the words that textual inversions added at its end."""
    tokenizer = getattr(backbone.pipe, name.replace("text_encoder", "tokenizer"), None)
    module = backbone.components[name]
    if name in backbone.denoisers or tokenizer is None or not hasattr(tokenizer, "vocab_size"):
        return {}
    table: nn.Parameter = module.get_input_embeddings().weight  # type: ignore[operator]  # transformers' own method
    if not len(table) == len(tokenizer) > tokenizer.vocab_size:
        return {}
    return {part: table[: tokenizer.vocab_size] for part, p in module.named_parameters() if p is table}


def base_name(pipe: Any) -> str:
    """Hub id of the pipeline, or the name of the folder it was loaded from (never the whole path)."""
    source = str(pipe.config.get("_name_or_path") or type(pipe).__name__)
    return Path(source).name if Path(source).exists() else source


__all__ = ["base_name", "component_prints", "new_config"]
