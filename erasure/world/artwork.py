"""The drawings of Emoji World.

The artwork of the concepts ships in the package as one 64x64 RGBA PNG per (style, concept); licences and
attribution are in NOTICE. ``python -m erasure.world.artwork`` rebuilds it from the vendors' npm packages, and
gathers the emoji that are *not* concepts of the world, on which alone the autoencoder is trained.
"""

from __future__ import annotations

import argparse
import functools
import importlib.resources
import io
import json
import subprocess
import tarfile
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from erasure.io import writing
from erasure.world.spec import spec

PACKAGES = {
    "noto": ("emoji-datasource-google@16.0.0", "package/img/google/64/{}.png"),
    "twemoji": ("emoji-datasource-twitter@16.0.0", "package/img/twitter/64/{}.png"),
    "fluent": ("@lobehub/fluent-emoji-3d@1.1.0", "package/assets/{}.webp"),
}
# Other drawings of the cat, never shown to the autoencoder either (cat faces, the whole cat). It saw relatives of other
# targets, such as other flowers.
LOOKALIKES = ("1f408", "1f638", "1f639", "1f63a", "1f63b", "1f63c", "1f63d", "1f63e", "1f63f", "1f640")
SKIN_TONES = ("1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff")


@functools.cache
def artwork() -> dict[tuple[str, str], Image.Image]:
    """(concept, style) -> 64x64 RGBA drawing, for every concept and style of the world."""
    root = importlib.resources.files("erasure.world") / "artwork"
    return {
        (concept, style): Image.open(io.BytesIO((root / style / f"{file_name(concept)}.png").read_bytes())).convert(
            "RGBA"
        )
        for style in spec().styles
        for concept in spec().concepts
    }


def file_name(concept: str) -> str:
    return concept.replace(" ", "-")


def strangers(path: Path) -> np.ndarray:
    """The emoji outside the world, as a uint8 array ``(n, 64, 64, 4)``, from the file :func:`build` wrote."""
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: the autoencoder's training images are not there; "
            f"run `python -m erasure.world.artwork --strangers {path}` (needs npm) to gather them"
        )
    with np.load(path, allow_pickle=False) as data:
        return data["images"]


def build(destination: Path | None, strangers_path: Path) -> None:
    """Download the three npm packages and write the concepts' PNGs and the strangers' ``.npz``."""
    codes = {emoji.code: name for name, emoji in spec().concepts.items()}
    images, labels = [], []
    with tempfile.TemporaryDirectory() as folder:
        for style, (package, pattern) in PACKAGES.items():
            for code, image in _read(package, pattern, Path(folder)):
                if code in codes:
                    if destination is not None:
                        target = destination / style / f"{file_name(codes[code])}.png"
                        target.parent.mkdir(parents=True, exist_ok=True)
                        image.save(target, optimize=True)
                elif _is_stranger(code, codes):
                    images.append(np.asarray(image))
                    labels.append(f"{style}/{code}")
    with writing(strangers_path) as partial:  # of the same suffix, .npz: numpy would add it
        np.savez_compressed(partial, images=np.stack(images), labels=np.array(labels))


def _is_stranger(code: str, concepts: dict[str, str]) -> bool:
    parts = code.split("-")
    related = any(code == c or code.startswith(c + "-") for c in (*concepts, *LOOKALIKES))
    return not related and not any(tone in parts for tone in SKIN_TONES)


def _read(package: str, pattern: str, folder: Path):
    """Yield (code, 64x64 RGBA image) for every emoji of one npm package, in the order of their codes."""
    try:
        command = ["npm", "pack", "--json", package]
        packed = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise FileNotFoundError(
            "the emoji outside the world come from npm packages, and npm is not here; install Node.js"
        ) from None
    except subprocess.CalledProcessError as error:
        raise OSError(
            f"npm could not fetch {package}: {error.stderr.strip().splitlines()[-1:]}; check the network"
        ) from None
    prefix, suffix = pattern.split("{}")
    with tarfile.open(folder / json.loads(packed.stdout)[0]["filename"]) as archive:
        members = {
            m.name[len(prefix) : -len(suffix)]: m
            for m in archive
            if m.name.startswith(prefix) and m.name.endswith(suffix)
        }
        for code in sorted(members):
            file = archive.extractfile(members[code])
            if file is None:
                continue  # a folder
            image = Image.open(io.BytesIO(file.read())).convert("RGBA")
            yield code.removesuffix("-fe0f"), image.resize((64, 64), Image.Resampling.LANCZOS)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Rebuild Emoji World's artwork from the vendors' npm packages.")
    parser.add_argument("--concepts", type=Path, help="folder for the concepts' PNGs (default: leave the shipped ones)")
    parser.add_argument(
        "--strangers", type=Path, required=True, help="file for the autoencoder's training images (.npz)"
    )
    arguments = parser.parse_args()
    build(arguments.concepts, arguments.strangers)
