"""Things found by name: built in, or declared by other packages as entry points; imported when asked for."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import sys
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from erasure.io import meant

FEW = 40  # names that are listed even where one of them is near: all methods, not all probes


@functools.lru_cache
def declared(group: str, path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    """The entry points of a group in the packages on ``path``; kept, since looking takes a tenth of a second."""
    return tuple(entry_points(group=group))


@dataclasses.dataclass(frozen=True)
class Registry:
    """Names to ``module:attribute``.

    Attributes:
        noun: what an entry is, for messages.
        group: entry-point group in which other distributions declare theirs.
        built_in: the library's own.
    """

    noun: str
    group: str
    built_in: dict[str, str]

    def available(self) -> dict[str, str]:
        """Every known name to its target. Nothing is imported.

        Raises:
            ValueError: two installed packages claim one name.
        """
        table = dict(self.built_in)
        for point in declared(self.group, tuple(sys.path)):
            if table.setdefault(point.name, point.value) != point.value:
                raise ValueError(
                    f"two packages define the {self.noun} {point.name!r}: {table[point.name]} and {point.value}; "
                    "uninstall one"
                )
        return table

    def check(self, name: str) -> dict[str, str]:
        """All names, if this is one of them. Nothing is imported, so that a slip is met before minutes of loading.

        Raises:
            ValueError: unknown name; the message says which one was meant, and lists the known ones where none is near.
        """
        table = self.available()
        if name not in table:
            declared.cache_clear()  # a package may have been installed since
            table = self.available()
        if name not in table:
            near = meant(name, table)
            others = f"; choose one of {sorted(table)}" if not near or len(table) <= FEW else ""
            own = "" if near else f"; one of your own is declared in its package, in the entry points {self.group!r}"
            raise ValueError(f"unknown {self.noun} {name!r}{near}{others}{own}")
        return table

    def load(self, name: str) -> Any:
        """The object of a name.

        Raises:
            ValueError: unknown name; see :meth:`check`.
        """
        table = self.check(name)
        module, _, attribute = table[name].partition(":")
        return getattr(importlib.import_module(module), attribute)
