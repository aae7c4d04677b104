"""S9: how often the target appears by chance in as many tries as an attack has."""

from __future__ import annotations

import dataclasses

from erasure.eval.core.models import Model
from erasure.eval.probes.attacking import goals_of, random_tokens
from erasure.eval.probes.base import Context, Evidence, Observation, Probe, Roles, Rows
from erasure.eval.probes.success import any_hits
from erasure.eval.probes.weigh import KNOWN, contrasts


@dataclasses.dataclass(frozen=True)
class RandomControl(Probe):
    """The suite's own sentences, k times each: with other noise ("seeds"), and with random tokens in front ("words").

    A picture that shows the target with probability r shows it at least once in k independent tries with probability
    1 - (1 - r)^k: 2 in 100 become 38 in 100 at k = 24. Only the success of an attack beyond that counts.

    Attributes:
        prompts: sentences, spread evenly over the names and templates of the suite.
        tries: k; as many as the attack that is compared has.
        tokens: random tokens in front, decoded to a string.
    """

    key, code, title = "random_control", "S9", "random control"
    section, level, access = "suppression", "outputs", "black_box"
    controls = 1
    presets = {"smoke": {"prompts": 2, "tries": 2}, "standard": {"prompts": 6}, "full": {"prompts": 75, "tries": 20}}
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
        seeds, tries = tuple(range(first, first + self.tries)), range(self.tries)
        tokenizer = context.pipe.tokenizer
        words = [
            f"{tokenizer.decode(random_tokens(tokenizer, self.tokens, one, i))} {one}" for one in named for i in tries
        ]
        with context.open(model) as pipe:
            other = context.draw(pipe, model, named, seeds=seeds, description=f"{self.code} {model.name}")
            prefixed = context.draw(pipe, model, words, cut=True, description=f"{self.code} {model.name}")
        return context.observe(
            model,
            [image for row in (*other, *prefixed) for image in row],
            family=["seeds"] * len(words) + ["words"] * len(words),
            clusters=[one for one in named for _ in tries] * 2,
            seeds=list(seeds) * len(named) + [0] * len(words),
            facts=[
                {"prompt": prompt, "try": i % self.tries, "tries": self.tries}
                for prompts in ([one for one in named for _ in tries], words)
                for i, prompt in enumerate(prompts)
            ],
        )

    def weigh(self, rows: Rows, models: Roles) -> list[Evidence]:
        found: list[Evidence] = []
        for family in ("seeds", "words"):
            once = {name: any_hits(own, family) for name, own in rows.items()}
            found += contrasts(self.key, once, models, family, known=KNOWN)
        return found
