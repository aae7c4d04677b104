"""Erasures on the text instead of on the weights: nothing is written, and every prompt of a batch can have its own.

Every layer that receives the text multiplies it by ``W``; an operator erasure makes that ``W T``. So ``T`` may as well
be put on the input of those layers: ``(W T) x = W (T x)``. A server switches erasures between requests for nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from erasure.artifact import Erasure, OperatorErasure
from erasure.artifact.base import Allow
from erasure.artifact.stack import check_scales, stack_of
from erasure.backbone import Backbone, Site, Space, backbone_of

Rows = Sequence[Sequence[Erasure | str]]


def attach_erasures(
    pipe: Any,
    edits: Erasure | Sequence[Erasure],
    *,
    scales: float | Sequence[float] = 1.0,
    rows: Rows | None = None,
    num_images_per_prompt: int = 1,
    allow: Allow | None = None,
) -> Attached:
    """Put operator erasures on a pipeline without touching a weight. The pictures are those of the applied erasures.

    Args:
        pipe: the pipeline they were made for. Erasures applied to its weights stay in force beside these.
        edits: one operator erasure or several; several act in the order in which ``apply`` would stack them.
        scales: how strongly, one number for all or one each.
        rows: for each prompt of the batch the erasures (or their names) it gets, ``[]`` for none; all of them on every
            prompt by default.
        num_images_per_prompt: what the pipeline is called with; it repeats each prompt so often.
        allow: as in :meth:`Erasure.apply <erasure.artifact.Erasure.apply>`.

    Returns:
        A handle: ``remove()`` takes them off, ``set(...)`` changes scales and rows between calls; it is a context
        manager too.

    Raises:
        ValueError: an erasure is no single map of the text: a fine-tune, one with a factor for each layer, or one that
            leaves some of the layers that read the text alone.

    >>> with attach_erasures(pipe, [hero, cat], rows=[[hero], [], [hero, cat]]):  # doctest: +SKIP
    ...     pipe(["a photo of a superhero", "a cat", "a superhero with a cat"])
    """
    backbone = backbone_of(pipe)
    several = [edits] if isinstance(edits, Erasure) else list(edits)
    for edit in several:
        edit.check_base(backbone, allow=allow)
        edit.warn_unreached(backbone)
    operators = [check_map(edit, backbone) for edit in several]
    return Attached(backbone, operators, scales=scales, rows=rows, num_images_per_prompt=num_images_per_prompt)


def check_map(edit: Erasure, backbone: Backbone) -> OperatorErasure:
    """The erasure, if it is one map of the text: the same at every layer that reads a space."""
    if not isinstance(edit, OperatorErasure):
        raise ValueError(
            f"{edit.name!r} is a {edit.kind}: a change of weights, not a map of the text; use load_erasure instead"
        )
    for space, facts in edit.spaces.items():
        absent = sorted(set(backbone.text_sites(space)) - set(facts["sites"]))
        own = [site for site in facts["sites"] if f"{site}.v" in edit.tensors]
        if absent or own:
            why = f"leaves {absent[0]} alone" if absent else f"has a factor for {own[0]} alone"
            raise ValueError(f"{edit.name!r} is no one map of the {space} text: it {why}; use load_erasure instead")
    return edit


class Attached:
    """Operator erasures that stand on a denoiser's text input; see :func:`attach_erasures`."""

    def __init__(
        self,
        backbone: Backbone,
        edits: Sequence[OperatorErasure],
        *,
        scales: float | Sequence[float],
        rows: Rows | None,
        num_images_per_prompt: int,
    ) -> None:
        names = [edit.name for edit in edits]
        if len(set(names)) < len(names):
            raise ValueError(f"two erasures of one name; got {names}; rename one of them")
        self.edits = {edit.name: edit for edit in edits}
        self._call = _Call()
        self._latents = backbone.latent_argument
        self.set(scales=scales, rows=rows, num_images_per_prompt=num_images_per_prompt)
        self._handles = [
            site.linear.register_forward_pre_hook(self._hook(site, space))
            for space in backbone.spaces
            if any(space in edit.spaces for edit in edits)
            for site in backbone.text_sites(space).values()
        ]
        for denoiser in backbone.denoiser_parts.values():
            self._handles.append(denoiser.register_forward_pre_hook(self._begin, with_kwargs=True))
            self._handles.append(denoiser.register_forward_hook(self._end, always_call=True))
        self._stack = stack_of(backbone)
        self._stack.attached.append(self)

    def set(
        self, *, scales: float | Sequence[float] = 1.0, rows: Rows | None = None, num_images_per_prompt: int = 1
    ) -> None:
        """Change scales and rows for the calls that follow; what is not given goes back to its default.

        Raises:
            ValueError: a name is not attached, or scales and erasures differ in number. Nothing changes then.
        """
        factors = check_scales(scales, len(self.edits))
        named = None if rows is None else [[e if isinstance(e, str) else e.name for e in row] for row in rows]
        if unknown := sorted({name for row in named or [] for name in row} - set(self.edits)):
            raise ValueError(f"not attached: {unknown}; attached are {list(self.edits)}; attach them first")
        self._scales = dict(zip(self.edits, factors, strict=True))
        self._rows, self._images = named, num_images_per_prompt
        used = {*self.edits} if named is None else {name for row in named for name in row}
        self._in_force = {name for name in used if self._scales[name]}  # the others cost a server nothing

    def remove(self) -> None:
        """Take the erasures off. Calling it again does nothing."""
        for handle in self._handles:
            handle.remove()
        if self in self._stack.attached:
            self._stack.attached.remove(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        latents = kwargs.get(self._latents, args[0] if args else None)
        self._call.batch = len(latents) if latents is not None else 1
        self._call.mapped.clear()
        if self._rows is not None:
            self._check_rows(self._call.batch)

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        self._call.mapped.clear()

    def _hook(self, site: Site, space: Space) -> Any:
        """What maps the input of one layer: all of it, or the columns that hold the text."""

        def hook(linear: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            x, *others = args
            mapped = self._call.mapped
            if id(x) not in mapped:  # the tensor is kept beside the result, so that no other takes its identity
                mapped[id(x)] = x, self._map(x, site, space)
            return mapped[id(x)][1], *others

        return hook

    def _map(self, x: Tensor, site: Site, space: Space) -> Tensor:
        columns = slice(*(site.columns or (None,)))
        part = x[..., columns]
        # W T1 T2 x: the one applied last meets the text first.
        for name, edit in reversed(self.edits.items()):
            if space in edit.spaces and name in self._in_force:
                part = edit.map(part, space, self._scale(name, part))
        if site.columns is None:
            return part
        whole = x.clone()
        whole[..., columns] = part
        return whole

    def _scale(self, name: str, x: Tensor) -> float | Tensor:
        """One scale, or one for each row: rows are prompts, each repeated for its pictures, all again for guidance."""
        if self._rows is None:
            return self._scales[name]
        once = torch.tensor([self._scales[name] * (name in row) for row in self._rows], device=x.device)
        batch, once = self._call.batch, once.repeat_interleave(self._images)
        self._check_rows(batch, len(x))
        each = once.repeat(batch // len(once)).repeat_interleave(len(x) // batch)  # frames of a video
        return each.reshape(-1, *[1] * (x.dim() - 1))

    def _check_rows(self, batch: int, texts: int = 0) -> None:
        """Raise unless a batch of the denoiser, and its rows of text, are those of the prompts."""
        once = len(self._rows or ()) * self._images
        if not once or batch % once or texts % batch:
            raise ValueError(
                f"rows for {len(self._rows or ())} prompts with {self._images} pictures each, but the denoiser got a "
                f"batch of {batch}; give one row a prompt, and num_images_per_prompt as the pipeline has it; models "
                "that read all prompts as one sequence take no rows"
            )


class _Call(threading.local):
    """One denoiser call, of each thread its own: its batch, and what was mapped (keys and values share their input)."""

    def __init__(self) -> None:
        self.batch = 1
        self.mapped: dict[int, tuple[Tensor, Tensor]] = {}


__all__ = ["Attached", "attach_erasures"]
