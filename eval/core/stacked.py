"""Several erasures as one change of a pipeline, in the order in which they were asked for."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from erasure.artifact import Erasure
from erasure.eval.core.models import Kind


class Stacked:
    """Several erasures, each made for the unmodified base, as one change: put on one after another, in their order."""

    def __init__(self, name: str, erasures: Sequence[Erasure]) -> None:
        if not erasures:
            raise ValueError(f"nothing to stack under {name!r}; got no erasures; give at least one")
        self.name, self.erasures = name, tuple(erasures)
        parts = [edit.config for edit in erasures]
        lists = {
            key: [item for part in parts for item in part.get(key, ())] for key in ("keep", "keep_everyday", "prompts")
        }
        self.config = {
            "method": " then ".join(dict.fromkeys(part["method"] for part in parts)),
            "erasures": [edit.name for edit in erasures],
            "settings": parts[0]["settings"]
            if all(p["settings"] == parts[0]["settings"] for p in parts)
            else "various",
            "concepts": [concept for part in parts for concept in part["concepts"]],
            **{key: list(dict.fromkeys(items)) for key, items in lists.items() if items},
        }

    @property
    def intervention(self) -> Kind:
        """An adapter where one of them is: it works beside the weights."""
        return "adapter" if any(edit.intervention == "adapter" for edit in self.erasures) else "weights"

    def first(self, count: int) -> Stacked:
        """The first so many of them."""
        return Stacked(f"the first {count} of {self.name}", self.erasures[:count])

    def apply(self, pipe: Any) -> None:
        """Put all of them on, or none where one is refused."""
        with contextlib.ExitStack() as undo:
            for edit in self.erasures:
                edit.apply(pipe)
                undo.callback(edit.remove, pipe)
            undo.pop_all()

    def remove(self, pipe: Any) -> None:
        """Take all of them off, the last first."""
        for edit in reversed(self.erasures):
            edit.remove(pipe)
