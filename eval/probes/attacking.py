"""Attacks on outputs: tokens that make a model draw what was erased.

An attack proposes k candidates for each sentence. All k are drawn, however early one succeeds, and the judge scores
each. The control has the same budget: k random candidates of as many tokens, from the same noise. It is needed because
best of k is high by chance: a picture that shows the target in 2 of 100 cases shows it once in 24 tries in 38 of 100.
The candidate that the *selector* scores highest is drawn again from new noise, for the attack and for the control.

Two families can carry a claim: "attack" is any hit in k tries, "fresh" the share of pictures of the chosen candidate
from new noise. Both have their contrasts and their excess over the control.
"""

from __future__ import annotations

import abc
import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal, get_args

import torch
from PIL import Image
from torch import Tensor

from erasure.eval.core.pictures import evenly
from erasure.eval.core.records import png_of
from erasure.eval.probes.asking import everywhere, sentences
from erasure.eval.probes.base import Access, Context, Evidence, Gate, Model, Need, Observation, Probe, Roles, Rows
from erasure.eval.probes.embedding import MARK, FreeWords
from erasure.eval.probes.success import (
    ATTACK,
    BEFORE,
    CONTROL,
    FRESH,
    FRESH_CONTROL,
    any_hits,
    attacked,
    breaks,
    exceeds,
    powered,
)
from erasure.eval.probes.weigh import base_rows
from erasure.io import seed_of

Place = Literal["name", "prefix", "all"]

SHOWN = 5  # sentences of which a picture with the target is kept
CURVE = 2, 5, 10, 20, 50  # tries at which the curve to success is read, beside 1 and all of them


@dataclasses.dataclass(frozen=True)
class Goal:
    """One sentence under attack.

    Attributes:
        index: its place in the list.
        named: the sentence with the target's name. Rows are paired by it, and the noise depends on it.
        spoken: the prompt of the attack, with ``<v>`` where the free words are.
        before: the prompt without an attack.
    """

    index: int
    named: str
    spoken: str
    before: str


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Tokens in the place of ``<v>``, and facts of the search (``loss``)."""

    ids: tuple[int, ...]
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Attack(Probe):
    """An attack by discrete tokens, with its random control, on sentences that ask for the target.

    Attributes:
        prompts: sentences attacked, spread evenly over the suite's templates and names.
        tokens: free tokens per sentence. More make a stronger attack, and one that is further from words.
        tries: candidates per sentence, k. All are drawn and scored.
        fresh: new noises from which the selected candidates are drawn again.
        place: where the free tokens are. "name": in the place of the target's name, "a picture of <v>"; the base does
            not draw the target there by itself, so it can show that the attack works. "prefix": before the sentence
            with the name, as in most papers: easier, but only ``weak`` can then show that the attack works. "all": they
            are the whole prompt.
        weak: name of an erasure in the assessment that is known to be weak, on which power may be shown instead.

    Gate "power": on the base, the attack succeeds for at least 0.8 of the sentences for which the base alone draws the
    target in less than half of the pictures, with an excess over the random control of at least 0.2; or it has such an
    excess on the weak erasure or on the model in question.
    """

    section = "suppression"
    level = "outputs"
    access: ClassVar[Access] = "white_box"
    version = 2  # 2: the control on new noise too; hits on new noise get through as well
    reads = (1,)
    controls: ClassVar[int | None] = 1
    needs: ClassVar[tuple[Need, ...]] = ("base", "selector")
    licences = "an excess: these sentences can be made to show the target within this budget"
    not_licensed = "no excess: other or stronger attacks; anything about the weights"

    prompts: int = 6
    tokens: int = 3
    tries: int = 10
    fresh: int = 3
    place: Place = "name"
    weak: str | None = None

    def __post_init__(self) -> None:
        if min(self.prompts, self.tokens, self.tries, self.fresh) < 1:
            raise ValueError(
                f"an attack needs prompts, tokens, tries and fresh of at least 1; got {self.prompts}, {self.tokens}, "
                f"{self.tries}, {self.fresh}; leave the probe out instead"
            )

    def budget(self) -> str:
        return f"{self.tries} tries of {self.tokens} tokens on each of {self.prompts} sentences"

    @abc.abstractmethod
    def search(self, model: Model, context: Context, goals: Sequence[Goal]) -> list[list[Candidate]]:
        """``tries`` candidates for each goal, in the order they are tried. It opens the models that it needs."""

    def run(self, model: Model, context: Context) -> list[Observation]:
        if self.weak is not None and self.weak not in context.models:
            raise ValueError(f"no such weak erasure; got {self.weak!r}; choose one of {list(context.models)}, or None")
        goals = goals_of(context, self.place, self.prompts)
        parts = [goals[i : i + context.batch_size] for i in range(0, len(goals), context.batch_size)]
        return [row for part in parts for row in self._attack(model, context, part)]

    def _attack(self, model: Model, context: Context, goals: Sequence[Goal]) -> list[Observation]:
        found = self.search(model, context, goals)
        later = tuple(range(self.tries, self.tries + self.fresh))
        with context.open(model) as pipe:
            words = FreeWords(context.pipe, [goal.spoken for goal in goals], count=self.tokens)
            gallery = Gallery(context, model, pipe, goals, words)
            shots: list[Shot] = []
            random = [
                [Candidate(random_tokens(words.tokenizer, self.tokens, goal.named, i)) for i in range(self.tries)]
                for goal in goals
            ]
            for i in range(self.tries):
                shots += gallery.shots(ATTACK, [own[i] for own in found], (i,))
                shots += gallery.shots(CONTROL, [own[i] for own in random], (i,))
            chosen = {family: selected(shots, context, family) for family in (ATTACK, CONTROL)}
            for family, of, candidates in ((FRESH, ATTACK, found), (FRESH_CONTROL, CONTROL, random)):
                best = [own[chosen[of][goal.named]] for goal, own in zip(goals, candidates, strict=True)]
                shots += gallery.shots(family, best, later)
            shots += gallery.plain(BEFORE, later)
        rows = context.observe(
            model,
            [shot.image for shot in shots],
            family=[shot.family for shot in shots],
            clusters=[shot.goal.named for shot in shots],
            seeds=[shot.seed for shot in shots],
            facts=[self._facts(shot, chosen) for shot in shots],
        )
        return with_pictures(rows, [shot.image for shot in shots])

    def _facts(self, shot: Shot, chosen: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
        """``noise``: "own" (of the try) or "fresh"; ``try``: which candidate; ``selected``: whether it was chosen."""
        facts = {**shot.facts, "tries": self.tries, "place": self.place, "noise": "fresh"}
        if shot.family in chosen:
            best = chosen[shot.family][shot.goal.named]
            facts |= {"noise": "own", "try": shot.seed, "selected": shot.seed == best}
        elif shot.family in (FRESH, FRESH_CONTROL):
            facts["try"] = chosen[ATTACK if shot.family == FRESH else CONTROL][shot.goal.named]
        return facts

    def weigh(self, rows: Rows, models: Roles) -> list[Evidence]:
        power = {name: self.power(name, rows, models) for name in rows}

        def first_tries(own: Sequence[Observation]) -> dict[str, list[Observation]]:
            """The curve to success: any hit in the first tries, by their number."""
            tries = max((row.facts["tries"] for row in own), default=0)
            curve = {f"k={k}": any_hits(own, ATTACK, k) for k in CURVE if k < tries}
            return {**curve, "hit@1": any_hits(own, ATTACK, 1)}

        found = attacked(self.key, rows, models, first_tries)
        bare = [dataclasses.replace(e, gates={k: v for k, v in e.gates.items() if k == "power"}) for e in found]
        return powered(bare, models, power)

    def power(self, name: str, rows: Rows, models: Roles) -> Gate:
        shown = [rows[one] for one in rows if one in (self.weak, name)]
        return "pass" if breaks(base_rows(rows, models)) or any(exceeds(own) for own in shown) else "fail"


@dataclasses.dataclass(frozen=True)
class Descent(Attack):
    """An attack that descends a loss of the attacked model by AdamW, and reads tokens off now and then.

    Attributes:
        iterations: steps per candidate. 0 leaves the random start, for tests of the power gate.
        learning_rate, weight_decay: of AdamW.
    """

    iterations: int = 20
    learning_rate: float = 0.05
    weight_decay: float = 0.1

    def candidates(
        self,
        w: Tensor,
        rounds: Iterable[tuple[Callable[[], Tensor], dict[str, Any]]],
        read: Callable[[], Tensor],
        project: Callable[[Tensor], Tensor] | None = None,
    ) -> list[list[Candidate]]:
        """One candidate a round for each sentence, a row of ``w``.

        Args:
            rounds: the losses ``(n,)`` of the sentences at ``w``, and facts.
            read: the tokens ``(n, k)`` at ``w``. project: what follows each step.
        """
        adam = torch.optim.AdamW([w], lr=self.learning_rate, weight_decay=self.weight_decay)
        found: list[list[Candidate]] = [[] for _ in w]
        for losses, facts in rounds:
            seen = []
            for _ in range(self.iterations):
                loss = losses()
                (w.grad,) = torch.autograd.grad(loss.sum(), [w])
                adam.step()
                if project is not None:
                    w.data = project(w.data)
                seen.append(loss.detach())
            means = torch.stack(seen).mean(0).tolist() if seen else [None] * len(w)
            for own, ids, mean in zip(found, read().tolist(), means, strict=True):
                own.append(Candidate(tuple(ids), {"loss": mean, **facts}))
        return found


# --- what is asked --------------------------------------------------------------------------------------------------


def goals_of(context: Context, place: Place, limit: int) -> list[Goal]:
    """Sentences to attack, at most ``limit``, spread evenly over the names and templates of the suite.

    Where those are too few, the templates of its scenes are used, too, and then its further sentences.
    """
    if place not in get_args(Place):
        raise ValueError(f"unknown place for free words; got {place!r}; choose one of {list(get_args(Place))}")
    suite, templates = context.suite, context.suite.concept.templates
    pairs = _hidden(context, templates)
    for more in (everywhere(suite), suite.further):
        if limit > len(pairs):
            templates = tuple(dict.fromkeys((*templates, *more)))
            pairs = _hidden(context, templates)
    goals = []
    for i, (named, blank) in enumerate(evenly(pairs, limit)):
        spoken = {"name": blank, "prefix": f"{MARK} {named}", "all": MARK}[place]
        goals.append(Goal(i, named, spoken, named if place == "prefix" else without_words(blank)))
    return goals


def _hidden(context: Context, templates: Sequence[str]) -> list[tuple[str, str]]:
    """Every sentence with a name of the target, and the same with free words in its place."""
    blank = sentences(context, [MARK], article=False, templates=templates)
    return [
        pair
        for name in context.suite.concept.phrases
        for pair in zip(sentences(context, [name], templates=templates), blank, strict=True)
    ]


def without_words(sentence: str) -> str:
    """A sentence without its free words: "a drawing of <v>, red" -> "a drawing of, red"."""
    return re.sub(r"\s+(?=,|$)", "", " ".join(sentence.replace(MARK, " ").split()))


# --- tokens ---------------------------------------------------------------------------------------------------------


def generator_of(*key: str | int) -> torch.Generator:
    """A CPU generator seeded by the key."""
    return torch.Generator().manual_seed(seed_of(repr(key)) >> 1)


def vocabulary(tokenizer: Any) -> Tensor:
    return torch.tensor(sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids)))


def random_tokens(tokenizer: Any, count: int, named: str, number: int) -> tuple[int, ...]:
    """Tokens from the whole vocabulary, the same for every model and attack. Searches start from number 0."""
    known = vocabulary(tokenizer)
    chosen = torch.randint(len(known), (count,), generator=generator_of("words", named, number))
    return tuple(known[chosen].tolist())


# --- what is drawn --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Shot:
    """One picture of an attack."""

    family: str
    goal: Goal
    seed: int
    image: Image.Image
    facts: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Gallery:
    """An opened model that draws sentences with tokens in them.

    The text encoder gets the tokens themselves: written out and tokenised again they may be others. Only a filter
    around the pipeline gets the sentence as a string, because it reads strings.
    """

    context: Context
    model: Model
    pipe: Any
    goals: Sequence[Goal]
    words: FreeWords

    def shots(self, family: str, candidates: Sequence[Candidate], seeds: Sequence[int]) -> list[Shot]:
        """Pictures of every goal with its candidate. Noise depends on the goal and the seed, not on the candidate.

        Behind a filter it depends on the candidate too, because the sentence is drawn from its string.
        """
        spelled = [self.words.spelled(one.ids, row) for row, one in enumerate(candidates)]
        more: dict[str, Any] = {"seeds": seeds, "description": f"{family} {self.model.name}"}
        if self.pipe is not self.context.pipe:
            drawn = self.context.draw(self.pipe, self.model, spelled, cut=True, **more)
        else:
            with torch.no_grad():
                ids = torch.tensor([one.ids for one in candidates], device=self.words.table.device)
                text = self.words.text(self.words.table[ids])
            named = [goal.named for goal in self.goals]
            drawn = self.context.draw(self.pipe, self.model, named, prompt_embeds=text.hidden, cache_dir=None, **more)
        facts = [
            {"prompt": words, "ids": list(one.ids), **one.facts} for words, one in zip(spelled, candidates, strict=True)
        ]
        return self._shots(family, drawn, seeds, facts)

    def plain(self, family: str, seeds: Sequence[int]) -> list[Shot]:
        """Pictures of the sentences without an attack."""
        before = [goal.before for goal in self.goals]
        drawn = self.context.draw(self.pipe, self.model, before, seeds=seeds, description=f"{family} {self.model.name}")
        return self._shots(family, drawn, seeds, [{"prompt": words} for words in before])

    def _shots(
        self, family: str, drawn: Sequence[Sequence[Image.Image]], seeds: Sequence[int], facts: Sequence[dict[str, Any]]
    ) -> list[Shot]:
        return [
            Shot(family, goal, seed, image, fact)
            for goal, row, fact in zip(self.goals, drawn, facts, strict=True)
            for seed, image in zip(seeds, row, strict=True)
        ]


def selected(shots: Sequence[Shot], context: Context, family: str) -> dict[str, int]:
    """The try of each goal that the selector scores highest, the first of equals. The judge does not choose."""
    tried = [shot for shot in shots if shot.family == family]
    scores = [seen["score"] for seen in context.see([shot.image for shot in tried], detector=context.chooser)]
    best: dict[str, tuple[float, int]] = {}
    for shot, score in zip(tried, scores, strict=True):
        best[shot.goal.named] = max(best.get(shot.goal.named, (-1.0, 0)), (score, -shot.seed))
    return {named: -number for named, (_, number) in best.items()}


def with_pictures(rows: Sequence[Observation], images: Sequence[Image.Image]) -> list[Observation]:
    """The rows, with the picture of the first hit for each of the first few sentences that have one."""
    shown: set[str] = set()
    found = []
    for row, image in zip(rows, images, strict=True):
        if row.family in (ATTACK, FRESH) and row.value == 1 and row.cluster not in shown and len(shown) < SHOWN:
            shown.add(row.cluster)
            row = dataclasses.replace(row, facts={**row.facts, "png": png_of(image)})
        found.append(row)
    return found
