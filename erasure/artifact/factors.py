"""The changes of an erasure as pairs of thin matrices, one for each layer: what every LoRA file holds.

``W (I + U V^T) - W = (W U) V^T``: an operator erasure *is* a LoRA, with up matrix ``W U (out, n)`` and down matrix
``V^T (n, d)``, exact at every scale. A weight difference is one only as far as its rank goes, which an SVD tells.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from erasure.artifact.base import Erasure, exact
from erasure.artifact.gated import GatedErasure
from erasure.artifact.lora import LoraErasure
from erasure.artifact.operator import OperatorErasure
from erasure.artifact.stack import stack_of
from erasure.backbone import Backbone
from erasure.backbone.names import parameters_by_name, split

EXACT = 1e-6  # singular values below this share of the largest are rounding
Pairs = dict[str, tuple[Tensor, Tensor]]
"""Up ``(out, n)`` and down ``(n, in)`` of each layer, by qualified name; all of one rank ``n``."""


def factors(edit: Erasure, backbone: Backbone, rank: int | None = None) -> tuple[Pairs, float]:
    """The pairs of an erasure, and the relative error of the whole, 0 where they are exact.

    Readers tell the rank, and from it the scale, from one layer, so all layers are filled up to one rank with zeros.

    Args:
        rank: cut every layer of a weight difference to this rank; None for as many as it has.

    Raises:
        ValueError: it is no change of a denoiser; it changes what no LoRA can; or its rank is too high.
    """
    refuse_elsewhere(edit, backbone)
    if rank is not None and isinstance(edit, OperatorErasure | LoraErasure | GatedErasure):
        raise ValueError(f"{edit.name!r} is a LoRA of its own rank, exactly; got rank={rank}; leave it out")
    error = 0.0
    if isinstance(edit, OperatorErasure):
        pairs = _of_operator(edit, backbone)
    elif isinstance(edit, LoraErasure | GatedErasure):
        pairs = _of_factors(edit)
    else:
        pairs, error = _of_delta(edit, backbone, rank)
    return filled(pairs), error


def filled(pairs: Pairs, ranks: Sequence[int] = ()) -> Pairs:
    """All pairs filled with zeros up to one rank: the largest among them, or the next one of ``ranks``.

    Raises:
        ValueError: the largest is above all ``ranks``.
    """
    n = max((len(down) for _, down in pairs.values()), default=1)
    if ranks:
        if n > max(ranks):
            raise ValueError(f"it has rank {n}, and {max(ranks)} is the highest that is read")
        n = min(allowed for allowed in ranks if allowed >= n)
    return {site: _filled(up, down, n) for site, (up, down) in pairs.items()}


def _filled(up: Tensor, down: Tensor, n: int) -> tuple[Tensor, Tensor]:
    more = n - len(down)
    return (
        torch.cat([up, up.new_zeros(len(up), more, *up.shape[2:])], dim=1),
        torch.cat([down, down.new_zeros(more, *down.shape[1:])]),
    )


def refuse_elsewhere(edit: Erasure, backbone: Backbone) -> None:
    """Refuse erasures that are no change of a denoiser: of a text encoder, or of what happens while it draws."""
    sites = edit.sites if isinstance(edit, GatedErasure) else edit.parameter_names
    if not sites:
        raise ValueError(
            f"{edit.name!r} is of kind {edit.kind}, which changes no layer; a file of weights cannot hold it"
        )
    parts = {site: split(site, first=backbone.denoiser_name)[0] for site in sites}
    if other := next((site for site, part in parts.items() if part not in backbone.denoisers), None):
        part = parts[other]
        raise ValueError(
            f"{edit.name!r} changes the {part} ({other}), and a LoRA here is one of the denoiser; apply it and save "
            f"that module instead: pipe.{part}.save_pretrained(folder)"
        )


def base_weights(backbone: Backbone) -> dict[str, Tensor]:
    """The parameters of every part, by qualified name, as they are without the erasures on them."""
    own = parameters_by_name(backbone.components, first=backbone.denoiser_name)
    return {**{name: parameter.detach() for name, parameter in own.items()}, **stack_of(backbone).originals}


def _of_operator(edit: OperatorErasure, backbone: Backbone) -> Pairs:
    """``W U`` and ``V^T`` of every site, the latter zero at the columns that do not read the text."""
    weights, pairs = base_weights(backbone), {}
    for site in edit.site_spaces:
        w = exact(weights[f"{site}.weight"]).cpu()
        columns = edit.columns(site)
        u, v = (factor.double() for factor in edit.factors(site))
        down = torch.zeros(u.shape[1], w.shape[1], dtype=torch.float64)
        down[:, columns] = v.T
        pairs[site] = (w[:, columns] @ u).float(), down.float()
    return pairs


def _of_factors(edit: LoraErasure | GatedErasure) -> Pairs:
    """``B`` and ``A`` of every layer."""
    sites = edit.sites if isinstance(edit, GatedErasure) else edit.config.sites or ()
    ups, downs = ({site: edit.tensors[f"{site}.lora_{k}"].float() for site in sites} for k in "BA")
    return {site: (ups[site], downs[site]) for site in sites}


def _of_delta(edit: Erasure, backbone: Backbone, rank: int | None) -> tuple[Pairs, float]:
    """Factors of every changed layer by SVD, all of one rank, and the relative error of the whole."""
    layers = {
        backbone.qualified(part, name)
        for part, denoiser in backbone.denoiser_parts.items()
        for name, module in denoiser.named_modules()
        if _takes_lora(module)
    }
    flat, lost, whole = {}, 0.0, 0.0
    for name, delta in edit.tensors.items():
        module, _, kind = name.rpartition(".")
        whole += float(delta.double().square().sum())
        if kind == "weight" and module in layers:
            flat[module] = delta.double().flatten(1)
        elif delta.any() and rank is None:
            raise ValueError(
                f"a LoRA cannot change {name}; export the whole model, or leave it out with rank= (the error is noted)"
            )
        else:
            lost += float(delta.double().square().sum())
    spectra = {module: torch.linalg.svd(delta, full_matrices=False) for module, delta in flat.items()}
    needed = {module: int((s > EXACT * s[0]).sum()) for module, (_, s, _) in spectra.items() if s[0] > 0}
    for module, n in needed.items() if rank is None else ():
        rows, columns = flat[module].shape
        if n * (rows + columns) > rows * columns:
            raise ValueError(
                f"the change of {module} has rank {n} of {min(rows, columns)}: a LoRA of it would be larger than the "
                "difference itself; export the whole model, or give rank= for an approximation (its error is noted)"
            )
    n = rank or max(needed.values(), default=1)
    pairs = {}
    for module in needed:
        left, s, right = spectra[module]
        root = s[:n].sqrt()
        lost += float(s[n:].square().sum())
        shape = edit.tensors[f"{module}.weight"].shape
        up, down = _padded(left[:, :n] * root, n), _padded((right[:n].T * root), n).T
        up, down = up.reshape(shape[0], n, *[1] * (len(shape) - 2)), down.reshape(n, *shape[1:])
        pairs[module] = up.float(), down.float()
    return pairs, (lost / whole) ** 0.5 if whole else 0.0


def _takes_lora(module: Any) -> bool:
    return isinstance(module, torch.nn.Linear | torch.nn.Conv2d)


def _padded(factor: Tensor, n: int) -> Tensor:
    return torch.nn.functional.pad(factor, (0, n - factor.shape[1]))


__all__ = ["Pairs", "base_weights", "factors", "filled", "refuse_elsewhere"]
