"""The published methods, one file each, found by name.

Third parties add theirs through the entry-point group ``erasure.methods``: name to ``module:Class``.
"""

from __future__ import annotations

import importlib
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from erasure.methods.base import Method

BUILT_IN = {
    "uce": "erasure.methods.uce:UCE",
    "rece": "erasure.methods.rece:RECE",
    "time": "erasure.methods.time:TIME",
    "speed": "erasure.methods.speed:SPEED",
    "mace-cfr": "erasure.methods.mace_cfr:MACECFR",
    "double-projections": "erasure.methods.double_projections:DoubleProjections",
    "cure": "erasure.methods.cure:CURE",
    "esd": "erasure.methods.esd:ESD",
}


def available() -> dict[str, str]:
    """Every known method: name to ``module:Class``. Nothing is imported.

    Raises:
        ValueError: two installed packages claim one name.
    """
    table = dict(BUILT_IN)
    for point in entry_points(group="erasure.methods"):
        if table.setdefault(point.name, point.value) != point.value:
            raise ValueError(
                f"two packages define the method {point.name!r}: {table[point.name]} and {point.value}; uninstall one"
            )
    return table


def method_class(name: str) -> type[Method]:
    """The class of a method.

    Raises:
        ValueError: unknown name; the message lists the known ones.
    """
    table = available()
    if name not in table:
        raise ValueError(f"unknown method; got {name!r}; choose one of {sorted(table)}")
    module, _, attribute = table[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
