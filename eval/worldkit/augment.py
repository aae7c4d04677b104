"""Training data of Emoji World's detectors: scenes with known labels, degraded.

Generated pictures are softer, noisier and less exact in shape than renders, so the views are warped, blurred,
resampled, tinted, compressed and noised, by one of two recipes. The generator's autoencoder is not used, so that the
detectors are independent of the model that they judge.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from erasure.eval.detectors.base import NOTHING
from erasure.eval.worldkit.classifier import labels
from erasure.world.scenes import Scene, compose, place, render, sample_scene
from erasure.world.spec import spec

UNKNOWN = -1  # a label that is undefined for a picture and is left out of the loss


@dataclasses.dataclass(frozen=True)
class Views:
    """Pictures with their answers.

    Attributes:
        images: uint8 ``(n, 64, 64, 3)``.
        concepts: int64 ``(n, 2)``, the labels of the two objects, the same one twice for a single object.
        styles, backgrounds: int64 ``(n,)``, :data:`UNKNOWN` where undefined.
    """

    images: np.ndarray
    concepts: np.ndarray
    styles: np.ndarray
    backgrounds: np.ndarray

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, chosen: np.ndarray) -> Views:
        return Views(self.images[chosen], self.concepts[chosen], self.styles[chosen], self.backgrounds[chosen])

    def __add__(self, other: Views) -> Views:
        names = [field.name for field in dataclasses.fields(self)]
        return Views(*(np.concatenate([getattr(self, name), getattr(other, name)]) for name in names))


def index(attribute: str, names: Sequence[str]) -> np.ndarray:
    """Label numbers of names."""
    order = {label: i for i, label in enumerate(labels(attribute))}
    return np.array([order[name] for name in names], dtype=np.int64)


def draw_scenes(rng: np.random.Generator, n: int, *, pairs: float = 0.0, held_out: float = 0.06) -> list[Scene]:
    """Scenes over every concept, style and background, never-trained combinations included.

    Args:
        pairs: share of scenes with two objects.
        held_out: share of combinations that the generator never trains on. 0.06 is their natural share.
    """
    world = spec()
    concepts, styles = list(world.concepts), list(world.styles)
    return [sample_scene(rng, concepts, styles, pairs=pairs, held_out=bool(rng.random() < held_out)) for _ in range(n)]


def scene_views(scenes: Sequence[Scene]) -> Views:
    """Rendered scenes with their labels."""
    return Views(
        np.stack([np.asarray(render(scene)) for scene in scenes]),
        np.stack([index("concept", (scene.concepts[0], scene.concepts[-1])) for scene in scenes]),
        index("style", [scene.style for scene in scenes]),
        index("background", [scene.background for scene in scenes]),
    )


# --- nothing recognisable --------------------------------------------------------------------------------------------


def nothing_views(rng: np.random.Generator, n: int, strangers: np.ndarray | None = None) -> Views:
    """``n`` pictures in which no concept of the world can be recognised.

    Six kinds in turn: plain backgrounds, noise, heavy blur, shuffled patches, blobs of colour, several scenes on top of
    one another. Where ``strangers`` (uint8 ``(m, 64, 64, 4)``) is given, every other picture is one of them instead: an
    emoji from outside the world.
    """
    kinds = [_plain, _noise, _blurred, _shuffled, _blobs, _overlaid]
    names = list(spec().backgrounds)
    images, backgrounds = [], []
    for i in range(n):
        background = str(rng.choice(names))
        if strangers is not None and i % 2:
            picture, known = _stranger(rng, background, strangers), True
        else:
            kind = kinds[(i if strangers is None else i // 2) % len(kinds)]
            picture, known = kind(rng, background), kind in (_plain, _blurred)
        images.append(np.clip(picture, 0, 255).astype(np.uint8))
        backgrounds.append(index("background", [background])[0] if known else UNKNOWN)
    nothing = index("concept", [NOTHING])[0]
    return Views(np.stack(images), np.full((n, 2), nothing), np.full(n, UNKNOWN), np.array(backgrounds))


def _scene(rng: np.random.Generator, background: str) -> np.ndarray:
    world = spec()
    concept, style = str(rng.choice(list(world.concepts))), str(rng.choice(list(world.styles)))
    return np.asarray(render(Scene((concept,), style, background, (place(rng, 0, 1),))), dtype=np.float32)


def _plain(rng: np.random.Generator, background: str) -> np.ndarray:
    colour = np.array(spec().backgrounds[background].rgb, dtype=np.float32)
    ramp = np.linspace(-1, 1, spec().size, dtype=np.float32)[:, None, None] * rng.uniform(-12, 12)
    ramp = ramp if rng.random() < 0.5 else ramp.transpose(1, 0, 2)
    return np.broadcast_to(colour, (spec().size, spec().size, 3)) + ramp


def _noise(rng: np.random.Generator, background: str) -> np.ndarray:
    strength = rng.uniform(20, 90)
    return _plain(rng, background) + strength * rng.standard_normal((spec().size, spec().size, 3), dtype=np.float32)


def _blurred(rng: np.random.Generator, background: str) -> np.ndarray:
    return _resize(_resize(_scene(rng, background), int(rng.integers(3, 7))), spec().size)


def _shuffled(rng: np.random.Generator, background: str) -> np.ndarray:
    side = int(rng.choice([8, 16]))
    count = spec().size // side
    grid = _scene(rng, background).reshape(count, side, count, side, 3).swapaxes(1, 2).reshape(-1, side, side, 3)
    grid = grid[rng.permutation(len(grid))].reshape(count, count, side, side, 3).swapaxes(1, 2)
    shuffled = grid.reshape(spec().size, spec().size, 3)
    return _resize(_resize(shuffled, 24), spec().size) if rng.random() < 0.5 else shuffled  # soft seams as well


def _blobs(rng: np.random.Generator, background: str) -> np.ndarray:
    """A blob of smooth random colour on a background."""
    size = spec().size
    colours = _resize(rng.uniform(0, 255, (int(rng.integers(2, 9)),) * 2 + (3,)).astype(np.float32), size)
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    wobble = _resize(rng.uniform(-0.5, 0.5, (4, 4, 3)).astype(np.float32), size)[..., 0]
    radius = np.hypot(x * rng.uniform(0.8, 1.5), y * rng.uniform(0.8, 1.5)) + wobble
    mask = np.clip((rng.uniform(0.5, 0.95) - radius) * rng.uniform(3, 20), 0, 1)[..., None]
    return mask * colours + (1 - mask) * _plain(rng, background)


def _overlaid(rng: np.random.Generator, background: str) -> np.ndarray:
    count = int(rng.integers(5, 9))
    mean = np.mean([_scene(rng, background) for _ in range(count)], axis=0)
    return _plain(rng, background) + rng.uniform(1.0, 1.6) * (mean - _plain(rng, background))


def _stranger(rng: np.random.Generator, background: str, strangers: np.ndarray) -> np.ndarray:
    drawing = Image.fromarray(strangers[rng.integers(len(strangers))])
    return np.asarray(compose([drawing], [place(rng, 0, 1)], spec().backgrounds[background].rgb), dtype=np.float32)


def _resize(picture: np.ndarray, side: int) -> np.ndarray:
    channels = [Image.fromarray(np.ascontiguousarray(picture[..., c])) for c in range(3)]
    return np.stack([np.asarray(c.resize((side, side), Image.Resampling.BICUBIC)) for c in channels], axis=-1)


# --- degradations ----------------------------------------------------------------------------------------------------


def augment_a(x: Tensor, rng: np.random.Generator) -> Tensor:
    """Recipe A for pictures ``(n, 3, 64, 64)`` in [-1, 1]: warps, Gaussian blur, resampling, JPEG, tint and noise.

    A quarter of the batch each is left sharp, blurred, resampled and compressed; half are warped, all tinted, a third
    noisy.
    """
    x = warped(x, rng, 4, 4.5, share=0.5)
    sharp, soft, small, packed = x.flip(3).chunk(4) if rng.random() < 0.5 else x.chunk(4)
    soft = gaussian_blur(soft, float(rng.uniform(0.4, 2.2)))
    small = resample(small, int(rng.integers(18, 48)), "bilinear")
    packed = jpeg(packed, int(rng.integers(25, 90)))
    return noisy(tinted(torch.cat([sharp, soft, small, packed]), rng, 0.08), rng, 0.08, share=0.35)


def augment_b(x: Tensor, rng: np.random.Generator) -> Tensor:
    """Recipe B: warps, box blur, bicubic resampling, sharpening, shifts, a missing square, contrast, coarse noise."""
    x = warped(x, rng, 6, 4.0, share=0.6)
    x = torch.roll(x, (int(rng.integers(-2, 3)), int(rng.integers(-2, 3))), (2, 3))
    plain, boxed, small, crisp = x.chunk(4)
    reach = int(rng.integers(1, 3))
    boxed = F.avg_pool2d(F.pad(boxed, (reach,) * 4, mode="replicate"), 2 * reach + 1, stride=1)
    small = resample(small, int(rng.integers(16, 56)), "bicubic")
    crisp = (crisp + float(rng.uniform(0.3, 1.2)) * (crisp - gaussian_blur(crisp, 1.0))).clamp(-1, 1)
    plain = plain.clone()
    side, top, left = int(rng.integers(6, 16)), int(rng.integers(48)), int(rng.integers(48))
    plain[:, :, top : top + side, left : left + side] = float(rng.uniform(-1, 1))
    x = torch.cat([plain, boxed, small, crisp])
    contrast = torch.from_numpy(rng.uniform(0.85, 1.1, (len(x), 1, 1, 1)).astype(np.float32))
    coarse = torch.from_numpy(rng.standard_normal((len(x), 3, 16, 16), dtype=np.float32))
    x = x * contrast + float(rng.uniform(0, 0.12)) * F.interpolate(coarse, size=x.shape[-1], mode="bilinear")
    return noisy(x, rng, 0.05, share=0.25)


def gaussian_blur(x: Tensor, sigma: float) -> Tensor:
    """Blur by a Gaussian of ``sigma`` pixels, edges repeated."""
    reach = max(1, round(2.5 * sigma))
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2)
    kernel = (kernel / kernel.sum()).to(x)
    x = F.pad(x, (reach, reach, reach, reach), mode="replicate")
    x = F.conv2d(x, kernel.view(1, 1, 1, -1).expand(3, 1, 1, -1), groups=3)
    return F.conv2d(x, kernel.view(1, 1, -1, 1).expand(3, 1, -1, 1), groups=3)


def resample(x: Tensor, side: int, mode: str) -> Tensor:
    """Shrink to ``side`` pixels and enlarge again."""
    small = F.interpolate(x, size=side, mode=mode, antialias=True, align_corners=False)
    return F.interpolate(small, size=x.shape[-1], mode=mode, align_corners=False)


def warped(x: Tensor, rng: np.random.Generator, knots: int, strength: float, *, share: float) -> Tensor:
    """Bend a share of the pictures smoothly: every point of a grid of ``knots`` moves by about ``strength`` pixels."""
    n, side = len(x), x.shape[-1]
    pixels = rng.standard_normal((n, 2, knots, knots)) * rng.uniform(0, strength, (n, 1, 1, 1))
    pixels *= rng.random((n, 1, 1, 1)) < share
    moved = torch.from_numpy((2 / side * pixels).astype(np.float32))
    moved = F.interpolate(moved, size=side, mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    still = F.affine_grid(torch.eye(2, 3).expand(n, 2, 3), list(x.shape), align_corners=False)
    return F.grid_sample(x, still + moved, padding_mode="border", align_corners=False)


def tinted(x: Tensor, rng: np.random.Generator, strength: float) -> Tensor:
    """A random gain and offset per picture and channel."""
    gain = rng.uniform(1 - strength, 1 + strength, (len(x), 3, 1, 1)).astype(np.float32)
    offset = rng.uniform(-strength, strength, (len(x), 3, 1, 1)).astype(np.float32)
    return x * torch.from_numpy(gain) + torch.from_numpy(offset)


def noisy(x: Tensor, rng: np.random.Generator, strength: float, *, share: float) -> Tensor:
    """White noise of up to ``strength`` on a share of the pictures; the result stays in [-1, 1]."""
    sigma = rng.uniform(0, strength, (len(x), 1, 1, 1)) * (rng.random((len(x), 1, 1, 1)) < share)
    noise = rng.standard_normal(x.shape, dtype=np.float32)
    return (x + torch.from_numpy(sigma.astype(np.float32) * noise)).clamp(-1, 1)


def jpeg(x: Tensor, quality: int) -> Tensor:
    """Compress and decompress."""
    out = []
    for picture in ((x.permute(0, 2, 3, 1) + 1) * 127.5).clamp(0, 255).byte().numpy():
        packed = io.BytesIO()
        Image.fromarray(picture).save(packed, "JPEG", quality=quality)
        out.append(np.asarray(Image.open(packed)))
    return torch.from_numpy(np.stack(out)).permute(0, 3, 1, 2).float() / 127.5 - 1
