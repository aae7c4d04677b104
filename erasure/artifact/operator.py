"""Closed forms: one low-rank matrix multiplied onto every layer that reads the prompt."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from erasure.artifact.base import Erasure, exact


class OperatorErasure(Erasure):
    """``W' = W (I + s U V^T)`` for every text site, with ``U, V`` of shape ``(d, n)``: d the width of the text
    embeddings, n the number of edited embeddings. Kilobytes, whatever the size of the model.

    ``U`` holds where each edited embedding is moved (anchor minus target), ``V`` how strongly any embedding takes part.
    """

    kind: ClassVar[str] = "operator"

    @property
    def parameter_names(self) -> tuple[str, ...]:
        return tuple(f"{site}.weight" for site in self.config["sites"])

    def edit(self, name: str, weight: Tensor, scale: float) -> Tensor:
        w = exact(weight)
        u, v = (self.tensors[key].to(w.device, w.dtype) for key in ("u", "v"))
        return (w + scale * (w @ u) @ v.T).to(weight.device, weight.dtype)

    def compose(self, other: Erasure) -> OperatorErasure:
        """``(I + U1 V1^T)(I + U2 V2^T)`` as one pair of factors.

        Not the joint solve: where two erasures overlap, the second acts on what the first left.
        """
        self._check_composable(other)
        u1, v1, u2, v2 = (e.tensors[k].double() for e in (self, other) for k in ("u", "v"))
        u, v = torch.cat([u1, u2 + u1 @ (v1.T @ u2)], dim=1), torch.cat([v1, v2], dim=1)
        factors = {"u": u.float(), "v": v.float()}
        return OperatorErasure(f"{self.name}+{other.name}", self._composed_config(other), factors)

    def check_tensors(self) -> None:
        shapes = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}
        if set(shapes) != {"u", "v"} or shapes["u"] != shapes["v"] or len(shapes["u"]) != 2:
            raise ValueError(
                f"an operator erasure holds u and v of one shape (d, n); got {shapes}; the file is not one"
            )
