"""Joint attention: which layers project the text, and how much the picture looks at each word.

Text and picture meet in one attention, in one of two ways. Either each has projections of its own (*apart*: FLUX's
double blocks, SD3, Qwen-Image), or one projection reads both as one sequence (*together*: Z-Image, FLUX's single
blocks). Where the text stands in that sequence is :meth:`Backbone.text_rows`.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from erasure.backbone.listen import Call, listening
from erasure.backbone.names import split

if TYPE_CHECKING:
    from erasure.backbone.base import Backbone

FUSED = "to_qkv_mlp_proj"
APART, TOGETHER = ("add_q_proj", "add_k_proj"), ("to_q", "to_k", FUSED)


@dataclasses.dataclass(frozen=True)
class Streams:
    """How text and picture share the attentions of a transformer.

    Attributes:
        apart, together: the denoiser's rows of blocks of either kind; "" where it has none.
        text_first: whether the text stands before the picture in the sequence that attention reads.
    """

    apart: str = ""
    together: str = ""
    text_first: bool = True


@dataclasses.dataclass(frozen=True)
class Projection:
    """A linear layer that makes queries or keys of the text in a joint attention.

    Attributes:
        linear: the layer.
        outputs: how many of its first outputs are queries or keys; FLUX.2's single blocks make everything in one layer.
        shared: whether it reads the picture as well.
    """

    linear: nn.Linear
    outputs: int
    shared: bool


def text_projections(backbone: Backbone) -> dict[str, Projection]:
    """The layers that make queries and keys of the text in joint attentions, by qualified name.

    Raises:
        ValueError: the model has no joint attention, or one whose rows of text are not known.
    """
    streams = backbone.streams
    if streams is None:
        raise ValueError(
            f"queries and keys of the text are those of joint attention; {backbone.pipelines} has none whose rows of "
            "text are known; choose another method, such as uce"
        )
    found = {}
    for part, denoiser in backbone.denoiser_parts.items():
        for name, module in denoiser.named_modules():
            root, last = name.partition(".")[0], name.rpartition(".")[2]
            linear = getattr(module, "base_layer", module)  # of a LoRA that was loaded later
            apart, together = root == streams.apart and last in APART, root == streams.together and last in TOGETHER
            if isinstance(linear, nn.Linear) and (apart or together):
                attention: Any = denoiser.get_submodule(name.rpartition(".")[0])
                outputs = 2 * attention.inner_dim if last == FUSED else linear.out_features
                found[backbone.qualified(part, name)] = Projection(linear, outputs, together)
    return found


def picture_rows(text: slice, text_first: bool) -> slice:
    """The rows of a joint sequence that are the picture's, where those of the text are known."""
    return slice(text.stop, None) if text_first else slice(0, text.start)


@contextlib.contextmanager
def looking_at(backbone: Backbone, words: Tensor) -> Iterator[dict[str, Tensor]]:
    """How much the picture looks at some words in the last prediction made in the block, by attention, with its graph:

        sum over heads, rows p of the picture and words w of  softmax(Q K^T / sqrt(d))[p, w]^2      (n,)

    Queries and keys are those that the model's attention is called with: behind norms and positions.

    Args:
        words: ``(n, length)``, 1 at the tokens of the text to look at, for the rows of the prediction.

    Raises:
        ValueError: on leaving, where an attention did not run through PyTorch's own function.
    """
    names = dict.fromkeys(name.rpartition(".")[0] for name in text_projections(backbone))
    owners = {name: split(name, first=backbone.denoiser_name) for name in names}
    modules = {name: backbone.denoiser_parts[part].get_submodule(own) for name, (part, own) in owners.items()}
    heard = _Attention(backbone, words)
    handles = [module.register_forward_pre_hook(heard.entering(name)) for name, module in modules.items()]
    handles += [module.register_forward_hook(heard.leaving) for module in modules.values()]
    try:
        with listening(backbone.denoiser_parts, before=heard.called), heard:
            yield heard.found
    finally:
        for handle in handles:
            handle.remove()
    if heard.inputs is not None and (silent := [name for name in names if name not in heard.found]):
        raise ValueError(
            f"what {backbone.pipelines} looks at is read from PyTorch's own attention; {silent[0]} runs through "
            f"another; set it back ({backbone.denoiser_name}.set_attention_backend('native'))"
        )


class _Attention(TorchFunctionMode):
    """Hears the attentions of joint blocks; every other function runs as it would."""

    def __init__(self, backbone: Backbone, words: Tensor) -> None:
        super().__init__()
        self.backbone, self.words = backbone, words
        self.current: str | None = None
        self.inputs: Mapping[str, Any] | None = None
        self.found: dict[str, Tensor] = {}

    def called(self, call: Call) -> None:
        self.inputs = call.inputs
        self.found.clear()

    def entering(self, name: str) -> Callable[..., None]:
        def enter(module: nn.Module, args: Any) -> None:
            self.current = name

        return enter

    def leaving(self, module: nn.Module, args: Any, output: Any) -> None:
        self.current = None

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.scaled_dot_product_attention and self.current is not None:
            self.found[self.current] = self.squares(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))

    def squares(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **options: Any
    ) -> Tensor:
        """The sum of squares of one attention, ``(n,)``. Its ``(places, length)`` scores are not kept for the gradient
        but computed again: at a thousand places and more those of all layers would not fit."""
        streams = self.backbone.streams
        text = self.backbone.text_rows(self.inputs or {})
        start = text.indices(key.shape[2])[0]
        words = F.pad(self.words, (start, key.shape[2] - start - self.words.shape[1])).to(query)
        looking = query[:, :, picture_rows(text, streams.text_first)]  # type: ignore[union-attr]
        if attn_mask is not None and attn_mask.shape[-2] > 1:
            attn_mask = attn_mask[..., picture_rows(text, streams.text_first), :]  # type: ignore[union-attr]
        scale = options.get("scale") or query.shape[-1] ** -0.5
        given = looking, key, words, attn_mask, scale
        return checkpoint(attended, *given, use_reentrant=False, preserve_rng_state=False)  # type: ignore[return-value]


def attended(query: Tensor, key: Tensor, words: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """``(n,)``: the sum of squared attention that queries ``(n, heads, places, d)`` pay to words ``(n, length)``.

    Args:
        key: ``(n, heads, length, d)``.
        mask: as ``torch.nn.functional.scaled_dot_product_attention`` takes it.
    """
    scores = (query @ key.transpose(-1, -2) * scale).float()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return (scores.softmax(dim=-1) * words[:, None, None]).square().sum(dim=(1, 2, 3))


__all__ = ["Projection", "Streams", "attended", "looking_at", "picture_rows", "text_projections"]
