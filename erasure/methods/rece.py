"""RECE: erase a concept, find the embedding that would bring it back, erase that too, and again."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import NonNegativeFloat, NonNegativeInt
from torch import Tensor

from erasure.backbone import Backbone, Site, Space
from erasure.concept import Concept
from erasure.methods.base import Reference
from erasure.methods.closed_form import TokenSpan, joined
from erasure.methods.gram import Gram
from erasure.methods.kept import Kept
from erasure.methods.ridge import Problem, Solution, cholesky, solve
from erasure.methods.uce import UCE

Closure = Literal["regzero", "standardreg", "surrogatereg"]
OFFICIAL = UCE.presets["official-2023"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RECE(UCE):
    """Start from UCE, then play attacker and defender in closed form.

    After an edit every layer is ``W' = W T``. The attacker looks for the embedding that makes the edited layers say
    what the original ones said of the concept ``c``; with ``G = sum_l W_l^T W_l`` over all layers, ``(d, d)``,

        min_c'  sum_l |W_l T c' - W_l c|^2 + reg |c'|^2    ->    c_adv = (reg I + T^T G T)^-1 T^T G c

    for every token of the concept's prompt. The defender moves all ``c_adv`` of all concepts onto the anchors' tokens
    by one more ridge regression on the edited weights, ``T <- T T_2``. Nothing is generated and no layer is visited
    after ``G`` is summed: an epoch takes milliseconds.

    The settings it shares with UCE describe the start. A weight that ``max_drift`` lowers is a concept's weight in
    every round too, but how far the rounds move what is kept has no limit.

    The erasure's report has an entry for each epoch: how far what the layers make of ``c`` (``erased``), of ``c_adv``
    (``revived``), and of ``c_adv`` after the epoch (``erased_again``) is from what the original ones made of ``c``, the
    anchor's distance being 1.

    What an epoch erases is the attack it found, not the next one: this is no promise against people who search the
    space of embeddings.

    Attributes:
        epochs: rounds of attack and defence; 0 is UCE. Raise it when people find the concept again, and look at the
            neighbours when you do.
        reg: how short the attacker's embedding must be. Smaller finds stronger attacks, and their erasure reaches
            further; raise it when neighbours suffer.
        relative: read ``reg`` in units of the mean eigenvalue of ``G``, so that it means the same for every model. The
            published numbers are for Stable Diffusion 1.4.
        closure: what the attacker's embedding is drawn to. ``regzero`` (the paper's) to zero, ``reg |c'|^2``;
            ``standardreg`` to the anchor ``y``, ``reg |c' - y|^2``; ``surrogatereg`` to what the edited layers
            already say, ``reg sum_l |W_l T (c' - c)|^2``.
        revive_span: which tokens are attacked and defended. ``all`` is the official code's.
        epoch_lamb: ridge of an epoch's edit towards the weights before it. Raise it for smaller steps.
        epoch_preserve_scale: weight of each kept embedding in an epoch's edit. Raise it when neighbours suffer.
        empty_per_concept: an epoch keeps the empty prompt once for every concept, as the official script for nudity and
            unsafe concepts does (``train.py``; with a keep list it draws as many prompts of it at random, where here
            the whole list is kept). The scripts for styles and objects keep it once.
        hold: an epoch's edit must not move what was erased before it, the concept's own tokens first of all. The
            official code does not ask for that, and an epoch can undo part of what UCE did.
    """

    epochs: NonNegativeInt = 1
    reg: NonNegativeFloat = 0.1
    relative: bool = False
    closure: Closure = "regzero"
    revive_span: TokenSpan = "all"
    epoch_lamb: NonNegativeFloat = 0.1
    epoch_preserve_scale: NonNegativeFloat = 0.1
    empty_per_concept: bool = False
    hold: bool = False

    key: ClassVar[str] = "rece"
    summary: ClassVar[str] = "UCE, then closed-form rounds against what revives the concept; seconds"
    reference: ClassVar[Reference] = Reference(
        "Reliable and Efficient Concept Erasure of Text-to-Image Diffusion Models",
        "Gong et al., ECCV 2024",
        "2407.12383",
        "CharlesGong12/RECE",
    )
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "recommended": {
            **UCE.presets["recommended"],
            "reg": 0.01,
            "relative": True,
            "revive_span": "subject_to_end",
            "epoch_lamb": 0.5,
            "epoch_preserve_scale": 1.0,
            "hold": True,
        },
        "nudity": {**OFFICIAL, "reg": 0.1, "epochs": 3, "empty_per_concept": True},
        "unsafe": {**OFFICIAL, "reg": 0.1, "epochs": 2, "empty_per_concept": True},
        "style": {**OFFICIAL, "reg": 1e-3, "epochs": 1},
        "object": {**OFFICIAL, "reg": 1e-3, "epochs": 1},
        "object-easy": {**OFFICIAL, "reg": 0.1, "epochs": 1},
    }

    def solve(
        self, backbone: Backbone, concepts: Sequence[Concept], keep: Sequence[str], space: Space
    ) -> tuple[Solution, None]:
        """UCE's edit followed by every epoch's, as one matrix."""
        if self.technique != "replace":
            raise ValueError("RECE's rounds need one matrix for all layers; got technique='tensor'; use 'replace'")
        start, epoch = self.problem(backbone, concepts, keep, space), self._epoch()
        pairs = [pair for concept in concepts for pair in self.pairs(backbone, concept)]
        moved = epoch.moved_rows(backbone, pairs, space)
        c, y = (rows.cpu().double() for rows in joined(moved))
        if (y - c).norm() <= 1e-6 * c.norm():
            raise ValueError(
                f"target and anchor are the same to the text encoder; got {pairs[0]}; choose another anchor"
            )
        scales = start.scales or (self.erase_scale,) * len(concepts)
        of_pairs = [scale for one, scale in zip(concepts, scales, strict=True) for _ in self.pairs(backbone, one)]
        lengths = torch.tensor([len(x) for x, _ in moved])
        weight = (torch.tensor(of_pairs, dtype=c.dtype) / self.erase_scale).sqrt().repeat_interleave(lengths)[:, None]
        kept = epoch.kept(backbone, keep, space)
        if self.empty_per_concept:
            empties = len(concepts) - self.retain_empty
            kept = kept + empties * epoch.preserve_scale * epoch.empty(backbone, space)
        solution = solve(start)
        held = start.targets.cpu().double() if self.hold else c[:0]
        g = gram_of(self.sites(backbone, space).values())
        reg = self.reg * (float(g.diagonal().mean()) if self.relative else 1.0)
        rounds, whole = [], distance(g, y, c)
        for _ in range(self.epochs):
            before = solution.matrix
            c_adv = revive(before, g, c, y, reg=reg, closure=self.closure)
            hold = kept + Kept.rows_of(held, self.erase_scale)
            step = solve(Problem(weight * c_adv, weight * y, hold, self.epoch_lamb, self.erase_scale))
            held = torch.cat([held, weight * c_adv]) if self.hold else held
            solution = solution.then(step)
            seen = {"erased": (before, c), "revived": (before, c_adv), "erased_again": (solution.matrix, c_adv)}
            rounds.append({name: distance(g, x @ t.T, c) / whole for name, (t, x) in seen.items()})
        notes = {"epochs": rounds, **({"erase_scales": list(start.scales)} if start.scales else {})}
        return dataclasses.replace(solution.smallest(), notes=notes), None

    def empty(self, backbone: Backbone, space: Space) -> Kept:
        """The empty prompt as something kept, with a weight of 1."""
        return Gram.of(backbone, [""], span=self.keep_span, spaces=(space,)).kept[space]

    def _epoch(self) -> RECE:
        """The settings of one epoch's edit, read as a method of its own."""
        return dataclasses.replace(
            self,
            token_span=self.revive_span,
            lamb=self.epoch_lamb,
            preserve_scale=self.epoch_preserve_scale,
            preserve_rule="fixed",
        )


def gram_of(sites: Iterable[Site]) -> Tensor:
    """``G = sum_l W_l^T W_l`` in float64, ``(d, d)``: ``x^T G x = sum_l |W_l x|^2``."""
    weights = (site.weight.cpu().double() for site in sites)
    return functools.reduce(torch.add, (w.T @ w for w in weights))


def revive(t: Tensor, g: Tensor, c: Tensor, y: Tensor, *, reg: float, closure: Closure) -> Tensor:
    """The embeddings ``(n, d)`` that layers ``W T`` turn into what ``W`` makes of ``c (n, d)``.

    The minimum of each closure's sum of squares, with ``A = T^T G T`` and ``B = T^T G``:

        regzero        (A + reg I) c_adv = B c
        standardreg    (A + reg I) c_adv = B c + reg y
        surrogatereg   (1 + reg) A c_adv = (B + reg A) c,   that is   T c_adv = (c + reg T c) / (1 + reg)
    """
    if closure == "surrogatereg":  # solved in its second form: the first squares the condition number of T
        said = (c + reg * c @ t.T) / (1 + reg)
        return torch.linalg.lstsq(t, said.T, rcond=1e-13, driver="gelsd").solution.T
    b = t.T @ g
    a = b @ t
    factor, _ = cholesky((a + a.T) / 2 + reg * torch.eye(len(a), dtype=a.dtype))  # symmetric but for rounding
    right = c @ b.T + (reg * y if closure == "standardreg" else 0)
    return torch.cholesky_solve(right.T, factor).T


def distance(g: Tensor, x: Tensor, c: Tensor) -> float:
    """``sqrt(sum_l |W_l X - W_l C|^2)`` over the rows of ``x`` and ``c``."""
    difference = x - c
    return float(((difference @ g) * difference).sum().clamp(min=0).sqrt())
