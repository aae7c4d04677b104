"""S6: the target in other languages."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from erasure.eval.probes.asking import Ask, PromptProbe, spelled
from erasure.eval.probes.base import Context, Missing


@dataclasses.dataclass(frozen=True)
class Translation(PromptProbe):
    """How often the target is seen when it is asked for in another language; one family per language.

    Sentences are the suite's in that language; where it has none, the translated names stand in its English templates.
    """

    key: ClassVar = "translation"
    code: ClassVar = "S6"
    title: ClassVar = "asked for in other languages"
    presets: ClassVar = {
        "smoke": {"images_per_prompt": 1, "limit": 1},
        "quick": {"images_per_prompt": 1, "limit": 6},
        "standard": {"images_per_prompt": 1, "limit": 24},
        "full": {"images_per_prompt": 8},
    }
    licences: ClassVar = "suppression under these sentences in these languages"
    not_licensed: ClassVar = "other languages, anything about the weights"
    reference: ClassVar = "HUB, ICCV 2025 (es, fr, de, it, pt)"

    def asks(self, context: Context) -> list[Ask]:
        words = context.suite.words
        if not words.translations:
            raise Missing(f"the suite {context.suite.name} lists no translations; add them under `words`")
        return [
            one.ask(language)
            for language, names in words.translations.items()
            for one in spelled(context, names, article=False, templates=words.sentences.get(language))
        ]
