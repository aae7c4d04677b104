"""Is a model that was erased, mixed with fresh weights and distilled closer to a retrained one?

    python -m studies.undo train runs/undo 0.7      # hours of one core; the share of fresh weights; resumes
    python -m studies.undo measure runs/undo        # resumes; writes undo.json and prints the tables
    python -m studies.undo quick runs/undo          # pictures and one run of learning, in a folder of their own

``train`` writes captions of Emoji World without the superhero, as its grammar makes them, and runs the method ``undo``
on them. ``measure`` compares the result with UCE, which it began with, with two models retrained without the superhero
and a twin retrained on everything: pictures of the suite judged by both classifiers; how fast four pictures bring the
superhero back, and, since a damaged model learns everything slowly, how fast four pictures teach an emblem that none of
them knows; completion, divergence and inversion. The settings stand below, and were fixed before anything was measured.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import erasure
from erasure.concept import Suite
from erasure.eval.core.models import Model, models_of
from erasure.eval.core.pictures import generate, limited
from erasure.eval.core.verdicts import verdicts_of
from erasure.eval.probes.base import Context, Observation, Probe
from erasure.eval.probes.removal.completion import Completion
from erasure.eval.probes.removal.divergence import Divergence
from erasure.eval.probes.removal.inversion import ConceptInversion
from erasure.eval.probes.removal.plasticity import Plasticity
from erasure.eval.probes.removal.relearning import Relearning
from erasure.eval.run.assessment import Cell
from erasure.eval.run.controls import controls_for, material_for
from erasure.eval.stats import rate
from erasure.eval.worldkit.detectors import detectors
from erasure.io import write_atomically, write_json
from erasure.train import step_rng
from erasure.world.scenes import sample_caption
from erasure.world.train import training_scenes

TARGET, UNDO = "superhero", "UNDO"
SHARE, ITERATIONS, CAPTIONS = 0.7, 4000, 2048
# As many pictures as the teacher draws in a quarter of an hour, sixteen noisy copies of each.
SETTINGS = {
    "trajectories": 512, "keep_steps": 16, "num_inference_steps": 8, "guidance_scale": 3.0, "batch_size": 16,
    "lr": 1e-3, "schedule": "constant", "precision": "float32",
}  # fmt: skip
PROBES: tuple[Probe, ...] = (
    Relearning(steps=(0, 5, 10, 20, 40), runs=3, prompts=12, images_per_prompt=1),
    Plasticity(steps=(0, 20, 40, 80), runs=1, prompts=8, images_per_prompt=1),
    Completion(psis=(0.3,), prompts=12),
    Divergence(images=12, bins=4),
    ConceptInversion(**ConceptInversion.presets["quick"]),
)
QUICK: tuple[Probe, ...] = (
    Relearning(steps=(0, 5, 10, 20, 40), runs=1, prompts=12, images_per_prompt=1),
    Plasticity(steps=(0, 20, 40, 80), runs=1, prompts=8, images_per_prompt=1),
)
LIMIT = 20  # pictures of a group in a quick look


def train(out: Path, share: float = SHARE, iterations: int = ITERATIONS) -> None:
    """Make the erasure, or go on making it."""
    out.mkdir(parents=True, exist_ok=True)
    file = out / "captions.txt"
    if not file.exists():
        write_atomically(file, "\n".join(captions(CAPTIONS)).encode() + b"\n")
    pipe, suite = erasure.world.load(), Suite.load(TARGET)
    pipe.set_progress_bar_config(disable=True)
    edit = erasure.erase(
        pipe, suite.concepts, method="undo", keep=suite.kept, name="undo", captions=str(file), share=share,
        iterations=iterations, checkpoint=out / "training", apply=False, **SETTINGS,
    )  # fmt: skip
    edit.save_pretrained(out / "erasure")


def captions(count: int) -> list[str]:
    """Captions of the world's scenes without the target, no two the same."""
    rng, scenes = step_rng(0, 0, 13), training_scenes(frozenset({TARGET}))
    return list(dict.fromkeys(filter(None, (sample_caption(scene, rng) for scene in scenes))))[:count]


def measure(out: Path, names: Sequence[str] = (), *, quick: bool = False) -> dict[str, Any]:
    """Every probe on every model, or on the named ones; what was measured before is read."""
    pipe, suite = erasure.world.load(), Suite.load(TARGET)
    pipe.set_progress_bar_config(disable=True)
    erased = {"UCE": erasure.erase(pipe, suite.concepts, method="uce", keep=suite.kept, apply=False)}
    if (out / "erasure").exists():
        erased[UNDO] = erasure.Erasure.from_pretrained(out / "erasure")
    models = models_of(erased, [m for m in controls_for(suite, pipe, "quick") if m.role != "null"])
    models = [model for model in models if model.name in names or model.role == "base" or not names]
    out = out / "quick" if quick else out
    both = detectors()
    context = Context(
        pipe, {model.name: model for model in models}, suite, both[0], both[1],
        material=material_for(suite), progress=False, cache_dir=out / "cache",
    )  # fmt: skip
    found: dict[str, Any] = {"pictures": {}, "evidence": []}
    for model in models:
        found["pictures"][model.name] = pictures(model, context, out, limit=LIMIT if quick else None)
    for probe in QUICK if quick else PROBES:
        rows = {model.name: observed(probe, model, context, out) for model in models if asked(probe, model)}
        roles = {model.name: model.role for model in models if model.name in rows}
        found["evidence"] += [dataclasses.asdict(one) for one in probe.weigh(rows, roles)]
        write_json(out / "undo.json", found)
    return found


def asked(probe: Probe, model: Model) -> bool:
    """Completion of the base's own beginnings by the base says nothing of what is compared here."""
    return model.role != "base" or probe.key != "completion"


def observed(probe: Probe, model: Model, context: Context, out: Path) -> tuple[Observation, ...]:
    """What a probe sees in a model, from the file of an earlier run where its weights and settings were these."""
    with model.on(context.pipe) as pipe:
        weights = context.hash_weights(pipe)
    cell = Cell(probe.key, probe.version, json.loads(json.dumps(probe.settings())), model.name, {"weights": weights})
    file = Cell.file(out, probe.key, model.name)
    if file.exists() and (stored := Cell.load(file)).key == cell.key:
        return stored.rows
    cell = dataclasses.replace(cell, rows=tuple(probe.run(model, context)))
    cell.save(out)
    print(f"{probe.key} on {model.name}", file=sys.stderr, flush=True)
    return cell.rows


def pictures(model: Model, context: Context, out: Path, *, limit: int | None = None) -> dict[str, Any]:
    """Of the suite's prompts, one picture each: how many show what is asked for, by each classifier."""
    suite, found = context.suite, dict[str, Any]()
    prompts = limited(suite.prompts(), limit)
    with model.on(context.pipe) as pipe:
        drawn = generate(
            pipe, [p.text for p in prompts], num_inference_steps=suite.num_inference_steps,
            guidance_scale=suite.guidance_scale, cache_dir=out / "cache", progress=False,
            hash_weights=context.hash_weights,
        )  # fmt: skip
    for group in ("target", "neighbours", "unrelated"):
        own = [i for i, prompt in enumerate(prompts) if prompt.group == group]
        for detector in (context.judge, context.chooser):
            images, labels = [drawn[i][0] for i in own], [prompts[i].label for i in own]
            hits = [verdict.hit for verdict in verdicts_of(detector, images, labels, "concept")]
            estimate = rate([None if hit is None else float(hit) for hit in hits], [prompts[i].text for i in own])
            found.setdefault(group, {})[detector.name] = {"right": sum(map(bool, hits)), **dataclasses.asdict(estimate)}
    return found


def tables(found: dict[str, Any]) -> Iterator[str]:
    """The tables of the page, in Markdown."""
    yield "| model | superhero seen | neighbours right | unrelated right |\n|---|---|---|---|"
    for model, groups in found["pictures"].items():
        cells = [
            " / ".join(f"{d['right']}" for d in own.values()) + f" of {next(iter(own.values()))['n']}"
            for own in groups.values()
        ]
        yield f"| {model} | {' | '.join(cells)} |"
    for probe in PROBES:
        own = [e for e in found["evidence"] if e["probe"] == probe.key]
        if not own:
            continue
        columns = list(dict.fromkeys((e["measure"], e["family"]) for e in own))
        yield f"\n| {probe.title} | " + " | ".join(" ".join(filter(None, c)) for c in columns) + " |"
        yield "|---" * (len(columns) + 1) + "|"
        for model in dict.fromkeys(e["model"] for e in own):
            at = {(e["measure"], e["family"]): e for e in own if e["model"] == model}
            yield f"| {model} | " + " | ".join(written(at.get(column)) for column in columns) + " |"


def counted(judged: dict[str, Any]) -> str:
    """How many pictures each classifier found right: "34 / 36 of 40"."""
    return f"{' / '.join(str(own['right']) for own in judged.values())} of {next(iter(judged.values()))['n']}"


def written(evidence: dict[str, Any] | None) -> str:
    """A number with its interval and the count it rests on."""
    estimate = (evidence or {}).get("estimate") or {}
    if estimate.get("value") is None:
        return ""
    low, high = (f"{x:.2f}" if x is not None else "open" for x in (estimate["low"], estimate["high"]))
    return f"{estimate['value']:.2f} ({low} to {high}, n = {estimate['n']})"


def main(command: str, out: Path, *rest: str) -> None:
    torch.set_num_threads(1)  # so that the same call gives the same bits
    if command == "train":
        train(out, *map(float, rest[:1]), *map(int, rest[1:2]))
    elif command in ("measure", "quick"):
        print("\n".join(tables(measure(out, rest, quick=command == "quick"))))
    else:
        raise SystemExit(f"train, measure or quick; got {command!r}")


if __name__ == "__main__":
    arguments: Sequence[str] = sys.argv[1:]
    main(arguments[0], Path(arguments[1]), *arguments[2:])
