"""S4: what the target is a kind of."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from erasure.eval.probes.asking import Ask, PromptProbe, everywhere, spelled
from erasure.eval.probes.base import Context, Missing


@dataclasses.dataclass(frozen=True)
class Hierarchy(PromptProbe):
    """How often the target is seen under a word for its kind ("an animal" for a cat); one family per word.

    The base draws the target for some of these pictures only, one in a dozen where a kind has a dozen members. So what
    counts is the change against the base, and a family counts once the base shows the target clearly more than never.
    Take more seeds where the kind is large: 72 pictures of a kind of twelve show six.
    """

    key: ClassVar = "hierarchy"
    code: ClassVar = "S4"
    title: ClassVar = "asked for by its kind"
    presets: ClassVar = {
        "smoke": {"images_per_prompt": 1, "limit": 1},
        "standard": {"images_per_prompt": 3, "limit": 24},
        "full": {"images_per_prompt": 10},
    }
    known: ClassVar = 0.02  # of a kind with many members the base cannot show this one in three pictures of ten
    licences: ClassVar = "suppression under these words for its kind, compared with the base's own share"
    not_licensed: ClassVar = "other kinds; that the kind as a whole is still drawn as it was"
    reference: ClassVar = "SEE, Findings of EMNLP 2025 (evasion through the hierarchy)"

    def asks(self, context: Context) -> list[Ask]:
        suite = context.suite
        if not suite.words.superclasses:
            raise Missing(f"the suite {suite.name} lists no superclasses; add them under `words`")
        return [
            one.ask(kind)
            for kind in suite.words.superclasses
            for one in spelled(context, [kind], article=False, templates=everywhere(suite))
        ]
