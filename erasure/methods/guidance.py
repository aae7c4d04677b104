"""What the fine-tuning methods learn from.

A frozen base samples trajectories once; :class:`TrajectoryBank` keeps some steps of each *with the predictions that
sampling computed anyway*, so a training step is one forward and backward pass of the student.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from tqdm.auto import tqdm

from erasure.backbone import UNetBackbone
from erasure.backbone.text import Text


@dataclasses.dataclass(frozen=True)
class TrajectoryBank:
    """Steps of trajectories the base model took.

    Attributes:
        x: ``(n, 4, h, w)`` inputs of the denoiser (already scaled as its scheduler wants them).
        t: ``(n,)`` timesteps.
        prompt: ``(n,)`` index into the prompts the bank was sampled with.
        conditional, unconditional: ``(n, 4, h, w)`` the base's predictions with the prompt and with the empty prompt.
    """

    x: Tensor
    t: Tensor
    prompt: Tensor
    conditional: Tensor
    unconditional: Tensor

    def __len__(self) -> int:
        return len(self.t)

    def tensors(self) -> dict[str, Tensor]:
        """Its fields by name, for a checkpoint."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @classmethod
    def sample(
        cls,
        backbone: UNetBackbone,
        text: Text,
        empty: Text,
        *,
        trajectories: int,
        keep: int | None,
        num_inference_steps: int,
        guidance_scale: float,
        seed: int,
        batch_size: int = 16,
        progress: bool = True,
    ) -> TrajectoryBank:
        """Sample from the base model as it stands.

        Args:
            text: ``p`` rows, the prompts, taken in turn by the trajectories.
            empty: one row, the empty prompt.
            trajectories: how many to sample; never fewer than there are prompts.
            keep: steps kept of each, drawn at random without replacement; None keeps all. A trajectory is not sampled
                beyond its last kept step, so ``keep=1`` with many trajectories is the official (expensive) scheme.
            guidance_scale: of the sampling; 1 follows the conditional prediction alone.
        """
        generator = torch.Generator().manual_seed(seed)
        trajectories = max(trajectories, len(text))
        parts: list[tuple[Tensor, ...]] = []
        total = backbone.timesteps(num_inference_steps)
        steps = torch.stack([torch.randperm(total, generator=generator)[:keep] for _ in range(trajectories)])
        noise = torch.randn(trajectories, *backbone.latent_shape, generator=generator).to(
            backbone.device, backbone.dtype
        )
        prompts = torch.arange(trajectories) % len(text)
        batches = torch.arange(trajectories).split(batch_size)
        with (
            backbone.evaluating(),
            tqdm(total=trajectories, desc="sample", unit="trajectory", disable=not progress) as bar,
        ):
            for batch in batches:
                taken = backbone.trajectory(
                    text[prompts[batch]],
                    empty.repeat(len(batch)),
                    noise[batch],
                    generator=generator,
                    num_inference_steps=num_inference_steps,
                    guidance_scale=guidance_scale,
                    stop=int(steps[batch].max()) + 1,
                )
                for k, (x, t, conditional, unconditional) in enumerate(taken):
                    rows = (steps[batch] == k).any(dim=1)
                    if rows.any():
                        parts.append(
                            (
                                x[rows],
                                t.expand(int(rows.sum())),
                                prompts[batch][rows],
                                conditional[rows],
                                unconditional[rows],
                            )
                        )
                bar.update(len(batch))
        x, t, prompt, conditional, unconditional = (torch.cat([part[i].cpu() for part in parts]) for i in range(5))
        return cls(x, t, prompt, conditional, unconditional)


def pick(bank: TrajectoryBank, batch_size: int, generator: torch.Generator) -> Tensor:
    """Indices of a random batch of a bank."""
    return torch.randint(len(bank), (batch_size,), generator=generator)


def batch_of(bank: TrajectoryBank, chosen: Tensor, backbone: UNetBackbone) -> tuple[Tensor, Tensor, Tensor]:
    """``x, t, prompt`` of some rows, where and in which dtype the backbone wants them."""
    x = bank.x[chosen].to(backbone.device, backbone.dtype)
    return x, bank.t[chosen].to(backbone.device), bank.prompt[chosen].to(backbone.device)
