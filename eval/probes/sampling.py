"""DDIM step by step: sampling that can start from given latents, and be disturbed or steered.

Whatever scheduler a pipeline has, these probes sample with DDIM (Song et al. 2021, arXiv 2010.02502) on its noise
schedule, because it is deterministic.
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
from erasure.backbone.noise import Diffusion
from erasure.backbone.text import Text
from erasure.eval.core.models import Model
from erasure.eval.core.pictures import evenly, initial_noise
from erasure.eval.probes.asking import everywhere, named, sentences
from erasure.eval.probes.base import (
    Access,
    Context,
    Evidence,
    Level,
    Missing,
    Need,
    Observation,
    Probe,
    Roles,
    Rows,
    Section,
)
from erasure.eval.probes.denoising import backbone_for
from erasure.eval.probes.weigh import KNOWN, contrasts

LEAST_STEPS = 25  # DDIM needs more steps than the multistep samplers that suites draw with

Key = tuple[str, int]  # (prompt or name of a picture, seed): the noise of a sample depends on it alone
Split = tuple[Tensor, Tensor]  # the clean latents and the noise in noised latents


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of the schedule, from more noise to less.

    Attributes:
        t: timestep, as the denoiser gets it.
        a: share of signal before the step, ᾱ_t (a variance, 0 to 1).
        a_prev: share of signal after it, ᾱ_{t-1} in the numbering of the DDIM paper.
    """

    t: int
    a: float
    a_prev: float


@dataclasses.dataclass(frozen=True)
class DDIM:
    """Sampling with classifier-free guidance, step by step.

    Attributes:
        backbone: of the pipeline.
        num_inference_steps: of the whole trajectory, from pure noise.
        guidance_scale: as in diffusers; there is no guidance at 1 and below, nor with the empty prompt.
        batch_size: rows per pass.
        autocast: bfloat16 arithmetic.
    """

    backbone: Backbone
    num_inference_steps: int = 25
    guidance_scale: float = 5.0
    batch_size: int = 16
    autocast: bool = False

    @classmethod
    def of(cls, context: Context) -> DDIM:
        """With the suite's guidance and its steps, at least 25, on the pipeline without any filter.

        Raises:
            Missing: a flow model, or packed latents.
        """
        suite, backbone = context.suite, backbone_for(context.pipe)
        if not isinstance(backbone.noise, Diffusion):
            raise Missing(f"this probe samples with DDIM, and {backbone.pipelines} is a flow model, which has none")
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
        scheduler = DDIMScheduler.from_config(self.backbone.pipe.scheduler.config)
        scheduler.set_timesteps(self.num_inference_steps)
        alphas, last = scheduler.alphas_cumprod.tolist(), float(scheduler.final_alpha_cumprod)
        gap = scheduler.config.num_train_timesteps // self.num_inference_steps
        return tuple(Step(t, alphas[t], alphas[t - gap] if t >= gap else last) for t in scheduler.timesteps.tolist())

    def starts(self, keys: Sequence[Key]) -> Tensor:
        """Standard normal latents ``(n, c, h, w)``, as :func:`erasure.eval.core.pictures.generate` starts from."""
        noise = [initial_noise(self.backbone.pipe, name, seed) for name, seed in keys]
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

            x_{t-1} = √ᾱ_{t-1} x̂0 + √max(1 - ᾱ_{t-1} - σ², 0) ε̂ + scale σ z,
            σ = η √((1 - ᾱ_{t-1}) / (1 - ᾱ_t)) √(1 - ᾱ_t / ᾱ_{t-1})

        Above η = 1 the root's argument may be negative, which gives NaN in the stock scheduler; here it is 0 then.

        Args:
            x: ``(n, c, h, w)`` with the noise of step ``start``.
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
        empty = (empty or self.texts([""])) if self.guidance_scale > 1 and any(prompts) else None
        out = []
        with runtime.autocast(x.device, self.autocast):
            for rows in self._batches(len(x)):
                part, given = x[rows], self.texts(prompts[rows]) if text is None else text[rows]
                for i, step in steps:
                    sigma = eta * ((1 - step.a_prev) / (1 - step.a) * (1 - step.a / step.a_prev)) ** 0.5
                    clean, noise = split(part, step, given, empty)
                    part = step.a_prev**0.5 * clean + max(1 - step.a_prev - sigma**2, 0) ** 0.5 * noise
                    if sigma > 0 and keys is not None:
                        part = part + scale * sigma * self.starts([(f"{name}, step {i}", s) for name, s in keys[rows]])
                    part = mend(part, step, rows) if mend else part
                out.append(part)
        return torch.cat(out)

    @torch.no_grad()
    def texts(self, prompts: Sequence[str]) -> Text:
        """What the pipeline's text encoders, as they now are, make of prompts."""
        return self.backbone.encode(prompts).text

    def split(self, x: Tensor, step: Step, text: Text, empty: Text | None = None) -> Split:
        """The model's estimates of the parts of noised latents, ``x = √ᾱ x̂0 + √(1 - ᾱ) ε̂``; differentiable.

        Args:
            text: one row each. empty: one row of the empty prompt, to guide away from; None without guidance.
        """
        t = torch.full((len(x),), step.t, device=x.device)
        if empty is None:
            predicted = self.backbone.predict_float(x, t, text)
        else:
            both = self.backbone.predict_float(torch.cat([x, x]), torch.cat([t, t]), empty.repeat(len(x)) + text)
            unconditional, conditional = both.chunk(2)
            predicted = unconditional + self.guidance_scale * (conditional - unconditional)
        _, noise = self.backbone.noise.split(predicted, x, t)
        if self.backbone.prediction_type == "v_prediction":  # in which ᾱ may be 0
            return step.a**0.5 * x - (1 - step.a) ** 0.5 * predicted, noise
        return (x - (1 - step.a) ** 0.5 * noise) / step.a**0.5, noise

    def _batches(self, count: int) -> Iterator[slice]:
        return (slice(i, min(i + self.batch_size, count)) for i in range(0, count, self.batch_size))


def noised(x: Tensor, noise: Tensor, a: float) -> Tensor:
    """``√ᾱ x + √(1 - ᾱ) noise`` for clean latents ``x``."""
    return a**0.5 * x + (1 - a) ** 0.5 * noise


# --- the probes that sample so ----------------------------------------------------------------------------------------


class Shot(NamedTuple):
    """Pictures of one family, one for each key.

    Attributes:
        facts: of each picture, or one mapping for all.
    """

    family: str
    keys: Sequence[Key]
    images: Sequence[Image.Image]
    facts: Sequence[Mapping[str, Any]] | Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Sampled(Probe):
    """A probe of removal that samples with :class:`DDIM`."""

    section: ClassVar[Section] = "removal"
    level: ClassVar[Level] = "behaviour"
    access: ClassVar[Access] = "white_box"
    needs: ClassVar[tuple[Need, ...]] = ("base", "control")
    not_licensed = "knowledge in the weights, unless above a model that never saw the target"

    @abc.abstractmethod
    def shots(self, sampler: DDIM, model: Model, context: Context) -> Iterator[Shot]:
        """The pictures of every family. It opens the model, and the base where it needs it."""

    def run(self, model: Model, context: Context) -> list[Observation]:
        found = []
        for family, keys, images, facts in self.shots(DDIM.of(context), model, context):
            each = [facts] * len(keys) if isinstance(facts, Mapping) else facts
            names, seeds = [name for name, _ in keys], [seed for _, seed in keys]
            found += context.observe(model, images, family=family, clusters=names, seeds=seeds, facts=each)
        return found


@dataclasses.dataclass(frozen=True)
class FromPictures(Sampled):
    """A probe that starts from real pictures of the target.

    Attributes:
        pictures: how many, which the base was not trained on. images_per_picture: seeds of each.
    """

    needs = ("base", "material", "control")
    presets = {"smoke": {"pictures": 2}, "standard": {}, "full": {"pictures": 50, "images_per_picture": 2}}

    pictures: int = 30
    images_per_picture: int = 1

    def real(self, context: Context) -> tuple[list[Key], list[Image.Image]]:
        """Every picture with every seed."""
        examples = context.real("target", self.pictures)
        images = [example.image for example in examples for _ in range(self.images_per_picture)]
        return keys_of([example.key for example in examples], self.images_per_picture), images


def doses(probe: str, rows: Rows, models: Roles, families: Sequence[str], *, declared: str) -> list[Evidence]:
    """Contrasts of every family, after those of the one declared in advance."""
    each = [e for family in families for e in contrasts(probe, rows, models, family)]
    return headline(probe, rows, models, declared) + each


# --- what they ask with, and what they say --------------------------------------------------------------------------


def target_prompts(context: Context, limit: int) -> list[str]:
    """At most this many prompts for the target, spread evenly: the suite's, and where they are too few every sentence
    that names it."""
    suite = context.suite
    own = [sentence.text for sentence in named(suite)]
    if limit > len(own):
        own = list(dict.fromkeys([*own, *sentences(context, suite.concept.phrases, templates=everywhere(suite))]))
    return evenly(own, limit)


def keys_of(names: Sequence[str], seeds: int) -> list[Key]:
    """Every name with every seed."""
    return [(name, seed) for name in names for seed in range(seeds)]


def headline(probe: str, rows: Rows, models: Roles, family: str, *, known: float = KNOWN) -> list[Evidence]:
    """Contrasts of the family declared in advance, as those of the whole probe: their family is ""."""
    found = contrasts(probe, rows, models, family, known=known)
    return [dataclasses.replace(evidence, family="", note=f"at {family}") for evidence in found]
