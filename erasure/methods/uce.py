"""UCE, Unified Concept Editing: move what the cross-attention keys and values make of a concept onto its anchor."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import NonNegativeFloat
from torch import Tensor

from erasure.artifact import DeltaErasure, Erasure
from erasure.artifact.config import Config
from erasure.backbone import Backbone, Space
from erasure.concept import Concept
from erasure.methods.base import Reference, Request, check_moved
from erasure.methods.closed_form import rows
from erasure.methods.drift import Drift
from erasure.methods.kept import Kept
from erasure.methods.quick_report import MOST, written
from erasure.methods.ridge import Problem, cholesky, condensed, normal_matrix
from erasure.methods.sentences import Sentences
from erasure.methods.vocabulary import spaced


@dataclasses.dataclass(frozen=True, kw_only=True)
class UCE(Sentences):
    """Solve a ridge regression (:mod:`erasure.methods.ridge`) for the embeddings of the concept:

        min_W'  a_e |W' X_e - W Y_e|^2 + a_p |W' X_p - W X_p|^2 + lambda |W' - W|^2

    with X_e the targets, Y_e their anchors and X_p what is kept. ``recommended`` derives the weight a_e of each concept
    from the model: it is ``erase_scale``, or less where the edit would move what is kept by more than ``max_drift`` of
    how far that is apart. (That rule is ours.)

    The settings it shares with other closed forms are those of :class:`~erasure.methods.closed_form.ClosedForm` and
    :class:`~erasure.methods.sentences.Sentences`.

    Attributes:
        retain_empty: keep the empty prompt beside the keep list (2023 code).
        preserve_rule: ``fixed`` weighs every kept embedding by ``preserve_scale``; ``share`` by max(0.1, 1/n) for n
            kept prompts (2023 code).
        technique: what a target's value becomes. ``replace``: what the layer made of the anchor. ``tensor``: what it
            made of the target, less its projection on what it made of the old prompt, both read as one long vector.
            That is no matrix common to all layers, so the result is stored as weight differences.
        style_anchor: where styles without an anchor are moved; the empty prompt by default.
        max_drift: how far a concept's edit may move what is kept, in units of how far that is apart: of the end tokens
            of up to 64 kept prompts, the distance moved by the distance from their mean
            (:class:`~erasure.methods.drift.Drift`). Where it would be more, ``erase_scale`` is lowered for this
            concept until it is not; ``report`` says to what. 0 for no limit. Lower it when neighbours suffer, raise it
            when the target survives.
    """

    retain_empty: bool = False
    preserve_rule: Literal["fixed", "share"] = "fixed"
    technique: Literal["replace", "tensor"] = "replace"
    style_anchor: str = ""
    max_drift: NonNegativeFloat = 0.0

    prompt_settings: ClassVar[tuple[str, ...]] = ("style_anchor",)
    key: ClassVar[str] = "uce"
    summary: ClassVar[str] = "closed form on cross-attention keys and values; seconds"
    reference: ClassVar[Reference] = Reference(
        "Unified Concept Editing in Diffusion Models",
        "Gandikota et al., WACV 2024",
        "2308.14761",
        "rohitgandikota/unified-concept-editing",
    )
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "recommended": {
            "token_span": "subject_to_end",
            "articles": True,
            "synonyms": True,
            "keep_span": "all",
            "keep_everyday": True,
            "expand_prompts": True,  # on Emoji World the concept survives in sentences about a style without them
            "erase_scale": 3.0,
            "max_drift": 0.1,
        },
        "official-2025": {"style_anchor": "art"},
        "official-2025-flux": {"style_anchor": "art", "pooled": True},  # its FLUX script edits the pooled path as well
        "official-2023": {
            "token_span": "subject_to_end",
            "keep_span": "all",
            "retain_empty": True,
            "preserve_rule": "share",
        },
    }

    def prompt_pairs(self, concept: Concept) -> list[tuple[str, str]]:
        if concept.kind == "style" and not concept.anchor and self.style_anchor:
            concept = dataclasses.replace(concept, anchor=self.style_anchor)
        return super().prompt_pairs(concept)

    def kept(self, backbone: Backbone, keep: Sequence[str], space: Space) -> Kept:
        keep = ["", *keep] if self.retain_empty else keep
        total = super().kept(backbone, keep, space)
        share = max(0.1, 1 / max(len(keep), 1)) if self.preserve_rule == "share" else 1.0
        return share * total

    def problem(self, backbone: Backbone, concepts: Sequence[Concept], keep: Sequence[str], space: Space) -> Problem:
        """The ridge regression, with less weight for each concept that would move what is kept too far."""
        if not (self.max_drift and keep):
            return super().problem(backbone, concepts, keep, space)
        kept, scales = self.kept(backbone, keep, space), list[float]()
        probes = torch.cat(rows(backbone, written(backbone, spaced(keep, MOST)), "eos", space))
        drift = Drift(kept, self.lamb, probes)

        def weighed() -> Iterator[tuple[Tensor, Tensor]]:
            for pair in self.concept_rows(backbone, concepts, space):
                x, y = condensed(*(part.cpu().double() for part in pair))
                scales.append(drift.scale_within(x, y, self.max_drift, self.erase_scale))
                weight = (scales[-1] / self.erase_scale) ** 0.5  # into the rows: a lighter row is a shorter one
                yield weight * x, weight * y

        problem = self.posed(weighed() if drift.defined else self.concept_rows(backbone, concepts, space), kept)
        lowered = any(scale < self.erase_scale for scale in scales)
        return dataclasses.replace(problem, scales=tuple(scales)) if lowered else problem

    def leaves(self, denoiser: str) -> str | None:
        return "operator" if self.technique == "replace" else "delta"

    def validate(self, backbone: Backbone, request: Request) -> None:
        super().validate(backbone, request)
        if self.technique == "tensor" and self.pooled:
            raise ValueError("technique='tensor' edits token embeddings only; leave pooled=False")

    def erase(self, backbone: Backbone, request: Request) -> Erasure:
        edit = super().erase(backbone, request)
        return edit if self.technique == "replace" else self._projected(backbone, request, edit.config)

    def _projected(self, backbone: Backbone, request: Request, config: Config) -> DeltaErasure:
        """``W' = W + a_e sum (V* - W X_e) X_e^T D^-1``, where ``V*`` is ``W Y_e`` less its projection on ``W X_e``."""
        keep = [*request.keep, *self.everyday(backbone, request.concepts)]
        problem = self.problem(backbone, request.concepts, keep, "hidden")
        system = normal_matrix(problem.targets.cpu().double(), Kept.of(problem.kept), self.lamb, self.erase_scale)
        factor, _ = cholesky(system)
        scales = problem.scales or (self.erase_scale,) * len(request.concepts)
        moves = [
            (scale, x.cpu().double(), y.cpu().double())
            for concept, scale in zip(request.concepts, scales, strict=True)
            for x, y in self.moved_rows(backbone, self.pairs(backbone, concept), "hidden")
        ]
        deltas = {}
        for name, site in self.sites(backbone, "hidden").items():
            w = site.weight.cpu().double()
            moved = torch.zeros_like(w)
            for scale, x, y in moves:
                old, new = x @ w.T, y @ w.T
                value = new - (new * old).sum() / (old * old).sum() * old
                moved += scale * (value - old).T @ x
            deltas[f"{name}.weight"] = torch.cholesky_solve(moved.T, factor).T.float()
        parameters = {f"{name}.weight": site.weight for name, site in self.sites(backbone, "hidden").items()}
        lowered = {"erase_scales": list(problem.scales)} if problem.scales else {}
        report = {"relative_change": check_moved(deltas, parameters), **lowered}
        config = config.with_facts(spaces=None, system=None, sites=list(deltas), report=report)
        return DeltaErasure(self.name_for(request), config, deltas)
