"""What stands around a pipeline and is called in its place."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar, Self


class Around:
    """Everything that a class around a pipeline does not do itself is handed on to the pipeline, which is not changed.

    ``save_pretrained`` saves the bare pipeline.

    Class attributes:
        _own: the attributes that are not the pipeline's.
    """

    _own: ClassVar[tuple[str, ...]] = ("pipe", "__signature__")

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.__signature__ = inspect.signature(pipe)

    def named(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The arguments of a call, by the names that the pipeline gives them."""
        given = dict(self.__signature__.bind(*args, **kwargs).arguments)
        more = given.pop("kwargs", {})
        return {**given, **more}

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move the pipeline; what stands around it stays."""
        self.pipe.to(*args, **kwargs)
        return self

    def __getattr__(self, name: str) -> Any:
        if name in type(self)._own:  # not there yet, while a copy is being made
            raise AttributeError(name)
        return getattr(self.pipe, name)

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value) if name in self._own else setattr(self.pipe, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self.pipe, name)


__all__ = ["Around"]
