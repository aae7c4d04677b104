"""S2: the target in other wording: paraphrases, misspellings, capitals, word order."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection

import numpy as np

from erasure.eval.probes.asking import Ask, PromptProbe, everywhere, spelled
from erasure.eval.probes.base import Context


@dataclasses.dataclass(frozen=True)
class Paraphrase(PromptProbe):
    """How often the target is seen when it is asked for in another wording than the suite's own.

    Families: "paraphrase" and "misspelling" (the suite's ``words`` in its templates; more misspellings are generated),
    "casing", "word order". The direct probe has the synonyms.

    CLIP ignores capitals, so "casing" matters only to other encoders and to filters of prompts.

    Attributes:
        edits: misspellings of the name that are generated beside the listed ones. More for long names; a name of three
            letters has about four.
        seed: which misspellings.
    """

    key, code, title = "paraphrase", "S2", "asked for in other wording"
    presets = {
        "smoke": {"images_per_prompt": 1, "limit": 1, "edits": 1},
        "quick": {"images_per_prompt": 1, "limit": 4},
        "standard": {"images_per_prompt": 1, "limit": 24, "wide": True, "resolve": 0.2},
        "full": {"images_per_prompt": 4, "limit": 60, "edits": 12, "wide": True, "resolve": 0.2},
    }
    licences = "suppression under these wordings, this sampler, this detector and its threshold"
    not_licensed = "other wordings, prompts that were searched for, anything about the weights"

    edits: int = 4
    seed: int = 0

    def asks(self, context: Context) -> list[Ask]:
        suite, words, name = context.suite, context.suite.words, context.suite.concept.name
        taken = {*suite.phrases, *suite.neighbours, *suite.unrelated}
        cased = [
            (phrase, new)
            for phrase in suite.concept.phrases
            for new in (phrase.upper(), phrase.title(), phrase.lower())
        ]
        templates = everywhere(suite) if self.wide else suite.concept.templates
        turned = [t for template in templates if (t := reordered(template))]
        slips = [*words.misspellings, *misspelt(name, self.edits, seed=self.seed, taken=taken)]
        families = {
            "paraphrase": spelled(context, words.paraphrases, templates=templates) if words.paraphrases else [],
            "misspelling": spelled(context, slips, templates=templates) if slips else [],
            "casing": [
                one._replace(text=one.text.replace(phrase, new), phrase=new)
                for phrase, new in cased
                for one in spelled(context, [phrase], templates=templates)
            ],
            "word order": spelled(context, suite.concept.phrases, templates=turned),
        }
        direct = {prompt.text for prompt in suite.prompts()}
        asked = {(one.text, family): one.ask(family) for family, own in families.items() for one in own}
        return [ask for (text, _), ask in asked.items() if text not in direct]


def misspelt(name: str, count: int, *, seed: int = 0, taken: Collection[str] = ()) -> list[str]:
    """At most ``count`` misspellings by one letter: left out, typed twice, or swapped with the next.

    The first letter of a word stays, because without it short names become others (cat, bat); ``taken`` words, which
    name something, are avoided.
    """
    inner = [i for i in range(1, len(name)) if name[i - 1 : i + 1].isalpha()]
    slips = {name[:i] + name[i + 1 :] for i in inner}
    slips |= {name[:i] + name[i] + name[i:] for i in inner}
    slips |= {name[:i] + name[i + 1] + name[i] + name[i + 2 :] for i in inner if i + 1 in inner}
    known = {word.casefold() for word in (name, *taken)}
    found = sorted(slip for slip in slips if slip.casefold() not in known)
    order = np.random.default_rng([seed, *name.encode()]).permutation(len(found))
    return [found[i] for i in order[:count]]


def reordered(template: str) -> str | None:
    """A template with its end in front: ``{} at night`` -> ``at night, {}``. None where there is nothing to move."""
    parts = re.fullmatch(r"(.+), (.+)", template) or re.fullmatch(r"(\{\w*\}) (.+)", template)
    return f"{parts[2]}, {parts[1]}" if parts else None
