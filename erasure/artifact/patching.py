"""A single file with its edited tensors alone replaced: everything else, names and data types too, stays as it was.

Which tensor of the file is which parameter is asked of diffusers: its own converter turns the file's tensors into the
model's, mostly as views of them, so that an edited parameter is written through the view into the file's tensor.
Afterwards the file is converted again, and what was written is compared.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from erasure.artifact.base import Erasure
from erasure.artifact.provenance import METADATA, records_of
from erasure.artifact.stack import check_finite
from erasure.backbone import Backbone
from erasure.backbone.names import parameters_by_name, split
from erasure.weights import unwrapped

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "unet.", "transformer.", "model.")


def patched(
    pipe: Any, backbone: Backbone, source: Path, edit: Erasure | None = None, scale: float = 1.0
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of the file that a pipeline was opened from, edited, and the file's metadata.

    Args:
        edit: an erasure, which is computed in the file's own precision. None: whatever differs in the pipeline now.

    Raises:
        ValueError: a part is edited that the file does not hold, or holds in a form that cannot be written to.
    """
    with safe_open(source, "pt") as file:
        metadata = dict(file.metadata() or {})
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
    _refuse_encoders(pipe, backbone, source, metadata, edit)
    views = converted(tensors, backbone)
    wanted: dict[str, Callable[[Tensor], Tensor]]
    if edit is not None:
        wanted = {name: functools.partial(edit.edit, name, scale=scale) for name in edit.parameter_names}
    else:
        wanted = differing(views, backbone)
    made = {}
    for name, edited in wanted.items():
        if name not in views:
            raise ValueError(f"{source} holds no tensor that is {name} alone; export the pipeline's folder instead")
        made[name] = check_finite(name, views[name], edited(views[name])).to(views[name].dtype)
        views[name].copy_(made[name])
    after = converted(tensors, backbone)
    for name, written in made.items():
        if not torch.equal(after[name], written):
            raise ValueError(
                f"{name} is stored in {source} in a form that cannot be written to; export the pipeline's folder "
                "instead"
            )
    return tensors, metadata


def differing(views: Mapping[str, Tensor], backbone: Backbone) -> dict[str, Callable[[Tensor], Tensor]]:
    """What makes each parameter of a denoiser that differs from the file's, seen in the pipeline's precision."""
    own = parameters_by_name({backbone.denoiser_name: backbone.denoiser}, first=backbone.denoiser_name)
    now = {name: parameter.detach().cpu() for name, parameter in own.items()}
    return {
        name: functools.partial(_instead, value)
        for name, value in now.items()
        if name not in views or not torch.equal(views[name].to(value.dtype), value)
    }


def _instead(value: Tensor, weight: Tensor) -> Tensor:
    return value


def _refuse_encoders(
    pipe: Any, backbone: Backbone, source: Path, metadata: dict[str, str], edit: Erasure | None
) -> None:
    """Refuse to leave an edit of a text encoder, or of a second denoiser, out of the file."""
    first = backbone.denoiser_name
    try:
        known = json.loads(metadata.get(METADATA, "{}")).get("parts", {})
    except ValueError:
        known = {}
    parts = {split(name, first=first)[0] for name in edit.parameter_names} if edit is not None else set()
    parts |= {part for part, entries in records_of(pipe).items() if entries != known.get(part)}
    if other := next((part for part in sorted(parts) if part != first), None):
        raise ValueError(
            f"the {other} is edited, and only the {first} of {source} can be written to; export the pipeline's folder "
            "instead (--format pipeline)"
        )


def converted(tensors: Mapping[str, Tensor], backbone: Backbone) -> dict[str, Tensor]:
    """The denoiser's parameters by diffusers' names, as far as possible views of a file's tensors."""
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    names = unwrapped(dict.fromkeys(tensors, ("", ())))
    state = {names[name]: tensor for name, tensor in tensors.items()}
    denoiser = backbone.denoiser
    expected = set(denoiser.state_dict())
    for prefix in ("", *PREFIXES):
        inner = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
        if expected <= inner.keys():
            return {name: inner[name] for name in expected}
    for kind in type(denoiser).__mro__:
        if entry := SINGLE_FILE_LOADABLE_CLASSES.get(kind.__name__):
            if any(name.startswith("input_blocks.") for name in state):
                state = {f"model.diffusion_model.{name}": tensor for name, tensor in state.items()}
            return entry["checkpoint_mapping_fn"](checkpoint=state, config=denoiser.config)
    raise ValueError(
        f"diffusers does not say which tensors of a single file are a {type(denoiser).__name__}'s; export the "
        "pipeline's folder instead"
    )


__all__ = ["converted", "patched"]
