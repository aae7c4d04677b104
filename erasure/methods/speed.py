"""SPEED: move a concept onto its anchor, but only along directions that what is kept does not use."""

from __future__ import annotations

import csv
import dataclasses
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat
from scipy.cluster.vq import kmeans2
from torch import Tensor

from erasure.backbone import Backbone, Site, Space
from erasure.concept import Concept
from erasure.methods.base import Reference, Request, expanded
from erasure.methods.closed_form import ClosedForm, rows
from erasure.methods.gram import Gram, warn_left_out
from erasure.methods.kept import Kept
from erasure.methods.ridge import Solution, cholesky, compressed, gathered
from erasure.wording import naming

CENTROIDS = 3  # of the empty prompt's end and padding tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class Retention:
    """What one space's null-space edit must not change.

    Attributes:
        kept: the sum over what is kept without being looked at, and ``count``, how many embeddings it stands for.
        retain: ``(m, d)`` embeddings each layer filters and augments for itself.
        invariants: ``(k, d)`` embeddings that must not move at all.
    """

    kept: Kept
    count: float
    retain: Tensor
    invariants: Tensor

    def moment(self, total: Tensor, count: float) -> Tensor:
        """``R = mean c c^T (d, d)`` of all that is kept, with what a layer keeps of ``retain`` summed up."""
        return (self.kept.matrix() + total) / (self.count + count)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SPEED(ClosedForm):
    """Edit in the null space of the retain set. With targets ``x``, anchors ``y`` and kept embeddings ``c``,

        W' = W + W (S_at - S_tt) Q,              S_tt = mean x x^T,   S_at = mean y x^T
        Q  = N - N K (K^T N K + lamb I)^-1 K^T N
        N  = U_0 (U_0^T S_tt U_0 + rho I)^-1 U_0^T

    all ``(d, d)``. The columns of ``U_0`` are the eigenvectors of ``R = mean c c^T`` whose eigenvalue is below the
    threshold. ``K (d, 4)`` are the empty prompt's start token and three centroids of its other tokens (four for each
    text encoder). ``Q`` is symmetric and zero on ``K`` and on what ``U_0`` leaves out, so that neither moves. As an
    operator: ``U = (Y - X)^T`` and ``V = Q X^T / n``, one pair for all layers.

    Two refinements choose ``R`` for each layer ``W`` on its own, and with it ``V``:

    *Filter.* The plain edit ``E = W (S_at - S_tt) (I + S_tt)^-1`` hits some kept embeddings and not others. Only those
    with ``|E c|`` of at least the mean are kept; the others need no protection, and leave more room to edit.

    *Augmentation.* Each is joined by copies ``c + s v``, with ``v (d,)`` the direction in which ``W`` does least and
    ``s`` standard normal, of which again those that ``E`` hits are kept. (The paper's ``P_0 z``: ``P_0 = v v^T``.) All
    that is needed of the copies follows from their ``s``, so none is ever made.

    Anchors in the paper: the empty prompt for single things, "art" for styles, "person" for people. The published code
    takes the mean over copies in chunks of 128 embeddings, so that it depends on their order; here it is over all.
    The settings it shares with other closed forms are those of :class:`~erasure.methods.closed_form.ClosedForm`.

    Attributes:
        layers: keys and values say where and what. ``v`` is the paper's; ``kv`` when the target survives.
        threshold: directions in which kept embeddings have less than this mean square are free to be edited. Raise it
            when the target survives, lower it when neighbours suffer.
        retain_scale: rho, a ridge in the free directions. Lower it for many concepts or when the target survives.
        relative: read ``threshold``, ``retain_scale`` and the noise of the copies in units of the mean square of the
            targets' entries, so that they mean the same for every text encoder. The published numbers are for Stable
            Diffusion 1.x, where that unit is about 1.
        lamb: how much of the protection of ``K`` is given up; 0, the published value, gives up none.
        prior_filter: the filter. Leave it out for many concepts at once, where most of what is kept is hit by one of
            them. (The published code leaves it out whenever ``augment`` is 0.)
        augment: copies of each kept embedding; 0 for none. They protect what lies near what was named, and leave less
            room to edit. With the filter off as well, one matrix serves all layers and the file is smallest.
        retain: file of names or captions to keep beside the keep list: one a line, or a CSV with a column ``concept``.
            Texts that name a target are left out of everything that is kept. With nothing to keep at all, the empty
            prompt's tokens are.
        seed: of the copies.
    """

    lamb: NonNegativeFloat = 0.0
    layers: Literal["v", "k", "kv"] = "v"
    threshold: PositiveFloat = 0.1
    retain_scale: PositiveFloat = 1.0
    relative: bool = False
    prior_filter: bool = True
    augment: NonNegativeInt = 10
    retain: str = ""
    seed: int = 0

    files: ClassVar[tuple[str, ...]] = ("corpus", "retain")
    key: ClassVar[str] = "speed"
    summary: ClassVar[str] = "closed form in the null space of what is kept; seconds, for many concepts at once"
    reference: ClassVar[Reference] = Reference(
        "SPEED: Scalable, Precise, and Efficient Concept Erasure for Diffusion Models",
        "Li et al., ICLR 2026",
        "2503.07392",
        "Ouxiang-Li/SPEED",
    )
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        # Without filter and copies, unlike the paper: of nine settings tried on earlier weights of Emoji World this one
        # lost least of the rest among those that erased both a superhero and a cat. One matrix serves all layers.
        "recommended": {
            "token_span": "subject_to_end",
            "articles": True,
            "synonyms": True,
            "keep_span": "all",
            "keep_everyday": True,
            "retain_scale": 0.2,
            "relative": True,
            "prior_filter": False,
            "augment": 0,
        },
        "few": {},
        "many": {"threshold": 1e-4, "retain_scale": 0.05, "prior_filter": False},
        # All 76 tokens after the start, summed; with neither a keep list nor an anchor, as the official script.
        "nudity": {"token_span": "content_to_end", "erase_scale": 76.0, "retain_scale": 0.7, "lamb": 0.5},
    }

    @property
    def needs_keep(self) -> bool:
        return super().needs_keep and not self.retain

    @property
    def by_layer(self) -> bool:
        """Whether each layer has a retain set of its own."""
        return self.prior_filter or self.augment > 0

    def validate(self, backbone: Backbone, request: Request) -> None:
        super().validate(backbone, request)
        if self.preserve_scale != 1.0:
            raise ValueError(
                f"SPEED gives what is kept no weight; got preserve_scale={self.preserve_scale}; leave it at 1 and "
                "lower threshold instead"
            )
        if self.retain:
            texts = read_texts(self.retain)
            fitting = set(backbone.fitting(texts))
            warn_left_out([text for text in texts if text not in fitting])

    def facts(self, backbone: Backbone, request: Request) -> dict[str, Any]:
        texts = self.texts(backbone, [*request.keep, *self.everyday(backbone, request.concepts)])
        retained = len(without(texts, request.concepts))
        return {"retained": retained, "named_a_target": len(texts) - retained}

    # --- the steps ----------------------------------------------------------------------------------------------------

    def sites(self, backbone: Backbone, space: Space) -> dict[str, Site]:
        """Keys, values or both; architectures whose text layers are neither have them all edited."""
        sites = super().sites(backbone, space)
        chosen = [role for letter, role in (("k", "key"), ("v", "value")) if letter in self.layers]
        return {name: site for name, site in sites.items() if site.role not in ("key", "value") or site.role in chosen}

    def texts(self, backbone: Backbone, keep: Sequence[str]) -> list[str]:
        """Everything that is to be kept, in words; of the retain set what the text encoders read to its end."""
        listed = expanded(backbone, keep, articles=self.articles)
        return list(dict.fromkeys([*listed, *(backbone.fitting(read_texts(self.retain)) if self.retain else [])]))

    def retention(
        self, backbone: Backbone, concepts: Sequence[Concept], keep: Sequence[str], space: Space
    ) -> Retention:
        """What must not change: the keep list, the retain set, the corpus, and the empty prompt."""
        texts = without(self.texts(backbone, keep), concepts)
        empty = self._empty(backbone, space)
        kept, count = self._corpus(backbone, space)
        retain = empty[0][:0]
        if not texts and not count:
            retain = torch.cat([tokens[1:] if len(tokens) > 1 else tokens for tokens in empty])
        elif texts and self.by_layer:
            every = backbone.read_at(space)
            retain = torch.cat([row for one in every for row in rows(one, texts, self.keep_span, space)])
        elif texts:  # nobody looks at them one by one, so their number does not matter
            gram = self.gram(backbone, texts, space)
            kept, count = kept + gram.kept[space], count + gram.counts[space]
        k = torch.cat([invariants(tokens) for tokens in empty])
        return Retention(kept=kept, count=count, retain=retain.cpu().double(), invariants=k)

    def _empty(self, backbone: Backbone, space: Space) -> list[Tensor]:
        """The embeddings of the empty prompt, ``(length, d)`` for each text encoder; one row in the pooled space."""
        parts = []
        for conditioning in (one.read([""]) for one in backbone.read_at(space)):
            pooled = [] if conditioning.pooled is None else [conditioning.pooled]
            parts += pooled if space == "pooled" else [segment.hidden[0] for segment in conditioning.segments]
        return [part.cpu().double() for part in parts]

    def _corpus(self, backbone: Backbone, space: Space) -> tuple[Kept, float]:
        """The corpus as a sum of outer products, and how many embeddings it stands for."""
        kept = super().kept(backbone, [], space)
        if not self.corpus:
            return kept, 0.0
        return kept, self.corpus_scale or Gram.load(self.corpus).counts[space]

    def solve(
        self, backbone: Backbone, concepts: Sequence[Concept], keep: Sequence[str], space: Space
    ) -> tuple[Solution, None]:
        """``U`` and ``V``, or a ``V`` for each layer."""
        x, y, counts = gathered(self.concept_rows(backbone, concepts, space))
        x, y, n = x.cpu().double(), y.cpu().double(), sum(counts)
        must_stay = self.retention(backbone, concepts, keep, space)
        c = must_stay.retain
        b = self.erase_scale / n * x.T  # (d, n): S_tt = B X and S_at - S_tt = U B^T
        s_tt, unit = b @ x, float(x.square().sum()) / (n * x.shape[1]) if self.relative else 1.0
        u, b = compressed((y - x).T, b)
        tuned = {"rho": self.retain_scale * unit, "threshold": self.threshold * unit, "lamb": self.lamb}
        if not self.by_layer:
            r = must_stay.moment(c.T @ c, len(c))
            v, condition, free = null_space_factor(r, s_tt, b, must_stay.invariants, **tuned)
            return Solution(u, v, condition, notes={"free_directions": free}), None  # one matrix for every layer
        plain = torch.linalg.solve(unit * torch.eye(len(s_tt), dtype=s_tt.dtype) + s_tt, b)  # E = W U plain^T
        generator = torch.Generator().manual_seed(self.seed)
        noise = unit**0.5 * torch.randn(len(c), self.augment, generator=generator, dtype=torch.float64)
        site_v: dict[str, Tensor] = {}
        conditions, frees = [], []
        for name, site in self.sites(backbone, space).items():
            w = site.weight.cpu().double()
            r = must_stay.moment(*second_moment(w, c, w @ u, plain, noise, prior_filter=self.prior_filter))
            site_v[name], condition, free = null_space_factor(r, s_tt, b, must_stay.invariants, **tuned)
            conditions.append(condition)
            frees.append(free)
        mean = torch.stack(list(site_v.values())).mean(dim=0)
        return Solution(u, mean, max(conditions), site_v, notes={"free_directions": min(frees)}), None


# --- the mathematics -------------------------------------------------------------------------------------------------


def null_space_factor(
    r: Tensor, s_tt: Tensor, b: Tensor, invariants: Tensor, *, rho: float, threshold: float, lamb: float
) -> tuple[Tensor, float, int]:
    """``V = Q B (d, n)``, the condition number of the system and the number of free directions.

    With ``L L^T = U_0^T S_tt U_0 + rho I``, ``N = H^T H`` for ``H = L^-1 U_0^T``. So ``Q = H^T (I - F (F^T F + lamb
    I)^-1 F^T) H`` with ``F = H K``: for ``lamb = 0`` a projection, which a thin SVD of ``F`` gives whatever its rank.
    """
    values, vectors = torch.linalg.eigh(r)
    u0 = vectors[:, values < threshold]
    if not u0.shape[1]:
        raise ValueError(
            f"what is kept leaves no direction free to edit; its least mean square is {float(values[0]):.1e}, the "
            f"threshold {threshold:.1e}; raise threshold or keep less"
        )
    factor, condition = cholesky(u0.T @ s_tt @ u0 + rho * torch.eye(u0.shape[1], dtype=r.dtype))
    h = torch.linalg.solve_triangular(factor, u0.T @ torch.cat([b, invariants.T], dim=1), upper=False)
    hb, f = h[:, : b.shape[1]], h[:, b.shape[1] :]
    left, s, _ = torch.linalg.svd(f, full_matrices=False)
    present = s > 1e-10 * float(invariants.norm()) / rho**0.5  # the rest of K is protected by the retain set already
    share = torch.where(present, s.square() / (s.square() + lamb), 0.0)
    hb = hb - left @ (share[:, None] * (left.T @ hb))
    return u0 @ torch.linalg.solve_triangular(factor.T, hb, upper=True), condition, u0.shape[1]


def second_moment(
    w: Tensor, c: Tensor, wu: Tensor, plain: Tensor, noise: Tensor, *, prior_filter: bool
) -> tuple[Tensor, float]:
    """``sum c c^T`` over a layer's filtered embeddings and their filtered copies, and how many they are.

    Args:
        w: ``(out, d)`` the layer.
        c: ``(m, d)`` embeddings to keep.
        wu, plain: ``(out, n)`` and ``(d, n)`` factors of the plain edit ``E = (W U) plain^T``.
        noise: ``(m, copies)`` the ``s`` of each copy ``c + s v``.
    """
    v = idle_direction(w)
    ec, ev = c @ plain @ wu.T, wu @ (plain.T @ v)  # E c and E v
    if prior_filter:
        hit = above_mean(ec.norm(dim=1))
        c, ec, noise = c[hit], ec[hit], noise[hit]
    squared = ec.square().sum(dim=1)[:, None] + 2 * noise * (ec @ ev)[:, None] + noise.square() * ev.square().sum()
    chosen = above_mean(squared.clamp(min=0).sqrt())
    s, weight = noise * chosen, 1.0 + chosen.sum(dim=1)
    cross = torch.outer(c.T @ s.sum(dim=1), v)
    total = (c.T * weight) @ c + cross + cross.T + s.square().sum() * torch.outer(v, v)
    return total, float(weight.sum())


def idle_direction(w: Tensor) -> Tensor:
    """The right singular vector ``(d,)`` of the least of the ``min(out, d)`` singular values of ``w (out, d)``.

    A layer with fewer outputs than inputs has a null space beside those, in which no direction comes before another.
    The sign is fixed so that its largest entry is positive, or the copies would depend on the machine.
    """
    _, vectors = torch.linalg.eigh(w.T @ w)
    v = vectors[:, max(w.shape[1] - w.shape[0], 0)]
    return v * v[v.abs().argmax()].sign()


def above_mean(values: Tensor) -> Tensor:
    """Which values are at least the mean; of equal ones, all."""
    return values >= torch.minimum(values.mean(), values.max()) if values.numel() else values.bool()


def invariants(empty: Tensor) -> Tensor:
    """``(4, d)``: the start token of the empty prompt ``(length, d)`` and centroids of its other tokens.

    The k-means starts from tokens that lie far from each other, so that no chance is in it.
    """
    start, others = empty[:1], empty[1:]
    if len(others) <= CENTROIDS:
        return empty
    chosen = [0]
    while len(chosen) < CENTROIDS:
        chosen.append(int(torch.cdist(others, others[chosen]).min(dim=1).values.argmax()))
    centroids, _ = kmeans2(others.numpy(), others[chosen].numpy(), iter=100, minit="matrix")
    return torch.cat([start, torch.from_numpy(centroids)])


# --- the retain set in words -----------------------------------------------------------------------------------------


def without(texts: Iterable[str], concepts: Sequence[Concept]) -> list[str]:
    """The texts that name none of the concepts: "catfish" says nothing of a cat, "A cat, asleep" does."""
    several = list(texts)
    named = {*naming(several, (phrase for concept in concepts for phrase in concept.phrases))}
    return [text for text in several if text not in named]


def read_texts(path: str | os.PathLike[str]) -> list[str]:
    """Names or captions of a file: the column ``concept`` of a CSV, or one a line.

    Raises:
        FileNotFoundError, ValueError: no such file, no such column, or nothing in it.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"no retain set at {path}; give a file of names or captions, one a line")
    lines = file.read_text("utf-8-sig").splitlines()
    if file.suffix.lower() == ".csv":
        table = csv.DictReader(lines)
        if "concept" not in (table.fieldnames or ()):
            raise ValueError(f"{path}: no column 'concept'; it has {table.fieldnames}; rename one of them")
        lines = [row["concept"] or "" for row in table]
    texts = [line.strip() for line in lines if line.strip()]
    if not texts:
        raise ValueError(f"{path}: nothing to keep in it; write one name or caption a line")
    return texts
