"""Which library some code comes from, by the source file that it stands in: a name is easily taken."""

from __future__ import annotations

import functools
import operator
import sys
from collections.abc import Collection, Iterable
from pathlib import Path
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import nn

BUILT = ("__init__", "__repr__", "__eq__", "__hash__")  # methods that dataclasses write, and no layer runs


def comes_from(libraries: Collection[str], thing: Any, *, within: tuple[Any, ...] = ()) -> bool:
    """Whether a function, or the class of an object, was written in one of some libraries; and all that it calls up.

    Args:
        within: what led here, and is being looked at already.
    """
    if any(thing is one for one in within):
        return True
    code = thing if isinstance(thing, FunctionType | type) else type(thing)
    if isinstance(code, FunctionType):
        module = sys.modules.get(code.__globals__.get("__name__", ""))
        written = module is not None and vars(module) is code.__globals__ and code.__code__ in _source(module)
    else:
        module = sys.modules.get(code.__module__)
        written = module is not None and _stands_in(module, code)
    if module is None or not written:
        return False
    plain = module.__name__ in ("builtins", "functools")  # a bound method, a partial: what they hold decides
    parts = _parts(thing)
    return (plain and bool(parts) or _package(module) in libraries) and all(
        comes_from(libraries, part, within=(*within, thing)) for part in parts
    )


def _parts(thing: Any) -> list[Any]:
    """What is run by a function, a method, an object or a class of objects beside its own code."""
    if isinstance(thing, MethodType):
        return [thing.__func__, thing.__self__ if isinstance(thing.__self__, type) else type(thing.__self__)]
    if isinstance(thing, functools.partial):
        return [thing.func, *_functions([*thing.args, *thing.keywords.values()])]
    if isinstance(thing, FunctionType):
        kept = [*(thing.__defaults__ or ()), *(thing.__kwdefaults__ or {}).values()]
        return _functions([*kept, *map(held_by, thing.__closure__ or ())])
    if isinstance(thing, type):
        return [value for name, value in vars(thing).items() if name not in BUILT and isinstance(value, FunctionType)]
    layers = [type(layer) for layer in thing.modules()] if isinstance(thing, nn.Module) else []
    return [type(thing), *layers, *_functions(getattr(thing, "__dict__", {}).values())]


def _functions(values: Iterable[Any]) -> list[Any]:
    return [value for value in values if isinstance(value, FunctionType | MethodType | functools.partial)]


def held_by(cell: CellType) -> Any:
    """What a function keeps in one cell of its closure; None where that is empty."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


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


__all__ = ["comes_from", "held_by"]
