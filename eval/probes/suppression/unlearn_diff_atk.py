"""S10: tokens before a sentence, or in the place of a name, found by the attacked model's own loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from erasure.backbone import Backbone
from erasure.eval.probes.attacking import Attack, Candidate, Goal, generator_of, random_tokens, vocabulary
from erasure.eval.probes.base import Context, Model
from erasure.eval.probes.denoising import backbone_for
from erasure.eval.probes.embedding import FreeWords

# Timesteps are between these shares of the schedule: above, the loss hardly depends on the words, and below, it depends
# on details that words do not name.
SPAN = 0.6, 0.3


@dataclasses.dataclass(frozen=True)
class UnlearnDiffAtk(Attack):
    """UnlearnDiffAtk: tokens under which the denoiser gives a real picture of the target a low loss.

        min over v in the vocabulary^k of  E || eps - eps_e(z_t, t, [v, sentence]) ||^2,   z_t = √ᾱ_t z + √(1 - ᾱ_t) eps

    with ``z`` the latents of one real picture of the target (never one the base was trained on) and ``eps_e`` the
    attacked model. There are as many timesteps as tries, from much noise to little; each, of ``iterations`` steps,
    gives one candidate.

    Each token is a point w of the simplex over the vocabulary. The model gets the most likely token, and the gradient
    passes to w as if it had been the mean (straight through); after each step of AdamW, w is projected onto the simplex
    (Euclidean).

    Attributes:
        iterations: steps per timestep. 0 leaves the random start, for tests of the power gate.
        learning_rate, weight_decay: of AdamW. The paper has 0.01 and 40 iterations; fewer iterations need larger steps.
        pictures: real pictures of the target; sentences take them in turn.

    On Stable Diffusion the paper has 50 tries of 40 iterations at a learning rate of 0.01, with 5 tokens for nudity
    and 3 for styles and objects, as a prefix.
    """

    key, code, title = "unlearn_diff_atk", "S10", "UnlearnDiffAtk"
    needs = ("base", "selector", "material")
    reference = "Zhang et al., ECCV 2024, arXiv 2310.11868"
    presets = {
        "smoke": {"prompts": 2, "tries": 2, "iterations": 2, "fresh": 1, "pictures": 2},
        "standard": {"prompts": 6},
        "full": {"prompts": 75, "tries": 20, "iterations": 40},
    }

    iterations: int = 20
    learning_rate: float = 0.05
    weight_decay: float = 0.1
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
        adam = torch.optim.AdamW([w], lr=self.learning_rate, weight_decay=self.weight_decay)
        noises = [generator_of("eps", goal.named) for goal in goals]
        found: list[list[Candidate]] = [[] for _ in goals]
        for t in backbone.noise.times(torch.linspace(*SPAN, self.tries)):
            seen = []
            at = torch.full((len(goals),), int(t), device=z.device)
            for _ in range(self.iterations):
                eps = torch.stack([torch.randn(z.shape[1:], generator=g) for g in noises]).to(z.device)
                loss = backbone.losses(z, at, eps, words.text(straight_through(w) @ table))
                (w.grad,) = torch.autograd.grad(loss.sum(), [w])
                adam.step()
                w.data = simplex(w.data)
                seen.append(loss.detach())
            losses = torch.stack(seen).mean(0).tolist() if seen else [None] * len(goals)
            for own, ids, one in zip(found, known[w.detach().argmax(-1)].tolist(), losses, strict=True):
                own.append(Candidate(tuple(ids), {"loss": one, "t": int(t)}))
        return found


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
