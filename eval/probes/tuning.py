"""Training on an opened model: some word vectors, or its weights, which are restored bit for bit."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from erasure.backbone import Backbone
from erasure.backbone.text import Text
from erasure.eval.core.material import Example
from erasure.eval.core.models import modules_of
from erasure.eval.probes.base import DIVERGED, Access, Context, Level, Missing, Observation, Probe, Section
from erasure.eval.probes.denoising import noise_like
from erasure.eval.probes.embedding import FreeWords
from erasure.train import Diverged, Run, Training, trainable

LEVEL_ROWS = 16  # of the batch on which losses before and after are compared
Learner = contextlib.AbstractContextManager[Mapping[str, Tensor]]  # yields what is trained inside the block


class Teaches(abc.ABC):
    """What a training needs: a loss of random batches, and one that is always the same to tell how far it went."""

    backbone: Backbone

    @abc.abstractmethod
    def loss(self, generator: torch.Generator, rows: int | None = None) -> Tensor:
        """The mean loss of one batch, of ``rows`` where that is another number; differentiable."""

    @torch.no_grad()
    def level(self) -> float:
        """The loss on one fixed batch: lower after learning, or nothing was learnt."""
        return self.loss(torch.Generator().manual_seed(0), LEVEL_ROWS).item()


@dataclasses.dataclass(frozen=True)
class Lesson(Teaches):
    """Real pictures to learn from.

    Attributes:
        backbone: of the opened pipeline.
        latents: ``(M, c, h, w)`` float32, encoded once.
        text: the conditioning of some rows; differentiable in words that are learnt.
        batch_size: rows per step, drawn with replacement, each with its own time and noise.
    """

    backbone: Backbone
    latents: Tensor
    text: Callable[[Tensor], Text]
    batch_size: int

    def loss(self, generator: torch.Generator, rows: int | None = None) -> Tensor:
        """Denoising loss of one batch, the mean of ``|ε - ε_θ(x_t, t, c)|²`` (or v, or velocity); differentiable."""
        n = rows or self.batch_size
        chosen = torch.randint(len(self.latents), (n,), generator=generator)
        # One time from each of n equal parts of the range gives a gradient with less noise than independent draws.
        t = self.backbone.noise.times((torch.arange(n) + torch.rand(n, generator=generator)) / n)
        x = self.latents[chosen]
        return self.backbone.losses(x, t.to(x.device), noise_like(x, generator), self.text(chosen)).mean()


def captioned(backbone: Backbone, examples: Sequence[Example], batch_size: int) -> Lesson:
    """Pictures with their own captions."""
    text = backbone.encode([e.caption for e in examples]).text
    latents = backbone.latents([e.image for e in examples])
    return Lesson(backbone, latents, lambda rows: text[rows], batch_size)


@contextlib.contextmanager
def tuned(pipe: Any, parameters: Mapping[str, nn.Parameter] | None = None) -> Iterator[dict[str, nn.Parameter]]:
    """Freeze a pipeline but for some parameters of the denoiser, which it yields; see :func:`trainable`.

    Pictures may be drawn inside. Leave the block before the model is closed: an erasure cannot be removed from weights
    that were changed under it.
    """
    parameters = dict(parameters or {})
    with trainable(parameters, modules_of(pipe).values()):
        yield parameters


def learn(
    parameters: Mapping[str, Tensor],
    loss: Callable[[torch.Generator], Tensor],
    *,
    pipe: Any,
    marks: Sequence[int],
    lr: float,
    seed: int,
    autocast: bool,
) -> Iterator[int]:
    """Minimise a loss by AdamW, and yield at some steps, so that the caller can look; 0 is before the first.

    Args:
        parameters: by name; what :func:`tuned` yields, or word vectors.
        loss: draws from one generator all along, so the first steps of a longer run are those of a shorter one.
        pipe: what the loss runs through, in float32 (with ``autocast`` in bfloat16) or in its own half precision.
    """
    generator = torch.Generator().manual_seed(seed)
    run = Run(
        parameters,
        lambda draw: loss(generator),
        training=Training(marks[-1], lr, seed=seed, optimizer="adamw", precision="bfloat16" if autocast else "float32"),
        modules=modules_of(pipe).values(),
        marks=marks,
        progress=False,
    )
    try:
        for step in run:
            yield from [step] * list(marks).count(step)
    except Diverged as error:
        raise Missing(f"{DIVERGED}: {error}") from None


@dataclasses.dataclass(frozen=True)
class Learning(Probe):
    """A probe that trains the opened model, several times from its own weights, and looks at it on the way."""

    section: ClassVar[Section] = "removal"
    level: ClassVar[Level] = "weights"
    access: ClassVar[Access] = "fine_tune"

    parameters: str = "all"
    lr: float = 3e-4
    batch_size: int = 8
    runs: int = 3
    prompts: int = 12
    images_per_prompt: int = 2

    def trained(
        self, context: Context, lesson: Teaches, marks: Sequence[int], look: Callable[..., list[Observation]]
    ) -> list[Observation]:
        """What is seen at some steps of every run.

        Args:
            marks: the steps to look at, in order; 0 is before the first.
            look: observations of the model as it is at ``step``, given ``seeds``, which no two runs share, and
                ``facts``: ``step``, ``run`` and ``loss``.
        """
        found: list[Observation] = []
        for run in range(self.runs):
            seeds = range(run * self.images_per_prompt, (run + 1) * self.images_per_prompt)
            with self.learner(context, lesson.backbone, run) as parameters:
                for step in learn(
                    parameters, lesson.loss, pipe=context.pipe, marks=marks, lr=self.lr, seed=run,
                    autocast=context.autocast,
                ):  # fmt: skip
                    found += look(step, seeds=seeds, facts={"step": step, "run": run, "loss": lesson.level()})
        return found

    def learner(self, context: Context, backbone: Backbone, run: int) -> Learner:
        """What is trained inside the block; afterwards every bit is as it was."""
        return tuned(context.pipe, backbone.select(self.parameters))


def random_words(free: FreeWords, seed: int) -> Tensor:
    """Random word vectors ``(k, d)`` with the mean and spread of the vocabulary."""
    table = free.table.float()
    noise = torch.randn(free.count, table.shape[1], generator=torch.Generator().manual_seed(seed))
    return table.mean(0) + table.std(0) * noise.to(table.device)
