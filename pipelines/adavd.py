"""AdaVD: a concept's part is taken out of the values of cross-attention while pictures are drawn."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat
from torch import Tensor, nn

from erasure.artifact import Erasure, HookErasure
from erasure.artifact.hooks import Handles
from erasure.backbone import Backbone, backbone_of
from erasure.backbone.listen import named_arguments
from erasure.methods.base import Method, Reference, Request, expanded
from erasure.pipelines.guided import DenoiserHook, has_numbers

DEPENDENT = 1e-6  # of its square norm: a direction of which less is left lies in those before it


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaVD(Method):
    """In every cross-attention, for the value v of each token of the prompt and the concept's value c:

        v - s shift(cos(v, c)) <v, c> / <c, c> c,    shift(x) = height / (1 + exp(-steepness (x - midpoint)))

    with s the erasure's scale (Wang et al. 2025, section 3). A shift of 1 leaves the orthogonal complement of c, one of
    0 the token as it is; above 1 the component is turned round. Several concepts are made orthogonal to one another
    first (Gram-Schmidt), and each keeps a shift of its own.

    c is the value of the concept's last word piece; of several names for one concept, the one that a token resembles
    most. Keys, the start token and the unconditional half of guidance stay as they are. It needs no guidance and no
    further call of the denoiser.

    The released code has each value and the unconditional one of the same position in one vector, for cosines and
    projections; here a value stands alone, as in the paper.

    Attributes:
        steepness, midpoint, height: of the shift. Lower the midpoint when the concept is still drawn; raise it when
            similar things change.
        end_token: take the value of the end token as a second c: encoders collect the whole prompt there, and behind.
        articles: read "a ninja" beside "ninja".
        synonyms: read the concept's synonyms as well.
    """

    steepness: PositiveFloat = 100.0
    midpoint: Annotated[float, Field(ge=-1, le=1)] = 0.93
    height: PositiveFloat = 2.0
    end_token: bool = False
    articles: bool = False
    synonyms: bool = False

    architectures: ClassVar[tuple[str, ...] | None] = ("sd-unet", "sdxl")  # where the text alone makes the values
    anchored: ClassVar[bool] = False
    key: ClassVar[str] = "adavd"
    kind: ClassVar[str | None] = "value"
    summary: ClassVar[str] = "the concept's part taken out of cross-attention values while drawing; changes no weight"
    reference: ClassVar[Reference] = Reference(
        "Precise, Fast, and Low-cost Concept Erasure in Value Space: Orthogonal Complement Matters",
        "Wang et al., CVPR 2025",
        "2412.06143",
        "WYuan1001/AdaVD",
    )
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        # On Emoji World, by its two classifiers: target seen in 4 and 6 % of 72 pictures (base: 92 and 86), neighbours
        # right in 95 and 94 % of 108 (97 and 96), unrelated things in 88 and 89 % of 120 (93 and 92). Screened with 18
        # pictures of the target: the paper's settings left it in 100 and 89 %, as the base; the same names and tokens
        # as here with a midpoint of 0.85 and a height of 2 in 33 %; a midpoint of 0.5 and a height of 1.5 in none.
        "recommended": {"midpoint": 0.5, "height": 1.0, "end_token": True, "articles": True, "synonyms": True},
        "paper": {},
    }

    def erase(self, backbone: Backbone, request: Request) -> Erasure:
        """Encode the concepts; everything else happens while pictures are drawn."""
        tensors, prompts = {}, []
        for i, concept in enumerate(request.concepts):
            phrases = concept.phrases if self.synonyms else (concept.name,)
            names = expanded(backbone, phrases, articles=self.articles)
            text = backbone.encode(names)
            rows = [*text.take("last_subject"), *(text.take("eos") if self.end_token else [])]
            tensors[f"concept.{i}"] = torch.cat(rows).float().cpu().contiguous()
            prompts += names
        return ValueErasure(self.name_for(request), self.record(backbone, request, prompts=prompts), tensors)


class ValueErasure(HookErasure):
    """AdaVD on a pipeline. Tensors: ``concept.0 (rows, d)``, ..., the embeddings whose values are c."""

    kind: ClassVar[str] = "value"
    numbers: ClassVar[tuple[str, ...]] = ("steepness", "midpoint", "height")

    @property
    def concepts(self) -> list[Tensor]:
        return [self.tensors[f"concept.{i}"] for i in range(len(self.tensors))]

    def install(self, pipe: Any, scale: float) -> Handles:
        backbone = backbone_of(pipe)
        hook = Decomposition(backbone, self, scale)
        values = [site for site in backbone.text_sites().values() if site.role == "value"]
        handles = Handles([site.linear.register_forward_hook(hook) for site in values])
        for module in backbone.denoiser_parts.values():
            handles.hooks.append(module.register_forward_pre_hook(hook.before, with_kwargs=True))
        return handles

    def misfits(self, backbone: Backbone) -> list[str]:
        found, width = self.tensors["concept.0"].shape[1], backbone.width()
        return [] if found == width else [f"its text is {found} wide, the model's {width}"]

    def check_tensors(self) -> None:
        names = {f"concept.{i}" for i in range(len(self.tensors))}
        shapes = [tuple(tensor.shape) for tensor in self.tensors.values()]
        whole = bool(shapes) and all(len(s) == 2 and 0 not in s and s[1] == shapes[0][1] for s in shapes)
        if set(self.tensors) != names or not whole or not has_numbers(self) or self.system:
            raise ValueError(
                "a value erasure holds the embeddings of its concepts and AdaVD's settings; got others; get it again"
            )


class Decomposition(DenoiserHook):
    """The hooks: one on each layer that makes values, and one that learns which half of a call is the prompts'."""

    def __init__(self, backbone: Backbone, edit: ValueErasure, scale: float) -> None:
        super().__init__(backbone, scale)
        self.concepts = edit.concepts
        s: Any = edit.config.settings
        self.shift = lambda cosine: s["height"] * torch.sigmoid(s["steepness"] * (cosine - s["midpoint"]))

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        state: Any = self.state
        if not self.raw.on:
            inputs = named_arguments(module, args, kwargs)
            state.rows = len(self.backbone.text_of(inputs)) if self.guided(inputs) else 0

    def __call__(self, layer: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if self.raw.on:
            return output
        start = len(output) // 2 if len(output) == getattr(self.state, "rows", 0) else 0
        v = output[start:, 1:]
        with torch.no_grad():
            values = [F.linear(rows.to(layer.weight), layer.weight, layer.bias).float() for rows in self.concepts]
        kept = output.clone()
        kept[start:, 1:] = (v.float() - self.scale * component(v.float(), values, self.shift)).to(v)
        return kept


def component(v: Tensor, concepts: Sequence[Tensor], shift: Callable[[Tensor], Tensor]) -> Tensor:
    """The part of values that belongs to concepts, shifted: ``sum_j shift(cos(v, c_j)) a_j c_j``.

    ``sum_j a_j c_j`` is the orthogonal projection of v on the span of the c_j, by Gram-Schmidt.

    Args:
        v: ``(..., d)`` values.
        concepts: ``(rows, d)`` for each concept: its c_j is the row with the largest cosine to v.
        shift: of a cosine.
    """
    c, shifts = [], []
    for rows in concepts:
        cosine, index = (F.normalize(v, dim=-1) @ F.normalize(rows, dim=-1).T).max(dim=-1)
        c.append(rows[index])
        shifts.append(shift(cosine)[..., None])
    basis: list[tuple[Tensor, Tensor]] = []  # orthogonal q, and each as a combination of the c_j
    a = torch.zeros(*v.shape[:-1], len(c), dtype=v.dtype, device=v.device)
    for i, unit in enumerate(torch.eye(len(c), dtype=v.dtype, device=v.device)):
        q, combination = c[i], unit.expand_as(a)
        for p, of_p in basis:
            r = ratio(q, p)
            q, combination = q - r * p, combination - r * of_p
        q = torch.where(square(q) > DEPENDENT * square(c[i]), q, 0)
        a = a + ratio(v, q) * combination
        basis.append((q, combination))
    return sum((s * a[..., j, None] * one for j, (s, one) in enumerate(zip(shifts, c, strict=True))), 0 * v)


def ratio(x: Tensor, p: Tensor) -> Tensor:
    """``<x, p> / <p, p>``, and 0 where p is."""
    return (x * p).sum(-1, keepdim=True) / square(p).clamp(min=torch.finfo(p.dtype).tiny)


def square(x: Tensor) -> Tensor:
    return x.square().sum(-1, keepdim=True)
