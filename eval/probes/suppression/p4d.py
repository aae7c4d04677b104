"""S11: tokens that make the attacked model predict the noise that the base predicts when it is asked by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from erasure.backbone import Backbone
from erasure.eval.probes.attacking import Candidate, Descent, Goal, Place, generator_of, random_tokens
from erasure.eval.probes.base import Context, Model
from erasure.eval.probes.denoising import backbone_for
from erasure.eval.probes.embedding import FreeWords


@dataclasses.dataclass(frozen=True)
class Lesson:
    """What the base predicts for its own pictures of the named sentences, at ``m`` moments of the schedule.

    Attributes:
        x: noised latents ``(m, n, c, h, w)``. t: their timesteps ``(m,)``. predicted: by the base, shaped as ``x``.
    """

    x: Tensor
    t: Tensor
    predicted: Tensor


@dataclasses.dataclass(frozen=True)
class P4D(Descent):
    """P4D (Prompting4Debugging): tokens that replace the target's name in the attacked model.

        min over v in the vocabulary^N of  E_t || eps_e(z_t, t, v) - eps_b(z_t, t, sentence with the name) ||^2

    with the base model ``eps_b``, the attacked one ``eps_e`` and ``z`` the latents of a picture that the base draws of
    the sentence. The base predicts first, at ``moments`` fixed (t, noise) per sentence, so the two models are never
    open at once.

    The free vectors are continuous. The model gets the nearest tokens by cosine, and the gradient there passes to the
    vectors (projection with a straight-through gradient, as in PEZ, Wen et al. 2023). Every ``iterations`` steps the
    nearest tokens are a candidate.

    Attributes:
        place: "all" is the paper's P4D-N: the tokens are the whole prompt. P4D-K, tokens at every third place of the
            sentence, is in :mod:`studies.reproduce.p4d` alone.
        moments: timesteps at which the base predicts, evenly spread.

    On Stable Diffusion the paper has 16 tokens and 60 tries of 50 iterations.
    """

    key, code, title = "p4d", "S11", "P4D"
    reference = "Chin et al., ICML 2024, arXiv 2309.06135"
    presets = {
        "smoke": {"prompts": 2, "tries": 2, "iterations": 2, "fresh": 1, "moments": 4},
        "standard": {"prompts": 18, "tries": 5, "fresh": 2},
        "full": {"prompts": 75, "tries": 12},
    }

    tokens: int = 4
    tries: int = 12
    place: Place = "all"
    iterations: int = 25
    learning_rate: float = 0.1
    moments: int = 25

    def search(self, model: Model, context: Context, goals: Sequence[Goal]) -> list[list[Candidate]]:
        named = [goal.named for goal in goals]
        with context.open(context.base) as pipe:
            drawn = context.draw(pipe, context.base, named)
            lesson = self.lesson(backbone_for(context.pipe), [row[0] for row in drawn], named)
        with context.open(model):
            words = FreeWords(context.pipe, [goal.spoken for goal in goals], count=self.tokens)
            return self.descend(backbone_for(context.pipe), words, lesson, named)

    @torch.no_grad()
    def lesson(self, backbone: Backbone, images: Sequence[Image.Image], named: Sequence[str]) -> Lesson:
        """What the opened base predicts for a picture of each sentence."""
        z, text = backbone.latents(images), backbone.encode(named).text
        last = backbone.pipe.scheduler.config.num_train_timesteps - 1
        t = torch.linspace(0.1 * last, 0.9 * last, self.moments).long().to(z.device)
        noises = [generator_of("p4d", sentence) for sentence in named]
        x = []
        for moment in t:
            eps = torch.stack([torch.randn(z.shape[1:], generator=g) for g in noises]).to(z.device)
            x.append(backbone.noise.mix(z, eps, moment.expand(len(z))))
        predicted = [backbone.predict_float(one, moment.expand(len(z)), text) for one, moment in zip(x, t, strict=True)]
        return Lesson(torch.stack(x), t, torch.stack(predicted))

    def descend(
        self, backbone: Backbone, words: FreeWords, lesson: Lesson, named: Sequence[str]
    ) -> list[list[Candidate]]:
        """Candidates for the free words of each sentence, on the opened model under attack."""
        starts = torch.tensor(
            [random_tokens(words.tokenizer, words.count, one, 0) for one in named], device=words.table.device
        )
        table = words.table.float()
        v = table[starts].clone().requires_grad_()
        order = generator_of("order", self.moments)  # of the moments; the same for every sentence

        def nearest() -> Tensor:
            return torch.tensor([words.tokens(one) for one in v], device=v.device)

        def losses() -> Tensor:
            i = int(torch.randint(self.moments, (), generator=order))
            text = words.text(v + (table[nearest()] - v).detach())
            predicted = backbone.predict_float(lesson.x[i], lesson.t[i].expand(len(v)), text)
            return (predicted - lesson.predicted[i]).square().mean(dim=(1, 2, 3))

        return self.candidates(v, [(losses, {})] * self.tries, nearest)
