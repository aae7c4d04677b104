"""The assessment: every probe of a preset on every model, one cell at a time; each is stored at once."""

from __future__ import annotations

import collections
import copy
import dataclasses
import json
import os
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from erasure.backbone.text import TooLong
from erasure.concept import WIDE, Suite
from erasure.eval.core.audit import judged
from erasure.eval.core.hashes import WeightHashes
from erasure.eval.core.material import Material
from erasure.eval.core.models import (
    IN_WEIGHTS,
    Applied,
    Model,
    Swapped,
    Unfaithful,
    check_base,
    check_restored,
    denoisers_of,
    models_of,
    modules_of,
)
from erasure.eval.core.prompt_files import PromptFile
from erasure.eval.core.records import fingerprint
from erasure.eval.core.surroundings import differences, state_of
from erasure.eval.detectors.base import Detector
from erasure.eval.detectors.clip import ClipDetector
from erasure.eval.judge.policy import Policy
from erasure.eval.probes import probe_class, probes_of
from erasure.eval.probes.attacking import Attack
from erasure.eval.probes.base import FAILED, Context, Missing, Probe, lacking
from erasure.eval.probes.denoising import denoiser_for, predictions
from erasure.eval.probes.success import found_by
from erasure.eval.run.assessment import Assessment, Cell, ModelCard
from erasure.eval.run.drawing import options_of, paired_pictures, sampler_text
from erasure.io import sha256, tensor_bytes

# Sizes of the paired pictures: seeds per prompt, prompts per group, and sentences. From `standard` on there are more
# sentences in place of more seeds: an interval is about sentences.
PICTURES: dict[str, dict[str, Any]] = {
    "smoke": {"images_per_prompt": 1, "limit": 2},
    "no-draw": {"draw": False},
    "quick": {"images_per_prompt": 1, "limit": None, "wide": WIDE},
    "standard": {"images_per_prompt": None, "limit": None, "wide": WIDE},
    "full": {"images_per_prompt": 4, "limit": None, "wide": WIDE},
}

COPIES = 0.1  # of their distance from the base; models retrained apart on Emoji World: 0.6 and more, predictions 0.48
NEAR = 0.02  # of the base's own size; models retrained on Emoji World are 0.27 and more from it, predictions 0.18


def assess(
    pipe: Any,
    erasures: Mapping[str, Applied],
    suite: Suite,
    *,
    preset: str = "quick",
    detectors: Sequence[Detector],
    controls: Sequence[Model] = (),
    clip: ClipDetector | None = None,
    extractors: Sequence[torch.nn.Module] | None = None,
    material: Material | None = None,
    prompt_files: Mapping[str, PromptFile] | None = None,
    policy: Policy | None = None,
    probes: Sequence[str] | None = None,
    out: str | os.PathLike[str] | None = None,
    cache_dir: str | Path | None = None,
    batch_size: int = 16,
    autocast: bool | None = None,
    progress: bool = True,
) -> Assessment:
    """Run every probe of a preset on a pipeline, its erasures and its controls.

    Args:
        pipe: the unmodified pipeline; it is returned unmodified.
        erasures: name to change: erasures, filters, other models.
        suite: the target, its neighbours, prompts and sampler.
        preset: "smoke" shows that everything runs and is no evidence; "quick" for development, "standard" for reports,
            "full". "no-draw" decodes no picture, for content that must not be drawn.
        detectors: two independent ones or more. The first scores; the second selects tries of attacks.
        controls: models that never saw the target, retrained ones first, for probes of removal (:mod:`.controls`).
        clip, extractors, batch_size, autocast, progress: as in :func:`erasure.eval.evaluate`.
        material: real pictures (:mod:`erasure.eval.core.material`), for the probes that need them.
        prompt_files: the user's copies of I2P, Ring-A-Bell and others, or own lists, by name
            (:func:`erasure.eval.core.prompt_files.load`).
        policy: what is required, and by whom; the report compares.
        probes: keys, to run fewer than the preset has, or with larger samples
            (:func:`erasure.eval.probes.probes_of`).
        out: folder for the cells; the same call continues there. None stores nothing.
        cache_dir: of pictures, for several assessments that share a base; ``cache`` in ``out`` by default.

    A probe that lacks an input, or fails, leaves its reason and no number; ``ERASURE_DEBUG=1`` raises a failure.

    Raises:
        TooLong, ValueError: as :func:`erasure.eval.evaluate`; an unknown preset or probe, a control given twice.
        RuntimeError: a change, or a probe, did not give the weights back.
    """
    chosen = probes_of(preset, None if probes is None else tuple(probes))
    check_base(pipe)
    started, folder = time.monotonic(), None if out is None else Path(out)
    cache = cache_dir or (None if folder is None else folder / "cache")
    shared = options_of(pipe, batch_size=batch_size, autocast=autocast, cache_dir=cache, progress=progress)
    before = shared["hash_weights"](pipe)
    _apart(pipe, suite, before, controls, models_of(erasures, ()), shared["hash_weights"])
    evaluation = paired_pictures(
        pipe, erasures, suite, detectors=detectors, controls=controls, clip=clip, extractors=extractors,
        **shared, **PICTURES[preset],
    )  # fmt: skip
    context = Context(
        pipe=pipe, models={model.name: model for model in models_of(erasures, controls)}, suite=suite,
        judge=detectors[0], selector=detectors[1] if len(detectors) > 1 else None,
        evaluation=evaluation, material=material, prompt_files=dict(prompt_files or {}), **shared,
    )  # fmt: skip
    cards = tuple(
        ModelCard(model.name, model.role, model.kind, arm.weights, model.config, _judged(pipe, model))
        for model, arm in zip(context.models.values(), evaluation.arms, strict=True)
    )
    cells = _cells(chosen, cards, _alike(pipe, cards, context), context, folder, before)
    settings = _settings(context, seconds=time.monotonic() - started)
    assessment = Assessment(evaluation, preset, cards, tuple(cells), policy, settings)
    if folder is not None:
        assessment.save(folder)
    return assessment


def _cells(
    probes: Sequence[Probe],
    cards: Sequence[ModelCard],
    alike: Mapping[str, str],
    context: Context,
    folder: Path | None,
    before: str,
) -> list[Cell]:
    """Every probe on every model that it concerns; the guardrails get the prompts of successful attacks."""
    cells: list[Cell] = []
    own = getattr(context.pipe, "vae", None) if any(map(_looks_inside, probes)) else None
    plain = isinstance(own, torch.nn.Module) and not hasattr(own, "_hf_hook")
    autoencoder = copy.deepcopy(own) if plain else None  # which no erasure can reach
    pairs = [(probe, card) for probe in probes for card in _asked(probe, cards, context)]
    for probe, card in (bar := tqdm(pairs, desc="probes", unit="cell", disable=not context.progress)):
        bar.set_postfix_str(f"{probe.key}, {card.name}")
        if probe.section == "guardrails":
            context = dataclasses.replace(context, attacks=_attacks(cells, context))
        if (known := _known(probe, card, cards, alike, cells)) is None:
            asked = dataclasses.replace(context, autoencoder=autoencoder if _looks_inside(probe) else None)
            known = _cell(probe, card, asked, _inputs(probe, card, asked, cards), folder, before)
        cells.append(known)
    return cells


def _looks_inside(probe: Probe) -> bool:
    """Whether a probe is about the denoiser, whatever the autoencoder."""
    return probe.section == "removal" and not probe.own_autoencoder


def _settings(context: Context, *, seconds: float) -> dict[str, Any]:
    """All that is needed to repeat it, beside the settings of the probes."""
    pictures = context.paired.settings
    return {
        **pictures,
        "prompts": fingerprint([[prompt.group, prompt.label, prompt.text] for prompt in context.suite.prompts()]),
        "material": None if context.material is None else context.material.key,
        "judge": context.judge.name,
        "selector": None if context.selector is None else context.selector.name,
        "sampler": sampler_text(pictures),
        "threads": torch.get_num_threads(),
        "seconds": round(seconds, 1),
    }


def _apart(
    pipe: Any, suite: Suite, base: str, controls: Sequence[Model], judged: Sequence[Model], hash_weights: WeightHashes
) -> None:
    """Raise where two controls, or a control and the base, are one model, which would count twice.

    Copies are one model too, rounded, trained a little further, or with other numbers that compute the same: by their
    weights or by their predictions they are far closer to each other than to the base. A control may be judged as well,
    as it is; a near copy of it that is judged would be held against itself.
    """
    if not controls:
        return
    prompts = list(dict.fromkeys([*suite.phrases[:1], *suite.neighbours[:3]]))
    known, start = {base: "the base"}, _samples(pipe, prompts)
    seen, limits = dict[str, tuple[Tensor, Tensor]](), dict[str, list[Any]]()

    def near(samples: tuple[Tensor, Tensor], others: tuple[Tensor, Tensor], limits: Sequence[Any]) -> bool:
        pairs = zip(samples, others, start, limits, strict=True)
        return any(a.shape == b.shape == c.shape and bool((a - b).norm() < limit) for a, b, c, limit in pairs)

    def copies(samples: tuple[Tensor, Tensor]) -> list[str]:
        return [name for name, one in seen.items() if near(samples, one, limits[name])]

    for model in controls:
        with model.on(pipe) as opened:
            weights, samples = hash_weights(opened), _samples(pipe, prompts)
        if weights in known:
            raise ValueError(f"{model.name} and {known[weights]} have the same weights; give each control once")
        if same := copies(samples) + ["the base"] * near(samples, start, [NEAR * one.norm() for one in start]):
            raise ValueError(f"{model.name} is all but a copy of {same[0]}; give controls that were made independently")
        known[weights], seen[model.name] = model.name, samples
        pairs = zip(samples, start, strict=True)
        limits[model.name] = [COPIES * torch.dist(a, b) if a.shape == b.shape else 0.0 for a, b in pairs]
    for model in judged:
        if model.kind not in IN_WEIGHTS:
            continue
        with model.on(pipe) as opened:
            same = copies(_samples(pipe, prompts))
            other = bool(same) and hash_weights(opened) not in known  # hashed only where it is close to a control
        if other:
            raise ValueError(
                f"{model.name} is all but a copy of the control {same[0]}, and would be held against itself; leave one "
                "of them out, or judge the control as it is"
            )


def _samples(pipe: Any, prompts: Sequence[str], size: int = 2**16, times: int = 3) -> tuple[Tensor, Tensor]:
    """About ``size`` of a pipeline's weights, spread evenly over all layers; and its predictions on fixed noise."""
    parameters = [parameter for module in modules_of(pipe).values() for parameter in module.parameters()]
    stride = max(sum(parameter.numel() for parameter in parameters) // size, 1)
    weights = torch.cat([parameter.detach().flatten()[::stride].double().cpu() for parameter in parameters])
    try:
        backbone, generator = denoiser_for(pipe), torch.Generator().manual_seed(0)
    except Missing:  # on a pipeline without predictions to compare, weights alone are
        return weights, torch.zeros(0)
    noise = torch.randn(len(prompts), *backbone.latent_shape, generator=generator).to(backbone.device)
    return weights, predictions(backbone, backbone.encode(prompts).text, noise, times).double()


def _judged(pipe: Any, model: Model) -> dict[str, str] | None:
    """What the record of how a model was made says of its weights as they are here."""
    audit = model.config.get("audit")
    if not audit:
        return None
    with model.on(pipe):
        return judged(audit, modules_of(pipe), denoisers_of(pipe))


def _asked(probe: Probe, cards: Sequence[ModelCard], context: Context) -> list[ModelCard]:
    """The models that a probe runs on: the base, controls, erasures. No claim reads a null beside retrained models."""
    golds, nulls = ([card for card in cards if card.role == role] for role in ("gold", "null"))
    controls = (golds or nulls)[: probe.controls]
    controls += [card for card in cards if card.role == "twin"][: probe.controls]
    chosen = [
        *(card for card in cards if card.role == "base"),
        *controls,
        *(card for card in cards if card.role == "erased"),
    ]
    return [card for card in chosen if probe.concerns(context.models[card.name])]


def _cell(
    probe: Probe, card: ModelCard, context: Context, inputs: Mapping[str, Any], folder: Path | None, before: str
) -> Cell:
    """The stored cell if it is still valid, else the probe's observations, or why there are none."""
    settings = json.loads(json.dumps(probe.settings()))
    cell = Cell(probe.key, probe.version, settings, card.name, inputs)
    if folder is not None and (stored := _stored(cell, folder)) is not None:
        return stored
    started = time.monotonic()
    try:
        if reason := lacking(probe, context):
            raise Missing(reason)
        cell = dataclasses.replace(cell, rows=tuple(probe.run(context.models[card.name], context)))
    except (Missing, TooLong) as absent:
        cell = dataclasses.replace(cell, missing=str(absent))
    except Unfaithful:
        raise
    except Exception as error:
        if os.environ.get("ERASURE_DEBUG"):
            raise
        cell = dataclasses.replace(cell, missing=f"{FAILED}: {type(error).__name__}: {' '.join(str(error).split())}")
        warnings.warn(f"{probe.key} on {card.name} {cell.missing}", stacklevel=3)
    check_restored(context.pipe, before, f"{probe.key} on {card.name}", hash_weights=context.hash_weights)
    cell = dataclasses.replace(cell, seconds=time.monotonic() - started)
    if folder is not None:
        cell.save(folder)
    return cell


def _alike(pipe: Any, cards: Sequence[ModelCard], context: Context) -> dict[str, str]:
    """The weights of models that share them with another and changed nothing else: with one hash they are one model."""
    changed = [card for card in cards if card.kind in IN_WEIGHTS]
    count, plain, found = collections.Counter(card.weights for card in changed), state_of(pipe), {}
    for card in changed:
        if count[card.weights] > 1:
            with context.models[card.name].on(pipe) as opened:
                if not differences(plain, state_of(opened)):
                    found[card.name] = card.weights
    return found


def _known(
    probe: Probe, card: ModelCard, cards: Sequence[ModelCard], alike: Mapping[str, str], cells: Sequence[Cell]
) -> Cell | None:
    """The cell of another model, where its observations are those of this model.

    A retrained model may be judged and be a control, and one erasure may be given twice. Probes of the weights of a
    filtered pipeline find the base.
    """
    if card.kind == "filter" and probe.level == "weights" and not probe.descriptive:
        same = [other.name for other in cards if other.role == "base" and other.weights == card.weights]
    elif card.name in alike:
        there = [other for other in cards if alike.get(other.name) == alike[card.name]]
        same = [other.name for other in there if not probe.descriptive or other.config == card.config]
    else:
        same = []
    found = next((cell for cell in cells if cell.probe == probe.key and cell.model in same), None)
    if found is None:
        return None
    rows = tuple(dataclasses.replace(row, model=card.name) for row in found.rows)
    return dataclasses.replace(found, model=card.name, rows=rows, seconds=0.0)


def _attacks(cells: Sequence[Cell], context: Context) -> dict[str, list[str]]:
    """Attack to the prompts with which it succeeded so far, on the base or an erasure."""
    found: dict[str, list[str]] = {}
    for cell in cells:
        if issubclass(probe_class(cell.probe), Attack) and context.models[cell.model].role in ("base", "erased"):
            found.setdefault(cell.probe, []).extend(found_by(cell.rows))
    return {attack: list(dict.fromkeys(prompts)) for attack, prompts in found.items() if prompts}


def _stored(cell: Cell, folder: Path) -> Cell | None:
    """The same cell from an earlier run, if it is complete and has observations."""
    file = Cell.file(folder, cell.probe, cell.model)
    if not file.exists():
        return None
    try:
        stored = Cell.load(file)
    except ValueError:
        return None
    return stored if stored.key == cell.key and stored.missing is None else None


def _numbers(model: Model) -> str | None:
    """The hash of an erasure's own numbers, by which adapters differ that no picture tells apart."""
    tensors = getattr(model.change, "tensors", None)
    if not isinstance(tensors, Mapping):
        return None
    named = sorted(tensors.items())
    return sha256(piece for name, tensor in named for piece in tensor_bytes(name, tensor))[:16]


def _inputs(probe: Probe, card: ModelCard, context: Context, cards: Sequence[ModelCard]) -> dict[str, Any]:
    """Everything that the observations of a cell depend on, beside the probe's settings.

    Of the other models these are the base, and the retrained ones if the probe needs them.
    """
    evaluation = context.paired
    code = next(arm.beside for arm in evaluation.arms if arm.name == card.name)
    swapped = {name for name, model in context.models.items() if model.change is None or type(model.change) is Swapped}
    beside = [other for other in cards if other.role == "base" or (other.role == "gold" and "gold" in probe.needs)]
    read = dict.fromkeys([card.name, context.base.name])
    # What is read from the evaluation beside its pictures depends on the CLIP judge and the extractors.
    figures = {
        "cosines": [r.clip_cosine for arm in read for r in evaluation.select(arm)],
        "distances": [dataclasses.asdict(d) for d in evaluation.distances if d.arm in read],
    }
    return {
        **({"figures": fingerprint(figures)} if "evaluation" in probe.needs else {}),
        **({"autoencoder": "the base's"} if context.decoded_by_base(context.models[card.name]) else {}),
        **({"code": code} if code else {}),
        **({} if evaluation.records else {"change": _numbers(context.models[card.name])}),
        "weights": card.weights,
        # The config matters for changes beside the weights, and for probes that record where a model comes from.
        "config": None if card.name in swapped and not probe.descriptive else fingerprint(card.config),
        "beside": {other.name: other.weights for other in beside},
        "suite": fingerprint(dataclasses.asdict(context.suite)),  # type: ignore[call-overload]
        "detectors": [
            None if one is None else [one.name, one.card.version, one.card.weights_sha256]
            for one in (context.judge, context.selector)
        ],
        "material": None if context.material is None else context.material.key,
        "autocast": context.autocast,
        **({"prompts": [f.sha256 for f in context.prompt_files.values()]} if "prompts" in probe.needs else {}),
        "attacks": fingerprint(context.attacks) if probe.section == "guardrails" else None,
        "pictures": fingerprint([r.image_hash for arm in read for r in evaluation.select(arm)]),
    }
