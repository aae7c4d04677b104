"""Which cases run every time, and which with `pytest -m slow`: the same test, on fewer models first."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from erasure.methods import BUILT_IN, method_class

# Fine-tunes that differ from others (esd, concept-ablation) in their loss alone, which tests/test_finetunes.py holds.
ALIKE = {"leco", "age", "eap", "salun", "erasediff", "random-label", "gradient-ascent", "cogfd"}


def first(every: Iterable[Any], *quick: Any) -> list[Any]:
    """All cases of a parametrised test; those that are not among the quick ones are marked slow."""
    cases = list(every)
    assert set(quick) <= set(cases), f"no such cases: {set(quick) - set(cases)}"
    return [case if case in quick else pytest.param(*_values(case), marks=pytest.mark.slow) for case in cases]


def every_method(*quick: str) -> list[Any]:
    """Every built-in method for Stable Diffusion 1; those alike with another are marked slow, or all but some."""
    works = {name: method_class(name).architectures for name in sorted(BUILT_IN)}
    names = [name for name, architectures in works.items() if architectures is None or "sd-unet" in architectures]
    return first(names, *(quick or sorted(set(names) - ALIKE)))


def _values(case: Any) -> tuple[Any, ...]:
    return case if isinstance(case, tuple) else (case,)
