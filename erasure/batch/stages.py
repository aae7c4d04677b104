"""The work of one cell in stages, each kept as soon as it is there: the erasure, what is written of it, what an
evaluation says of it, and its place on the hub.

A stage notes which erasure it belongs to and what was asked for. So it is done again where either changed, and only
then: a LoRA that a recipe asks for later costs no second training.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock

from erasure.api import erase
from erasure.artifact import Erasure
from erasure.artifact.files import WEIGHTS
from erasure.backbone import backbone_of
from erasure.batch import outputs
from erasure.batch.cost import counted
from erasure.batch.judging import judge
from erasure.batch.publishing import described, digest_of
from erasure.batch.recipe import Cell, Recipe
from erasure.io import parse_json, read_bytes, remove_partial, write_json

RESULT, LOCK = "result.json", ".lock"
MADE, WRITTEN, JUDGED, PUSHED = "made.json", "written.json", "judged.json", "pushed.json"  # one of each stage
State = Literal["done", "failed", "waiting", "damaged"]


@contextlib.contextmanager
def replacing(*files: Path) -> Iterator[None]:
    """Files of a recipe's folder that one process at a time writes anew; what killed ones left of them is deleted."""
    files[0].parent.mkdir(parents=True, exist_ok=True)
    with FileLock(str(files[0].parent / LOCK)):
        for file in files:
            remove_partial(file)
        yield


def record(file: Path) -> dict[str, Any] | None:
    """What a stage wrote; None where there is nothing, or something damaged."""
    try:
        found = parse_json(read_bytes(file))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def result_of(recipe: Recipe, cell: Cell) -> dict[str, Any] | None:
    """What a cell came to, failed ones included; None where it has not been run, or the file is damaged."""
    return record(recipe.out / cell.key / RESULT)


def state_of(recipe: Recipe, cell: Cell) -> tuple[State, dict[str, Any]]:
    """Where a cell stands, with its result.

    One whose erasure or outputs are gone, truncated or altered is *damaged*. One whose recipe asks for something else
    by now is *waiting*.
    """
    result = result_of(recipe, cell)
    if result is None or result.get("asked") != wishes(recipe, cell):
        return "waiting", {}
    if result.get("status") == "failed":
        return "failed", result
    return ("done" if intact(recipe.out / cell.key, result) else "damaged"), result


def wishes(recipe: Recipe, cell: Cell) -> dict[str, Any]:
    """What a recipe asks for beside the erasure of a cell, as it stands in the cell's result."""
    asked = recipe.evaluate if cell.suite else None
    return {
        "outputs": [output.plain() for output in recipe.outputs],
        "evaluate": None if asked is None else [asked.preset, list(asked.probes), recipe.limit],
        "push": None if recipe.push is None else recipe.push.repository_of(cell),
    }


def intact(folder: Path, made: dict[str, Any]) -> bool:
    """Whether the erasure of a cell, and what else was written of it, are what was written."""
    written = made.get("outputs", {})
    if not isinstance(written, dict) or not all(outputs.whole(folder, files) for files in written.values()):
        return False
    return outputs.whole(folder, {f"erasure/{WEIGHTS}": made.get("weights")})


def finish(pipe: Any, cell: Cell, recipe: Recipe, judges: Any) -> dict[str, Any]:
    """Do the stages of a cell that are not done; what came of them.

    One that fails does not keep the others from being done, but nothing is pushed that is not finished.

    Args:
        judges: detectors for a suite, see :class:`erasure.eval.detectors.choice.Judges`.

    Raises:
        Exception: the first failure, after the other stages.
    """
    folder, failures = recipe.out / cell.key, list[Exception]()
    edit, found = make(pipe, cell, folder)
    stages: list[tuple[str, Callable[[], dict[str, Any]]]] = [
        (output.name, lambda output=output: _written(pipe, edit, found, folder, output))  # type: ignore[misc]
        for output in recipe.outputs
    ]
    if wishes(recipe, cell)["evaluate"] is not None:
        stages.append(("evaluation", lambda: _judged(pipe, edit, found, cell, recipe, judges)))
    if recipe.push is not None:
        stages.append(("push", lambda: _pushed(edit, found, cell, recipe)))
    for name, stage in stages:
        if name == "push" and failures:
            break
        try:
            found |= stage()
        except Exception as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
                raise  # no room, or nothing may be written: it would fail every stage
            error.add_note(f"stage: {name}")
            failures.append(error)
    if failures:
        raise failures[0]
    return found


def so_far(recipe: Recipe, cell: Cell) -> dict[str, Any]:
    """What the finished stages of a cell came to, for the result of one that failed."""
    folder = recipe.out / cell.key
    made, judged = record(folder / MADE), record(folder / JUDGED)
    if made is None or not intact(folder, made):
        return {}
    right = judged is not None and _valid(judged, made, wishes(recipe, cell)["evaluate"])
    return made | ({key: judged[key] for key in EVALUATED} if right and judged else {})


def make(pipe: Any, cell: Cell, folder: Path) -> tuple[Erasure, dict[str, Any]]:
    """The erasure of a cell and its record: made and saved, or opened where an earlier run got as far as that."""
    made = record(folder / MADE)
    if made is not None and intact(folder, made):
        return Erasure.from_pretrained(folder / "erasure"), made
    settings = {**cell.method.settings, **({"seed": cell.seed} if cell.method.seeded else {})}
    with counted(backbone_of(pipe)) as cost:
        edit = erase(
            pipe,
            cell.concepts,
            cell.method.name,
            keep=cell.wanted.keep,
            preset=cell.method.preset,
            name=cell.key,
            checkpoint=folder / "training",
            apply=False,
            progress=False,
            **settings,
        )
    edit.save_pretrained(folder / "erasure")
    made = {
        "erasure": "erasure",
        "weights": outputs.facts(folder / "erasure" / WEIGHTS),
        "report": edit.config.get("report") or {},  # not every kind has figures
        "cost": {**dataclasses.asdict(cost), "passes": cost.passes},
    }
    write_json(folder / MADE, made, default=str)
    shutil.rmtree(folder / "training", ignore_errors=True)
    return edit, made


EVALUATED = ("figures", "answers", "evidence")


def _valid(stage: dict[str, Any] | None, made: dict[str, Any], asked: Any) -> bool:
    """Whether the record of a stage belongs to this erasure, and to what is asked for."""
    return stage is not None and stage.get("of") == made["weights"]["sha256"] and stage.get("asked") == asked


def _written(pipe: Any, edit: Erasure, made: dict[str, Any], folder: Path, output: outputs.Output) -> dict[str, Any]:
    """One output, written unless it is there as it was written."""
    every = record(folder / WRITTEN) or {}
    one = every.get(output.name)
    if (
        not isinstance(one, dict)
        or not _valid(one, made, output.plain())
        or not outputs.whole(folder, one.get("files"))
    ):
        files = outputs.write(output, edit, pipe, folder)
        one = {"of": made["weights"]["sha256"], "asked": output.plain(), "files": files}
        write_json(folder / WRITTEN, {**every, output.name: one})
    return {"outputs": {**made.get("outputs", {}), output.name: one["files"]}}


def _judged(pipe: Any, edit: Erasure, made: dict[str, Any], cell: Cell, recipe: Recipe, judges: Any) -> dict[str, Any]:
    """The evaluation, unless this erasure was evaluated so."""
    file, asked = recipe.out / cell.key / JUDGED, wishes(recipe, cell)["evaluate"]
    found = record(file)
    if found is None or not _valid(found, made, asked) or not all(key in found for key in EVALUATED):
        found = {"of": made["weights"]["sha256"], "asked": asked, **judge(pipe, edit, cell, recipe, judges)}
        write_json(file, found, default=str)
        found = record(file) or found  # as it reads from a file, whoever made it
    return {key: found[key] for key in EVALUATED}


def _pushed(edit: Erasure, made: dict[str, Any], cell: Cell, recipe: Recipe) -> dict[str, Any]:
    """The place on the hub, pushed unless the same was pushed there before."""
    assert recipe.push is not None  # the caller looked
    file, repository = recipe.out / cell.key / PUSHED, recipe.push.repository_of(cell)
    edit = described(edit, made.get("answers", {}))
    digest, known = digest_of(edit, made["weights"]["sha256"]), record(file) or {}
    if known.get("of") != digest or known.get("repository") != repository:
        url = edit.push_to_hub(repository, private=recipe.push.private)
        known = {"of": digest, "repository": repository, "url": url}
        write_json(file, known)
    return {"pushed": {"repository": repository, "url": known.get("url", "")}}


__all__ = [
    "JUDGED",
    "LOCK",
    "MADE",
    "RESULT",
    "WRITTEN",
    "State",
    "finish",
    "intact",
    "make",
    "record",
    "replacing",
    "result_of",
    "so_far",
    "state_of",
    "wishes",
]
