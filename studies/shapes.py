"""Shapes: a second small text-to-image model, to see whether what was chosen on Emoji World holds elsewhere.

    python -m studies.shapes runs/shapes     # two hours of one core; resumes

It has nothing of Emoji World: drawn shapes in place of emoji, a vocabulary of whole words in place of byte pairs,
prediction of v in place of noise, Euler's sampler in place of UniPC, latents of 8 x 8 in place of 16 x 16. A word that
no caption has is the unknown word. A classifier of the shapes comes with it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

from erasure.eval.detectors.base import NOTHING, DetectorCard
from erasure.io import writing_folder
from erasure.train import Draw, Training, train_modules
from erasure.world.train import pixels

SIDE, FINER = 32, 4  # pixels of a picture, and how many times finer it is drawn
Points = list[tuple[float, float]]
COLOURS = {
    "red": (220, 40, 40), "orange": (245, 140, 30), "yellow": (250, 215, 50), "green": (40, 160, 70),
    "blue": (40, 90, 215), "purple": (130, 60, 180), "pink": (250, 140, 190), "brown": (125, 80, 45),
}  # fmt: skip
GROUNDS = {"white": (250, 250, 250), "grey": (150, 150, 150), "black": (20, 20, 20), "beige": (225, 205, 170)}
SIZES = {"small": (0.45, 0.58), "": (0.62, 0.78), "large": (0.82, 0.95)}


# --- what is drawn ----------------------------------------------------------------------------------------------------


def corners(count: int, inner: float = 1.0) -> Points:
    """A regular polygon, or with ``inner`` < 1 a star, in the unit circle, its first point up."""
    radii = [1.0, inner] if inner < 1 else [1.0]
    steps = count * len(radii)
    angles = [2 * math.pi * i / steps for i in range(steps)]
    return [(radii[i % len(radii)] * math.sin(a), -radii[i % len(radii)] * math.cos(a)) for i, a in enumerate(angles)]


def curve(of: Callable[[float], tuple[float, float]], count: int = 60) -> Points:
    return [of(2 * math.pi * i / count) for i in range(count)]


def heart(a: float) -> tuple[float, float]:
    y = 13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)
    return 0.95 * math.sin(a) ** 3, -y / 17


def drop(a: float) -> tuple[float, float]:
    return 0.75 * math.sin(a) * math.sin(a / 2) ** 1.5, -math.cos(a)


def crescent() -> Points:
    outer = [(math.cos(a), math.sin(a)) for a in np.linspace(0.9, 2 * math.pi - 0.9, 40)]
    inner = [(0.42 + 0.8 * math.cos(a), 0.8 * math.sin(a)) for a in np.linspace(2 * math.pi - 1.35, 1.35, 40)]
    return [*outer, *inner]


SHAPES: dict[str, Points] = {
    "triangle": corners(3),
    "square": [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)],
    "diamond": [(0, -1), (0.6, 0), (0, 1), (-0.6, 0)],
    "hexagon": corners(6),
    "star": corners(5, inner=0.42),
    "sun": corners(12, inner=0.6),
    "cross": [(-0.3, -1), (0.3, -1), (0.3, -0.3), (1, -0.3), (1, 0.3), (0.3, 0.3), (0.3, 1), (-0.3, 1), (-0.3, 0.3),
              (-1, 0.3), (-1, -0.3), (-0.3, -0.3)],
    "arrow": [(0, -1), (0.8, -0.1), (0.3, -0.1), (0.3, 1), (-0.3, 1), (-0.3, -0.1), (-0.8, -0.1)],
    "bolt": [(0.3, -1), (-0.6, 0.15), (-0.05, 0.15), (-0.3, 1), (0.6, -0.2), (0.05, -0.2)],
    "chevron": [(-1, -0.2), (0, -0.9), (1, -0.2), (1, 0.7), (0, 0), (-1, 0.7)],
    "circle": curve(lambda a: (0.9 * math.sin(a), 0.9 * math.cos(a))),
    "ring": curve(lambda a: (0.95 * math.sin(a), 0.95 * math.cos(a))),
    "crescent": crescent(),
    "heart": curve(heart),
    "drop": curve(drop),
    "bar": [(-1, -0.28), (1, -0.28), (1, 0.28), (-1, 0.28)],
}  # fmt: skip
TURNED = 0.18  # radians that a shape may be turned either way


def draw(
    rng: np.random.Generator, shape: str | None, colour: str, ground: str, size: str, *, play: float = 1.0
) -> Image.Image:
    """A picture ``SIDE`` pixels wide; without a shape the ground alone.

    Args:
        play: share of the room there is in which the shape may lie, and of the angle by which it may be turned.
    """
    wide = SIDE * FINER
    picture = Image.new("RGB", (wide, wide), GROUNDS[ground])
    if shape is not None:
        radius = wide / 2 * rng.uniform(*SIZES[size])
        x, y = wide / 2 + (wide / 2 - radius) * play * rng.uniform(-0.9, 0.9, size=2)
        turn = play * rng.uniform(-TURNED, TURNED)
        sin, cos = math.sin(turn), math.cos(turn)
        pen = ImageDraw.Draw(picture)

        def placed(factor: float) -> Points:
            points = ((factor * radius * px, factor * radius * py) for px, py in SHAPES[shape])
            return [(x + px * cos - py * sin, y + px * sin + py * cos) for px, py in points]

        pen.polygon(placed(1), fill=COLOURS[colour])
        if shape == "ring":
            pen.polygon(placed(0.5), fill=GROUNDS[ground])
    return picture.resize((SIDE, SIDE), Image.Resampling.BOX)


def scene(rng: np.random.Generator) -> tuple[str, str, str, str]:
    """Shape, colour, ground and size, each drawn evenly."""
    return tuple(str(rng.choice(list(these))) for these in (SHAPES, COLOURS, GROUNDS, SIZES))  # type: ignore[return-value]


def caption(rng: np.random.Generator, shape: str, colour: str, ground: str, size: str) -> str:
    """One of the ways to say what a scene shows; a tenth are empty, for guidance."""
    if rng.random() < 0.1:
        return ""
    noun = " ".join(word for word in (size, colour if rng.random() < 0.6 else "", shape) if word)
    start = rng.choice(["a {}", "a {}", "a drawing of a {}", "{}", "the {}"])
    end = rng.choice(["", f" on a {ground} background", f" on {ground}", f", {ground} background"])
    return f"{start}{end}".format(noun)


# --- the model --------------------------------------------------------------------------------------------------------

WORDS = sorted({*SHAPES, *COLOURS, *GROUNDS, *SIZES, "a", "the", "drawing", "of", "on", "background", ","} - {""})
LENGTH = 16
# UNet and text encoder: steps, and how much of its play a shape has, in place and turn. A steady one is learnt sooner.
PHASES = {"first": (4500, 1.0), "second": (6000, 0.45)}


def tokenizer() -> PreTrainedTokenizerFast:
    """A token a word. The end also pads, as in CLIP; what no caption has is the unknown word."""
    vocabulary = {word: i for i, word in enumerate(["<start>", "<end>", "<unknown>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 0), ("<end>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<start>", eos_token="<end>", unk_token="<unknown>", pad_token="<end>",
        model_max_length=LENGTH,
    )  # fmt: skip


def noises() -> EulerDiscreteScheduler:
    return EulerDiscreteScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        steps_offset=1,
    )


def plan(steps: int, *, batch: int, lr: float) -> Training:
    return Training.from_scratch(
        steps=steps, batch=batch, lr=lr, warmup=100, decay=0.6, ema=0.997, weight_decay=1e-2, save_every=250
    )


def new_model() -> dict[str, Any]:
    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=3 + len(WORDS), bos_token_id=0, eos_token_id=1, pad_token_id=1, hidden_size=128,
        intermediate_size=384, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=LENGTH,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=SIDE // 4, block_out_channels=(64, 96), cross_attention_dim=128, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), layers_per_block=1,
    )  # fmt: skip
    return {"unet": unet, "text_encoder": CLIPTextModel(text)}


def train_autoencoder(out: Path) -> AutoencoderKL:
    torch.manual_seed(0)
    vae: Any = AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, norm_num_groups=8, block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3, layers_per_block=1,
        mid_block_add_attention=False, sample_size=SIDE,
    )  # fmt: skip
    training = plan(1200, batch=16, lr=2e-3)

    def loss(step: Draw) -> Tensor:
        rng = step.rng()
        x = pixels([draw(rng, *scene(rng)) for _ in range(training.batch_size)])
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.sample()).sample
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        return (y - x).abs().mean() + (y - x).square().mean() + 1e-3 * kl

    vae = train_modules({"vae": vae}, loss, training=training, folder=out / "autoencoder")["vae"]
    rng = np.random.default_rng(1)
    with torch.no_grad():
        latents = vae.encode(pixels([draw(rng, *scene(rng)) for _ in range(256)])).latent_dist.mean
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    return vae


def train(out: Path) -> Path:
    """Train or go on training autoencoder, UNet with text encoder, and classifier; returns the pipeline's folder."""
    if (final := out / "pipeline").exists():
        return final
    vae: Any = train_autoencoder(out).eval()
    model = new_model()
    model["unet"].set_attn_processor(AttnProcessor())  # the backward pass of fused attention is slow on CPUs
    model["text_encoder"].set_attn_implementation("eager")
    for phase, (steps, play) in PHASES.items():
        model = train_phase(out / phase, model, vae, plan(steps, batch=24, lr=1e-3), play)
    if not (out / "classifier.pt").exists():  # a training that is resumed at its end has no running means
        train_classifier(out, vae)
    pipe = StableDiffusionPipeline(  # files of half the size; the text encoder is opened in the precision of its file
        vae=vae.half(), unet=model["unet"].half(), text_encoder=model["text_encoder"], tokenizer=tokenizer(),
        scheduler=noises(), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    with writing_folder(final) as folder:
        pipe.save_pretrained(folder)
    return final


def train_phase(folder: Path, model: dict[str, Any], vae: Any, training: Training, play: float) -> dict[str, Any]:
    """UNet and text encoder together, on the error of v (Salimans and Ho 2022)."""
    words, scheduler, rng = tokenizer(), noises(), np.random.default_rng(2)
    for module in model.values():
        module.requires_grad_(True).train()
    scenes = [scene(rng) for _ in range(20_000)]
    with torch.no_grad():
        parts = [
            pixels([draw(rng, *one, play=play) for one in scenes[i : i + 100]]) for i in range(0, len(scenes), 100)
        ]
        latents = torch.cat([vae.encode(x).latent_dist.mean for x in parts]) * vae.config.scaling_factor

    def loss(step: Draw) -> Tensor:
        rng = step.rng()
        chosen = rng.choice(len(scenes), size=training.batch_size)
        texts = [caption(rng, *scenes[i]) for i in chosen]
        tokens = words(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        x = latents[chosen]
        noise = torch.randn(x.shape)
        grid = (np.arange(len(x)) + rng.random(len(x))) / len(x)
        t = torch.from_numpy((grid * scheduler.config.num_train_timesteps).astype(np.int64))
        kept = scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
        noisy, v = kept.sqrt() * x + (1 - kept).sqrt() * noise, kept.sqrt() * noise - (1 - kept).sqrt() * x
        predicted = model["unet"](noisy, t, model["text_encoder"](tokens).last_hidden_state).sample
        return (predicted - v).square().mean()

    return train_modules(model, loss, training=training, folder=folder)


# --- its classifier ---------------------------------------------------------------------------------------------------


def network() -> nn.Module:
    def block(into: int, out: int) -> list[nn.Module]:
        return [nn.Conv2d(into, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU(), nn.MaxPool2d(2)]

    return nn.Sequential(
        *block(3, 32), *block(32, 64), *block(64, 96), nn.Flatten(), nn.Dropout(0.2),
        nn.Linear(96 * (SIDE // 8) ** 2, len(SHAPES) + 1),
    )  # fmt: skip


def nothing(rng: np.random.Generator, vae: Any) -> Tensor:
    """A picture of no shape ``(3, h, w)``: an empty ground, or what random latents decode to."""
    if rng.random() < 0.5:
        return pixels([draw(rng, None, "red", str(rng.choice(list(GROUNDS))), "")])[0]
    latents = torch.from_numpy(rng.normal(size=(1, 4, SIDE // 4, SIDE // 4))).float() * rng.uniform(0.2, 1.2)
    return vae.decode(latents / vae.config.scaling_factor).sample[0].clamp(-1, 1)


def train_classifier(out: Path, vae: Any) -> nn.Module:
    """Trained on drawings, half of them through the autoencoder, as generated pictures are."""
    torch.manual_seed(0)
    training = plan(1500, batch=64, lr=1e-3)
    names, net = [*SHAPES, NOTHING], network().train()

    def loss(step: Draw) -> Tensor:
        rng = step.rng()
        scenes = [scene(rng) for _ in range(training.batch_size)]
        labels = torch.tensor([names.index(one[0]) for one in scenes])
        x = pixels([draw(rng, *one) for one in scenes])
        with torch.no_grad():
            half = len(x) // 2
            x[:half] = vae.decode(vae.encode(x[:half]).latent_dist.sample()).sample.clamp(-1, 1)
            for i in np.flatnonzero(rng.random(len(x)) < 0.1):
                x[i], labels[i] = nothing(rng, vae), len(names) - 1
        x = x + 0.1 * torch.randn(x.shape)
        return nn.functional.cross_entropy(net(x), labels)

    net = train_modules({"classifier": net}, loss, training=training, folder=out / "training-classifier")["classifier"]
    torch.save(net.state_dict(), out / "classifier.pt")
    return net


class Judge:
    """The classifier as a detector of the evaluation."""

    name = "shapes"

    def __init__(self, file: Path) -> None:
        self.net = network()
        self.net.load_state_dict(torch.load(file, weights_only=True))
        self.net.eval()
        self.card = DetectorCard(self.name, "1", labels={"concept": (*SHAPES, NOTHING)})

    def labels(self, attribute: str) -> tuple[str, ...]:
        return self.card.labels.get(attribute, ())

    def scores(self, images: Sequence[Image.Image], attribute: str) -> np.ndarray:
        with torch.no_grad():
            return self.net(pixels([image.convert("RGB") for image in images])).softmax(-1).numpy()


if __name__ == "__main__":
    print(train(Path(sys.argv[1])))
