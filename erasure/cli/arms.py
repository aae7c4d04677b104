"""What a command compares with the base: erasures, whole models, a filter of prompts, a retrained model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from erasure.cli.options import note

FILTER, RETRAINED, IN_ORDER = "prompt filter", "retrained", "in order"  # what tables call them


def read_erasures(sources: list[str]) -> dict[str, Any]:
    """Erasures by name.

    Raises:
        ValueError: two share one.
    """
    from erasure.artifact import Erasure

    edits: dict[str, Any] = {}
    for edit in map(Erasure.from_pretrained, sources):
        if edit.name in edits:
            raise ValueError(f"two of the erasures are called {edit.name!r}; compare them one at a time, or rename one")
        edits[edit.name] = edit
    return edits


def note_others(edits: dict[str, Any], plan: Any) -> None:
    """Say which erasures are of something else than the suite asks for."""
    from erasure.wording import same

    for edit in edits.values():
        erased = [concept["name"] for concept in edit.config["concepts"]]
        if not any(same(name, phrase) for name in erased for phrase in plan.phrases):
            note(
                f"{edit.name} is an erasure of {', '.join(map(repr, erased))}; the suite {plan.name!r} asks for "
                f"{plan.target!r}"
            )


def stacked(edits: dict[str, Any]) -> dict[str, Any]:
    """All erasures as one more arm, in their order.

    Raises:
        ValueError: there are fewer than two, or one has the arm's name.
    """
    from erasure.eval.core.stacked import Stacked

    if len(edits) < 2 or IN_ORDER in edits:
        raise ValueError(
            f"--in-order puts two erasures or more on in turn, under the name {IN_ORDER!r}; got {list(edits)}; repeat "
            "--erasure, or rename the one of that name"
        )
    return {IN_ORDER: Stacked(IN_ORDER, list(edits.values()))}


def check_arms(named: list[str], methods: list[str]) -> None:
    """Raise unless there is something to compare, each has a name of its own, and every method exists."""
    from erasure.methods import method_class

    every = [*named, *map(str.upper, methods)]
    if not every:
        raise ValueError("nothing to evaluate; give --erasure FOLDER, --method NAME or --model FOLDER")
    if twice := [name for name in dict.fromkeys(every) if every.count(name) > 1]:
        raise ValueError(f"two of what is compared would be called {twice[0]!r}; compare them one at a time")
    for method in methods:
        method_class(method)


def check_models(base: str, sources: Sequence[str]) -> None:
    """Raise unless the base and every other model are there, whole, and of one architecture.

    Raises:
        FileNotFoundError: there is nothing of that name.
        ValueError: one is an erasure, or another architecture than the base.
    """
    from erasure.artifact.files import CONFIG
    from erasure.eval.core.models import check_alike
    from erasure.opening import check_there

    for source in [base, *sources]:
        check_there(source)
        if (Path(source) / CONFIG).exists():
            raise ValueError(f"{source} is an erasure, not a whole model; give it as --erasure {source}")
        check_alike(base, source)


def further_arms(plan: Any, prompt_filter: bool, retrained: Any) -> dict[str, Any]:
    """What erasures are compared with: a filter of prompts, a retrained model."""
    from erasure.pipelines.guardrails import Guard

    arms = {FILTER: Guard.of_words(plan.phrases)} if prompt_filter else {}
    return arms if retrained is None else {**arms, RETRAINED: retrained}


def make_erasures(pipe: Any, plan: Any, methods: list[str], folder: Path) -> dict[str, Any]:
    """Erasures of a suite's target, named after their methods and kept in ``folder``; fine-tunes resume there."""
    from erasure.api import erase

    edits: dict[str, Any] = {}
    for method in methods:
        training = folder / f"{method}-training"
        edit = erase(pipe, plan.concepts, method, keep=plan.kept, checkpoint=training, apply=False)
        edit.save_pretrained(folder / method)
        edits[method.upper()] = edit
    return edits
