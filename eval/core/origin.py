"""Which library some code comes from, by the source file that it stands in: a name is easily taken."""

from __future__ import annotations

import functools
import operator
import sys
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

BUILT = ("__init__", "__repr__", "__eq__", "__hash__")  # methods that dataclasses write, and no layer runs


def comes_from(libraries: Collection[str], thing: Any) -> bool:
    """Whether a function, or the class of an object, was written in one of some libraries; and what it wraps, too."""
    thing = getattr(thing, "__func__", thing)
    if isinstance(thing, functools.partial):
        return comes_from(libraries, thing.func)
    if isinstance(thing, FunctionType):
        module = sys.modules.get(thing.__globals__.get("__name__", ""))
        if module is None or vars(module) is not thing.__globals__ or thing.__code__ not in _source(module):
            return False
        parts = [*_wrapped(thing)]
    else:
        kind = thing if isinstance(thing, type) else type(thing)
        module = sys.modules.get(kind.__module__)
        if module is None or not _stands_in(module, kind):
            return False
        parts = [value for name, value in vars(kind).items() if name not in BUILT and isinstance(value, FunctionType)]
    return _package(module) in libraries and all(comes_from(libraries, part) for part in parts)


def _wrapped(function: FunctionType) -> Iterator[Callable[..., Any]]:
    """The functions that a function keeps from where it was made."""
    for cell in function.__closure__ or ():
        try:
            value = cell.cell_contents
        except ValueError:  # an empty one
            continue
        if isinstance(getattr(value, "__func__", value), FunctionType) and value is not function:
            yield value


def _stands_in(module: ModuleType, kind: type) -> bool:
    try:
        return operator.attrgetter(kind.__qualname__)(module) is kind
    except AttributeError:
        return False


def _package(module: ModuleType) -> str:
    return module.__name__.partition(".")[0]


def _source(module: ModuleType) -> frozenset[CodeType]:
    """All code in the source file of a module, if that lies in the folder of its library."""
    file, library = getattr(module, "__file__", None), getattr(sys.modules.get(_package(module)), "__file__", None)
    if not file or not library or not Path(file).is_relative_to(Path(library).parent):
        return frozenset()
    return _code_in(file)


@functools.cache
def _code_in(file: str) -> frozenset[CodeType]:
    try:
        left = [compile(Path(file).read_bytes(), file, "exec", dont_inherit=True)]
    except (OSError, SyntaxError, ValueError):
        return frozenset()
    found: set[CodeType] = set()
    while left:
        found.add(code := left.pop())
        left += [one for one in code.co_consts if isinstance(one, CodeType)]
    return frozenset(found)


__all__ = ["comes_from"]
