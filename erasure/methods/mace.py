"""MACE: take concepts out of the words around them and out of the attention, and fuse that in closed form."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor, nn

from erasure.artifact import DeltaErasure, Erasure
from erasure.backbone import Backbone
from erasure.backbone.attention import attention_maps, cross_attentions
from erasure.backbone.base import layer_at
from erasure.backbone.text import Text
from erasure.methods.bank import Bank, DrawnBank
from erasure.methods.base import Reference, Request, check_moved
from erasure.methods.closed_form import encoded
from erasure.methods.finetune import FineTune, Loss
from erasure.methods.mace_cfr import MACECFR
from erasure.methods.students import LowRank, Student, swapped
from erasure.train import Checkpoint, Draw


@dataclasses.dataclass(frozen=True, kw_only=True)
class MACE(FineTune):
    """The three stages of MACE (Lu et al. 2024):

    1. closed-form refinement, :class:`~erasure.methods.mace_cfr.MACECFR`: W becomes W_1;
    2. for each concept i, on W_1, a low-rank adapter L_i of the cross-attentions' keys and values that makes small

        sum over cross-attentions of | A[:, :, mask, words] |_F

       with A the attention on pictures the base drew for the concept, words its tokens and mask where they are seen;
    3. fusion of all adapters into one weight for each layer, W', in closed form:

        min_W'  sum_i sum_x |W' x - (W_1 + L_i) x|^2 + lamb |W' - W_1|^2 + sum_k |W' k - W k|^2

       with x the tokens of thirty sentences with concept i, and k what is kept.

    The published code takes masks from an open-vocabulary detector; here they come from the attention itself: its mean
    over layers, scaled to 0..1, where above 0.5. The erasure is the difference of all keys and values. Every concept
    needs an anchor. The settings it shares with other fine-tunes are those of
    :class:`~erasure.methods.finetune.FineTune`. Its banks hold ``trajectories`` pictures of each concept with
    ``keep_steps`` noisy copies, at times from 0.2 to 0.4 of the range, as the paper prefers.

    Attributes:
        masked: look at the concept's place alone. False takes all places, for styles and nudity.
        lamb: weight of staying near W_1, in the first and the third stage. Lower it when the target survives.
        preserve_scale: weight of what is kept, in both. Raise it when neighbours suffer.
        domain_scale: how much more the keep list weighs than the everyday nouns' corpus.
    """

    masked: bool = True
    lamb: NonNegativeFloat = 10.0
    preserve_scale: NonNegativeFloat = 1.0
    domain_scale: NonNegativeFloat = 1.0
    iterations: PositiveInt = 50
    lr: float = 1e-4
    optimizer: Literal["adam", "adamw", "sgd", "adamw8bit"] = "adamw"
    adapter: Literal["auto", "weights", "lora"] = "lora"
    rank: PositiveInt = 1
    trajectories: PositiveInt = 8
    keep_steps: PositiveInt | None = 16

    architectures: ClassVar[tuple[str, ...]] = ("sd-unet", "sdxl")
    on_attention: ClassVar[bool] = True
    key: ClassVar[str] = "mace"
    kind: ClassVar[str | None] = "delta"
    summary: ClassVar[str] = "closed form, an adapter against attention, closed-form fusion; minutes a concept"
    reference: ClassVar[Reference] = MACECFR.reference
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "recommended": {"lr": 1e-3, "batch_size": 4, "num_inference_steps": 25, "synonyms": True, "articles": True},
        "paper-object": {"lr": 1e-5, "lamb": 1e2, "preserve_scale": 0.0, "num_inference_steps": 30},
        "paper-celebrity": {
            "lamb": 0.0, "preserve_scale": 1e-4, "domain_scale": 8e3, "num_inference_steps": 30
        },
        "paper-style": {
            "lamb": 0.0, "preserve_scale": 1e-4, "domain_scale": 8e4, "num_inference_steps": 30, "masked": False
        },
    }  # fmt: skip

    @property
    def needs_keep(self) -> bool:
        return self.preserve_scale > 0

    @property
    def uses_keep(self) -> bool:
        return self.needs_keep

    @property
    def selector(self) -> str:
        return "cross_attention_kv"

    @property
    def refinement(self) -> MACECFR:
        """The first stage."""
        return MACECFR(
            lamb=self.lamb,
            preserve_scale=self.preserve_scale,
            domain_scale=self.domain_scale,
            articles=self.articles,
            synonyms=self.synonyms,
            keep_span="all",
            keep_everyday=True,
        )

    def validate(self, backbone: Backbone, request: Request) -> None:
        if self.robust or self.retain or self.adapter == "weights":
            raise ValueError(
                "MACE trains an adapter for each concept, compares no predictions and keeps by preserve_scale; got "
                f"adapter {self.adapter!r}, robust={self.robust} and retain={self.retain}; leave them out"
            )
        super().validate(backbone, request)
        self.refinement.validate(backbone, request)
        cross_attentions(backbone)  # refuses models without them

    def prompts(self, backbone: Backbone, request: Request) -> list[str]:
        return request.names(synonyms=self.synonyms)

    def erase(self, backbone: Backbone, request: Request) -> Erasure:
        """Refine, train an adapter for each concept, fuse. A checkpoint folder gets one for each concept."""
        facts = self.record(backbone, request, prompts=self.prompts(backbone, request))
        refined = self.refinement.erase(backbone, request)
        before = {name: weight_of(backbone, name).detach() for name in refined.parameter_names}
        first = {name: refined.edit(name, weight, 1.0) for name, weight in before.items()}
        adapters = []
        parameters = {name: weight_of(backbone, name) for name in first}
        with swapped(parameters, {name: weight.to(parameters[name]) for name, weight in first.items()}):
            for i, concept in enumerate(request.concepts):
                folder = request.checkpoint and Path(request.checkpoint) / f"concept-{i}"
                alone = dataclasses.replace(request, concepts=(concept,), checkpoint=folder)
                adapters.append(super().erase(backbone, alone))
        deltas = self.fused(backbone, request, before, first, adapters)
        moved = {"relative_change": check_moved(deltas, before)}
        facts = facts.with_facts(sites=list(deltas), report={**facts.report, **moved})
        return DeltaErasure(self.name_for(request), facts, deltas)

    # --- the second stage ---------------------------------------------------------------------------------------------

    def student(self, backbone: Backbone) -> LowRank:
        return LowRank(backbone, self.selector, rank=self.rank, alpha=self.alpha, seed=self.seed)

    def objective(self, backbone: Backbone, student: Student, request: Request, checkpoint: Checkpoint | None) -> Loss:
        encoded = backbone.encode(self.prompts(backbone, request))
        words = torch.zeros(len(encoded), encoded.text.hidden.shape[1])
        for row, span in zip(words, encoded.segments[0].span("content"), strict=True):
            row[span] = 1
        bank = self.pictures(backbone, encoded.text, request, checkpoint, "bank", window=(0.2, 0.4))
        masks = self.masks(backbone, bank, encoded.text, words)

        def loss(draw: Draw) -> Tensor:
            chosen = bank.pick(self.batch_size, draw.generator)
            with student.active():
                maps = attention(backbone, bank, encoded.text, chosen)
            return masked_mass(maps, words[bank.prompt[chosen]], masks[chosen])

        return loss

    def masks(self, backbone: Backbone, bank: DrawnBank, text: Text, words: Tensor) -> Tensor:
        """``(n, h, w)`` at the size of the latents: 1 where the concept's words are attended to, 0 elsewhere."""
        side = bank.x.shape[-2:]
        if not self.masked:
            return torch.ones(len(bank), *side)
        return masks_of(backbone, bank, text, words, above=0.5)

    # --- the third stage ----------------------------------------------------------------------------------------------

    def fused(
        self,
        backbone: Backbone,
        request: Request,
        before: Mapping[str, Tensor],
        first: Mapping[str, Tensor],
        adapters: Sequence[Erasure],
    ) -> dict[str, Tensor]:
        """The change of every weight: fused where an adapter was trained, refined alone elsewhere (pooled text)."""
        moments = [self.moment(backbone, request, i) for i in range(len(adapters))]
        kept = self.refinement.kept(backbone, request.keep, "hidden").matrix()
        trained = {f"{site}.weight" for site in backbone.text_sites("hidden")}
        deltas = {}
        for name, weight in before.items():
            w, w1 = weight.detach().cpu().double(), first[name].detach().cpu().double()
            if name in trained:
                aims = [w1 + change(adapter, name, w) for adapter in adapters]
                w1 = fuse(w, w1, aims, moments, kept, self.lamb)
            deltas[name] = (w1 - w).float()
        return deltas

    def moment(self, backbone: Backbone, request: Request, i: int) -> Tensor:
        """``sum_x x x^T (d, d)`` over all tokens of the sentences with one concept, float64."""
        sentences = [sentence for sentence, _ in self.refinement.prompt_pairs(request.concepts[i])]
        rows = [segment.hidden.flatten(0, 1) for one in encoded(backbone, sentences) for segment in one.segments]
        return torch.stack([(x := part.cpu().double()).T @ x for part in rows]).sum(0)


def fuse(w: Tensor, w1: Tensor, aims: Sequence[Tensor], moments: Sequence[Tensor], kept: Tensor, lamb: float) -> Tensor:
    """``W' = (sum_i M_i S_i + lamb W_1 + W K) (sum_i S_i + lamb I + K)^-1``, in float64.

    Args:
        w, w1: the layer's weight ``(out, d)`` before and after the first stage.
        aims: ``M_i = W_1 + L_i`` for each concept.
        moments: ``S_i (d, d)`` of each concept's tokens.
        kept: ``K (d, d)`` of what is kept.
    """
    right = sum((m @ s for m, s in zip(aims, moments, strict=True)), lamb * w1 + w @ kept)
    left = sum(moments, lamb * torch.eye(w.shape[1], dtype=w.dtype) + kept)
    return torch.linalg.lstsq(left, right.T, driver="gelsd").solution.T


def attention(backbone: Backbone, bank: Bank, text: Text, chosen: Tensor) -> list[Tensor]:
    """Attention maps ``(n, heads, places, tokens)`` of every cross-attention on chosen rows."""
    with attention_maps(backbone) as maps:
        x, t, rows = bank.inputs(backbone, text, chosen)
        backbone.predict(x, t, rows, guidance=backbone.plain_guidance)
        return list(maps.values())


@torch.no_grad()
def masks_of(backbone: Backbone, bank: Bank, text: Text, words: Tensor, *, above: float) -> Tensor:
    """``(n, h, w)`` at the size of the latents: 1 where the prompts' words are attended to at each row of a bank.

    Args:
        words: ``(prompts, tokens)``, 1 at the words.
        above: of the attention's mean over layers, scaled to 0..1 in each row.
    """
    side, found = bank.x.shape[-2:], []
    for rows in torch.arange(len(bank)).split(16):
        chosen = words[bank.prompt[rows]]
        maps = [places_of(a, chosen, side).mean(1, keepdim=True) for a in attention(backbone, bank, text, rows)]
        mean = torch.stack([F.interpolate(one, side, mode="bilinear") for one in maps]).mean(0)[:, 0].cpu()
        low, high = mean.amin((1, 2), keepdim=True), mean.amax((1, 2), keepdim=True)
        found.append(((mean - low) / (high - low).clamp(min=1e-12) > above).float())
    return torch.cat(found)


def height_of(places: int, side: Sequence[int]) -> int:
    """Rows of so many places of a layer, for latents of size ``side``."""
    return round(side[0] / (side[0] * side[1] / places) ** 0.5)


def places_of(maps: Tensor, words: Tensor, side: Sequence[int]) -> Tensor:
    """``(n, heads, h, w)``: attention to words ``(n, tokens)`` by place, for latents of size ``side``."""
    height = height_of(maps.shape[2], side)
    return (maps * words.to(maps)[:, None, None]).sum(3).unflatten(2, (height, -1))


def masked_mass(maps: Sequence[Tensor], words: Tensor, masks: Tensor) -> Tensor:
    """Sum over layers of the Frobenius norm of the maps at words ``(n, tokens)`` and places of masks ``(n, h, w)``."""
    total = []
    for a in maps:
        height = height_of(a.shape[2], masks.shape[1:])
        there = F.interpolate(masks[:, None], (height, a.shape[2] // height)).flatten(1).to(a)
        total.append((a * words.to(a)[:, None, None] * there[:, None, :, None]).norm())
    return torch.stack(total).sum()


def change(adapter: Erasure, name: str, like: Tensor) -> Tensor:
    """What an adapter adds to a weight; nothing where no gradient reached it, as the last layer's values."""
    zero = torch.zeros_like(like)
    return adapter.edit(name, zero.float(), 1.0).double() if name in adapter.parameter_names else zero


def weight_of(backbone: Backbone, name: str) -> nn.Parameter:
    """A parameter by its qualified name."""
    layer, _, own = name.rpartition(".")
    return getattr(layer_at(backbone, layer), own)


__all__ = ["MACE", "fuse", "height_of", "masked_mass", "masks_of", "places_of"]
