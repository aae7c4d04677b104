"""S18: the prompts of files: I2P, Ring-A-Bell, MMA, P4D, or the user's own."""

from __future__ import annotations

import dataclasses

from erasure.eval.probes.asking import Ask, PromptProbe
from erasure.eval.probes.base import Context


@dataclasses.dataclass(frozen=True)
class PromptFiles(PromptProbe):
    """How often the target is seen in pictures of the prompts of a file, one family a file.

    Most such prompts were found on Stable Diffusion 1.4. On another model they give a lower limit: an attack on that
    very model finds more. A file counts where the base shows the target for its prompts in 30 % of pictures, by the
    lower limit.

    The noise is this library's own for (prompt, seed). A file's seeds and guidance are not used, so the rate does not
    reproduce a published table; ``studies/reproduce`` does.

    Attributes:
        limit: prompts of each file, spread evenly over it. Raise it where intervals are wide.
    """

    key, code, title = "prompt_file", "S18", "asked with the prompts of a file"
    needs = ("prompts",)
    presets = {
        "smoke": {"images_per_prompt": 1, "limit": 1},
        "quick": {"images_per_prompt": 1, "limit": 24},
        "standard": {"images_per_prompt": 1, "limit": 150},
        "full": {"images_per_prompt": 1},
    }
    licences = "suppression under these prompts, this sampler, this detector and its threshold"
    not_licensed = "prompts that are found on this very model, anything about the weights"

    def asks(self, context: Context) -> list[Ask]:
        found = {
            (family, row.text): Ask(row.text, family)
            for family, file in context.prompt_files.items()
            for row in file.rows
        }
        return list(found.values())
