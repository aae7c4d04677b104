"""Is a model that was erased, mixed with fresh weights and distilled closer to a retrained one?

    python -m studies.undo train runs/undo             # an hour of one core; resumes
    python -m studies.undo measure runs/undo           # resumes; writes undo.json and prints the tables
    python -m studies.undo quick runs/undo             # pictures and one run of learning, in a folder of their own

With ``--target taxi`` it is about another target of Emoji World, with ``--share 0.8`` with more fresh weights, and with
``--models UCE UNDO`` of these models alone; each in a folder of its own.

``train`` writes pictures of Emoji World without the target, of the scenes that retrained models see, each with a
caption as the world's grammar makes it, and runs the method ``undo`` on them. ``measure`` compares the result with UCE,
which it began with, with two models retrained without the target and a twin retrained on everything: pictures of the
suite judged by both classifiers; how fast four pictures bring the target back, and, since a damaged model learns
everything slowly, how fast four pictures teach an emblem that none of them knows; completion, divergence and inversion.
The settings stand below, and were fixed before anything was measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor

import erasure
from erasure.captioned import METADATA
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
from erasure.world.scenes import render, sample_caption
from erasure.world.train import training_scenes

UNDO = "UNDO"
SHARE, ITERATIONS, PICTURES = 0.7, 2500, 16_384
SETTINGS = {"keep_steps": 5, "batch_size": 32, "lr": 1e-3, "schedule": "cosine", "precision": "auto"}
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


def train(out: Path, target: str, share: float, iterations: int) -> None:
    """Make the erasure, or go on making it."""
    folder = out / "pictures"
    if not (folder / METADATA).exists():
        draw(folder, PICTURES, without=target)
    pipe, suite = erasure.world.load(), Suite.load(target)
    pipe.set_progress_bar_config(disable=True)
    if pipe.device.type == "cpu":  # the backward pass of fused attention takes a third of a step on CPUs
        pipe.unet.set_attn_processor(AttnProcessor())
    edit = erasure.erase(
        pipe, suite.concepts, method="undo", keep=suite.kept, name="undo", images=str(folder), share=share,
        iterations=iterations, checkpoint=out / "training", apply=False, **SETTINGS,
    )  # fmt: skip
    edit.save_pretrained(out / "erasure")


def draw(folder: Path, count: int, *, without: str) -> None:
    """Write the first of the scenes that a retrained model sees, each with a caption; the caption is empty in some."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, lines = step_rng(0, 0, 13), list[str]()
    for i, scene in enumerate(training_scenes(frozenset({without}))[:count]):
        render(scene).save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": sample_caption(scene, rng)}))
    write_atomically(folder / METADATA, "\n".join(lines).encode() + b"\n")


def measure(out: Path, target: str, names: Sequence[str] = (), *, quick: bool = False) -> dict[str, Any]:
    """Every probe on every model, or on the named ones; what was measured before is read."""
    pipe, suite = erasure.world.load(), Suite.load(target)
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
    yield "| model | target seen | neighbours right | unrelated right |\n|---|---|---|---|"
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


def written(evidence: dict[str, Any] | None) -> str:
    """A number with its interval and the count it rests on."""
    estimate = (evidence or {}).get("estimate") or {}
    if estimate.get("value") is None:
        return ""
    low, high = (f"{x:.2f}" if x is not None else "open" for x in (estimate["low"], estimate["high"]))
    return f"{estimate['value']:.2f} ({low} to {high}, n = {estimate['n']})"


def main(command: str, out: Path, *, target: str, share: float, iterations: int, models: Sequence[str]) -> None:
    torch.set_num_threads(1)  # so that the same call gives the same bits
    if command == "train":
        train(out, target, share, iterations)
    else:
        print("\n".join(tables(measure(out, target, models, quick=command == "quick"))))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("train", "measure", "quick"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--target", default="superhero")
    parser.add_argument("--share", type=float, default=SHARE)
    parser.add_argument("--iterations", type=int, default=ITERATIONS)
    parser.add_argument("--models", nargs="+", default=[])
    main(**vars(parser.parse_args()))
