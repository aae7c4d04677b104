"""Projections that edit every layer at once, as pure mathematics: Double Projections and CURE.

Both multiply each layer that reads the text by one matrix ``T = I + U V^T``, as the ridge regressions of
:mod:`erasure.methods.ridge` do, and ask no weight for what is kept but a subspace. Embeddings are rows in code,
``(n, d)``, and columns in formulas; no ``(d, d)`` matrix is formed unless what is kept comes as one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from erasure.methods.kept import Kept
from erasure.methods.ridge import Solution

RESOLVED = 1e-6  # singular values below this share of the largest are duplicates of other rows, rounded


def subspace(kept: Kept, *, energy: float, rank: int = 0) -> Tensor:
    """An orthonormal basis ``(d, k)`` of the directions that hold a share of the energy of what is kept.

    Args:
        energy: share of ``sum_j a_j |x_j|^2`` that the fewest directions hold, above 0 and up to 1. Embeddings of whole
            prompts fill every direction a little: with a share of 1 nothing may be left to edit.
        rank: k itself, instead of a share; 0 for the share.
    """
    values, vectors = kept.spectrum()
    if not len(values) or not 0 < energy <= 1 or rank < 0:
        raise ValueError(
            f"a subspace needs something kept and a share of its energy above 0 and up to 1; got energy={energy}, "
            f"rank={rank} and {len(values)} directions; keep something, and set energy=0.99"
        )
    if rank:
        return vectors[:, :rank]
    share = values.cumsum(0) / (values.sum() + kept.lost)
    k = int((share < energy - 1e-12).sum()) + 1
    return vectors[:, :k]


def proxy(targets: Tensor, safe: Tensor) -> Tensor:
    """Anchors ``C* = S S^+ C (n, d)``: what the span of safe concepts has of each target.

    Args:
        targets: ``(n, d)`` embeddings to erase.
        safe: an orthonormal basis ``(d, k)`` of the span, from :func:`subspace`.
    """
    return (targets @ safe) @ safe.T


def residual(targets: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """``R = (I - P) C (n, d)``, what the preserved span does not hold of each target, and ``|r| / |c| (n,)``.

    Args:
        basis: orthonormal ``(d, k)``; ``P`` is the projector on its span.
    """
    r = targets - (targets @ basis) @ basis.T
    return r, r.norm(dim=1) / targets.norm(dim=1).clamp(min=torch.finfo(targets.dtype).tiny)


def double_projection(
    targets: Tensor, anchors: Tensor, basis: Tensor, *, floor: float = 0.02, ridge: float = 0.0
) -> Solution:
    """Send each target to its anchor and leave the preserved span exactly as it is.

        T = I + (C* - C)(R^T R + rho I)^-1 R^T,   R = (I - P) C,   rho = (ridge |c|)^2

    (Double Projections, CVPR 2026, arXiv 2604.10032; several targets at once, and the ridge, are ours.) ``T p = p`` for
    every ``p`` in the span of the basis, whatever the ridge, and ``T c = c*`` without one. The edit's norm grows as
    ``|c| / |r|``: a target that the preserved span all but holds cannot be moved without moving everything.

    Args:
        targets, anchors: ``(n, d)``, float64, row by row.
        basis: orthonormal ``(d, k)`` of the preserved span, from :func:`subspace`.
        floor: least ``|r| / |c|`` of a target without a ridge.
        ridge: the ``|r| / |c|`` at which a target is moved half way; those far above it are moved whole, those far
            below hardly. Targets in one direction count together, as a longer one. 0 is the paper's. Set it where a
            concept's many tokens are moved.

    Returns:
        The solution, with ``residual`` (``|R| / |C|`` of all targets together), ``least_residual``, ``moved`` (the
        share of ``|R|^2`` that the ridge lets move) and ``preserved_rank`` in its notes.

    Raises:
        ValueError: a target lies in the preserved span but for less than the floor, and there is no ridge.
    """
    r, ratios = residual(targets, basis)
    least, whole = float(ratios.min()), float(r.norm() / targets.norm())
    if not ridge and not least >= floor:
        raise ValueError(
            f"what is kept holds a target but for {least:.1e} of its length, and the floor is {floor:.1e}; an edit of "
            "the rest would move everything; keep less, lower energy or rank, or set ridge to move it part of the way"
        )
    left, s, right = torch.linalg.svd(r, full_matrices=False)
    rho = ridge**2 * float(targets.square().sum(dim=1).mean())
    present = s > RESOLVED * s[0]
    gain = torch.where(present, s / (s.square() + rho), 0.0)
    v = right.T @ (gain[:, None] * left.T)
    condition = float((s[0].square() + rho) / (s[present][-1].square() + rho)) if present.any() else 1.0
    moved = float((s.pow(3) * gain).sum() / s.square().sum().clamp(min=torch.finfo(s.dtype).tiny))
    notes = {"residual": whole, "least_residual": least, "moved": moved, "preserved_rank": basis.shape[1]}
    return Solution((anchors - targets).T, v, condition, notes=notes)


def expansion(energies: Tensor, alpha: float) -> Tensor:
    """``f(r; a) = a r / ((a - 1) r + 1)`` of each direction's share ``r = s^2 / sum s^2``; ``r`` itself at ``a = 1``.

    Args:
        energies: ``s^2 (k,)``.
        alpha: how far beyond the strongest directions the projector reaches; towards infinity it is 1 for all.
    """
    if not alpha >= 1:
        raise ValueError(f"the expansion goes up from 1; got {alpha}; use 2 to 5, more for a stronger projector")
    r = energies / energies.sum()
    return alpha * r / ((alpha - 1) * r + 1)


def cure(forget: Tensor, retain: Kept, *, forget_alpha: float, retain_alpha: float) -> Solution:
    """Take out the directions of what is to be forgotten, less what they share with what is retained.

        T = I - P_dis,   P_dis = P_f - P_f P_r,   P = B diag(f(r; a)) B^T

    with ``B`` and ``r`` the directions of each set of embeddings and their shares of its energy (CURE, NeurIPS 2025,
    arXiv 2505.12677). The weights ``f`` are below 1, so ``P_dis`` is no projector: applying it twice erases more.

    Args:
        forget: ``(n, d)`` embeddings of the concept, float64.
        retain: what must not change.
        forget_alpha, retain_alpha: the ``a`` of each projector.

    Returns:
        The solution, of the rank of ``forget``; its notes hold both ranks.
    """
    s_f, b_f = Kept.rows_of(forget).spectrum()
    if not len(s_f):
        raise ValueError("every embedding to forget is zero; the text encoder gave nothing; check the prompts")
    f_f = expansion(s_f, forget_alpha)
    v, rank = b_f, 0
    if len(retain.data):
        s_r, b_r = retain.spectrum()
        v, rank = b_f - b_r @ (expansion(s_r, retain_alpha)[:, None] * (b_r.T @ b_f)), len(s_r)
    return Solution(-b_f * f_f, v, 1.0, notes={"forget_rank": len(s_f), "retain_rank": rank})
