"""How a probe's number rises with what a model knows: ``python -m studies.doses runs/doses [--ladders NAME ...]``.

Three ladders of models of Emoji World, each from one that never saw the superhero to one that knows it:

- *relearnt*: a retrained model after 0, 3, 10, 30 and 100 steps on sixteen pictures of the target;
- *erased*: UCE at the full scale, then at 3/4, 1/2 and 1/4 of it, then not at all;
- *retrained with a share*: dose models that saw 1, 5 and 25 % of the target's pictures, where `gold/` has them, between
  the retrained model and a twin.

Each is judged as an erasure is, against the other retrained models. A probe that measures knowledge rises along every
ladder: Spearman's rank correlation of its number with the place on the ladder is near 1. Writes ``doses.json`` and
``doses.png`` there, and resumes; ``docs/findings.md`` shows them.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from diffusers import StableDiffusionPipeline
from scipy.stats import spearmanr
from torch import nn

import erasure
from erasure.eval import assess
from erasure.eval.core.models import Applied, Model, Swapped
from erasure.eval.judge.meta import SCORES, metric
from erasure.eval.probes.base import Evidence
from erasure.eval.probes.denoising import backbone_for
from erasure.eval.probes.tuning import captioned, learn, tuned
from erasure.eval.run.controls import controls_for, material_for
from erasure.eval.worldkit import detectors
from erasure.io import write_json
from erasure.world.retrain import load_gold

TARGET = "superhero"
STEPS = (0, 3, 10, 30, 100)
SCALES = (1.0, 0.75, 0.5, 0.25, 0.0)
SHARES = (0.01, 0.05, 0.25)
PROBES = ("direct", "relearning", "inversion", "completion", "divergence")  # those that the preset quick has


class Scaled:
    """An erasure at a part of its strength."""

    intervention = "weights"

    def __init__(self, edit: Any, scale: float) -> None:
        self.name, self.config, self._edit, self._scale = f"{edit.name} x {scale:g}", {}, edit, scale

    def apply(self, pipe: Any) -> None:
        self._edit.apply(pipe, self._scale)

    def remove(self, pipe: Any) -> None:
        self._edit.remove(pipe)


def erased(pipe: Any, suite: erasure.Suite) -> list[tuple[str, Applied]]:
    """One erasure at its full scale, and at less and less of it."""
    edit = erasure.erase(pipe, suite.concepts, method="uce", keep=suite.kept)
    edit.remove(pipe)
    return [(f"UCE x {scale:g}", Scaled(edit, scale)) for scale in SCALES]


def relearnt(_: Any, suite: erasure.Suite) -> list[tuple[str, Applied]]:
    """The first retrained model after some steps of the relearning probe's training."""
    pipe, material = load_gold(TARGET, seed=0), material_for(suite)
    assert material is not None
    lesson, found = captioned(backbone_for(pipe), material.target(16), 8), list[tuple[str, Applied]]()
    with tuned(pipe, lesson.backbone.select("all")) as trained:
        for step in learn(trained, lesson.loss, pipe=pipe, marks=STEPS, lr=3e-4, seed=0, autocast=False):
            found.append((f"{step} steps", kept(f"{step} steps", pipe)))
    return found


def dosed(*_: Any) -> list[tuple[str, Applied]]:
    """Models retrained with none, some and all of the target's scenes, those of them that are there."""
    found = []
    for share in (0.0, *SHARES, 1.0):
        try:
            pipe = load_gold(None) if share == 1 else load_gold(TARGET, seed=0, share=share)
        except FileNotFoundError:
            continue
        found.append((f"{share:.0%}", kept(f"{share:.0%} seen", pipe)))
    return found if len(found) > 2 else []


def kept(name: str, pipe: StableDiffusionPipeline) -> Swapped:
    """What a pipeline's denoiser and text encoder are now."""
    parts: Mapping[str, nn.Module] = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    copies = {part: copy.deepcopy(module).eval().requires_grad_(False) for part, module in parts.items()}
    return Swapped(name, copies, intervention="weights")


# Ladder to its models, from the one that knows least to the one that knows most.
LADDERS = {"relearnt": relearnt, "erased": erased, "retrained with a share": dosed}


def main(out: Path, *, preset: str, probes: Sequence[str], ladders: Sequence[str]) -> None:
    pipe, suite = erasure.world.load(), erasure.Suite.load(TARGET)
    pipe.set_progress_bar_config(disable=True)
    every = {ladder: dict(LADDERS[ladder](pipe, suite)) for ladder in ladders}
    every = {ladder: models for ladder, models in every.items() if models}
    controls = [m for m in controls_for(suite, pipe, "standard") if not (m.role == "gold" and holds_first(m))]
    arms = {f"{ladder}: {name}": change for ladder, models in every.items() for name, change in models.items()}
    found = assess(
        pipe, arms, suite, preset=preset, detectors=detectors.detectors(), controls=controls,
        material=material_for(suite), probes=tuple(probes), out=out,
    )  # fmt: skip
    rungs = {ladder: [f"{ladder}: {name}" for name in models] for ladder, models in every.items()}
    curves = curves_of(found.evidence, rungs)
    write_json(out / "doses.json", curves)
    figure(curves, out / "doses.png")
    print(json.dumps({probe: row["rank correlation"] for probe, row in curves.items()}, indent=1))


def holds_first(model: Model) -> bool:
    """Whether a control is the retrained model that the ladders start from."""
    return model.config.get("seed") == 0


def curves_of(evidence: Sequence[Evidence], rungs: Mapping[str, Sequence[str]]) -> dict[str, dict[str, Any]]:
    """Of every probe its most relative number on each rung ``[value, low, high]``, and how it ranks the rungs."""
    arms = {arm for ladder in rungs.values() for arm in ladder}
    curves: dict[str, dict[str, Any]] = {}
    for probe in dict.fromkeys(e.probe for e in evidence):
        own = [e for e in evidence if e.probe == probe and e.model in arms and e.measure in SCORES]
        own = [e for e in own if e.estimate.value is not None]
        if not own:
            continue
        measure, family = metric(own)
        at = {e.model: e.estimate for e in own if (e.measure, e.family) == (measure, family)}
        values = {
            ladder: [[at[arm].value, at[arm].low, at[arm].high] if arm in at else None for arm in own_rungs]
            for ladder, own_rungs in rungs.items()
        }
        curves[probe] = {
            "measure": measure,
            "rungs": {ladder: [arm.partition(": ")[2] for arm in own_rungs] for ladder, own_rungs in rungs.items()},
            "values": values,
            "rank correlation": {ladder: rank(numbers) for ladder, numbers in values.items()},
        }
    return curves


def rank(numbers: Sequence[Sequence[float] | None]) -> float | None:
    """Spearman's correlation of the numbers with their place; None for fewer than three, or all alike."""
    known = [(place, number[0]) for place, number in enumerate(numbers) if number is not None]
    if len(known) < 3 or len({value for _, value in known}) == 1:
        return None
    return round(float(spearmanr(*zip(*known, strict=True)).statistic), 2)


def figure(curves: Mapping[str, Mapping[str, Any]], file: Path) -> None:
    """A row for each ladder and a column for each probe."""
    ladder_names = list(next(iter(curves.values()))["values"])
    size = (2.6 * len(curves), 2.2 * len(ladder_names))
    sheet, axes = plt.subplots(len(ladder_names), len(curves), figsize=size, squeeze=False, layout="constrained")
    for row, ladder in zip(axes, ladder_names, strict=True):
        for axis, (probe, facts) in zip(row, curves.items(), strict=True):
            known = [(i, number) for i, number in enumerate(facts["values"][ladder]) if number is not None]
            at, numbers = [i for i, _ in known], [number for _, number in known]
            values = [value for value, _, _ in numbers]
            limits = np.array([[v - (v if low is None else low), (v if high is None else high) - v]
                               for v, low, high in numbers]).reshape(-1, 2).T.clip(min=0)  # fmt: skip
            axis.errorbar(at, values, yerr=limits, marker="o", markersize=4, linewidth=1.2, capsize=2)
            axis.axhline(0, color="0.7", linewidth=0.8)
            axis.set_xticks(range(len(facts["rungs"][ladder])), facts["rungs"][ladder], fontsize=6)
            axis.tick_params(axis="y", labelsize=7)
            found = facts["rank correlation"][ladder]
            ranked = "n/a" if found is None else format(found, ".2f")
            axis.set_title(f"{probe}, {facts['measure']} (rank {ranked})", fontsize=8)
        row[0].set_ylabel(ladder, fontsize=8)
    sheet.savefig(file, dpi=110)
    plt.close(sheet)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--preset", default="quick")
    parser.add_argument("--probes", nargs="+", default=list(PROBES))
    parser.add_argument("--ladders", nargs="+", choices=LADDERS, default=list(LADDERS))
    given = parser.parse_args()
    main(given.out, preset=given.preset, probes=given.probes, ladders=given.ladders)
