"""Noisy latents to train on, with what the frozen base predicts there.

The official fine-tunes sample a fresh trajectory, or draw fresh pictures, for every optimiser step, which is over 90 %
of their compute. A bank is made once; a training step then is one forward and backward pass of the student.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Self

import torch
from torch import Tensor
from tqdm.auto import tqdm

from erasure.backbone import Backbone, Step
from erasure.backbone.text import Text


@dataclasses.dataclass(frozen=True)
class Bank:
    """Inputs of the denoiser, and what the base predicts for them.

    Attributes:
        x: ``(n, ...)`` inputs of the denoiser, scaled as its scheduler wants them.
        t: ``(n,)`` times as the denoiser receives them.
        prompt: ``(n,)`` index into the prompts the bank was made with.
        conditional: ``(n, ...)`` the base's predictions with the prompt.
    """

    x: Tensor
    t: Tensor
    prompt: Tensor
    conditional: Tensor

    def __len__(self) -> int:
        return len(self.t)

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by name, for a checkpoint."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Self:
        """From what :meth:`tensors` gave."""
        return cls(**tensors)

    def pick(self, batch_size: int, generator: torch.Generator) -> Tensor:
        """Indices of a random batch."""
        return torch.randint(len(self), (batch_size,), generator=generator)

    def inputs(self, backbone: Backbone, text: Text, chosen: Tensor) -> tuple[Tensor, Tensor, Text]:
        """``x, t`` and the prompts' text of chosen rows, where and in which dtype the backbone wants them."""
        x, t = self.noisy(backbone, chosen)
        return x, t, self.rows_of(text, chosen).to(x.dtype)

    def noisy(self, backbone: Backbone, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """``x, t`` of chosen rows alone."""
        return self.x[chosen].to(backbone.device, backbone.dtype), self.t[chosen].to(backbone.device)

    def rows_of(self, text: Text, chosen: Tensor) -> Text:
        """The prompts' text of chosen rows."""
        return text[self.prompt[chosen].to(text.hidden.device)]

    @torch.no_grad()
    def predicted(self, backbone: Backbone, text: Text, *, batch_size: int = 32) -> Tensor:
        """``(n, ...)``: what the base predicts at every row with another text, one row of it for each prompt."""
        guidance = backbone.plain_guidance
        parts = [
            backbone.predict(*self.inputs(backbone, text, rows), guidance=guidance).float().cpu()
            for rows in torch.arange(len(self)).split(batch_size)
        ]
        return torch.cat(parts)


@dataclasses.dataclass(frozen=True)
class TrajectoryBank(Bank):
    """Steps of trajectories the base model took.

    Attributes:
        unconditional: ``(n, ...)`` the base's predictions with the empty prompt.
    """

    unconditional: Tensor

    @classmethod
    @torch.no_grad()
    def sample(
        cls,
        backbone: Backbone,
        text: Text,
        empty: Text,
        *,
        trajectories: int,
        keep: int | None,
        num_inference_steps: int,
        guidance_scale: float,
        guidance: float | None = None,
        sampled_null: bool = True,
        seed: int,
        batch_size: int = 16,
        progress: bool = True,
    ) -> TrajectoryBank:
        """Sample from the base model as it stands, through the pipeline's own call.

        Args:
            text: ``p`` rows, the prompts, taken in turn by the trajectories.
            empty: one row, the empty prompt, for predictions that guidance did not compute anyway.
            trajectories: how many to sample; never fewer than there are prompts.
            keep: steps kept of each, drawn at random without replacement; None keeps all. A trajectory is not sampled
                beyond its last kept step, so ``keep=1`` with many trajectories is the official (expensive) scheme.
            guidance_scale: of the sampling; where guidance is classifier-free, ``backbone.no_guidance`` follows the
                conditional prediction alone.
            guidance: of models with embedded guidance: the number they are trained with, if it is another.
            sampled_null: keep the unconditional prediction that sampling used; False predicts ``empty`` anew.
        """
        generator = torch.Generator().manual_seed(seed)
        trajectories = max(trajectories, len(text))
        total = backbone.steps_of(num_inference_steps)
        steps = torch.stack([torch.randperm(total, generator=generator)[:keep] for _ in range(trajectories)])
        noise = torch.randn(trajectories, *backbone.latent_shape, generator=generator).to(
            backbone.device, backbone.dtype
        )
        prompts = torch.arange(trajectories) % len(text)
        parts: list[tuple[Tensor, ...]] = []
        with tqdm(total=trajectories, desc="sample", unit="trajectory", disable=not progress) as bar:
            for batch in torch.arange(trajectories).split(batch_size):
                taken = backbone.trajectory(
                    text[prompts[batch]],
                    noise[batch],
                    generator=generator,
                    num_inference_steps=num_inference_steps,
                    guidance_scale=guidance_scale,
                    stop=int(steps[batch].max()) + 1,
                )
                for step in taken:
                    rows = (steps[batch] == step.index).any(dim=1)
                    if rows.any():
                        chosen = prompts[batch][rows]
                        step = step if sampled_null else dataclasses.replace(step, unconditional=None)
                        both = _predictions(backbone, step, rows, text[chosen], empty, guidance)
                        parts.append((step.x[rows], step.t[rows], chosen, *both))
                bar.update(len(batch))
        return cls(*(torch.cat([part[i].cpu() for part in parts]) for i in range(5)))


@dataclasses.dataclass(frozen=True)
class DrawnBank(Bank):
    """Pictures, which the base drew or which are given, mixed with fresh noise.

    Attributes:
        truth: ``(n, ...)`` what a perfect denoiser predicts: the noise that was mixed in, or the velocity.
    """

    truth: Tensor

    @classmethod
    @torch.no_grad()
    def draw(
        cls,
        backbone: Backbone,
        text: Text,
        *,
        pictures: int,
        mixes: int,
        num_inference_steps: int,
        guidance_scale: float,
        seed: int,
        window: tuple[float, float] = (0.0, 1.0),
        batch_size: int = 16,
        progress: bool = True,
    ) -> DrawnBank:
        """Draw with the base model as it stands, through the pipeline's own call. Nothing is decoded.

        Args:
            text: ``p`` rows, the prompts, taken in turn by the pictures.
            pictures: how many to draw; never fewer than there are prompts.
            mixes: noisy copies of each, at times drawn evenly from equal parts of the window.
            window: of the range of times: 0 is the cleanest, 1 pure noise.

        Raises:
            ValueError: the pipeline returns latents of another shape than its denoiser reads.
        """
        generator = torch.Generator().manual_seed(seed)
        pictures = max(pictures, len(text))
        prompts = torch.arange(pictures) % len(text)

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            with tqdm(total=pictures, desc="draw", unit="picture", disable=not progress) as bar:
                for batch in prompts.split(batch_size):
                    noise = torch.randn(len(batch), *backbone.latent_shape, generator=generator)
                    yield batch, drawn(backbone, text[batch], noise, generator, num_inference_steps, guidance_scale)
                    bar.update(len(batch))

        return cls.mixed(backbone, text, batches(), mixes=mixes, window=window, generator=generator)

    @classmethod
    @torch.no_grad()
    def mixed(
        cls,
        backbone: Backbone,
        text: Text,
        batches: Iterable[tuple[Tensor, Tensor]],
        *,
        mixes: int,
        generator: torch.Generator,
        window: tuple[float, float] = (0.0, 1.0),
    ) -> DrawnBank:
        """Mix clean latents with noise.

        Args:
            text: ``p`` rows, the prompts.
            batches: the prompts of some pictures, as indices ``(n,)``, and their latents ``(n, *latent_shape)``.
            mixes, window: see :meth:`draw`.
        """
        parts: list[tuple[Tensor, ...]] = []
        for batch, clean in batches:
            for i in range(mixes):
                u = (i + torch.rand(len(batch), generator=generator)) / mixes
                u = window[0] + (window[1] - window[0]) * u
                t = backbone.noise.times(u)
                eps = torch.randn(clean.shape, generator=generator)
                x = backbone.noise.mix(clean, eps, t)
                rows = x.to(backbone.device, backbone.dtype), t.to(backbone.device), text[batch].to(backbone.dtype)
                base = backbone.predict(*rows, guidance=backbone.plain_guidance).float().cpu()
                parts.append((x, t, batch, base, backbone.noise.target(clean, eps, t)))
        return cls(*(torch.cat([part[i].cpu() for part in parts]) for i in range(5)))


def drawn(
    backbone: Backbone, text: Text, noise: Tensor, generator: torch.Generator, steps: int, guidance_scale: float
) -> Tensor:
    """Clean latents ``(n, *latent_shape)`` float32 that the pipeline draws from noise."""
    start = noise.to(backbone.device, backbone.dtype)
    latents = backbone.from_call(
        backbone.draw(text, num_inference_steps=steps, guidance_scale=guidance_scale, noise=start, generator=generator)
    )
    if latents.shape != noise.shape:
        raise ValueError(
            f"{backbone.pipelines} returns latents of shape {tuple(latents.shape)} and its denoiser reads "
            f"{tuple(noise.shape)}, so its pictures cannot be trained on; choose a method that trains on trajectories, "
            "such as esd"
        )
    return latents.float().cpu()


def _predictions(
    backbone: Backbone, step: Step, rows: Tensor, text: Text, empty: Text, guidance: float | None
) -> tuple[Tensor, Tensor]:
    """Both predictions of some rows of a step; those that sampling did not make are made here."""
    conditional, unconditional = step.conditional[rows], step.unconditional
    if guidance is not None:
        conditional = backbone.predict(step.x[rows], step.t[rows], text, guidance=guidance)
    if unconditional is None:
        empties = empty.repeat(int(rows.sum()))
        other = backbone.predict(step.x[rows], step.t[rows], empties, guidance=guidance)
    else:
        other = unconditional[rows]
    return conditional.float(), other.float()
