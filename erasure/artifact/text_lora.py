"""Low-rank additions at the rows of text of a joint attention; rows of the picture pass the base's weight alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from erasure.artifact.hooks import Factors, Handles, Installed, Listener, product
from erasure.artifact.lora import LowRankHooks, paired
from erasure.backbone import Backbone, backbone_of
from erasure.backbone.streams import Projection, text_projections


class TextLoraErasure(LowRankHooks):
    """``y = W x + s B A x`` for the text and ``y = W x`` for the picture, in layers that make queries and keys of both.

    From Z-Erase (Jiang et al. 2026): a low-rank change of a layer that reads text and picture as one sequence also
    moves the picture's rows, and pictures collapse. Where the text stands is read from every call of the denoiser, so
    the size of the picture may change. Layers of the text alone get the addition everywhere.

    Tensors are ``<layer>.lora_A (r, in)`` and ``<layer>.lora_B (out, r)`` as in a LoRA erasure. Where one layer makes
    queries, keys and more (FLUX.2), ``out`` counts the queries and keys, which are its first outputs. It is no LoRA for
    other programs: those act on every row.
    """

    kind: ClassVar[str] = "text-lora"

    def install(self, pipe: Any, scale: float) -> Handles:
        backbone = backbone_of(pipe)
        known = text_projections(backbone)
        factors = {site: tuple(f.to(backbone.device) for f in self.factors(site)) for site in self.sites}
        return text_low_rank(backbone, {site: known[site] for site in self.sites}, factors, scale)  # type: ignore[arg-type]

    def misfits(self, backbone: Backbone) -> list[str]:
        if backbone.streams is None:
            return [f"{backbone.pipelines} has no joint attention whose rows of text are known"]
        known, found = text_projections(backbone), []
        for site in self.sites:
            up, down = self.factors(site)
            if site not in known:
                found.append(f"{site} is missing, or makes no queries or keys of the text")
            elif (len(up), down.shape[1]) != (known[site].outputs, known[site].linear.in_features):
                found.append(f"{site} has shape {(known[site].outputs, known[site].linear.in_features)}")
        return found

    def check_tensors(self) -> None:
        flat = all(tensor.dim() == 2 for tensor in self.tensors.values())
        if not flat or not paired(self.tensors, self.sites) or self.system:
            raise ValueError(
                "a text-lora erasure holds lora_A and lora_B of one rank for each of its sites; names or shapes in "
                "file and config differ; get it again"
            )


class TextRows(Listener):
    """The rows of text in the denoiser's current call."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def hear(self, call: Mapping[str, Any]) -> None:
        self.current.rows = self.backbone.text_rows(call)

    def __call__(self) -> slice:
        return self.current.rows


def text_low_rank(
    backbone: Backbone, projections: Mapping[str, Projection], factors: Mapping[str, Factors], scale: float = 1.0
) -> Handles:
    """Add ``scale * B A x`` to the first outputs of every projection, at the rows of text.

    Args:
        projections: of :func:`~erasure.backbone.streams.text_projections`, by name.
        factors: name to ``B`` and ``A``; read at every call, so that they can be trained.
    """
    rows = TextRows(backbone)
    hooks = {
        name: _Addition(name, factors, scale, rows if projection.shared else None)
        for name, projection in projections.items()
    }
    handles = Handles(rows.listen(backbone.denoiser_parts.values()))
    for name, hook in hooks.items():
        handles.hooks.append(projections[name].linear.register_forward_hook(hook, with_kwargs=True))
    return handles


@dataclasses.dataclass(frozen=True)
class _Addition(Installed):
    name: str
    factors: Mapping[str, Factors]
    scale: float
    rows: TextRows | None  # None: every row is text

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        x = args[0] if args else kwargs["input"]
        up, down = self.factors[self.name]
        text = slice(None) if self.rows is None else self.rows()
        more = self.scale * product(layer, x[:, text], up, down)
        output = output.clone()
        output[:, text, : len(up)] += more.to(output.dtype)
        return output


__all__ = ["TextLoraErasure", "TextRows", "text_low_rank"]
