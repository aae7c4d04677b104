"""EAP: erase, and hold on to the prompts that the erasing damages most."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

from pydantic import NonNegativeFloat, PositiveInt

from erasure.methods.base import Reference
from erasure.methods.esd import ESD


@dataclasses.dataclass(frozen=True, kw_only=True)
class EAP(ESD):
    """ESD with adversarial preservation (Bui et al. 2024):

        min_theta  | e_theta(x_t, t, c) - y |^2  +  retain  max_a | e_theta(x_t, t, a) - e(x_t, t, a) |^2
        y = e(x_t, t, c) - eta (e(x_t, t, c) - e(x_t, t))

    with c the concept, a a prompt of the keep list and e the frozen base. In the paper eta is 1 and y = e(x_t, t);
    ``recommended`` has ESD's 2. The maximum is over ``retain_hardest`` times
    as many rows of the bank as are trained on, drawn anew at every step. The paper finds it by gradient steps on a
    mixture of up to 100 words, and compares predicted pictures instead of predictions.

    Give it a long keep list: it finds by itself which of them matter. The other settings are those of
    :class:`~erasure.methods.esd.ESD` and :class:`~erasure.methods.finetune.FineTune`.
    """

    eta: NonNegativeFloat = 1.0
    variant: Literal["x", "x-strict", "u", "all"] = "x"
    lr: float = 1e-5
    iterations: PositiveInt = 1000
    retain: NonNegativeFloat = 1.0
    retain_hardest: PositiveInt = 4

    key: ClassVar[str] = "eap"
    summary: ClassVar[str] = "ESD that holds on to whatever suffers most; minutes"
    reference: ClassVar[Reference] = Reference(
        "Erasing Undesirable Concepts in Diffusion Models with Adversarial Preservation",
        "Bui et al., NeurIPS 2024",
        "2410.15618",
        "tuananhbui89/Erasing-Adversarial-Preservation",
    )
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "recommended": {
            **ESD.presets["recommended"],
            "eta": 2.0,
        },
        "paper": {"trajectories": 1000, "keep_steps": 1, "adapter": "weights"},
    }

    @property
    def needs_keep(self) -> bool:
        return True
