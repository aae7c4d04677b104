"""The evaluation of a cell: plain, or by a preset of probes, with what the cells of one suite share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import model_validator
from pydantic.dataclasses import dataclass

from erasure.concept import STRICT, Suite
from erasure.io import folder_name, sha256_json, shown, write_atomically
from erasure.opening import quiet

if TYPE_CHECKING:
    from erasure.artifact import Erasure
    from erasure.batch.recipe import Cell, Recipe

SHARED = "shared"  # folder beside the cells: what probes saw of the base and of the controls


@dataclass(frozen=True, config=STRICT)
class Judging:
    """How the cells of a recipe are evaluated whose concepts came from a suite.

    Attributes:
        preset: "smoke" (a trial), "no-draw" (without pictures), "quick", "standard" or "full": its probes, detectors
            and controls are those of ``erasure evaluate --preset``. None draws and judges the paired pictures alone.
        probes: keys, to run fewer than the preset has, or with larger samples
            (:func:`erasure.eval.probes.probes_of`).
    """

    preset: str | None = None
    probes: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Judging:
        from erasure.eval.probes import probes_of

        if self.preset is None and self.probes:
            raise ValueError(f"probes belong to a preset; got {shown(list(self.probes))}; add one, such as quick")
        if self.preset is not None:
            probes_of(self.preset, self.probes or None)
        return self


def judge(pipe: Any, edit: Erasure, cell: Cell, recipe: Recipe, judges: Callable[[Suite], Any]) -> dict[str, Any]:
    """What the evaluation of a cell says; its pictures, scores and report lie in the cell's folder.

    Args:
        judges: detectors for a suite, see :class:`erasure.eval.detectors.choice.Judges`.

    Returns:
        ``figures``, the rates by group and detector; ``answers``, the five verdicts; ``evidence``, the numbers about
        the weights and about the rest of the model.
    """
    from erasure.eval import write_report

    asked = recipe.evaluate
    assert cell.suite is not None and asked is not None  # the caller looked
    suite, arm, folder = cell.suite, cell.method.name.upper(), recipe.out / cell.key
    by = _plainly if asked.preset is None else _by_preset

    found = within_memory(lambda size: by(pipe, {arm: edit}, cell, recipe, judges(suite), size))
    found.save(folder)
    write_report(found, folder / "report.html", records=folder)
    (claim,) = found.claims()
    return {
        "figures": [dataclasses.asdict(row) for row in found.evaluation.rows() if row.arm == arm],
        "answers": {
            question: {"verdict": one.verdict, "word": one.word, "number": one.number, "sentence": one.sentence}
            for question, one in claim.answers.items()
        },
        "evidence": evidence_of(found, arm),
    }


def evidence_of(found: Any, arm: str) -> list[dict[str, Any]]:
    """The numbers of an assessment about one model's weights, and about what it does to the rest, as plain values."""
    return [_number(e) for e in found.evidence if e.model == arm and _is_wanted(e)]


def _plainly(pipe: Any, edits: Any, cell: Cell, recipe: Recipe, judges: Any, batch_size: int) -> Any:
    from erasure.eval import evaluate

    assert cell.suite is not None
    detectors, clip = judges
    return evaluate(
        pipe,
        edits,
        cell.suite,
        detectors=detectors,
        clip=clip,
        limit=recipe.limit,
        batch_size=batch_size,
        cache_dir=recipe.out / "cache",
        progress=False,
    )


def _by_preset(pipe: Any, edits: Any, cell: Cell, recipe: Recipe, judges: Any, batch_size: int) -> Any:
    """As `erasure evaluate --preset` does it. Probes of the base and the controls run once for all cells of a suite."""
    from erasure.eval import assess
    from erasure.eval.run.controls import controls_for, material_for

    assert cell.suite is not None and recipe.evaluate is not None and recipe.evaluate.preset is not None
    detectors, clip = judges
    with quiet():
        controls = controls_for(cell.suite, pipe, recipe.evaluate.preset)
    folder, shared = recipe.out / cell.key, recipe.out / SHARED / shared_name(cell)
    models = ["base", *(model.name for model in controls)]
    copy(shared, folder, models)
    try:
        return assess(
            pipe,
            edits,
            cell.suite,
            preset=recipe.evaluate.preset,
            detectors=detectors,
            controls=controls,
            clip=clip,
            material=material_for(cell.suite),
            probes=recipe.evaluate.probes or None,
            out=folder,
            cache_dir=recipe.out / "cache",
            batch_size=batch_size,
            progress=False,
        )
    finally:
        copy(folder, shared, models)


def shared_name(cell: Cell) -> str:
    """The folder of what the cells of one suite on one base share."""
    assert cell.suite is not None
    facts = [cell.content or cell.base, cell.dtype, dataclasses.asdict(cell.suite)]  # type: ignore[call-overload]
    return f"{folder_name(cell.suite.name, longest=60)}-{sha256_json(facts)[:8]}"


def copy(source: Path, target: Path, models: Sequence[str]) -> None:
    """Copy what probes saw of some models. An assessment takes a file only if all that it depends on is the same."""
    for file in _cells(source, models):
        there = target / file.relative_to(source)
        if not there.exists():
            write_atomically(there, file.read_bytes())


def _cells(folder: Path, models: Sequence[str]) -> Iterator[Path]:
    from erasure.eval.run.assessment import CELLS, slug

    names = {f"{slug(model)}.jsonl" for model in models}
    yield from (file for file in sorted((folder / CELLS).glob("*/*.jsonl")) if file.name in names)


def _is_wanted(e: Any) -> bool:
    """Numbers about the weights, against models that never saw the target, and about the kept groups."""
    from erasure.eval.probes import probe_class

    inside = e.measure in ("residual", "advantage") and probe_class(e.probe).section == "removal"
    kept = e.measure == "change" and e.probe in ("neighbours", "unrelated")
    return not e.family and (inside or kept)


def _number(e: Any) -> dict[str, Any]:
    value = {key: getattr(e.estimate, key) for key in ("value", "low", "high", "reason")}
    named = {"probe": e.probe, "measure": e.measure, "control": e.control, "detector": e.detector, "note": e.note}
    return {**named, **value, "conclusive": e.conclusive}


def within_memory(run: Callable[[int], Any], batch_size: int = 16) -> Any:
    """What ``run(batch_size)`` returns, with half as many at once each time the device has too little memory.

    Raises:
        torch.OutOfMemoryError: one at a time is too many.
    """
    import torch

    while True:
        try:
            return run(batch_size)
        except torch.OutOfMemoryError:
            if batch_size == 1:
                raise
            batch_size //= 2
        torch.cuda.empty_cache()  # outside of the handler, whose traceback holds tensors


__all__ = ["SHARED", "Judging", "copy", "evidence_of", "judge", "shared_name", "within_memory"]
