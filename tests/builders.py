"""Every tiny pipeline there is a builder for, by architecture."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from tests.tiny import ARCHITECTURES, tiny

# module, its table of builders, and the function that builds one of them
FURTHER = (("tests.tiny_cross", "CROSS", "tiny_cross"), ("tests.tiny_joint", "JOINT", "tiny_joint"))

BUILDERS: dict[str, Callable[[], Any]] = {name: functools.partial(tiny, name) for name in ARCHITECTURES}
CALLS: dict[str, dict[str, Any]] = {}
"""What a pipeline's call takes besides the prompt, where it takes anything."""

for module, table, build in FURTHER:
    if find_spec(module) is not None:
        found = importlib.import_module(module)
        BUILDERS |= {name: functools.partial(getattr(found, build), name) for name in getattr(found, table)}
        CALLS |= {name: found.call(name) for name in getattr(found, table) if hasattr(found, "call")}
