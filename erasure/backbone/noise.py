"""How a model mixes pictures with noise, and what its denoiser predicts: epsilon, v or flow."""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, Literal

import torch
from torch import Tensor

Time = Literal["thousandths", "sigma", "one_minus_sigma"]


class NoiseModel(abc.ABC):
    """The forward process of a diffusion model and the parameterisation of its denoiser.

    All methods take latents ``(n, ...)`` and times ``t (n,)`` *as the denoiser receives them*.

    Class attributes:
        prediction_type: ``epsilon``, ``v_prediction`` or ``velocity``; stands in configs and cards.
    """

    prediction_type: str

    @abc.abstractmethod
    def mix(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """``x_t`` of clean latents and standard normal noise."""

    @abc.abstractmethod
    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """The prediction of a perfect denoiser at ``mix(x0, eps, t)``."""

    @abc.abstractmethod
    def split(self, prediction: Tensor, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """``(x0, eps)``: the clean latents and the noise that a prediction at ``x`` stands for."""

    @abc.abstractmethod
    def clean(self, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """The latents that ``x`` was mixed from, given the noise in it."""

    @abc.abstractmethod
    def times(self, u: Tensor) -> Tensor:
        """Times for ``u (n,)`` in [0, 1): 0 is the cleanest, 1 pure noise."""


@dataclasses.dataclass(frozen=True)
class Diffusion(NoiseModel):
    """``x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) eps`` (Ho et al. 2020), ``t`` an index of training steps.

    The denoiser predicts ``eps``, or ``v = sqrt(a_t) eps - sqrt(1 - a_t) x_0`` (Salimans and Ho 2022).

    Attributes:
        alphas: ``(T,)`` cumulative products, float32.
        prediction_type: ``epsilon`` or ``v_prediction``.
    """

    alphas: Tensor
    prediction_type: str = "epsilon"

    def mix(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        a = self._alpha(t, x0)
        return a.sqrt() * x0 + (1 - a).sqrt() * eps

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        if self.prediction_type == "epsilon":
            return eps
        a = self._alpha(t, x0)
        return a.sqrt() * eps - (1 - a).sqrt() * x0

    def split(self, prediction: Tensor, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        a = self._alpha(t, x)
        if self.prediction_type == "epsilon":
            return (x - (1 - a).sqrt() * prediction) / a.sqrt(), prediction
        return a.sqrt() * x - (1 - a).sqrt() * prediction, a.sqrt() * prediction + (1 - a).sqrt() * x

    def clean(self, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        a = self._alpha(t, x)
        return (x - (1 - a).sqrt() * eps) / a.sqrt()

    def times(self, u: Tensor) -> Tensor:
        return (u * len(self.alphas)).long()

    def _alpha(self, t: Tensor, like: Tensor) -> Tensor:
        alphas = self.alphas.to(like.device)
        return alphas[t.to(like.device).long()].reshape(-1, *[1] * (like.ndim - 1))


@dataclasses.dataclass(frozen=True)
class Flow(NoiseModel):
    """``x_s = (1 - s) x_0 + s eps`` with the velocity ``eps - x_0`` (Lipman et al. 2023; Liu et al. 2023).

    Attributes:
        time: what the denoiser receives for ``s``: ``sigma`` itself (FLUX, Qwen-Image), ``thousandths`` 1000 s (SD3,
            Wan), or ``one_minus_sigma`` (Z-Image, Lumina 2).
        sign: -1 where the denoiser predicts ``x_0 - eps``.
    """

    time: Time = "thousandths"
    sign: int = 1
    prediction_type: str = "velocity"

    def sigma(self, t: Tensor) -> Tensor:
        """The share of noise, in [0, 1]."""
        t = t.float()
        return {"thousandths": t / 1000, "sigma": t, "one_minus_sigma": 1 - t}[self.time]

    def mix(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        s = self._sigma(t, x0)
        return (1 - s) * x0 + s * eps

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return self.sign * (eps - x0)

    def split(self, prediction: Tensor, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        s, velocity = self._sigma(t, x), self.sign * prediction
        return x - s * velocity, x + (1 - s) * velocity

    def clean(self, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        s = self._sigma(t, x)
        return (x - s * eps) / (1 - s)

    def times(self, u: Tensor) -> Tensor:
        return {"thousandths": 1000 * u, "sigma": u, "one_minus_sigma": 1 - u}[self.time]

    def _sigma(self, t: Tensor, like: Tensor) -> Tensor:
        return self.sigma(t.to(like.device)).reshape(-1, *[1] * (like.ndim - 1))


def diffusion_of(scheduler: Any, *, device: torch.device) -> Diffusion:
    """The noise model of a pipeline whose scheduler keeps cumulative alphas.

    Raises:
        ValueError: the denoiser predicts neither the noise nor v.
    """
    if (predicted := scheduler.config.prediction_type) not in ("epsilon", "v_prediction"):
        raise ValueError(
            f"{type(scheduler).__name__} has prediction_type={predicted!r}; models of epsilon or v_prediction "
            "are supported; give the scheduler that the model was trained with"
        )
    return Diffusion(scheduler.alphas_cumprod.to(device).float(), predicted)


__all__ = ["Diffusion", "Flow", "NoiseModel", "Time", "diffusion_of"]
