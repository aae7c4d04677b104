"""Concepts added to and dropped from closed forms later, by solving again. No base model is needed for that."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import reduce
from operator import add
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

from erasure.artifact import Erasure, OperatorErasure
from erasure.artifact.config import Config
from erasure.backbone import Space
from erasure.concept import Concept
from erasure.io import shown
from erasure.methods.base import check_request
from erasure.methods.kept import Kept
from erasure.methods.ridge import Problem, solve
from erasure.wording import listed


def resolve(
    edits: OperatorErasure | Sequence[OperatorErasure],
    *,
    without: str | Sequence[str] = (),
    lamb: float | None = None,
    name: str | None = None,
) -> OperatorErasure:
    """One erasure of all concepts of several, as if they had been erased together.

    :meth:`~erasure.artifact.OperatorErasure.compose` multiplies the solutions, so that the second acts on what the
    first left. This joins the regressions behind them and solves once,

        T = I + (Y - X) X^T (lambda I + X X^T + sum K)^-1,

    with the targets ``X`` and anchors ``Y`` of all of them (``(d, n)``, scaled by the root of their weight) and the
    Gram matrices ``K`` of all they keep. A Gram matrix that several of them share (the same keep list) counts once, so
    that concepts erased apart with one keep list give what they give together. Lists that merely overlap count twice
    where they do. What a dropped concept's erasure kept stays kept where another matrix comes with it.

    Args:
        edits: one or several operator erasures of one base, each with its system: as made, or saved with
            ``system=True``.
        without: one name or several, of concepts to drop.
        lamb: ridge of the joint solution. Needed where theirs differ.
        name: its name; from concepts and methods by default.

    Raises:
        ValueError: no system, another base or other layers, or the requests contradict each other: one erases what
            another keeps or moves things to, or both erase the same.
    """
    edits = list(edits) if isinstance(edits, Iterable) else [edits]
    without = listed(without)
    if not edits:
        raise ValueError("nothing to solve; got no erasures; give at least one")
    for edit in edits:
        _check(edit, edits[0])
    owned = [[TypeAdapter(Concept).validate_python(c) for c in edit.config["concepts"]] for edit in edits]
    named = [concept.name for concepts in owned for concept in concepts]
    if unknown := sorted(set(without) - set(named)):
        raise ValueError(f"not among the concepts; got {unknown}; they are {named}")
    left = [concept for concepts in owned for concept in concepts if concept.name not in without]
    keep = _union(edits, "keep")
    everyday = _union(edits, "keep_everyday")
    check_request(left, [*keep, *everyday])
    if len({concept.name.casefold() for concept in left}) < len(left):
        raise ValueError(f"a concept is erased twice; got {[c.name for c in left]}; leave one of the two out")

    dropping = [[concept.name in without for concept in concepts] for concepts in owned]
    tensors: dict[str, Tensor] = {}
    system: dict[str, Tensor] = {}
    facts: dict[str, Any] = {}
    report: dict[str, Any] = {}
    for space in edits[0].config["spaces"]:
        ridge = _ridge([edit.config["system"][space]["lamb"] for edit in edits], lamb)
        x, y, rows, kept = _joined(edits, space, dropping)
        solution = solve(Problem(x, y, reduce(add, kept), ridge)).smallest()
        tensors |= solution.tensors(space)
        system |= {f"{space}.targets": x, f"{space}.anchors": y}
        system |= {f"{space}.kept.{i}": gram.data for i, gram in enumerate(kept)}
        facts[space] = {"lamb": ridge, "rows": rows, "kept": len(kept)}
        report[space] = {"condition": solution.condition, "rank": len(x)}
    config = {
        **_config(edits, without),
        "keep": keep,
        "keep_everyday": everyday,
        "system": facts,
        "report": report.pop("hidden", {}) | report,
    }
    made = name or "+".join(concept.name for concept in left) + f"-{config['method']}"
    return OperatorErasure(made, Config.of(config), tensors, system)


def _check(edit: OperatorErasure, first: OperatorErasure) -> None:
    if not isinstance(edit, Erasure):
        raise ValueError(f"an erasure is needed; got {shown(edit)}; load one with Erasure.from_pretrained")
    if not isinstance(edit, OperatorErasure) or not edit.system:
        raise ValueError(
            f"{edit.name!r} does not hold the regression it solves; only closed forms of one plain regression have "
            "one; save it with save_pretrained(folder, system=True), or compose the erasures instead"
        )
    first.check_same_base(edit)
    if first.config["spaces"] != edit.config["spaces"]:
        raise ValueError(f"{first.name!r} and {edit.name!r} edit different layers; apply them one after the other")


def _joined(
    edits: Sequence[OperatorErasure], space: Space, dropping: Sequence[Sequence[bool]]
) -> tuple[Tensor, Tensor, list[int], list[Kept]]:
    """Targets and anchors ``(n, d)``, rows per concept, and the distinct sums of what is kept."""
    x: list[Tensor] = []
    y: list[Tensor] = []
    kept: list[Kept] = []
    for edit, drops in zip(edits, dropping, strict=True):
        facts = edit.config["system"][space]
        if len(facts["rows"]) != len(drops):
            raise ValueError(f"{edit.name!r} does not say which rows are whose; make it again")
        for all_rows, some in ((edit.system[f"{space}.targets"], x), (edit.system[f"{space}.anchors"], y)):
            some += [part for part, drop in zip(all_rows.split(facts["rows"]), drops, strict=True) if not drop]
        for tensor in (edit.system[f"{space}.kept.{i}"].double() for i in range(facts["kept"])):
            # a matrix is square; rows are fewer than the embedding is wide
            gram = Kept(tensor, low_rank=tensor.shape[0] < tensor.shape[1])
            if not any(_equal(gram, other) for other in kept):
                kept.append(gram)
    return torch.cat(x), torch.cat(y), [len(part) for part in x], kept


def _equal(a: Kept, b: Kept) -> bool:
    return a.data.shape == b.data.shape and bool((a.data - b.data).norm() <= 1e-6 * b.data.norm())


def _ridge(theirs: Sequence[float], given: float | None) -> float:
    if given is None and len(set(theirs)) > 1:
        raise ValueError(f"the erasures were solved with different lambdas; got {list(theirs)}; say which with lamb=")
    return theirs[0] if given is None else given


def _config(edits: Sequence[OperatorErasure], without: Sequence[str]) -> dict[str, Any]:
    """What they share, methods and settings as far as they differ, and the concepts that are left."""
    every = [edit.config["settings"] for edit in edits]
    return {
        **{key: value for key, value in edits[0].config.items() if key not in ("evaluation", "preset", "prompts")},
        "method": "+".join(dict.fromkeys(edit.config["method"] for edit in edits)),
        "settings": every[0] if all(settings == every[0] for settings in every) else every,
        "concepts": [c for edit in edits for c in edit.config["concepts"] if c["name"] not in without],
    }


def _union(edits: Sequence[OperatorErasure], key: str) -> list[str]:
    return list(dict.fromkeys(word for edit in edits for word in edit.config.get(key, ())))


__all__ = ["resolve"]
