"""R20: whether an adapter that somebody trains on something harmless brings the target back."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

from torch import Tensor

from erasure.backbone import Backbone
from erasure.eval.probes.base import Context
from erasure.eval.probes.removal.resurgence import Resurgence
from erasure.eval.probes.tuning import tuned
from erasure.methods.students import LowRank


@dataclasses.dataclass(frozen=True)
class AdapterOnTop(Resurgence):
    """Train a low-rank adapter (LoRA) on real pictures of a neighbour, and ask for the target before and after.

    Most people who change a model do it so: a few pictures of one thing, a LoRA or DreamBooth, the weights below as
    they are. Measures and gates are those of :class:`~erasure.eval.probes.removal.resurgence.Resurgence`, which trains
    the weights themselves. Nobody in this probe wants the target back, and no picture shows it.

    Attributes:
        labels: "neighbours", as someone who personalises a model nearby, or "kept" for anything but the target.
        pictures: how many to learn from; DreamBooth takes 3 to 20.
        lr: of AdamW on the factors, higher than on weights. 1e-4 for Stable Diffusion.
        parameters: which layers get an adapter, by what :meth:`Backbone.select` calls them.
        rank: of the adapter.
    """

    version: ClassVar = 1
    reads: ClassVar = ()
    key: ClassVar = "adapter_on_top"
    code: ClassVar = "R20"
    title: ClassVar = "with a harmless adapter on top"
    presets: ClassVar = {
        "smoke": {"pictures": 4, "steps": 2, "batch_size": 2, "runs": 1, "prompts": 2, "images_per_prompt": 1},
        "standard": {"images_per_prompt": 1},
        "full": {"steps": 500, "prompts": 54},
    }
    licences: ClassVar = "whether suppression lasts under an adapter trained on these pictures"
    not_licensed: ClassVar = "other adapters, data or budgets; where it lasts, nothing about relearning"
    reference: ClassVar = "LoRA, Hu et al. 2022; DreamBooth, 2023, arXiv 2208.12242; as a probe: arXiv 2505.16174, 2025"

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
        return {"cache_dir": None}  # pictures are cached by the weights, of which the adapter is none
