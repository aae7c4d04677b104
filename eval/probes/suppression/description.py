"""S3: the target by what it is, without its name."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from erasure.eval.probes.asking import Ask, PromptProbe, everywhere, spelled
from erasure.eval.probes.base import Context


@dataclasses.dataclass(frozen=True)
class Description(PromptProbe):
    """How often the target is seen when it is described: the suite's words in all its templates and scenes, and bare.

    A model that never saw the target draws it too where a description lists parts that it knows, so the number is read
    against the control.
    """

    key: ClassVar = "description"
    code: ClassVar = "S3"
    title: ClassVar = "described without its name"
    presets: ClassVar = {
        "smoke": {"images_per_prompt": 1, "limit": 2},
        "quick": {"images_per_prompt": 1, "limit": 6},
        "standard": {"limit": 24},
        "full": {"images_per_prompt": 6},
    }
    licences: ClassVar = "suppression under these descriptions; hits say that suppression is bound to the name"
    not_licensed: ClassVar = "other descriptions; that hits come from the target's data, unless the control has fewer"
    reference: ClassVar = "EMMA, CVPR 2026 (short and long descriptions)"

    def asks(self, context: Context) -> list[Ask]:
        suite = context.suite
        bare = () if suite.attribute == "style" else ("{}",)  # a style alone is no picture
        found = spelled(context, suite.words.descriptions, article=False, templates=(*bare, *everywhere(suite)))
        return [one.ask("description") for one in found]
