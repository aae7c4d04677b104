"""Erasures on the text instead of on the weights: nothing is written, and every prompt of a batch can have its own.

Every layer that receives the text multiplies it by ``W``; an operator erasure makes that ``W T``. So ``T`` may as well
be put on the input of those layers: ``(W T) x = W (T x)``. A server chooses erasures for each call, for nothing.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Self, get_args

import torch
from torch import Tensor, nn

from erasure.artifact import Erasure, OperatorErasure
from erasure.artifact.base import Allow
from erasure.artifact.hooks import Installed
from erasure.artifact.stack import check_scales, stack_of
from erasure.backbone import Backbone, Site, Space, backbone_of
from erasure.backbone.checks import refuse_unread
from erasure.backbone.listen import named_arguments, says_guided
from erasure.pipelines.calls import Copies
from erasure.pipelines.choices import Choice, Names, choice_of, chosen, order

SPACES: tuple[Space, ...] = get_args(Space)


def attach_erasures(
    pipe: Any,
    edits: Erasure | Sequence[Erasure],
    *,
    scales: float | Sequence[float] = 1.0,
    rows: Sequence[Names] | None = None,
    num_images_per_prompt: int | None = None,
    allow: Allow | None = None,
) -> Attached:
    """Put operator erasures on a pipeline without touching a weight. The pictures are those of the applied erasures.

    :func:`~erasure.pipelines.erasures` chooses among them for one call.

    Args:
        pipe: the pipeline they were made for. Erasures applied to its weights stay in force beside these.
        edits: one operator erasure or several; several act in the order in which ``apply`` would stack them.
        scales: how strongly, one number for all or one each.
        rows: for calls that choose nothing themselves: for each prompt of the batch the erasures (or their names) it
            gets, ``[]`` for none; all of them on every prompt by default.
        num_images_per_prompt: beside ``rows``: what the pipeline is called with. It is found out by default, and a call
            that leaves it open is refused.
        allow: as in :meth:`Erasure.apply <erasure.artifact.Erasure.apply>`.

    Returns:
        A handle: ``remove()`` takes them off; it is a context manager too. Until then the pipeline cannot be saved,
        copied with ``deepcopy`` or pickled: they are in no weight.

    Raises:
        ValueError: an erasure is no single map of the text: a fine-tune, one with a factor for each layer, or one that
            leaves some of the layers that read the text alone; or another one of that name is attached.

    >>> with attach_erasures(pipe, [hero, cat], rows=[[hero], [], [hero, cat]]):  # doctest: +SKIP
    ...     pipe(["a photo of a superhero", "a cat", "a superhero with a cat"])
    """
    backbone = backbone_of(pipe)
    several = [edits] if isinstance(edits, Erasure) else list(edits)
    stack, names = stack_of(backbone), [edit.name for edit in several]
    on_it, there = stack.layers, [name for handle in stack.attached for name in handle.edits]
    if len({*names, *there}) < len(names) + len(there):
        raise ValueError(f"two erasures of one name; got {names}, attached are {there}; rename one of them")
    for edit in several:
        edit.check_base(backbone, allow=allow)
        if edit.name in on_it:
            raise ValueError(
                f"{edit.name!r} is applied to this pipeline already, and the edit would be made twice; remove it "
                "first, or rename one of the two"
            )
        edit.warn_unreached(backbone)
    operators = [check_map(edit, backbone) for edit in several]
    return Attached(backbone, operators, scales=scales, rows=rows, num_images_per_prompt=num_images_per_prompt)


def check_map(edit: Erasure, backbone: Backbone) -> OperatorErasure:
    """The erasure, if it is one map of the text: the same at every layer that reads a space."""
    if not isinstance(edit, OperatorErasure):
        raise ValueError(
            f"{edit.name!r} is a change of weights (kind {edit.kind}), not a map of the text; use load_erasure "
            "instead, or serve a model that holds it (`erasure export --format pipeline`)"
        )
    for space in (name for name in SPACES if name in edit.spaces):
        facts = edit.spaces[space]
        absent = sorted(set(backbone.text_sites(space)) - set(facts["sites"]))
        own = [site for site in facts["sites"] if f"{site}.v" in edit.tensors]
        if absent or own:
            why = f"leaves {absent[0]} alone" if absent else f"has a factor for {own[0]} alone"
            raise ValueError(f"{edit.name!r} is no one map of the {space} text: it {why}; use load_erasure instead")
    return edit


class Attached(Installed):
    """Operator erasures that stand on a denoiser's text input; see :func:`attach_erasures`.

    Attributes:
        edits: the erasures by name, in the order in which they were attached.
        scales: theirs where a call gives none.
        default: what calls get that choose nothing.
        copies: of the pipeline, for calls from several threads.
    """

    def __init__(
        self,
        backbone: Backbone,
        edits: Sequence[OperatorErasure],
        *,
        scales: float | Sequence[float],
        rows: Sequence[Names] | None,
        num_images_per_prompt: int | None,
    ) -> None:
        self._stack = stack_of(backbone)
        names = [edit.name for edit in edits]
        self.edits = {edit.name: edit for edit in edits}
        self.scales = dict(zip(names, check_scales(scales, len(edits)), strict=True))
        self.copies = Copies()
        self._backbone, self._call = backbone, _Call()
        self.default = choice_of(self.scales, None, rows, num_images_per_prompt)
        self._sites = [
            (site, space)
            for space in SPACES
            if space in backbone.spaces and any(space in edit.spaces for edit in edits)
            for site in backbone.text_sites(space).values()
        ]
        self._handles = [
            site.linear.register_forward_pre_hook(_OnText(self, site, space)) for site, space in self._sites
        ]
        for denoiser in backbone.denoiser_parts.values():
            self._handles.append(denoiser.register_forward_pre_hook(self._begin, with_kwargs=True))
            self._handles.append(denoiser.register_forward_hook(self._end, always_call=True))
        self._stack.attach(self)

    def remove(self) -> None:
        """Take the erasures off. Calling it again does nothing."""
        for handle in self._handles:
            handle.remove()
        self._stack.detach(self)

    def __repr__(self) -> str:
        return f"Attached({list(self.edits)})"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        choice, call = chosen(self) or self.default, self._call
        call.clear()
        if not choice.each:
            call.scales = self._scales(choice, (0,))
            return
        inputs, backbone = named_arguments(module, args, kwargs), self._backbone
        latents = inputs[backbone.latent_argument]
        prompts = order(
            choice,
            latents,
            lambda: backbone.text_of(inputs),
            guidance_doubles=backbone.guidance == "cfg" and not backbone.guidance_calls,
            guided=says_guided() is True,
        )
        call.batch, call.scales = len(latents), self._scales(choice, prompts)

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        scales, mapped = self._call.scales, self._call.mapped
        self._call.clear()  # nothing of it is left for what is called next
        if output is not None and scales and not mapped:  # no output: the call failed, for a reason of its own
            self._check_layers(scales)

    def _check_layers(self, scales: Mapping[str, Any]) -> None:
        """Refuse layers that were replaced since. A cache that leaves them out of a step is no fault."""
        layers = [layer for part in self._backbone.denoiser_parts.values() for layer in part.named_modules()]
        for name, layer in layers:
            refuse_unread(name, layer)
        if {site.linear for site, _ in self._sites} - {layer for _, layer in layers}:
            raise ValueError(
                f"layers on which {list(scales)} stand were replaced since (or quantised), so the picture would not be "
                "erased; take the erasures off (remove()), and attach them to the model as it is now"
            )

    def _scales(self, choice: Choice, prompts: Sequence[int]) -> dict[str, list[float]]:
        """Scales of the erasures in force, for each row or one for all; the others cost a server nothing."""
        used = {name for row in choice.rows for name, scale in row.items() if scale}
        return {name: [choice.rows[i].get(name, 0.0) for i in prompts] for name in reversed(self.edits) if name in used}

    def map(self, x: Tensor, site: Site, space: Space) -> Tensor:
        """What a layer reads in the place of ``x``. Keys and values share their input, which is mapped once a call."""
        mapped = self._call.mapped
        if self._call.scales is None:  # a layer is called alone: nothing says when that ends
            return self._map(x, site, space)
        if id(x) not in mapped:  # the tensor is kept beside the result, so that no other takes its identity
            mapped[id(x)] = x, self._map(x, site, space)
        return mapped[id(x)][1]

    def _map(self, x: Tensor, site: Site, space: Space) -> Tensor:
        columns = slice(*(site.columns or (None,)))
        part = x[..., columns]
        # W T1 T2 x: the one applied last meets the text first.
        for name, scales in self._in_force().items():
            if space in self.edits[name].spaces:
                part = self.edits[name].map(part, space, self._scale(scales, part))
        if site.columns is None:
            return part
        whole = x.clone()
        whole[..., columns] = part
        return whole

    def _in_force(self) -> dict[str, list[float]]:
        """The erasures on the call this layer is in, or on the layer alone where somebody calls that."""
        if self._call.scales is not None:
            return self._call.scales
        choice = chosen(self) or self.default
        if choice.each:
            raise ValueError("rows belong to a call of the whole denoiser; a layer was called alone; choose no rows")
        return self._scales(choice, (0,))

    def _scale(self, scales: list[float], x: Tensor) -> float | Tensor:
        """One scale, or one for each row of the text."""
        batch = self._call.batch
        if not batch:
            return scales[0]
        if len(x) % batch:
            raise ValueError(
                f"rows for a batch of {batch}, but a layer got {len(x)} rows of text; models that read all prompts as "
                "one sequence take no rows; draw one prompt a call"
            )
        each = torch.tensor(scales, device=x.device).repeat_interleave(len(x) // batch)  # frames of a video
        return each.reshape(-1, *[1] * (x.dim() - 1))


@dataclasses.dataclass(frozen=True)
class _OnText(Installed):
    """The hook on one layer: its input, or the columns that hold the text."""

    attached: Attached
    site: Site
    space: Space

    def __call__(self, linear: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return self.attached.map(args[0], self.site, self.space), *args[1:]


class _Call(threading.local):
    """One denoiser call, of each thread its own: the scales of its rows, and what was mapped."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.batch = 0  # rows, where each has its own scales
        self.scales: dict[str, list[float]] | None = None  # the erasure that meets the text first comes first
        self.mapped: dict[int, tuple[Tensor, Tensor]] = {}


__all__ = ["Attached", "attach_erasures"]
