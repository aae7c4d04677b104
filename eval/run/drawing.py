"""The paired pictures: the same prompts and noise on the base and on each erasure, and what detectors see in them."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import itertools
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from erasure.artifact.base import base_name
from erasure.backbone import denoiser_of
from erasure.concept import Prompt, Suite
from erasure.eval.core.distances import OTHER_SEEDS, Distances
from erasure.eval.core.hashes import WeightHashes
from erasure.eval.core.lengths import refuse_cut
from erasure.eval.core.metrics import ClipFeatures
from erasure.eval.core.models import (
    IN_WEIGHTS,
    Applied,
    Model,
    Swapped,
    Wraps,
    check_base,
    check_beside,
    check_restored,
    check_unchanged,
    models_of,
)
from erasure.eval.core.pictures import evenly, generate, image_hash, limited
from erasure.eval.core.records import BASE, Arm, Distance, Evaluation, Picture, Record
from erasure.eval.core.surroundings import added, code_of, exchanged
from erasure.eval.core.tables import named_in
from erasure.eval.core.verdicts import verdicts_of
from erasure.eval.detectors.base import Detector
from erasure.eval.detectors.clip import ClipDetector
from erasure.io import is_whole, shown
from erasure.pictures import own_guidance
from erasure.runtime import autocast_for
from erasure.wording import folded, same

PACKAGES = (
    "diffusion-erasure", "torch", "diffusers", "transformers", "open_clip_torch", "torchmetrics", "numpy", "scipy",
)  # fmt: skip
GRID = {"target": 6, "neighbours": 10, "unrelated": 6}  # pictures kept per arm for the report
BESIDE = 3  # of what stands beside the weights that are named
NOTHING_DRAWN = "No picture was drawn: what the models draw, of the target and of anything else, was not assessed."


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What every arm of one evaluation shares.

    Attributes:
        prompts, seeds: what is drawn; every prompt with every seed.
        detectors, clip: of its pictures.
        options: of :func:`erasure.eval.core.pictures.generate`.
    """

    suite: Suite
    prompts: tuple[Prompt, ...]
    seeds: tuple[int, ...]
    detectors: tuple[Detector, ...]
    clip: ClipDetector | None
    options: Mapping[str, Any]

    def draw(
        self, pipe: Any, prompts: Sequence[Prompt], *, seeds: Sequence[int], description: str, **more: Any
    ) -> list[list[Image.Image]]:
        if not prompts:
            return []
        return generate(
            pipe,
            [prompt.text for prompt in prompts],
            seeds=seeds,
            num_inference_steps=self.suite.num_inference_steps,
            guidance_scale=self.suite.guidance_scale,
            description=description,
            **{**self.options, **more},
        )

    def check_restored(self, pipe: Any, before: str, name: str) -> None:
        check_restored(pipe, before, name, hash_weights=self.options["hash_weights"])


def options_of(
    pipe: Any,
    *,
    batch_size: int = 16,
    autocast: bool | None = None,
    cache_dir: str | Path | None = None,
    progress: bool = True,
    hash_weights: Callable[[Any], str] | None = None,
) -> dict[str, Any]:
    """How pictures are drawn; see :func:`erasure.eval.core.pictures.generate`."""
    return {
        "batch_size": batch_size, "autocast": autocast_for(pipe) if autocast is None else autocast,
        "cache_dir": cache_dir, "progress": progress, "hash_weights": hash_weights or WeightHashes(),
    }  # fmt: skip


class Drawn(NamedTuple):
    """One model of an evaluation: the arm, what was seen in its pictures, and notes for the reader."""

    arm: Arm
    records: list[Record]
    pictures: list[Picture]
    distances: list[Distance]
    notes: list[str]


def paired_pictures(
    pipe: Any,
    erasures: Mapping[str, Applied],
    suite: Suite,
    *,
    detectors: Sequence[Detector],
    controls: Sequence[Model] = (),
    clip: ClipDetector | None = None,
    extractors: Sequence[torch.nn.Module] | None = None,
    images_per_prompt: int | None = None,
    limit: int | None = None,
    wide: int | None = None,
    draw: bool = True,
    **options: Any,
) -> Evaluation:
    """The same prompts and noise drawn by the base, by every erasure and by every control, and what detectors see.

    Arguments are those of :func:`erasure.eval.evaluate`; without ``draw``, for content that must not be drawn, every
    change is applied once, hashed and removed.
    """
    if not isinstance(suite, Suite):
        raise ValueError(f"an evaluation needs a Suite; got {suite!r}; load it: Suite.load('superhero')")
    check_base(pipe)
    models = models_of(erasures, controls)
    check_request([model.name for model in models[1:]], detectors, images_per_prompt, limit, wide)
    started = time.monotonic()
    seeds = tuple(range(suite.pictures(wide=wide, images=images_per_prompt))) if draw else ()
    prompts = limited(suite.prompts(wide=wide, images=images_per_prompt), limit) if draw else ()
    job = Comparison(suite, prompts, seeds, tuple(detectors), clip if draw else None, options_of(pipe, **options))
    notes = [*refuse_cut(pipe, [p.text for p in prompts]), *_notes(pipe, job, limit)] if draw else [NOTHING_DRAWN]
    before = job.options["hash_weights"](pipe)
    for model in models[1:]:  # once, so that one that fails does so before hours of drawing
        with model.on(pipe):
            pass
        job.check_restored(pipe, before, model.name)
    drawn = _drawn(pipe, job, models, before, extractors)
    return Evaluation(
        suite=suite,
        arms=tuple(one.arm for one in drawn),
        detectors={detector.name: detector.card for detector in detectors},
        records=tuple(record for one in drawn for record in one.records),
        pictures=tuple(picture for one in drawn for picture in one.pictures),
        distances=tuple(distance for one in drawn for distance in one.distances),
        settings=_settings(pipe, job, before, limit=limit, seconds=time.monotonic() - started),
        warnings=(*notes, *(note for one in drawn for note in one.notes)),
    )


def _drawn(
    pipe: Any, job: Comparison, models: Sequence[Model], before: str, extractors: Sequence[torch.nn.Module] | None
) -> list[Drawn]:
    """Every model in turn; for the base also other seeds, where distances need them as their null."""
    if extractors is None:
        extractors = () if job.clip is None else (ClipFeatures(job.clip),)
    distances = Distances(extractors if job.prompts else (), job.prompts, job.seeds)
    other_seeds = [seed + OTHER_SEEDS for seed in job.seeds]
    asked = [job.prompts[i] for i in distances.wanted]
    rounds = len(models) + bool(asked)
    others = job.draw(pipe, asked, seeds=other_seeds, description=f"1 of {rounds}: {BASE}, other seeds")
    found = []
    for number, model in enumerate(models, 1 + bool(asked)):
        weights, beside, images = _draw(pipe, job, model, before, f"{number} of {rounds}: {model.name}")
        arm = Arm(model.name, weights, model.config, model.role, model.kind, beside)
        rows = records_of(model.name, job, images)
        far = distances.of(model.name, images, others if model.role == "base" else ())
        found.append(Drawn(arm, rows, grid_of(job, images, rows), list(far), _notes_about(model, weights, before, job)))
    return found


def _draw(
    pipe: Any, job: Comparison, model: Model, before: str, description: str
) -> tuple[str, tuple[str, ...], list[list[Image.Image]]]:
    """The hash of the weights of one arm, what stands beside them, and its pictures; the pipeline is restored."""
    code = code_of(pipe) if model.kind in IN_WEIGHTS else None
    with model.on(pipe) as drawn:
        opened = None if code is None else code_of(pipe)
        found = () if code is None or opened is None else tuple(added(code, opened)[:BESIDE])
        after = before if model.change is None else job.options["hash_weights"](pipe)
        # Pictures are cached by the hash of the weights, which an erasure beside the weights does not change.
        beside = after == before or found or isinstance(model.change, Wraps) or model.kind in ("filter", "adapter")
        uncached = {"cache_dir": None} if model.change is not None and beside else {}
        images = job.draw(drawn, job.prompts, seeds=job.seeds, description=description, **uncached)
        when = "after drawing than before"
        check_unchanged(pipe, after, model.name, when, hash_weights=job.options["hash_weights"])
        if opened is not None:
            check_beside(exchanged(opened, code_of(pipe)), (), model.name, when)
    if model.change is not None:
        job.check_restored(pipe, before, model.name)
    return after, found, images


def check_request(
    arms: Sequence[str],
    detectors: Sequence[Detector],
    images_per_prompt: int | None,
    limit: int | None,
    wide: int | None = None,
) -> None:
    if unnamed := [name for name in arms if not isinstance(name, str) or not name.strip()]:
        raise ValueError(f"every arm needs a name; got {shown(unnamed[0])}; give text that says which erasure it is")
    if not detectors:
        raise ValueError("an evaluation needs a detector; got none; pass at least one, better two independent ones")
    names = [detector.name for detector in detectors]
    if len(set(names)) < len(names):
        raise ValueError(f"two detectors share a name; got {names}; give each its own")
    if len(set(map(folded, arms))) < len(arms):
        raise ValueError(f"two arms share a name; got {list(arms)}; give each its own")
    if any(same(name, BASE) for name in arms):
        raise ValueError(f"{BASE!r} is the name of the unmodified pipeline; rename that erasure")
    for what, value in (("images_per_prompt", images_per_prompt), ("limit", limit), ("wide", wide)):
        if value is not None and not is_whole(value, 1):
            raise ValueError(
                f"{what} must be a whole number of at least 1; got {shown(value)}; leave it out for the "
                "suite's own number"
            )


def _notes(pipe: Any, job: Comparison, limit: int | None) -> list[str]:
    notes = []
    if limit is not None:
        notes.append(f"Limited to {limit} prompts per group: for testing only, not evidence.")
    base, wanted = base_name(pipe), job.suite.base
    if base.casefold() not in (wanted.casefold(), wanted.casefold().rpartition("/")[2]):
        notes.append(f"The suite {job.suite.name} was written for {wanted}; the pictures come from {base}.")
        if (usual := own_guidance(pipe)) != (guidance := job.suite.guidance_scale):
            notes.append(f"They are drawn at guidance {guidance:g}; without one, its pipeline draws at {usual:g}.")
    if getattr(pipe, "safety_checker", None) is not None:
        notes.append(
            "The pipeline's safety checker was on; it blacks out pictures, in the base and in every other arm."
        )
    for detector in job.detectors:
        card = detector.card
        if not card.sensitivity or not card.specificity:
            notes.append(
                f"{detector.name}: its sensitivity and specificity were not measured, so its errors are unknown."
            )
    return notes


def _notes_about(model: Model, weights: str, before: str, job: Comparison) -> list[str]:
    """Notes about one erasure: that it changed no weight, and which names its method was given."""
    if model.change is None:
        return []
    notes = []
    if weights == before:
        notes.append(f"{model.name} changed no stored weight; it acts beside them.")
    by_method = model.kind in ("weights", "adapter") and not isinstance(model.change, Swapped)
    return notes + ([_named_to(model.name, model.change, job.suite)] if by_method and model.role == "erased" else [])


def _named_to(name: str, erasure: Applied, suite: Suite) -> str:
    """Which prompts and names the method was given: erasing and keeping those is easier."""
    groups = {"neighbours": suite.neighbours, "unrelated things": suite.unrelated}
    keep = [*erasure.config.get("keep", ()), *erasure.config.get("keep_everyday", ())]
    counts = [f"{named_in(keep, names)} of {len(names)} {group}" for group, names in groups.items()]
    asked = {prompt.text for prompt in suite.prompts() if prompt.group == "target"}
    known = f"{len(asked & set(erasure.config.get('prompts', ())))} of the {len(asked)} target prompts"
    return f"{name} was made with {known}; its keep list has {' and '.join(counts)}."


def records_of(arm: str, job: Comparison, images: Sequence[Sequence[Image.Image]]) -> list[Record]:
    """What the detectors see in the pictures of one arm: a row for each prompt, a picture for each seed."""
    asked, pictures = list(itertools.product(job.prompts, job.seeds)), [image for row in images for image in row]
    labels, attribute = [prompt.label for prompt, _ in asked], job.suite.attribute
    verdicts = {detector.name: verdicts_of(detector, pictures, labels, attribute) for detector in job.detectors}
    cosines: list[float | None] = [None] * len(asked)
    hits: list[bool | None] = [None] * len(asked)
    if job.clip is not None:
        cosines = [float(c) for c in job.clip.cosines(pictures, [prompt.text for prompt, _ in asked])]
        known = verdicts[job.clip.name] if any(job.clip is detector for detector in job.detectors) else None
        hits = [v.hit for v in known or verdicts_of(job.clip, pictures, labels, attribute)]
    return [
        Record(
            arm=arm, prompt=p.text, group=p.group, label=p.label, seed=seed,
            verdicts={name: own[i] for name, own in verdicts.items()}, clip_cosine=cosines[i], clip_hit=hits[i],
            image_hash=image_hash(pictures[i]), template=p.template, phrase=p.phrase,
        )
        for i, (p, seed) in enumerate(asked)
    ]  # fmt: skip


def grid_of(job: Comparison, images: Sequence[Sequence[Image.Image]], records: Sequence[Record]) -> list[Picture]:
    """The pictures of the grid: the first seed of prompts that are chosen by their place in the suite."""
    chosen = []
    for group, count in GRID.items():
        members = [i for i, prompt in enumerate(job.prompts) if prompt.group == group]
        if group != "target":  # one per label, each with a different template where there are several
            by_label: dict[str, list[int]] = {}
            for i in members:
                by_label.setdefault(job.prompts[i].label, []).append(i)
            members = [indices[k % len(indices)] for k, indices in enumerate(by_label.values())]
        chosen += evenly(members, count)
    return [Picture.of(images[i][0], records[i * len(job.seeds)]) for i in chosen]


def _settings(pipe: Any, job: Comparison, weights: str, *, limit: int | None, seconds: float) -> dict[str, Any]:
    """All that is needed to repeat it."""
    scheduler = {k: v for k, v in dict(pipe.scheduler.config).items() if not k.startswith("_")}
    return {
        "base": base_name(pipe),
        "base_of_the_suite": job.suite.base,
        "base_weights": weights,
        "limit": limit,
        "pipeline": type(pipe).__name__,
        "dtype": str(denoiser_of(pipe).dtype).removeprefix("torch."),
        "autocast": bool(job.options["autocast"]),
        "scheduler": type(pipe.scheduler).__name__,
        "scheduler_config": scheduler,
        "num_inference_steps": job.suite.num_inference_steps,
        "guidance_scale": job.suite.guidance_scale,
        "seeds": list(job.seeds),
        "noise": "standard normal from a CPU generator keyed by (prompt, seed); the same in every arm",
        "prompts": len(job.prompts),
        "batch_size": job.options["batch_size"],
        "clip": job.clip.name if job.clip is not None else None,
        "versions": {name: _version(name) for name in PACKAGES} | {"python": platform.python_version()},
        "platform": f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads, {pipe.device}",
        "seconds": round(seconds, 1),
    }


def sampler_text(settings: Mapping[str, Any]) -> str:
    """The sampler in words: ``DDIM, 25 steps, guidance 3``; "" where it was not recorded."""
    if not {"scheduler", "num_inference_steps", "guidance_scale"} <= settings.keys():
        return ""
    name = str(settings["scheduler"]).removesuffix("Scheduler")
    return f"{name}, {settings['num_inference_steps']} steps, guidance {settings['guidance_scale']:g}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
