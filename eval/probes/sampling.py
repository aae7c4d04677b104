"""DDIM step by step: sampling that can start from given latents, and be disturbed or steered.

Whatever scheduler a pipeline has, these probes sample with DDIM (Song et al. 2021, arXiv 2010.02502) on its noise
schedule, because it is deterministic. Of a flow model the same step, with the flow's own shares of signal and noise, is
Euler's method on its differential equation (Lipman et al. 2023).
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from diffusers import DDIMScheduler
from PIL import Image
from torch import Tensor

from erasure import runtime
from erasure.backbone import Backbone
from erasure.backbone.noise import Diffusion, Flow
from erasure.backbone.text import Text
from erasure.eval.core.pictures import evenly, noise_of
from erasure.eval.probes.asking import everywhere, named, sentences
from erasure.eval.probes.base import (
    Access,
    Context,
    Evidence,
    Level,
    Model,
    Need,
    Observation,
    Probe,
    Roles,
    Rows,
    Section,
)
from erasure.eval.probes.denoising import backbone_for
from erasure.eval.probes.weigh import contrasts

LEAST_STEPS = 25  # DDIM needs more steps than the multistep samplers that suites draw with

Key = tuple[str, int]  # (prompt or name of a picture, seed): the noise of a sample depends on it alone
Split = tuple[Tensor, Tensor]  # the clean latents and the noise in noised latents


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of the schedule, from more noise to less.

    Noised latents are ``x = α x0 + σ ε``. With the ᾱ of the DDIM paper α = √ᾱ and σ = √(1 - ᾱ); in a flow α = 1 - σ.

    Attributes:
        t: time, as the denoiser gets it.
        alpha, sigma: before the step.
        alpha_prev, sigma_prev: after it, in the numbering of the DDIM paper.
    """

    t: float
    alpha: float
    sigma: float
    alpha_prev: float
    sigma_prev: float

    def added(self, eta: float) -> float:
        """Strength of the noise that is added on the way: DDPM's at ``eta`` 1, none at 0.

            η (σ_{t-1} / σ_t) √(σ_t² - (α_t / α_{t-1})² σ_{t-1}²)

        which for diffusion is the paper's ``η √((1 - ᾱ_{t-1}) / (1 - ᾱ_t)) √(1 - ᾱ_t / ᾱ_{t-1})``.
        """
        variance = self.sigma**2 - (self.alpha / self.alpha_prev * self.sigma_prev) ** 2
        return eta * self.sigma_prev / self.sigma * max(variance, 0.0) ** 0.5


@dataclasses.dataclass(frozen=True)
class DDIM:
    """Sampling with classifier-free guidance, step by step.

    Attributes:
        num_inference_steps: of the whole trajectory, from pure noise.
        guidance_scale: as the pipeline takes it. Classifier-free guidance stops where the pipeline's does, and at the
            empty prompt; models with embedded guidance are given the number, and distilled ones have none.
        batch_size: rows per pass. autocast: bfloat16 arithmetic.
    """

    backbone: Backbone
    num_inference_steps: int = 25
    guidance_scale: float = 5.0
    batch_size: int = 16
    autocast: bool = False

    @classmethod
    def of(cls, context: Context) -> DDIM:
        """With the suite's guidance and its steps, at least 25, on the pipeline without any filter."""
        suite, backbone = context.suite, backbone_for(context.pipe)
        return cls(
            backbone,
            max(suite.num_inference_steps, LEAST_STEPS),
            suite.guidance_scale,
            context.batch_size,
            context.autocast,
        )

    @functools.cached_property
    def steps(self) -> tuple[Step, ...]:
        """The schedule, from pure noise to none."""
        if isinstance(self.backbone.noise, Diffusion):
            return self._diffusion_steps()
        shares = self.backbone.sigmas(self.num_inference_steps)
        times = self.backbone.noise.times(torch.tensor(shares, dtype=torch.float64)).tolist()
        return tuple(Step(t, 1 - s, s, 1 - p, p) for t, s, p in zip(times, shares, shares[1:], strict=False))

    def _diffusion_steps(self) -> tuple[Step, ...]:
        scheduler = DDIMScheduler.from_config(self.backbone.pipe.scheduler.config)
        scheduler.set_timesteps(self.num_inference_steps)
        alphas, last = scheduler.alphas_cumprod.tolist(), float(scheduler.final_alpha_cumprod)
        gap = scheduler.config.num_train_timesteps // self.num_inference_steps
        found = []
        for t in scheduler.timesteps.tolist():
            a, prev = alphas[t], alphas[t - gap] if t >= gap else last
            found.append(Step(t, a**0.5, (1 - a) ** 0.5, prev**0.5, (1 - prev) ** 0.5))
        return tuple(found)

    @property
    def guided(self) -> bool:
        """Whether two predictions are compared at every step."""
        return self.backbone.guidance == "cfg" and self.guidance_scale > self.backbone.no_guidance

    def starts(self, keys: Sequence[Key]) -> Tensor:
        """Standard normal latents ``(n, *latent_shape)``, those of :func:`erasure.eval.core.pictures.generate`."""
        noise = [noise_of(self.backbone.latent_shape, name, seed) for name, seed in keys]
        return torch.stack(noise).to(self.backbone.device)

    @torch.no_grad()
    def sample(
        self,
        x: Tensor,
        prompts: Sequence[str],
        *,
        start: int = 0,
        stop: int | None = None,
        eta: float = 0.0,
        scale: float = 1.0,
        keys: Sequence[Key] | None = None,
        text: Text | None = None,
        empty: Text | None = None,
        split: Callable[[Tensor, Step, Text, Text | None], Split] | None = None,
        mend: Callable[[Tensor, Step, slice], Tensor] | None = None,
    ) -> Tensor:
        """Latents after the steps ``start`` to ``stop``.

            x_{t-1} = α_{t-1} x̂0 + √max(σ_{t-1}² - s², 0) ε̂ + scale s z,    s as Step.added says

        Above η = 1 the root's argument may be negative, which gives NaN in the stock scheduler; here it is 0 then.

        Args:
            x: ``(n, *latent_shape)`` with the noise of step ``start``.
            prompts: ``n`` of them.
            start, stop: numbers of steps, from 0 at pure noise; to the end by default.
            eta: 0 is deterministic, 1 adds as much noise as DDPM, more is more than the model was trained for.
            scale: of the added noise alone.
            keys: of the added noise ``z``; needed with ``eta``.
            text, empty: ``n`` rows and one row that :meth:`texts` made of the prompts and of the empty prompt; what
                the pipeline's own text encoder makes of them by default.
            split: replaces :meth:`split`, to steer.
            mend: changes ``x`` after each step, given the step and which of the ``n`` rows these are.

        Raises:
            ValueError: ``eta`` without keys.
        """
        if eta > 0 and keys is None:
            raise ValueError(f"noise on the way needs keys to draw it from; got eta={eta}; give one key per row")
        split, steps = split or self.split, list(enumerate(self.steps))[start:stop]
        null = self.backbone.null_prompt or ""
        empty = (empty or self.texts([null])) if self.guided and any(prompts) else None
        out = []
        with runtime.autocast(x.device, self.autocast):
            for rows in (slice(i, i + self.batch_size) for i in range(0, len(x), self.batch_size)):
                part, given = x[rows], self.texts(prompts[rows]) if text is None else text[rows]
                for i, step in steps:
                    added = step.added(eta)
                    left = max(step.sigma_prev**2 - added**2, 0) ** 0.5 if eta else step.sigma_prev
                    clean, noise = split(part, step, given, empty)
                    part = step.alpha_prev * clean + left * noise
                    if added > 0 and keys is not None:
                        part = part + scale * added * self.starts([(f"{name}, step {i}", s) for name, s in keys[rows]])
                    part = mend(part, step, rows) if mend else part
                out.append(part)
        return torch.cat(out)

    @torch.no_grad()
    def texts(self, prompts: Sequence[str]) -> Text:
        """What the pipeline's text encoders, as they now are, make of prompts."""
        return self.backbone.encode(prompts).text

    def split(self, x: Tensor, step: Step, text: Text, empty: Text | None = None) -> Split:
        """The model's estimates of the parts of noised latents, ``x = α x̂0 + σ ε̂``; differentiable.

        Args:
            text: one row each. empty: one row of the empty prompt, to guide away from; None without guidance.
        """
        t = torch.full((len(x),), step.t, device=x.device)
        predicted = self._predicted(x, t, text, empty)
        if isinstance(self.backbone.noise, Flow):
            return self.backbone.noise.split(predicted, x, t)
        _, noise = self.backbone.noise.split(predicted, x, t)
        if self.backbone.prediction_type == "v_prediction":  # in which ᾱ may be 0
            return step.alpha * x - step.sigma * predicted, noise
        return (x - step.sigma * noise) / step.alpha, noise

    def _predicted(self, x: Tensor, t: Tensor, text: Text, empty: Text | None) -> Tensor:
        backbone = self.backbone
        if empty is None:
            number = self.guidance_scale if backbone.guidance == "embedded" else None
            return backbone.predict_float(x, t, text, guidance=number)
        without = empty.repeat(len(x))
        if without.hidden.shape != text.hidden.shape or backbone.guidance_calls:
            unconditional, conditional = (backbone.predict_float(x, t, one) for one in (without, text))
        else:
            both = backbone.predict_float(torch.cat([x, x]), torch.cat([t, t]), without + text)
            unconditional, conditional = both.chunk(2)
        # in most pipelines 1 is the prompt's own prediction, in Z-Image's 0 is
        return unconditional + (self.guidance_scale + 1 - backbone.no_guidance) * (conditional - unconditional)


def noised(x: Tensor, noise: Tensor, alpha: float, sigma: float) -> Tensor:
    """``α x + σ noise`` for clean latents ``x``."""
    return alpha * x + sigma * noise


# --- the probes that sample so ----------------------------------------------------------------------------------------


class Shot(NamedTuple):
    """Pictures of one family, one for each key; ``facts`` of each picture, or one mapping for all.

    ``labels`` are what to look for in each; the target by default.
    """

    family: str
    keys: Sequence[Key]
    images: Sequence[Image.Image]
    facts: Sequence[Mapping[str, Any]] | Mapping[str, Any]
    labels: Sequence[str] | None = None


@dataclasses.dataclass(frozen=True)
class Sampled(Probe):
    """A probe of removal that samples with :class:`DDIM`.

    Class attribute ``along``: the word of a setting along which it samples; its families are "psi 0.3" and so on.
    """

    section: ClassVar[Section] = "removal"
    level: ClassVar[Level] = "behaviour"
    access: ClassVar[Access] = "white_box"
    needs: ClassVar[tuple[Need, ...]] = ("base", "control")
    not_licensed = "knowledge in the weights, unless above a model that never saw the target"
    along: ClassVar[str] = ""

    @abc.abstractmethod
    def shots(self, sampler: DDIM, model: Model, context: Context) -> Iterator[Shot]:
        """The pictures of every family. It opens the model, and the base where it needs it."""

    def run(self, model: Model, context: Context) -> list[Observation]:
        found = []
        for family, keys, images, facts, labels in self.shots(DDIM.of(context), model, context):
            each = [facts] * len(keys) if isinstance(facts, Mapping) else facts
            names, seeds = [name for name, _ in keys], [seed for _, seed in keys]
            found += context.observe(
                model, images, family=family, clusters=names, seeds=seeds, facts=each, label=labels
            )
        return found

    def weigh(self, rows: Rows, models: Roles) -> list[Evidence]:
        return contrasts(self.key, rows, models)

    def family(self, dose: float) -> str:
        return f"{self.along} {dose:g}"

    def doses(self, rows: Rows, models: Roles, doses: Sequence[float], declared: float) -> list[Evidence]:
        """Contrasts of the dose declared in advance, as those of the whole probe, then of every dose."""
        each = [e for dose in doses for e in contrasts(self.key, rows, models, self.family(dose))]
        return headline(self.key, rows, models, self.family(declared)) + each


@dataclasses.dataclass(frozen=True)
class FromPictures(Sampled):
    """A probe that starts from real pictures of the target, each with ``images_per_picture`` seeds."""

    needs = ("base", "material", "control")
    presets = {"smoke": {"pictures": 2}, "standard": {}, "full": {"pictures": 50, "images_per_picture": 2}}

    pictures: int = 30
    images_per_picture: int = 1

    def real(self, context: Context) -> tuple[list[Key], list[Image.Image]]:
        examples = context.real("target", self.pictures)
        images = [example.image for example in examples for _ in range(self.images_per_picture)]
        return keys_of([example.key for example in examples], self.images_per_picture), images


# --- what they ask with, and what they say --------------------------------------------------------------------------


def target_prompts(context: Context, limit: int) -> list[str]:
    """At most this many prompts for the target, spread evenly: the suite's, and where they are too few every sentence
    that names it."""
    suite = context.suite
    own = [sentence.text for sentence in named(suite)]
    for templates in (everywhere(suite), suite.further):
        if limit > len(own):
            own = list(dict.fromkeys([*own, *sentences(context, suite.concept.phrases, templates=templates)]))
    return evenly(own, limit)


def keys_of(names: Sequence[str], seeds: int) -> list[Key]:
    return [(name, seed) for name in names for seed in range(seeds)]


def headline(probe: str, rows: Rows, models: Roles, family: str) -> list[Evidence]:
    """Contrasts of the family declared in advance, as those of the whole probe: their family is ""."""
    found = contrasts(probe, rows, models, family)
    return [dataclasses.replace(evidence, family="", note=f"at {family}") for evidence in found]
