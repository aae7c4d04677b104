"""S12: tokens whose encoding is that of a harmless sentence plus the direction of the target."""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Sequence

import torch
from torch import Tensor

from erasure.backbone import backbone_of
from erasure.eval.probes.asking import sentences
from erasure.eval.probes.attacking import Attack, Candidate, Goal, Place, generator_of, vocabulary, without_words
from erasure.eval.probes.base import Context, Model
from erasure.eval.probes.embedding import MARK, FreeWords


@dataclasses.dataclass(frozen=True)
class RingABell(Attack):
    """Ring-A-Bell: a genetic search in the text encoder, without access to the attacked model.

        min over v in the vocabulary^K of  || enc(v) - (enc(p) + eta v_c) ||^2,
        v_c = mean over pairs of  enc(sentence with the target's name) - enc(the same sentence without it)

    with the *unmodified* text encoder ``enc (length, d)``, and ``p`` the sentence without the name. The tokens are the
    whole prompt. Candidates are the best of each eta, then the second of each, and so on.

    A generation keeps the better half and adds as many children: a child is a crossover of two parents with probability
    ``crossover``, else a copy of one; with probability ``mutation`` one of its tokens is replaced by a random one.

    Attributes:
        etas: how far to go in the target's direction. Too little does not reach it, too much is no sentence any more.
        population, generations, crossover, mutation: of the search. 0 generations leave random tokens.

    On Stable Diffusion the paper has 16 to 77 tokens, a population of 200 and 3000 generations.
    """

    key, code, title = "ring_a_bell", "S12", "Ring-A-Bell"
    access = "embedding"
    reference = "Tsai et al., ICLR 2024, arXiv 2310.10012"
    presets = {
        "smoke": {"prompts": 2, "tries": 2, "fresh": 1, "population": 8, "generations": 2},
        "standard": {"prompts": 18, "tries": 5, "fresh": 2},
        "full": {"prompts": 75, "tries": 12, "generations": 300},
    }

    tokens: int = 6
    tries: int = 6
    place: Place = "all"
    etas: tuple[float, ...] = (1.0, 3.0, 5.0)
    population: int = 60
    generations: int = 150
    crossover: float = 0.5
    mutation: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.place != "all":
            raise ValueError(
                f'the tokens of this attack are the whole prompt; got place={self.place!r}; leave it "all"'
            )
        if not self.etas or self.population < 2 * self._each:
            raise ValueError(
                f"half the population has to hold {self._each} candidates for each of {len(self.etas)} etas; "
                f"got population={self.population}; raise it or lower tries"
            )

    @property
    def _each(self) -> int:
        return math.ceil(self.tries / max(len(self.etas), 1))

    def search(self, model: Model, context: Context, goals: Sequence[Goal]) -> list[list[Candidate]]:
        known = context.memory.setdefault(self.key, {})  # the search is the same for every model
        with context.open(context.base), torch.no_grad():
            words = FreeWords(context.pipe, [MARK], count=self.tokens)
            encoder = context.hash_weights(types.SimpleNamespace(text_encoder=words.encoder))
            v_c, found = direction(context), []
            for goal in goals:
                key = (encoder, repr(self), context.suite.concept, context.suite.subjects, goal)
                if key not in known:
                    p = encoded(context, [goal.before])[0]
                    best = [self.fittest(words, p + eta * v_c, goal, eta) for eta in self.etas]
                    known[key] = [candidate for rank in zip(*best, strict=True) for candidate in rank][: self.tries]
                found.append(known[key])
        return found

    def fittest(self, words: FreeWords, target: Tensor, goal: Goal, eta: float) -> list[Candidate]:
        """The best distinct candidates of one genetic search."""
        known, g = vocabulary(words.tokenizer), generator_of("bell", goal.named, str(eta))
        half = self.population // 2
        fit = self._losses(words, target, known[torch.randint(len(known), (self.population, self.tokens), generator=g)])
        for _ in range(self.generations):
            parents = torch.tensor(list(fit))
            mothers, fathers = parents[torch.randint(len(parents), (2, half), generator=g)]
            cut = torch.randint(1, max(self.tokens, 2), (half, 1), generator=g)
            whole = torch.rand(half, 1, generator=g) >= self.crossover
            children = torch.where((torch.arange(self.tokens) < cut) | whole, mothers, fathers)
            mutant = torch.rand(half, generator=g) < self.mutation
            where = torch.arange(half), torch.randint(self.tokens, (half,), generator=g)
            random = known[torch.randint(len(known), (half,), generator=g)]
            children[where] = torch.where(mutant, random, children[where])
            fit |= self._losses(words, target, children)
            fit = dict(sorted(fit.items(), key=lambda pair: pair[1])[:half])
        ranked = sorted(fit.items(), key=lambda pair: pair[1])[: self._each]
        return [Candidate(ids, {"loss": loss, "eta": eta}) for ids, loss in ranked]

    def _losses(self, words: FreeWords, target: Tensor, ids: Tensor) -> dict[tuple[int, ...], float]:
        """``|| enc(v) - target ||^2`` of each row of ids."""
        hidden = words.text(words.table[ids.to(words.table.device)], rows=[0] * len(ids)).hidden.float()
        losses = (hidden - target).square().sum(dim=(1, 2)).tolist()
        return {tuple(row): loss for row, loss in zip(ids.tolist(), losses, strict=True)}


def encoded(context: Context, prompts: Sequence[str]) -> Tensor:
    """The embeddings of prompts, ``(n, length, d)``."""
    return backbone_of(context.pipe).encode(prompts).hidden.float()


def direction(context: Context) -> Tensor:
    """``v_c (length, d)``, over every name and sentence of the suite."""
    named = sentences(context, context.suite.concept.phrases)
    blank = [without_words(one) for one in sentences(context, [MARK], article=False)]
    return encoded(context, named).mean(0) - encoded(context, blank).mean(0)
