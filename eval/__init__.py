"""What an erasure did: to the target, to its neighbours, to everything else.

>>> from erasure.eval import evaluate, write_report  # doctest: +SKIP

Nothing heavy is imported until it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from erasure.eval.assessment import Assessment
    from erasure.eval.compare import evaluate
    from erasure.eval.detectors.base import Detector, DetectorCard
    from erasure.eval.detectors.clip import ClipDetector
    from erasure.eval.pictures import generate
    from erasure.eval.records import Evaluation
    from erasure.eval.report import write_report
    from erasure.eval.runner import assess
    from erasure.eval.stats import Estimate

_HOMES = {
    "Assessment": "assessment",
    "ClipDetector": "detectors.clip",
    "Detector": "detectors.base",
    "DetectorCard": "detectors.base",
    "Estimate": "stats",
    "Evaluation": "records",
    "assess": "runner",
    "evaluate": "compare",
    "generate": "pictures",
    "write_report": "report",
}

__all__ = [
    "Assessment",
    "ClipDetector",
    "Detector",
    "DetectorCard",
    "Estimate",
    "Evaluation",
    "assess",
    "evaluate",
    "generate",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
