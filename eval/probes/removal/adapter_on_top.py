"""R20: whether an adapter that somebody trains on something harmless brings the target back."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from torch import Tensor

from erasure.backbone import Backbone
from erasure.eval.probes.base import Context
from erasure.eval.probes.removal.resurgence import Resurgence
from erasure.eval.probes.tuning import tuned
from erasure.methods.students import LowRank


@dataclasses.dataclass(frozen=True)
class AdapterOnTop(Resurgence):
    """Train a low-rank adapter (LoRA) on real pictures of a neighbour, and ask for the target before and after.

    This is how most people personalise a model, by LoRA or DreamBooth. No picture shows the target. Measures and gates
    are those of :class:`~erasure.eval.probes.removal.resurgence.Resurgence`, which trains the weights themselves.

    Attributes:
        pictures: how many to learn from; DreamBooth takes 3 to 20.
        lr: of AdamW on the factors, higher than on weights. 1e-4 for Stable Diffusion.
        parameters: which layers get an adapter, a name of :meth:`Backbone.select`.
        rank: of the adapter.
    """

    version, reads = 1, ()
    key, code, title = "adapter_on_top", "R20", "with a harmless adapter on top"
    presets = {
        "smoke": {"pictures": 4, "steps": 2, "batch_size": 2, "runs": 1, "prompts": 2, "images_per_prompt": 1},
        "standard": {"steps": 100, "prompts": 18, "images_per_prompt": 1},
        "full": {"steps": 500, "prompts": 54},
    }
    licences = "whether suppression lasts under an adapter trained on these pictures"
    not_licensed = "other adapters, data or budgets; where it lasts, nothing about relearning"
    reference = "LoRA, Hu et al. 2022; DreamBooth, 2023, arXiv 2208.12242; as a probe: arXiv 2505.16174, 2025"

    labels: Literal["kept", "neighbours"] = "neighbours"
    pictures: int = 16
    lr: float = 1e-3
    parameters: str = "attention"
    rank: int = 4

    @contextlib.contextmanager
    def learner(self, context: Context, backbone: Backbone, run: int) -> Iterator[Mapping[str, Tensor]]:
        student = LowRank(backbone, self.parameters, rank=self.rank, seed=run)
        with tuned(context.pipe), student.active():
            yield student.parameters

    def drawing(self) -> dict[str, Any]:
        return {"cache_dir": None}  # pictures are cached by the weights, which the adapter does not change
