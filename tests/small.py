"""Pipelines that draw at a size tests can afford, whoever calls them."""

from __future__ import annotations

import functools
from typing import Any

from diffusers import AutoencoderKL
from diffusers.image_processor import VaeImageProcessor

from tests.every import build
from tests.tiny_joint import autoencoder

PIXELS = {"wan": 32, "wan2.2": 32, "z-image": 16}  # whose default size no config holds


def small(name: str, *, seed: int = 0) -> Any:
    """A tiny pipeline of :data:`tests.every.EVERY` whose call draws eight latent pixels a side, or two of Wan's."""
    pipe = build(name, seed=seed)
    pipe.set_progress_bar_config(disable=True)
    if name == "z-image":  # eight latent pixels of 16, as most have, and not of 1024
        pipe.vae, pipe.vae_scale_factor = autoencoder(AutoencoderKL, 4), 2
        pipe.image_processor = VaeImageProcessor(vae_scale_factor=4)
    if name == "lumina2":  # whose autoencoder is FLUX's, with a shift
        pipe.vae.register_to_config(shift_factor=0.0)
    if name in PIXELS:
        kind, size = type(pipe), {"height": PIXELS[name], "width": PIXELS[name]}

        @functools.wraps(kind.__call__)
        def call(self: Any, *args: Any, **settings: Any) -> Any:
            return kind.__call__(self, *args, **{**size, **settings})

        pipe.__class__ = type(kind.__name__, (kind,), {"__call__": call})
    return pipe
