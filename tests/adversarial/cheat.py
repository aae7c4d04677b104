"""What the tests of cheats share: a cheat on a tiny pipeline, with everything else as good as it can be."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from erasure.eval.core.models import Model
from erasure.eval.judge import ClaimReport
from erasure.eval.probes.base import Context, Evidence, Observation
from erasure.eval.probes.removal.construction import Construction
from tests.made_up import good, judged, without
from tests.probe_helpers import tiny_context


class Cheat:
    """A change that says it edited weights.

    Args:
        do: changes the pipeline in place and returns what undoes it.
    """

    intervention = "weights"

    def __init__(self, do: Callable[[Any], Callable[[], None]], **config: Any) -> None:
        self.name, self.config, self._do = "cheat", config, do

    def apply(self, pipe: Any) -> None:
        self._undo = self._do(pipe)

    def remove(self, pipe: Any) -> None:
        self._undo()


def overwrite(tensor: torch.Tensor, new: torch.Tensor) -> Callable[[], None]:
    """Write into a weight; what is returned gives it back."""
    old = tensor.detach().clone()
    with torch.no_grad():
        tensor.copy_(new)

    def undo() -> None:
        with torch.no_grad():
            tensor.copy_(old)

    return undo


@functools.cache
def shared() -> tuple[Context, list[Observation]]:
    """One tiny pipeline for all cheats, and what is found in it before any."""
    context = tiny_context()
    return context, Construction(images=0).run(context.base, context)


def structure(cheat: Cheat) -> list[Evidence]:
    """What is found in the parameters and predictions of a cheat, as evidence about "UCE"."""
    (context, base), probe = shared(), Construction(images=0)
    rows = {"base": base, "UCE": probe.run(Model("UCE", "erased", cheat), context)}
    return probe.weigh(rows, {"base": "base", "UCE": "erased"})


def verdict_on(found: list[Evidence], **facts: Any) -> ClaimReport:
    """The claims about a cheat whose pictures and attacks are beyond reproach: only its :func:`structure` can tell."""
    return judged([*without(good(), "construction"), *found], **facts)
