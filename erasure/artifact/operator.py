"""Closed forms: one low-rank matrix multiplied onto every layer that reads the prompt."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from erasure.artifact.base import Erasure, exact
from erasure.backbone import Backbone, Space


class OperatorErasure(Erasure):
    """``W' = W (I + s U V^T)`` for every text site, with ``U, V`` of shape ``(d, n)``: d the width of the text
    embeddings, n the number of edited embeddings. Kilobytes, whatever the size of the model.

    ``U`` holds where each edited embedding is moved (anchor minus target), ``V`` how strongly any embedding takes part.

    Tensors are called ``hidden.u`` and ``hidden.v``, with ``pooled.u`` and ``pooled.v`` beside them where pooled
    embeddings are edited too. A method that solves for each layer on its own adds ``<site>.v``, which takes the place
    of the shared one at that site. ``config["spaces"]`` lists the sites of each space, and the columns they read the
    embedding from where that is not all of them.
    """

    kind: ClassVar[str] = "operator"

    @property
    def site_spaces(self) -> dict[str, str]:
        """Site to the space of the embeddings it reads."""
        return {site: space for space, facts in self.config["spaces"].items() for site in facts["sites"]}

    @property
    def parameter_names(self) -> tuple[str, ...]:
        return tuple(f"{site}.weight" for site in self.site_spaces)

    def factors(self, site: str) -> tuple[Tensor, Tensor]:
        """``U, V`` of one site."""
        space = self.site_spaces[site]
        own = f"{site}.v"
        return self.tensors[f"{space}.u"], self.tensors[own if own in self.tensors else f"{space}.v"]

    def edit(self, name: str, weight: Tensor, scale: float) -> Tensor:
        site = name.removesuffix(".weight")
        columns = slice(*(self.config["spaces"][self.site_spaces[site]]["columns"] or (None,)))
        edited = exact(weight).clone()
        w = edited[:, columns]
        u, v = (factor.to(w.device, w.dtype) for factor in self.factors(site))
        edited[:, columns] = w + scale * (w @ u) @ v.T
        return edited.to(weight.device, weight.dtype)

    def compose(self, other: Erasure) -> OperatorErasure:
        """``(I + U1 V1^T)(I + U2 V2^T)`` as one pair of factors.

        Not the joint solve: where two erasures overlap, the second acts on what the first left.
        """
        self._check_composable(other)
        assert isinstance(other, OperatorErasure)
        if self.config["spaces"] != other.config["spaces"] or any(
            len(set(e.tensors)) > 2 * len(e.config["spaces"]) for e in (self, other)
        ):
            raise ValueError(
                f"{self.name!r} and {other.name!r} edit different layers; apply them one after the other instead"
            )
        tensors = {}
        for space in self.config["spaces"]:
            u1, v1, u2, v2 = (e.tensors[f"{space}.{k}"].double() for e in (self, other) for k in ("u", "v"))
            tensors[f"{space}.u"] = torch.cat([u1, u2 + u1 @ (v1.T @ u2)], dim=1).float()
            tensors[f"{space}.v"] = torch.cat([v1, v2], dim=1).float()
        return OperatorErasure(f"{self.name}+{other.name}", self._composed_config(other), tensors)

    def check_tensors(self) -> None:
        spaces = self.config.get("spaces")
        if not isinstance(spaces, dict) or not spaces:
            raise ValueError(
                "an operator erasure's config lists the layers of its spaces; 'spaces' is missing; get it again"
            )
        sites = self.site_spaces
        shared = {f"{space}.{factor}" for space in spaces for factor in ("u", "v")}
        allowed = shared | {f"{site}.v" for site in sites}
        shapes = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}
        missing = {f"{space}.u" for space in spaces} - set(shapes)
        missing |= {f"{s}.v" for s, space in sites.items() if f"{space}.v" not in shapes and f"{s}.v" not in shapes}
        wrong = [n for n, shape in shapes.items() if n in allowed and shape != shapes.get(f"{self._space_of(n)}.u")]
        if missing or wrong or set(shapes) - allowed or any(len(shape) != 2 for shape in shapes.values()):
            raise ValueError(
                f"an operator erasure holds u and v of one shape (d, n) for each space; got {shapes}; the file is not one"
            )

    def _space_of(self, tensor: str) -> str:
        stem = tensor.rpartition(".")[0]
        return self.site_spaces.get(stem, stem)


def space_config(backbone: Backbone, space: Space, names: list[str] | None = None) -> dict[str, Any]:
    """The entry of ``config["spaces"]`` for all sites of a space, or for those named."""
    sites = backbone.text_sites(space)
    columns = next(iter(sites.values())).columns  # one for all sites of a space
    return {"sites": list(sites) if names is None else names, "columns": list(columns) if columns else None}
