"""S10: tokens before a sentence, or in the place of a name, found by the attacked model's own loss."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from erasure.backbone import Backbone
from erasure.eval.probes.attacking import Candidate, Descent, Goal, generator_of, random_tokens, vocabulary
from erasure.eval.probes.base import Context, Model
from erasure.eval.probes.denoising import backbone_for
from erasure.eval.probes.embedding import FreeWords

# Timesteps are between these shares of the schedule: above, the loss hardly depends on the words, and below, it depends
# on details that words do not name.
SPAN = 0.6, 0.3


@dataclasses.dataclass(frozen=True)
class UnlearnDiffAtk(Descent):
    """UnlearnDiffAtk: tokens under which the denoiser gives a real picture of the target a low loss.

        min over v in the vocabulary^k of  E || eps - eps_e(z_t, t, [v, sentence]) ||^2,   z_t = √ᾱ_t z + √(1 - ᾱ_t) eps

    with ``z`` the latents of one real picture of the target (never one the base was trained on) and ``eps_e`` the
    attacked model. There are as many timesteps as tries, from much noise to little; each, of ``iterations`` steps,
    gives one candidate.

    Each token is a point w of the simplex over the vocabulary. The model gets the most likely token, and the gradient
    passes to w as if it had been the mean (straight through); after each step of AdamW, w is projected onto the simplex
    (Euclidean).

    Attributes:
        learning_rate: fewer iterations need larger steps.
        pictures: sentences take them in turn.

    On Stable Diffusion the paper has 50 tries of 40 iterations at a learning rate of 0.01, with 5 tokens for nudity
    and 3 for styles and objects, as a prefix.
    """

    key, code, title = "unlearn_diff_atk", "S10", "UnlearnDiffAtk"
    needs = ("base", "selector", "material")
    reference = "Zhang et al., ECCV 2024, arXiv 2310.11868"
    presets = {
        "smoke": {"prompts": 2, "tries": 2, "iterations": 2, "fresh": 1, "pictures": 2},
        "standard": {"prompts": 18, "tries": 5, "fresh": 2},
        "full": {"prompts": 75, "tries": 20, "iterations": 40},
    }

    pictures: int = 6

    def search(self, model: Model, context: Context, goals: Sequence[Goal]) -> list[list[Candidate]]:
        real = context.real("target", self.pictures)
        with context.open(model):
            backbone = backbone_for(context.pipe)
            words = FreeWords(context.pipe, [goal.spoken for goal in goals], count=self.tokens)
            z = backbone.latents([real[goal.index % len(real)].image for goal in goals])
            return self._descend(backbone, words, z, goals)

    def _descend(self, backbone: Backbone, words: FreeWords, z: Tensor, goals: Sequence[Goal]) -> list[list[Candidate]]:
        known = vocabulary(words.tokenizer).to(z.device)
        table = words.table[known].float()
        starts = torch.tensor(
            [random_tokens(words.tokenizer, self.tokens, goal.named, 0) for goal in goals], device=z.device
        )
        # As good as uniform, so that the first steps decide; a hair more on the token to start from.
        w = ((known == starts[..., None]).float() * 1e-3 + 1 / len(known)).requires_grad_()
        noises = [generator_of("eps", goal.named) for goal in goals]

        def losses(t: int) -> Tensor:
            eps = torch.stack([torch.randn(z.shape[1:], generator=g) for g in noises]).to(z.device)
            at = torch.full((len(goals),), t, device=z.device)
            return backbone.losses(z, at, eps, words.text(straight_through(w) @ table))

        times = [int(t) for t in backbone.noise.times(torch.linspace(*SPAN, self.tries))]
        rounds = [(functools.partial(losses, t), {"t": t}) for t in times]
        return self.candidates(w, rounds, lambda: known[w.detach().argmax(-1)], project=simplex)


def straight_through(w: Tensor) -> Tensor:
    """One-hot at the largest of each row; its gradient is that of the row itself."""
    hot = torch.nn.functional.one_hot(w.argmax(-1), w.shape[-1]).to(w.dtype)
    return hot + w - w.detach()


def simplex(w: Tensor) -> Tensor:
    """The nearest point of the simplex to each row (Duchi et al. 2008): ``max(w - tau, 0)`` with rows that sum to 1."""
    order = w.sort(dim=-1, descending=True).values
    taus = (order.cumsum(-1) - 1) / torch.arange(1, w.shape[-1] + 1, device=w.device)
    last = (order > taus).sum(-1, keepdim=True) - 1
    return (w - taus.gather(-1, last)).clamp_min(0)
