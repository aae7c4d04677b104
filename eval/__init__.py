"""What an erasure did: to the target, to its neighbours, to everything else.

>>> from erasure.eval import evaluate, write_report  # doctest: +SKIP

Nothing heavy is imported until it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from erasure.eval.core.pictures import generate
    from erasure.eval.core.records import Evaluation
    from erasure.eval.detectors.base import Detector, DetectorCard
    from erasure.eval.detectors.clip import ClipDetector
    from erasure.eval.report.html import write_report
    from erasure.eval.run.assess import assess
    from erasure.eval.run.assessment import Assessment
    from erasure.eval.run.evaluate import assessment_of, evaluate
    from erasure.eval.stats import Estimate

_WHERE = {
    "Assessment": "run.assessment",
    "ClipDetector": "detectors.clip",
    "Detector": "detectors.base",
    "DetectorCard": "detectors.base",
    "Estimate": "stats",
    "Evaluation": "core.records",
    "assess": "run.assess",
    "assessment_of": "run.evaluate",
    "evaluate": "run.evaluate",
    "generate": "core.pictures",
    "write_report": "report.html",
}

__all__ = [
    "Assessment",
    "ClipDetector",
    "Detector",
    "DetectorCard",
    "Estimate",
    "Evaluation",
    "assess",
    "assessment_of",
    "evaluate",
    "generate",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
