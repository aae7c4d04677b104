"""Take a concept out of what a diffusion model draws, and say honestly what that did.

>>> import erasure
>>> pipe = erasure.world.load()                                        # or a diffusers text-to-image pipeline
>>> edit = erasure.erase(pipe, "superhero", keep=["ninja", "wizard"])  # applied already
>>> edit.save_pretrained("superhero-uce")                              # doctest: +SKIP
>>> edit.remove(pipe)                                                  # every bit as before
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_LAZY = {
    "Concept": "erasure.concept",
    "Suite": "erasure.concept",
    "Erasure": "erasure.artifact",
    "save_denoiser": "erasure.artifact",
    "erase": "erasure.api",
    "resolve": "erasure.methods.resolve",
    "suggest_neighbours": "erasure.methods.neighbours",
}
_MODULES = {"world", "methods", "pipelines", "eval"}

if TYPE_CHECKING:
    from erasure.api import erase
    from erasure.artifact import Erasure, save_denoiser
    from erasure.concept import Concept, Suite
    from erasure.methods.neighbours import suggest_neighbours
    from erasure.methods.resolve import resolve


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"erasure.{name}")
    raise AttributeError(f"module 'erasure' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *_MODULES, "__version__"})


__all__ = ["Concept", "Erasure", "Suite", "erase", "resolve", "save_denoiser", "suggest_neighbours"]
