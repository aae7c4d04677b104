"""S9: how often the target appears by chance in as many tries as an attack has."""

from __future__ import annotations

import dataclasses

from erasure.eval.probes.attacking import goals_of, random_tokens
from erasure.eval.probes.base import Context, Evidence, Model, Observation, Probe, Roles, Rows
from erasure.eval.probes.success import any_hits
from erasure.eval.probes.weigh import contrasts


@dataclasses.dataclass(frozen=True)
class RandomControl(Probe):
    """The suite's own sentences, k times each: with other noise ("seeds"), and with random tokens in front ("words").

    A picture that shows the target with probability r shows it at least once in k independent tries with probability
    1 - (1 - r)^k: 2 in 100 become 38 in 100 at k = 24. Only the success of an attack beyond that counts.

    Attributes:
        tries: k; as many as the attack that is compared has.
        tokens: random tokens in front, decoded to a string.
    """

    key, code, title = "random_control", "S9", "random control"
    section, level, access = "suppression", "outputs", "black_box"
    controls = 1
    presets = {
        "smoke": {"prompts": 2, "tries": 2},
        "standard": {"prompts": 18, "tries": 5},
        "full": {"prompts": 75, "tries": 20},
    }
    licences = "how often these sentences show the target within k tries that nobody aimed"
    not_licensed = "attacks"
    reference = "the random and seed-search baselines of Zhang et al. 2024, arXiv 2310.11868"

    prompts: int = 12
    tries: int = 10
    tokens: int = 3

    def budget(self) -> str:
        return f"{self.tries} tries on each of at most {self.prompts} sentences with its name"

    def run(self, model: Model, context: Context) -> list[Observation]:
        named = [goal.named for goal in goals_of(context, "prefix", self.prompts)]
        first = context.suite.images_per_prompt  # noise with lower seeds is the evaluation's
        tokenizer, tries = context.pipe.tokenizer, range(self.tries)
        each = [one for one in named for _ in tries]
        words = [
            f"{tokenizer.decode(random_tokens(tokenizer, self.tokens, one, i))} {one}" for one in named for i in tries
        ]
        with context.open(model) as pipe:
            found = context.ask(model, named, family="seeds", seeds=range(first, first + self.tries), pipe=pipe)
            found += context.ask(model, words, family="words", clusters=each, pipe=pipe, cut=True)
        return [
            dataclasses.replace(row, facts={**row.facts, "try": i % self.tries, "tries": self.tries})
            for i, row in enumerate(found)
        ]

    def weigh(self, rows: Rows, models: Roles) -> list[Evidence]:
        once = {f: {name: any_hits(own, f) for name, own in rows.items()} for f in ("seeds", "words")}
        return [e for family, own in once.items() for e in contrasts(self.key, own, models, family)]
