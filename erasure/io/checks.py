"""What is a number, of those that somebody gave: True is none, and NaN compares with nothing."""

from __future__ import annotations

import math
import numbers
from typing import Any


def is_whole(value: Any, least: int = 0) -> bool:
    """Whether it is a whole number from ``least`` on; one of NumPy's too."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) >= least


def is_number(value: Any) -> bool:
    """Whether it is a real number, and finite."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


__all__ = ["is_number", "is_whole"]
