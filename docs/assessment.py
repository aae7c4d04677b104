"""The assessments that docs/findings.md shows: ten arms on Emoji World, every probe of a preset, the report.

    python docs/assessment.py quick runs/assessment
    python docs/assessment.py standard runs/standard direct paraphrase ...   # some probes; the report names the others
    python docs/assessment.py taxi runs/taxi   # another target: an edit and four retrained models, what C4 asks for

Erasures and every finished cell stay in the folder, so an interrupted run goes on. The report goes to docs/results/,
and beside it an archive of the records that it links to.
"""

from __future__ import annotations

import dataclasses
import sys
import zipfile
from pathlib import Path
from typing import Any

from figures import replace_block  # beside this file

import erasure
from erasure.batch.judging import evidence_of
from erasure.batch.lines import Line, inside_of, rest_of
from erasure.batch.pictures import still_inside
from erasure.eval import Assessment, assess, write_report
from erasure.eval.core.models import Model
from erasure.eval.judge import QUESTIONS, meta
from erasure.eval.run.assessment import Cell
from erasure.eval.run.controls import controls_for, held_out, material_for
from erasure.eval.worldkit import detectors
from erasure.eval.worldkit.controls import twin
from erasure.pipelines.guardrails import Guard
from erasure.world.retrain import FOLDER, TWIN
from studies.cheats import Declared, HiddenFilter

PAGE = Path(__file__).with_name("findings.md")
README = PAGE.parents[1] / "README.md"
RESULTS = PAGE.parent / "results"
INSIDE = PAGE.parent / "images" / "inside.png"
ON_README = ("UCE", "ESD", "prompt filter", "retrained")  # of the preset standard
METHODS = ("uce", "esd", "rece", "speed", "spm")
OTHER = "taxi"  # its twins know it well, so that every probe of removal has power
# What a claim of removal by measurement takes (C4), and what the model is like otherwise. With the samples of standard
# the intervals about a retrained model are wider than what is tolerated, whatever it left.
MEASURED = (
    *("direct", "neighbours", "unrelated", "degeneracy", "construction", "resurgence", "completion"),
    *("inversion:images_per_prompt=4", "noise:prompts=36", "base_encoder:prompts=36"),
    *("relearning:runs=8,prompts=18", "plasticity:runs=10"),
)
PICTURES = 6  # of each name in every sentence of the suite: 48 pictures of the target


def main(what: str, out: Path, *probes: str) -> None:
    target, preset = (OTHER, "standard") if what == OTHER else ("superhero", what)
    pipe, suite = erasure.world.load(), erasure.Suite.load(target)
    if what == OTHER:
        suite = dataclasses.replace(suite, images_per_prompt=PICTURES)
    pipe.set_progress_bar_config(disable=True)
    arms, controls = (few if what == OTHER else many)(pipe, suite, controls_for(suite, pipe, preset), out / "erasures")
    found = assess(
        pipe,
        arms,
        suite,
        preset=preset,
        detectors=detectors.detectors(),
        controls=controls,
        clip=detectors.clip(),
        material=material_for(suite),
        probes=probes or (MEASURED if what == OTHER else None),
        out=out,
    )
    publish(found, out)


def few(pipe: Any, suite: erasure.Suite, controls: list[Model], folder: Path) -> tuple[dict[str, Any], list[Model]]:
    """UCE and every retrained model, each held against the others, and all controls."""
    retrained = (model for model in controls if model.role == "gold")
    return {
        "UCE": made(pipe, suite, "uce", folder / "uce"),
        **{model.name.replace("gold", "retrained"): model.change for model in retrained},
    }, controls


def many(pipe: Any, suite: erasure.Suite, controls: list[Model], folder: Path) -> tuple[dict[str, Any], list[Model]]:
    """Five methods, a filter, a retrained model, a twin and two cheats, and the controls without that twin."""
    arms: dict[str, Any] = {name.upper(): made(pipe, suite, name, folder / name) for name in METHODS}
    arms["prompt filter"] = Guard.of_words(suite.phrases)
    if sum(model.role == "gold" for model in controls) > 1:
        arms["retrained"] = held_out(controls)
    if twins := sorted(FOLDER.glob(f"{TWIN}-[0-9]*.safetensors")):
        judged = twin(twins[-1], pipe.device, pipe.unet.dtype)
        arms["twin"] = judged.change
        controls = [model for model in controls if model.name != judged.name]
    arms["hidden filter"] = HiddenFilter(detectors.classifier("b"), suite.concept.name, "a wizard on a blue background")
    arms["declared retrained"] = Declared(arms["UCE"], "declared retrained")
    return arms, controls


def publish(found: Assessment, out: Path) -> None:
    """The report, everything it was made from in one archive beside it, and the tables of the page."""
    target = found.evaluation.suite.name
    name = f"{target}-{found.preset}"
    archive(found, out, RESULTS / f"{name}.zip")
    title = f"{target.capitalize()}, preset {found.preset}"
    write_report(found, RESULTS / f"{name}.html", title=title, records=f"{name}.zip")
    PAGE.write_text(with_tables(PAGE.read_text("utf-8"), found), "utf-8")
    if name == "superhero-standard":
        still_inside([line(found, method) for method in METHODS], INSIDE)
        README.write_text(replace_block(README.read_text("utf-8"), "verdicts", verdicts(found)), "utf-8")


def line(found: Assessment, method: str) -> Line:
    """What one method left in the weights, and what it did to the rest of the model."""
    numbers = evidence_of(found, method.upper())
    return Line(method, found.evaluation.suite.name, inside=inside_of(numbers), rest=rest_of(numbers))


def with_tables(page: str, found: Assessment) -> str:
    """The page with the tables of one assessment made anew."""
    if found.evaluation.suite.name == OTHER:
        return replace_block(page, OTHER, table(found))
    shown = meta.table(meta.faithfulness(*meta.trials(found)))
    return replace_block(replace_block(page, found.preset, table(found)), f"{found.preset} meta", shown)


def made(pipe: Any, suite: erasure.Suite, method: str, folder: Path) -> erasure.Erasure:
    """The erasure in ``folder``, made now if there is none."""
    if not folder.exists():
        edit = erasure.erase(pipe, suite.concepts, method, keep=suite.kept, apply=False, name=method.upper())
        edit.save_pretrained(folder)
    return erasure.Erasure.from_pretrained(folder)


def archive(found: Assessment, out: Path, file: Path) -> None:
    """What an assessment is loaded from, with every record behind its numbers; equal contents give equal bytes."""
    whole = [out / "assessment.json", out / "evaluation.json", out / "records.jsonl"]
    with zipfile.ZipFile(file, "w") as made:
        for one in [*whole, *(Cell.file(out, cell.probe, cell.model) for cell in found.cells)]:
            made.writestr(zipfile.ZipInfo(str(one.relative_to(out))), one.read_bytes(), zipfile.ZIP_DEFLATED)


def cell(answer: Any) -> str:
    return f"{answer.word}, {answer.number}" if answer.number else answer.word


def verdicts(found: Assessment) -> str:
    """The README's table: the five answers about some of the models."""
    headings = " | ".join(question.heading for question in QUESTIONS.values())
    lines = [f"| | {headings} |", f"|---|{'---|' * len(QUESTIONS)}"]
    answers = {claim.model: claim.answers.values() for claim in found.claims()}
    for model in ON_README:
        lines.append(f"| {' | '.join([model, *map(cell, answers[model])])} |")
    return "\n".join(lines)


def table(found: Assessment) -> str:
    """The five answers about each model, with their numbers, and the levels."""
    rates = {e.model: e.estimate for e in found.evidence if (e.probe, e.measure, e.family) == ("direct", "rate", "")}
    headings = " | ".join(question.heading for question in QUESTIONS.values())
    lines = [f"| model | {headings} | levels |", f"|---|{'---|' * len(QUESTIONS)}---|"]
    for model, role in found.roles.items():
        if role != "erased" and model in rates and model not in found.same_as.values():
            what = "the base" if role == "base" else f"{model} (control)"
            lines.append(f"| {what} | target in {rates[model]} | | | | | |")
    for claim in found.claims():
        cells = " | ".join(map(cell, claim.answers.values()))
        removal = claim.removal if claim.removal.startswith("C") else "not by construction"
        lines.append(f"| {claim.model} | {cells} | {claim.suppression}, {removal} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
