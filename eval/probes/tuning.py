"""Training on an opened model: some word vectors, or its weights, which are restored bit for bit."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from erasure.backbone import Backbone
from erasure.backbone.text import Text
from erasure.eval.core.material import Example
from erasure.eval.core.models import Model, modules_of
from erasure.eval.probes.base import Context, Missing, Observation
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
    """Freeze a pipeline but for the parameters to be trained, which it yields; see :func:`trainable`.

    Pictures may be drawn inside. Leave the block before the model is closed: an erasure cannot be removed from weights
    that were changed under it.

    Args:
        parameters: of the denoiser, by name; none by default.
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
        pipe: what the loss runs through, in float32 or in its own half precision.
        autocast: bfloat16 arithmetic for a float32 pipeline.

    Raises:
        Missing: the loss, or its gradient, is not finite.
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
        raise Missing(f"diverged: {error}") from None


def repeated(
    context: Context,
    lesson: Teaches,
    look: Callable[[dict[str, Any]], list[Observation]],
    *,
    parameters: str = "",
    learner: Callable[[int], Learner] | None = None,
    marks: Sequence[int],
    lr: float,
    runs: int,
) -> list[Observation]:
    """Train the opened model ``runs`` times, each time from its own weights, and look at some steps.

    Args:
        look: observations of the model as it is then, given ``step``, ``run`` and ``loss``.
        parameters: which weights of the denoiser are trained, a name of :meth:`Backbone.select`.
        learner: what is trained in a run instead, an adapter, say.
        marks: the steps to look at, in order; 0 is before the first.
    """
    found: list[Observation] = []
    for run in range(runs):
        with learner(run) if learner else tuned(context.pipe, lesson.backbone.select(parameters)) as trained:
            for step in learn(
                trained, lesson.loss, pipe=context.pipe, marks=marks, lr=lr, seed=run, autocast=context.autocast
            ):
                found += look({"step": step, "run": run, "loss": lesson.level()})
    return found


def seeds_of(run: int, count: int) -> range:
    """The seeds of the pictures of a run: no two runs share one."""
    return range(run * count, (run + 1) * count)


def random_words(free: FreeWords, seed: int) -> Tensor:
    """Random word vectors ``(k, d)`` with the mean and spread of the vocabulary."""
    table = free.table.float()
    noise = torch.randn(free.count, table.shape[1], generator=torch.Generator().manual_seed(seed))
    return table.mean(0) + table.std(0) * noise.to(table.device)


def look(
    context: Context,
    model: Model,
    prompts: Sequence[str],
    *,
    family: str,
    seeds: Sequence[int],
    clusters: Sequence[str] | None = None,
    facts: Mapping[str, Any],
    **sampler: Any,
) -> list[Observation]:
    """Draw prompts from the pipeline as it is now, without any filter, and let the judge look for the target.

    Args:
        clusters: one per prompt; the prompts themselves by default.
        facts: of every row.
        **sampler: as in :meth:`Context.draw`; ``prompt_embeds`` for conditioning that is not from a prompt.
    """
    description = f"{model.name}, {family}"
    drawn = context.draw(context.pipe, model, prompts, seeds=seeds, description=description, **sampler)
    return context.observe(
        model,
        [image for row in drawn for image in row],
        family=family,
        clusters=[cluster for cluster in clusters or prompts for _ in seeds],
        seeds=list(seeds) * len(prompts),
        facts=[{"prompt": prompt, **facts} for prompt in prompts for _ in seeds],
    )
