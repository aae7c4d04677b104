"""Models retrained without a target: what removal looks like where it is real.

Such a model, a *gold*, repeats the last phase of Emoji World's training, from the same start, with every scene of one
target left out. The start saw no target either, so no step of its UNet or text encoder ever did (sharded exact
retraining, Bourtoule et al. 2021). A *twin* repeats that phase on everything, with the same steps, batch and settings:
gold and twin differ in their data and in nothing else. A *dose* model repeats it with a share of the target's scenes.

Each is stored as its difference from the start, in four bits a weight; the golds of the first edition in eight.

An edition is a folder: a start, the manifest that says what it never saw, and the models trained on from there. The
repository has two, ``gold`` (the start of the shipped model, without three targets) and ``gold/second`` (without six).
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import zlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from transformers import CLIPTokenizer

from erasure.io import parse_json, read_bytes, write_atomically, write_json, writing_folder
from erasure.runtime import fast_bfloat16
from erasure.train import Precision, Training
from erasure.world import path
from erasure.world.train import (
    PHASES,
    config,
    folder_hash,
    new_model,
    phase_training,
    phases_manifest,
    run_phase,
    scenes_hash,
    store_model,
    stored_model,
    training_scenes,
)

*BEFORE, LAST = PHASES
TWIN = "twin"
GROUP = 128  # weights with one step of the quantiser
STEP = 0.485  # of it, in standard deviations of the group: an error of 14 % of the difference, in 3.1 bits a weight
FOLDER = Path(__file__).parents[2] / "gold"  # in the repository; not in the wheel
EDITIONS = (FOLDER, FOLDER / "second")  # a target's models are in the first that left it out


def retrain(
    out: Path,
    without: str | None,
    *,
    seed: int,
    device: torch.device,
    folder: Path | None = None,
    share: float = 0.0,
    steps: int | None = None,
    batch: int | None = None,
) -> Path:
    """Train, or go on training, a model that never sees ``without``; returns its file, named after it and the seed.

    Args:
        out: folder for checkpoints, one for all retrained models; the same call resumes there.
        without: a target of the world; None trains a twin, which sees everything.
        seed: 0, 1, 2 ...: of batches, captions and noise. Several of them show how much retraining varies by itself.
        folder: where ``start/`` and its ``manifest.json`` are, and where the result goes; by default the repository's
            folder for the target (:func:`edition_of`).
        share: of the target's scenes that it sees after all, for a dose model: 0.01, 0.05, 0.25.
        steps, batch: length of the run and pictures a step; by default those of the world's last phase. Fewer make a
            shorter run on a slow machine, of a model that draws a little worse; the file says how many it had. Golds,
            twins and doses that are compared need the same.

    Raises:
        FileNotFoundError: there is no start in ``folder``.
        ValueError: ``without`` is no target of the world: its start has seen it; ``share`` is not from 0 up to 1, or
            is one of a twin; or ``out`` holds a run of another length.
    """
    folder = folder or edition_of(without)
    training, model = trained_without(
        out, without, seed=seed, device=device, folder=folder, share=share, steps=steps, batch=batch
    )
    facts = {
        "without": without,
        "share": share,
        "seed": seed,
        "bits": 4,
        "steps": training.iterations,
        "batch": training.batch_size,
        "precision": training.precision,
        "scope": scope_of(folder, without),
        "scenes": scenes_hash(training_scenes(left_out(without), share=share)),
        "start": start_hash(folder),
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers")},
    }
    file = folder / f"{name_of(without, seed=seed, share=share)}.safetensors"
    write_atomically(file, save(pack(model, stored_model(folder / "start")), metadata={"gold": json.dumps(facts)}))
    return file


def name_of(without: str | None, *, seed: int, share: float = 0.0) -> str:
    """What a retrained model's file is called: ``superhero-0``, ``superhero-dose05-0``, ``twin-0``."""
    dose = f"-dose{100 * share:04.1f}".removesuffix(".0").replace(".", "p") if share else ""
    return f"{without or TWIN}{dose}-{seed}"


def make_start(out: Path, folder: Path, *, device: torch.device) -> Path:
    """Train, or go on training, a start for retrained models: the phases before the last, without any target.

    Autoencoder and tokenizer are the shipped model's. Returns ``folder``, with ``start/`` and ``manifest.json``.

    Args:
        out: folder for checkpoints; the same call resumes there.
    """
    vae, tokenizer = shipped_parts(out, device)
    model, seed = new_model(tokenizer, seed=config()["seed"]), config()["seed"]
    for number, phase in enumerate(BEFORE):
        if not (out / phase / "text_encoder").exists():
            without = PHASES[phase]
            model = run_phase(out, phase, model, vae, tokenizer, without=without, seed=seed + number, device=device)
            store_model(model, out / phase)
        model = stored_model(out / phase)
    store_model(model, folder / "start")
    drawings = {"of": "the shipped model, which gold/manifest.json describes"}
    write_json(folder / "manifest.json", phases_manifest(out, {phase: PHASES[phase] for phase in BEFORE}, drawings))
    return folder


def shipped_parts(out: Path, device: torch.device) -> tuple[Any, CLIPTokenizer]:
    """The shipped model's autoencoder and tokenizer, copied to ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    for part in ("vae", "tokenizer"):
        if not (out / part).exists():
            with writing_folder(out / part) as new:
                shutil.copytree(path() / part, new, dirs_exist_ok=True)
    vae: Any = AutoencoderKL.from_pretrained(out / "vae").to(device)
    return vae, CLIPTokenizer.from_pretrained(out / "tokenizer")


def manifest_of(folder: Path) -> dict[str, Any]:
    """What the start in a folder has seen, by the ``manifest.json`` beside it.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged.
    """
    file = folder / "manifest.json"
    if not file.exists():
        raise FileNotFoundError(
            f"{folder}: no start of retrained models is here (manifest.json and start/); those of the repository come "
            "with a clone, not with the wheel; or make one with `erasure world start`"
        )
    try:
        found: dict[str, Any] = parse_json(read_bytes(file))
        found["phases"][BEFORE[0]]["without"], found["scope"]["every target"]
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{file}: not the manifest of a start, or damaged; get it again") from None
    return found


def targets_of(folder: Path) -> frozenset[str]:
    """What the start in a folder never saw."""
    return frozenset.intersection(*(frozenset(manifest_of(folder)["phases"][phase]["without"]) for phase in BEFORE))


def scope_of(folder: Path, without: str | None) -> dict[str, str]:
    """Which components of a model retrained in a folder saw its target after all."""
    scope = manifest_of(folder)["scope"]
    return {name: scope[name] for name in (without, "every target") if name is not None}


def edition_of(without: str | None) -> Path:
    """The repository's folder for models without a target; the first one for twins, and for what is no target."""
    return next((folder for folder in editions() if without in targets_of(folder)), FOLDER)


def editions() -> list[Path]:
    """The editions that this installation has: both in a clone, none in a wheel."""
    return [folder for folder in EDITIONS if (folder / "manifest.json").exists()]


def left_out(without: str | None) -> frozenset[str]:
    """What the scenes of a retrained model do not show: nothing for a twin."""
    return frozenset() if without is None else frozenset({without})


def trained_without(
    out: Path,
    without: str | None,
    *,
    seed: int,
    device: torch.device,
    folder: Path,
    share: float = 0.0,
    steps: int | None = None,
    batch: int | None = None,
    precision: Precision | None = None,
) -> tuple[Training, dict[str, nn.Module]]:
    """The training of :func:`retrain`, whose arguments it has: its settings, and the model it ends in.

    Args:
        precision: what the forward pass computes in, which a replay takes from the record; by default bfloat16 where
            the device is fast in it, and float32 elsewhere. Where it is slow, bfloat16 takes twenty times as long.
    """
    if without is not None:
        check_target(without, folder)
    if not 0 <= share < 1 or (share and without is None):
        raise ValueError(
            f"share is of the target's scenes, from 0 up to 1, and a twin has none to keep; got {share} for "
            f"{without or TWIN}; give 0.05, say, with a target"
        )
    vae, tokenizer = shipped_parts(out, device)
    training = phase_training(LAST, 1000 * (seed + 1))
    training = dataclasses.replace(
        training,
        iterations=steps or training.iterations,
        batch_size=batch or training.batch_size,
        precision=precision or ("bfloat16" if fast_bfloat16(device) else "float32"),
    )
    model = run_phase(
        out,
        LAST,
        stored_model(folder / "start"),
        vae,
        tokenizer,
        without=left_out(without),
        share=share,
        seed=training.seed,
        device=device,
        name=name_of(without, seed=seed, share=share),
        training=training,
        unseen=targets_of(folder),
    )
    return training, model


def load_gold(
    without: str | None, *, seed: int = 0, share: float = 0.0, folder: Path | None = None, **options: Any
) -> StableDiffusionPipeline:
    """Emoji World retrained without a target, as a stock pipeline.

    Args:
        without: one of the world's targets; None for a twin, retrained on everything.
        seed: which of the retrained models.
        share: of the target's scenes that a dose model saw.
        folder: where the files are; by default the repository's folder for the target (:func:`edition_of`).
        **options: passed to ``from_pretrained`` for the rest of the pipeline.

    Raises:
        FileNotFoundError: there is no such model here; the message lists those there are.
        ValueError: ``without`` is no target, or the file belongs to another start.
    """
    folder = folder or edition_of(without)
    if without is not None:
        check_target(without, folder)
    file = folder / f"{name_of(without, seed=seed, share=share)}.safetensors"
    if not file.exists():
        there = sorted(f.stem for f in folder.glob("*-[0-9]*.safetensors"))
        raise FileNotFoundError(
            f"no retrained model {file.stem!r} in {folder.name}; there are {there}; they come with the repository, not "
            "with the wheel; or make one with `erasure world gold`"
        )
    return StableDiffusionPipeline.from_pretrained(path(), **stored_gold(file), **options)


def stored_gold(file: Path) -> dict[str, nn.Module]:
    """The ``unet`` and ``text_encoder`` of a retrained model's file, in float32.

    Raises:
        ValueError: it is no such file, or belongs to another start than the one beside it.
    """
    facts, folder = gold_facts(file), file.parent
    if facts["start"] != start_hash(folder):
        raise ValueError(f"{file.name} belongs to another start than {folder.name}/start; get both from one place")
    with safe_open(file, "pt") as opened:
        packed = {name: opened.get_tensor(name) for name in opened.keys()}
    return unpack(packed, stored_model(folder / "start"))


def gold_facts(file: Path) -> dict[str, Any]:
    """What a retrained model's file says of itself: ``without``, ``seed``, ``steps``, ``batch``, ``scope`` ...

    Raises:
        ValueError: it is no such file, or damaged.
    """
    try:
        with safe_open(file, "pt") as opened:
            facts: dict[str, Any] = parse_json(opened.metadata()["gold"])
    except (SafetensorError, KeyError, TypeError, ValueError):
        raise ValueError(f"{file.name}: not a retrained model, or damaged; get it again") from None
    return facts


def check_target(name: str, folder: Path) -> None:
    """Raise unless the start in a folder never saw ``name``."""
    if name not in (left := targets_of(folder)):
        others = [str(other) for other in editions() if name in targets_of(other)]
        named = f"; one without it is in {others[0]}" if others else ""
        raise ValueError(f"retraining starts from a model without the targets {sorted(left)}; got {name!r}{named}")


def start_hash(folder: Path) -> str:
    return folder_hash(folder / "start" / "unet")[:16] + folder_hash(folder / "start" / "text_encoder")[:16]


def pack(model: dict[str, nn.Module], start: dict[str, nn.Module], *, bits: int = 4) -> dict[str, Tensor]:
    """Differences of every weight from the start: codes of four bits, deflated, and one float16 step for each group of
    128 weights; vectors in float16.

    A step is 0.485 standard deviations of the group and a code at most 7 steps from 0.

    Args:
        bits: 8 for models of the first edition, to replay them: int8 and one scale for each row.
    """
    packed = {}
    for part, module in model.items():
        before = start[part].state_dict()
        for name, weight in module.state_dict().items():
            change = weight.cpu().float() - before[name].float()
            if change.ndim < 2:
                packed[f"{part}.{name}"] = change.half()
                continue
            if bits == 8:
                rows = change.flatten(1)
                scale = rows.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127
                packed[f"{part}.{name}"] = (rows / scale).round().to(torch.int8)
                packed[f"{part}.{name}:scale"] = scale.squeeze(1)
                continue
            rows = grouped(change)
            step = (STEP * rows.square().mean(1, keepdim=True).sqrt()).clamp(min=1e-7).half()
            codes = ((rows / step.float()).round().clamp(-7, 7) + 8).to(torch.uint8).flatten()
            pairs = codes[::2] | codes[1::2] << 4
            packed[f"{part}.{name}"] = torch.frombuffer(
                bytearray(zlib.compress(pairs.numpy().tobytes(), 9)), dtype=torch.uint8
            )
            packed[f"{part}.{name}:step"] = step.squeeze(1)
    return packed


def unpack(packed: dict[str, Tensor], start: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """The model whose differences from ``start`` are ``packed``; ``start`` itself becomes it."""
    for part, module in start.items():
        for name, weight in module.state_dict().items():
            change = packed[f"{part}.{name}"]
            if change.dtype == torch.int8:  # the first edition: eight bits, and one scale for each row
                change = change.float() * packed[f"{part}.{name}:scale"][:, None]
            elif weight.ndim >= 2:
                step = packed[f"{part}.{name}:step"].float()
                pairs = torch.frombuffer(bytearray(zlib.decompress(change.numpy().tobytes())), dtype=torch.uint8)
                codes = torch.stack([pairs & 15, pairs >> 4], 1).reshape(-1, GROUP).float() - 8
                change = (codes * step[:, None]).flatten()[: weight.numel()]
            weight.add_(change.reshape(weight.shape).float())
        module.eval()
    return start


def grouped(weight: Tensor) -> Tensor:
    """The numbers of a tensor in rows of 128, the last one filled up with zeros."""
    flat = weight.flatten()
    return nn.functional.pad(flat, (0, -len(flat) % GROUP)).reshape(-1, GROUP)
