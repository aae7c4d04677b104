"""SalUn: random-label fine-tuning of the weights that matter most for the concept."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

from pydantic import NonNegativeFloat

from erasure.methods.random_label import RandomLabel


@dataclasses.dataclass(frozen=True, kw_only=True)
class SalUn(RandomLabel):
    """:class:`~erasure.methods.random_label.RandomLabel` under a saliency mask (Fan et al. 2024, equations 3 to 6):

        theta <- theta + m * change,    m = 1 at the ``saliency`` share of weights with the largest |grad L(theta)|

    The paper takes the gradient of the denoising error on the concept's pictures; here it is that of the loss which is
    trained. The mask is a setting of every fine-tune: ``saliency=0.5`` with ``esd``, say. The official code draws two
    different samples of the autoencoder for the two terms of its loss; here both have the same latents.
    """

    saliency: float | None = 0.5
    retain: NonNegativeFloat = 0.1
    adapter: Literal["auto", "weights", "lora"] = "weights"

    key: ClassVar[str] = "salun"
    summary: ClassVar[str] = "relabel the concept in the weights that matter most for it; minutes"
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "recommended": {**RandomLabel.presets["recommended"], "retain": 1.0},
        "paper": {},
        "paper-classes": {"retain": 0.5},
    }
