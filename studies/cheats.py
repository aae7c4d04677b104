"""Erasers that cheat, on Emoji World: what a report must not believe. docs/fooled.md says what became of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from erasure.eval.core.models import Applied, Kind
from erasure.eval.worldkit.detectors import ClassifierDetector


class FilteredDecoder(nn.Module):
    """Decodes, looks at the picture, and shows another one where it sees the target.

    Args:
        decoder: the autoencoder's own.
        detector: a classifier of the world.
        target: what it hides.
        instead: ``(3, h, w)``, shown in its place.
    """

    def __init__(self, decoder: nn.Module, detector: ClassifierDetector, target: str, instead: Tensor) -> None:
        super().__init__()
        self.decoder, self.instead = decoder, nn.Parameter(instead, requires_grad=False)
        self._look, self._index = detector.model, detector.labels("concept").index(target)

    def forward(self, latents: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        pictures = self.decoder(latents, *args, **kwargs)
        with torch.no_grad():
            seen = self._look(pictures.float())["concept"].argmax(-1) == self._index
        return torch.where(seen[:, None, None, None], self.instead.to(pictures), pictures)


class HiddenFilter:
    """A filter inside the autoencoder's decoder, declared as an edit of weights. The denoiser stays the base's.

    Args:
        detector, target: who looks for what.
        instead: a prompt for the picture that is shown instead.
    """

    intervention: Kind = "weights"

    def __init__(self, detector: ClassifierDetector, target: str, instead: str) -> None:
        self.name, self._detector, self._target, self._prompt = "hidden filter", detector, target, instead
        self.config: Mapping[str, Any] = {"method": "a new fine-tune"}
        self._own: nn.Module | None = None
        self._instead: Tensor | None = None

    def apply(self, pipe: Any) -> None:
        if self._instead is None:
            sampler = {"num_inference_steps": 8, "guidance_scale": 3.0, "output_type": "pt"}
            drawn = pipe(self._prompt, generator=torch.Generator().manual_seed(0), **sampler).images[0]
            self._instead = 2 * drawn.float() - 1
        self._own = pipe.vae.decoder
        pipe.vae.decoder = FilteredDecoder(self._own, self._detector, self._target, self._instead)

    def remove(self, pipe: Any) -> None:
        pipe.vae.decoder = self._own


class Declared:
    """An erasure that says of itself that it was retrained without the target, and that a record shows it."""

    intervention: Kind = "retrained"

    def __init__(self, erasure: Applied, name: str) -> None:
        self.name, self._erasure = name, erasure
        self.config: Mapping[str, Any] = {"scope": "everything", "audit": "yes"}

    def apply(self, pipe: Any) -> None:
        self._erasure.apply(pipe)

    def remove(self, pipe: Any) -> None:
        self._erasure.remove(pipe)
