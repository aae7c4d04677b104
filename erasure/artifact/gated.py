"""Gated adapters: low-rank additions that act as far as the prompt resembles the concept. No weight changes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from erasure.artifact.hooks import Handles, Listener, low_rank
from erasure.artifact.lora import LowRankHooks, paired
from erasure.backbone import Backbone, backbone_of
from erasure.backbone.base import layer_at
from erasure.backbone.text import Text

# A prompt this near to the empty one, as a share of the concept's distance from it, is the empty one: encoded in
# another batch or in half precision it differs by rounding, whose direction means nothing.
EMPTY = 0.02


class GatedErasure(LowRankHooks):
    """``y = W x + s m(prompt) B A x`` on every trained layer (SPM, Lyu et al. 2024, section 3.4).

    The gate ``m`` is between 0 and 1 for each row of a batch: the largest cosine, if positive, between the prompt's
    token embeddings and those of the concept's phrases, both less the empty prompt's. (The paper's cosine of whole
    embeddings is never near 0, as all prompts share their start and padding tokens.) A prompt that differs from the
    empty one by rounding alone has a gate of 0.

    Where a prompt has as many rows as tokens (Qwen-Image, Z-Image), those behind its words are compared: they have read
    all of it, wherever in the prompt the concept stands.

    Tensors are ``<layer>.lora_A`` and ``<layer>.lora_B`` as in a LoRA erasure, ``gate.concept (k, length, d)`` and
    ``gate.empty (length, d)``. Exported as a LoRA it loses its gate and acts on every prompt.
    """

    kind: ClassVar[str] = "gated"

    def install(self, pipe: Any, scale: float) -> Handles:
        backbone = backbone_of(pipe)
        layers = {site: layer_at(backbone, site) for site in self.sites}
        factors = {site: tuple(f.to(layer.weight.device) for f in self.factors(site)) for site, layer in layers.items()}
        gate = Gate(self, backbone, scale)
        handles = low_rank(layers, factors, gate)  # type: ignore[arg-type]
        handles.hooks += gate.listen(backbone.denoiser_parts.values())
        return handles

    def misfits(self, backbone: Backbone) -> list[str]:
        gate = tuple(self.tensors["gate.concept"].shape[1:]), tuple(self.tensors["gate.empty"].shape)
        width = backbone.width()
        fits = gate[0] == gate[1] and gate[1][-1:] == (width,)
        found = [] if fits else [f"its gate is of text of shape {gate[1]}, the model's is of width {width}"]
        for site in self.sites:
            try:
                shape = layer_at(backbone, site).weight.shape
            except (AttributeError, KeyError):
                found.append(f"{site} is missing")
                continue
            up, down = self.factors(site)
            if (len(up), *down.shape[1:]) != tuple(shape):
                found.append(f"{site} has shape {tuple(shape)}")
        return found

    def check_tensors(self) -> None:
        gate = {name: self.tensors[name] for name in ("gate.concept", "gate.empty") if name in self.tensors}
        factors = {name: tensor for name, tensor in self.tensors.items() if name not in gate}
        shapes = [tuple(tensor.shape) for tensor in gate.values()]
        whole = len(shapes) == 2 and len(shapes[0]) == 3 and shapes[0][1:] == shapes[1] and 0 not in shapes[0]
        if not paired(factors, self.sites) or not whole or self.system:
            raise ValueError(
                "a gated erasure holds lora_A and lora_B of its sites and its gate; got others; get it again"
            )


class Gate(Listener):
    """How far each row of the current denoiser call resembles the concept."""

    def __init__(self, edit: GatedErasure, backbone: Backbone, scale: float) -> None:
        super().__init__()
        self.backbone, self.scale = backbone, scale
        self.concept, self.empty = edit.tensors["gate.concept"], edit.tensors["gate.empty"]

    def hear(self, call: Mapping[str, Any]) -> None:
        self.current.rows = torch.stack([self.resemblance(row) for row in self.backbone.rows_of(call)])

    @torch.no_grad()
    def resemblance(self, row: Tensor) -> Tensor:
        """``m`` of one prompt's embeddings ``(length, d)``, a scalar in [0, 1]."""
        if not row.any():  # what SDXL's guidance has in the place of the empty prompt
            return row.new_zeros((), dtype=torch.float32)
        empty, concept = self.empty.to(row.device), self.concept.to(row.device)
        length = min(len(row), len(empty))
        if self.backbone.cuts:
            row, empty, concept = row[-length:], empty[-length:], concept[:, -length:]
        prompt = (row[:length].float() - empty[:length]).flatten()
        phrases = (concept[:, :length] - empty[:length]).flatten(1)
        if prompt.norm() <= EMPTY * phrases.norm(dim=1).min():
            return prompt.new_zeros(())
        return F.cosine_similarity(prompt[None], phrases).amax().clamp(0, 1)

    def __call__(self, output: Tensor) -> Tensor:
        rows = self.current.rows.to(output)
        if len(output) % len(rows):
            return self.scale * rows.amax()  # a layer that reads all prompts as one sequence
        each = rows.repeat_interleave(len(output) // len(rows))
        return self.scale * each.reshape(-1, *[1] * (output.dim() - 1))


def gate_of(backbone: Backbone, concept: Text, empty: Text) -> tuple[Tensor, Tensor]:
    """``(k, length, d)`` and ``(length, d)``: what a prompt is compared with.

    Where prompts have no fixed length, it is the template behind the words: what the empty prompt does not have in
    common with the concept's from the start.
    """
    if not backbone.cuts:
        return concept.hidden, empty.hidden[0]
    rows, (nothing,) = (backbone.rows_of(backbone.text_inputs(text)) for text in (concept, empty))
    behind = len(nothing) - min(_common(row, nothing) for row in rows)
    return torch.stack([row[-behind:] for row in rows]), nothing[-behind:]


def _common(a: Tensor, b: Tensor) -> int:
    """How many rows two prompts begin with, the same but for rounding."""
    length = min(len(a), len(b))
    near = (a[:length] - b[:length]).float().norm(dim=-1) <= EMPTY * b[:length].float().norm(dim=-1)
    return int(near.long().cumprod(0).sum())


__all__ = ["Gate", "GatedErasure", "gate_of"]
