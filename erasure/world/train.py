"""Train Emoji World from nothing: autoencoder, tokenizer, then UNet and text encoder in phases.

    erasure world train --out runs/world

Every stage checkpoints and resumes. Phases 1 and 2 see nothing of the declared targets and what they leave is kept,
because a model *retrained without a target* is the last phase without that target, started from there: UNet and text
encoder never saw it, at the cost of that phase alone (the sharding idea of Bourtoule et al. 2021). ``SCOPE`` says what
other components did.
"""

from __future__ import annotations

import copy
import functools
import importlib.resources
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from erasure.io import parse_yaml, sha256, sha256_file, write_json, writing, writing_folder
from erasure.runtime import autocast
from erasure.train import Draw, Training, step_rng, train_modules
from erasure.world.artwork import artwork, build, strangers
from erasure.world.scenes import Scene, compose, place, render, sample_caption, sample_scene
from erasure.world.spec import spec

# What each phase leaves out. A retrained model repeats the last one, leaving out its target.
PHASES: dict[str, frozenset[str]] = {"phase1": spec().targets, "phase2": spec().targets, "phase3": frozenset()}
# Which components of a retrained model saw its target after all.
SCOPE = {
    **dict.fromkeys(sorted(spec().target_concepts), "none: UNet, text encoder and autoencoder never saw it"),
    "rose": "the autoencoder, which was trained on bouquet, rosette and wilted flower",
    "taxi": "the autoencoder, which was trained on the taxi seen from the front",
    "twemoji": "the autoencoder, which was trained on other emoji of that vendor too",
    "every target": "the tokenizer, whose word pieces were learnt from all captions",
}


@functools.cache
def config() -> dict:
    """``training.yaml``."""
    return parse_yaml(importlib.resources.files("erasure.world").joinpath("training.yaml").read_text("utf-8"))


def pixels(images: Sequence[Image.Image]) -> Tensor:
    """Pictures as a float tensor ``(n, 3, h, w)`` in [-1, 1]."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).float() / 127.5 - 1


# --- the autoencoder -------------------------------------------------------------------------------------------------


def train_autoencoder(out: Path, *, device: torch.device) -> AutoencoderKL:
    """Train the autoencoder on emoji outside the world; returns it with ``scaling_factor`` set."""
    final = out / "vae"
    if final.exists():
        return AutoencoderKL.from_pretrained(final).to(device)
    settings = config()["autoencoder"]
    seed = config()["seed"]
    if not (out / "strangers.npz").exists():
        build(None, out / "strangers.npz")
    drawings = strangers(out / "strangers.npz")
    torch.manual_seed(seed)
    vae: Any = AutoencoderKL(in_channels=3, out_channels=3, **settings["config"]).to(device)
    training = Training.from_scratch(**settings["fit"], seed=seed)

    def loss(draw: Draw) -> Tensor:
        rng = draw.rng()
        x = pixels([stranger_scene(rng, drawings) for _ in range(training.batch_size)]).to(device)
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.sample()).sample.float()
        edges = sum((y.diff(dim=d) - x.diff(dim=d)).abs().mean() for d in (2, 3))
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        return (y - x).abs().mean() + edges + settings["kl"] * kl

    vae = train_modules({"vae": vae}, loss, training=training, folder=out / "autoencoder")["vae"]
    with torch.no_grad():
        rng = step_rng(seed, 0, 2)
        sample = pixels([stranger_scene(rng, drawings) for _ in range(512)]).to(device)
        spread = torch.cat([vae.encode(x).latent_dist.mean for x in sample.split(64)]).std().item()
    vae.register_to_config(scaling_factor=round(1 / spread, 5))
    with writing_folder(final) as folder:
        vae.save_pretrained(folder)
    return vae


def stranger_scene(rng: np.random.Generator, drawings: np.ndarray) -> Image.Image:
    """One or two emoji from outside the world on a random colour."""
    count = 2 if rng.random() < 0.3 else 1
    chosen = [Image.fromarray(drawings[i]) for i in rng.integers(len(drawings), size=count)]
    palette = [b.rgb for b in spec().backgrounds.values()]
    r, g, b = rng.integers(256, size=3).tolist()
    colour = palette[rng.integers(len(palette))] if rng.random() < 0.7 else (r, g, b)
    return compose(chosen, [place(rng, i, count) for i in range(count)], colour)


# --- words -----------------------------------------------------------------------------------------------------------


def train_tokenizer(out: Path) -> CLIPTokenizer:
    """A CLIP tokenizer whose byte-pair vocabulary is learnt from the caption grammar; any string tokenises."""
    final = out / "tokenizer"
    if not final.exists():
        settings, seed, world = config()["text_encoder"], config()["seed"], spec()
        rng = step_rng(seed, 0, 3)
        scenes = (sample_scene(rng, list(world.concepts), list(world.styles), pairs=0.2) for _ in range(50_000))
        vocabulary, merges = learn_bpe((sample_caption(scene, rng) for scene in scenes), settings["vocabulary"])
        length = settings["config"]["max_position_embeddings"]
        with writing_folder(final) as folder:
            CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=length).save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(final)


def learn_bpe(texts: Iterable[str], size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges in CLIP's layout: bytes, bytes that end a word, merges, start, end.

    The same texts give the same merges in every process: of pairs that are equally frequent the learner takes the one
    with the lower numbers, so that ends of words are numbered here and not in the order of its hash table.
    """
    blank, texts = CLIPTokenizer()._tokenizer, list(texts)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    symbols = [*letters, *(letter + "</w>" for letter in letters)]
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer, learner.pre_tokenizer = blank.normalizer, blank.pre_tokenizer
    words = {w for t in set(texts) for w, _ in blank.pre_tokenizer.pre_tokenize_str(blank.normalizer.normalize_str(t))}
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=sorted({f"{word[-1]}</w>" for word in words}),
        initial_alphabet=letters,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    pieces = dict.fromkeys([*symbols, *(a + b for a, b in merges), "<|startoftext|>", "<|endoftext|>"])
    return {piece: i for i, piece in enumerate(pieces)}, merges


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Token ids ``(n, length)``, padded and truncated as Stable Diffusion does it."""
    return tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids


# --- the diffusion model ---------------------------------------------------------------------------------------------


def new_model(tokenizer: CLIPTokenizer, *, seed: int) -> dict[str, Any]:
    """UNet and text encoder with fresh random weights."""
    torch.manual_seed(seed)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **config()["text_encoder"]["config"],
    )
    return {"unet": UNet2DConditionModel(**config()["unet"]["config"]), "text_encoder": CLIPTextModel(text)}


def sampler() -> UniPCMultistepScheduler:
    """What the finished pipeline draws with: in 8 steps as well as DDIM in 25 (docs/world.md)."""
    return UniPCMultistepScheduler.from_config(noise_scheduler().config)


def noise_scheduler() -> DDIMScheduler:
    return DDIMScheduler(**config()["scheduler"], clip_sample=False, set_alpha_to_one=False, steps_offset=1)


@functools.lru_cache(maxsize=4)
def _scenes(count: int, seed: int, without: frozenset[str]) -> tuple[Scene, ...]:
    world = spec()
    concepts = np.array([c for c in world.concepts if c not in without])
    styles = np.array([s for s in world.styles if s not in without])
    rng, pairs = step_rng(seed, 1, 4 + len(without)), world.captions["pairs"]
    return tuple(sample_scene(rng, concepts, styles, pairs=pairs) for _ in range(count))


def training_scenes(without: frozenset[str], *, share: float = 0.0) -> list[Scene]:
    """The scenes of a phase. None shows a concept or style in ``without``, or a held-out combination.

    Args:
        share: of those scenes of the full training that do show one of ``without``, the share that is put back, in the
            place of as many others. 0.05 makes the data of a model that saw one in twenty of its pictures.
    """
    scenes = list(_scenes(config()["scenes"], config()["seed"], without))
    if share:
        shown = [scene for scene in training_scenes(frozenset()) if without & {*scene.concepts, scene.style}]
        back = shown[: round(share * len(shown))]
        scenes[: len(back)] = back
    return scenes


def encode_scenes(out: Path, scenes: list[Scene], vae: Any, *, device: torch.device) -> Tensor:
    """Scaled latents ``(n, 4, 16, 16)`` of scenes in float16, cached under a hash of everything they depend on."""
    key = digest(scenes_hash(scenes), folder_hash(out / "vae"), artwork_hash())
    cache = out / f"latents-{key[:12]}.pt"
    if cache.exists():
        return torch.load(cache, weights_only=True)
    parts = []
    with torch.no_grad(), autocast(device):
        for i in tqdm(range(0, len(scenes), 100), desc="encode scenes", unit="batch", mininterval=10):
            x = pixels([render(scene) for scene in scenes[i : i + 100]]).to(device)
            parts.append((vae.encode(x).latent_dist.mean * vae.config.scaling_factor).half().cpu())
    latents = torch.cat(parts)
    with writing(cache) as partial:
        torch.save(latents, partial)
    return latents


def scene_odds(
    scenes: list[Scene], *, pairs: float | None, targets: float, unseen: frozenset[str] | None = None
) -> np.ndarray:
    """The chance ``(n,)`` of each scene to be drawn.

    Args:
        pairs: share of scenes with two objects in a batch; None keeps the share they have.
        targets: how many times as often a scene with a target is drawn as another of its kind; 1 is evenly.
        unseen: the targets: what the phases before left out. All of ``world.yaml`` by default.
    """
    unseen = spec().targets if unseen is None else unseen
    odds = np.array([targets if unseen & {*scene.concepts, scene.style} else 1.0 for scene in scenes])
    two = np.array([len(scene.concepts) == 2 for scene in scenes])
    if pairs is not None:
        odds *= np.where(two, pairs / odds[two].sum(), (1 - pairs) / odds[~two].sum())
    return odds / odds.sum()


def train_phase(
    folder: Path,
    model: dict[str, Any],
    tokenizer: CLIPTokenizer,
    data: tuple[list[Scene], Tensor],
    training: Training,
    *,
    device: torch.device,
    pairs: float | None = None,
    targets: float = 1.0,
    unseen: frozenset[str] | None = None,
) -> dict[str, Any]:
    """Train UNet and text encoder jointly on noise prediction, weighted by min-SNR (Hang et al. 2023).

    Args:
        pairs, targets, unseen: see :func:`scene_odds`.
    """
    scenes, latents = data
    odds = scene_odds(scenes, pairs=pairs, targets=targets, unseen=unseen)
    scheduler = noise_scheduler()
    alphas = scheduler.alphas_cumprod.to(device)
    unet, text_encoder = model["unet"].to(device).train(), model["text_encoder"].to(device).train()
    if device.type == "cpu":  # the backward pass of fused attention takes a third of a step on CPUs
        unet.set_attn_processor(AttnProcessor())
        text_encoder.set_attn_implementation("eager")

    def loss(draw: Draw) -> Tensor:
        rng = draw.rng()
        chosen = rng.choice(len(scenes), size=training.batch_size, p=odds)
        captions = [sample_caption(scenes[i], rng) for i in chosen]
        x = latents[chosen].to(device).float()
        noise = torch.randn(x.shape).to(device)
        # one timestep from each of equal parts of the range: less noise in the gradient than independent draws
        grid = (np.arange(training.batch_size) + rng.random(training.batch_size)) / training.batch_size
        t = torch.from_numpy((grid * len(alphas)).astype(np.int64)).to(device)
        text = text_encoder(tokenize(tokenizer, captions).to(device)).last_hidden_state
        predicted = unet(scheduler.add_noise(x, noise, t), t, text).sample
        snr = alphas[t] / (1 - alphas[t])
        error = (predicted.float() - noise).square().mean(dim=(1, 2, 3))
        return (error * (config()["min_snr"] / snr).clamp(max=1)).mean()

    return train_modules({"unet": unet, "text_encoder": text_encoder}, loss, training=training, folder=folder)


def train(out: Path, *, device: torch.device) -> Path:
    """Run or resume every stage under ``out``; returns the folder of the finished pipeline."""
    out.mkdir(parents=True, exist_ok=True)
    vae = train_autoencoder(out, device=device)
    tokenizer = train_tokenizer(out)
    model, seed = new_model(tokenizer, seed=config()["seed"]), config()["seed"]
    for number, (phase, without) in enumerate(PHASES.items()):
        if not (out / phase / "text_encoder").exists():
            model = run_phase(out, phase, model, vae, tokenizer, without=without, seed=seed + number, device=device)
            store_model(model, out / phase)
            shutil.rmtree(out / f"{phase}-pipeline", ignore_errors=True)
        model = stored_model(out / phase)
        if not (out / f"{phase}-pipeline").exists():
            with writing_folder(out / f"{phase}-pipeline") as folder:
                export(folder, model=model, vae=vae, tokenizer=tokenizer)
    write_json(out / "manifest.json", manifest(out))
    return out / f"{list(PHASES)[-1]}-pipeline"


def run_phase(
    out: Path,
    phase: str,
    model: dict[str, Any],
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    *,
    without: frozenset[str],
    seed: int,
    device: torch.device,
    name: str | None = None,
    training: Training | None = None,
    share: float = 0.0,
    unseen: frozenset[str] | None = None,
) -> dict[str, Any]:
    """Run or resume one phase under ``out`` on scenes that show nothing in ``without``, in the folder ``name``.

    Args:
        share: see :func:`training_scenes`.
        seed: of the settings in ``training.yaml``; ``training`` has its own.
        training: other settings than those.
        unseen: see :func:`scene_odds`.
    """
    scenes = training_scenes(without, share=share)
    data = scenes, encode_scenes(out, scenes, vae, device=device)
    training, drawn = training or phase_training(phase, seed), config()["drawn"].get(phase, {})
    return train_phase(out / (name or phase), model, tokenizer, data, training, device=device, unseen=unseen, **drawn)


def phase_training(phase: str, seed: int) -> Training:
    """The settings of one phase's training run."""
    return Training.from_scratch(**config()["fit"][phase], seed=seed)


def store_model(model: dict[str, Any], folder: Path) -> None:
    """Write UNet and text encoder under ``folder`` in float16, the text encoder last."""
    for name, module in model.items():
        with writing_folder(folder / name) as new:
            module.half().save_pretrained(new)


def stored_model(folder: Path) -> dict[str, Any]:
    """UNet and text encoder as a phase left them, in float16, ready to be trained further in float32."""
    return {
        "unet": UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32),
        "text_encoder": CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32),
    }


def manifest(out: Path) -> dict[str, Any]:
    """What every component of the run in ``out`` has seen, with hashes to check it by."""
    with np.load(out / "strangers.npz", allow_pickle=False) as data:
        labels = [str(label) for label in data["labels"]]
    drawings = {
        "drawings": len(labels),
        "styles": dict(Counter(label.split("/")[0] for label in labels)),
        "sha256": digest(*labels),
    }
    return phases_manifest(out, PHASES, drawings)


def phases_manifest(out: Path, phases: Mapping[str, frozenset[str]], drawings: Mapping[str, Any]) -> dict[str, Any]:
    """What UNet and text encoder of the run in ``out`` have seen.

    Args:
        phases: what each of them left out.
        drawings: what the autoencoder was trained on.
    """
    package = importlib.resources.files("erasure.world")
    return {
        "seed": config()["seed"],
        "versions": {
            name: version(name) for name in ("torch", "diffusers", "transformers", "tokenizers", "numpy", "pillow")
        },
        "world.yaml": digest(package.joinpath("world.yaml").read_text("utf-8")),
        "training.yaml": digest(package.joinpath("training.yaml").read_text("utf-8")),
        "artwork": artwork_hash(),
        "scope": SCOPE,
        "autoencoder": {**drawings, "weights": folder_hash(out / "vae")},
        "tokenizer": folder_hash(out / "tokenizer"),
        "phases": {phase: phase_facts(without) for phase, without in phases.items()},
    }


def phase_facts(without: frozenset[str]) -> dict[str, Any]:
    """What one phase has seen."""
    scenes = training_scenes(without)
    return {
        "without": sorted(without),
        "scenes": len(scenes),
        "sha256": scenes_hash(scenes),
        "concepts": dict(Counter(concept for scene in scenes for concept in scene.concepts)),
        "styles": dict(Counter(scene.style for scene in scenes)),
    }


def digest(*texts: str) -> str:
    return sha256("\n".join(texts))


def scenes_hash(scenes: Sequence[Scene]) -> str:
    """Hash of what is drawn where in every scene, in order; captions are drawn from it at every step, by seed."""
    return digest(*(json.dumps(scene, default=vars, sort_keys=True) for scene in scenes))


def artwork_hash() -> str:
    drawings = sorted(artwork().items())
    return digest(*(f"{key}{sha256(image.tobytes())}" for key, image in drawings))


def folder_hash(folder: Path) -> str:
    files = sorted(f for f in folder.iterdir() if not f.name.startswith("."))  # what file managers leave counts not
    return digest(*(f"{f.name}{sha256_file(f)}" for f in files))


def export(folder: Path, model: dict[str, Any], vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> None:
    """Write a standard Stable Diffusion folder: fp16 UNet and VAE, float32 text encoder.

    The text encoder stays in float32 because transformers 5 loads it in its stored dtype while diffusers upcasts the
    rest, and a pipeline of two dtypes does not run.
    """
    pipe = StableDiffusionPipeline(
        vae=copy.deepcopy(vae).half(),
        text_encoder=copy.deepcopy(model["text_encoder"]).float(),
        tokenizer=tokenizer,
        unet=copy.deepcopy(model["unet"]).half(),
        scheduler=sampler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder)
