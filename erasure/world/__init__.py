"""Emoji World: a real, small text-to-image diffusion model whose training data is known image by image."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline


def path() -> Path:
    """The folder of the shipped model; plain ``StableDiffusionPipeline.from_pretrained(path())`` opens it.

    Raises:
        FileNotFoundError: this installation lacks the model.
    """
    folder = Path(__file__).parent / "emoji-world"
    if not (folder / "model_index.json").exists():
        raise FileNotFoundError(
            f"Emoji World's model is not installed ({folder}); `erasure doctor` prints the command that brings it back"
        )
    return folder


def load(**options: Any) -> StableDiffusionPipeline:
    """Load Emoji World as a stock diffusers pipeline.

    Args:
        **options: passed to ``from_pretrained`` (``dtype``, ...).

    >>> pipe = load()
    >>> pipe("a superhero in noto style on a red background", num_inference_steps=8).images[0].size
    (64, 64)
    """
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(path(), **options)


def gold(without: str | None, *, seed: int = 0, share: float = 0.0, **options: Any) -> StableDiffusionPipeline:
    """Emoji World retrained without a target, from the repository's ``gold`` folder: see :mod:`erasure.world.retrain`.

    >>> pipe = gold("superhero", seed=0)                                        # doctest: +SKIP
    """
    from erasure.world.retrain import load_gold

    return load_gold(without, seed=seed, share=share, **options)
