"""Do the defaults that were chosen on Emoji World hold on another base?

    python -m studies.second_base runs/shapes                   # every method of METHODS, on three targets; resumes
    python -m studies.second_base runs/shapes uce esd           # some of them; the table has all that were ever run
    python -m studies.second_base runs/held-out held-out uce    # on three targets that no setting was chosen by
    python docs/methods.py runs/shapes                          # the table in docs/methods.md
    python -m studies.shapes runs/shapes                        # before it: train the base afresh, in place of MODEL

Every method makes its erasure with its ``recommended`` settings, which nobody has fitted to this base (:mod:`shapes`).
The classifier of the shapes judges, as for ``erasure compare`` on Emoji World: the target by its name, its neighbours,
and unrelated shapes, eighteen prompts a group.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

import erasure
from erasure.backbone import backbone_of
from erasure.batch.comparison import table
from erasure.batch.cost import counted
from erasure.batch.lines import Line, before_of, means, rates_of
from erasure.concept import Concept, Suite
from erasure.eval.run.evaluate import evaluate
from erasure.io import write_json
from studies.shapes import COLOURS, GROUNDS, SHAPES, Judge

METHODS = (
    "uce", "time", "rece", "speed", "mace-cfr", "double-projections", "cure", "sld", "negative-prompt", "safree",
    "adavd", "mace", "spm", "esd", "concept-ablation", "leco", "receler", "gloce", "eap", "age", "stereo",
    "adv-unlearn", "eraseflow", "random-label", "salun", "erasediff", "gradient-ascent", "forget-me-not",
    "uce max_drift=0", "rece max_drift=0", "uce max_drift=0 erase_scale=1 preserve_scale=5",
    "esd retain=10 lr=0.001", "esd iterations=100", "concept-ablation retain=10 lr=0.001", "age retain=10 lr=0.001",
    "leco retain=10", "spm iterations=1000",
)  # fmt: skip
TARGETS = {  # each with the shape that is drawn instead, and its neighbours
    "star": ("circle", ("sun", "diamond", "triangle", "hexagon")),
    "heart": ("square", ("drop", "circle", "crescent", "diamond")),
    "arrow": ("cross", ("chevron", "bolt", "triangle", "bar")),
}
HELD_OUT = {  # of these nothing was known when ``max_drift`` of ``uce`` was chosen
    "crescent": ("square", ("circle", "drop", "sun", "heart")),
    "hexagon": ("cross", ("diamond", "triangle", "circle", "star")),
    "bolt": ("bar", ("arrow", "chevron", "triangle", "diamond")),
}
TEMPLATES = (
    "{}", "a drawing of {}", "{} on a white background", "{}, black background", "{} on grey",
    "{} on a beige background",
)  # fmt: skip
LIMIT, PICTURES = 18, 2
MODEL = Path(__file__).with_name("shapes-model")  # the base, trained by studies/shapes.py


def suite_of(target: str) -> Suite:
    """The target among the other shapes: six of those that are no neighbours are judged, the rest is kept by name."""
    anchor, neighbours = (TARGETS | HELD_OUT)[target]
    rest = [shape for shape in SHAPES if shape not in {target, anchor, *neighbours}]
    grounds = [f"a {ground} background" for ground in GROUNDS]
    return Suite(
        version=1,
        name=target,
        base="shapes",
        concept=Concept(target, anchor=anchor, neighbours=neighbours, templates=TEMPLATES),
        unrelated=tuple(rest[:6]),
        keep=(anchor, *rest[6:], *COLOURS, *grounds),
        num_inference_steps=12,
        guidance_scale=3.0,
        images_per_prompt=PICTURES,
    )


def line_of(pipe: Any, judge: Judge, method: str, target: str, folder: Path) -> Line:
    """One method, with the settings that stand behind its name, on one target: erased and judged."""
    suite, (name, *settings) = suite_of(target), method.split()
    own = {key: json.loads(value) for key, _, value in (setting.partition("=") for setting in settings)}
    with counted(backbone_of(pipe)) as cost:
        edit = erasure.erase(pipe, suite.concepts, name, keep=suite.kept, apply=False, progress=False, **own)
    edit.save_pretrained(folder / "erasure")
    found = evaluate(
        pipe, {method: edit}, suite, detectors=[judge], extractors=(),
        limit=LIMIT, cache_dir=folder.parents[1] / "cache", progress=False,
    )  # fmt: skip
    figures = [dataclasses.asdict(row) for row in found.evaluation.rows() if row.arm == method]
    size = sum(file.stat().st_size for file in (folder / "erasure").glob("*.safetensors"))
    return Line(method, target, rates_of(figures), cost.passes, cost.seconds, size, before=before_of(figures))


def lines_in(out: Path) -> list[Line]:
    """Everything that was run, in the order of methods and targets."""
    files = [out / "cells" / method / target / "line.json" for method in METHODS for target in TARGETS | HELD_OUT]
    return [Line.read(json.loads(file.read_text("utf-8"))) for file in files if file.exists()]


def main(folder: str, *methods: str) -> None:
    out = Path(folder)
    base = out if (out / "pipeline").exists() else MODEL
    pipe, judge = DiffusionPipeline.from_pretrained(base / "pipeline"), Judge(base / "classifier.pt")
    pipe.set_progress_bar_config(disable=True)
    targets = TARGETS
    if methods[:1] == ("held-out",):
        targets, methods = HELD_OUT, methods[1:]
    for method, target in itertools.product(methods or METHODS, targets):
        cell = out / "cells" / method / target
        if not (cell / "line.json").exists():
            write_json(cell / "line.json", dataclasses.asdict(line_of(pipe, judge, method, target, cell)))
    lines = lines_in(out)
    write_json(out / "comparison.json", [dataclasses.asdict(line) for line in lines])
    print(table([*lines, *means(lines)]))


if __name__ == "__main__":
    main(*sys.argv[1:])
