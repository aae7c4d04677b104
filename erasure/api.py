"""The top-level verbs."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from erasure.artifact import Erasure
from erasure.artifact.files import check_name
from erasure.artifact.provenance import already, names_in
from erasure.artifact.record import base_name
from erasure.artifact.stack import Stack, stack_of
from erasure.backbone import backbone_of
from erasure.concept import WORLD, Concept, Suite, concepts_of
from erasure.io import named, shown
from erasure.methods import method_class
from erasure.methods.base import Method, Request
from erasure.wording import listed, nfc


def erase(
    pipe: Any,
    concept: str | Concept | Sequence[str | Concept],
    method: str | type[Method] = "uce",
    *,
    keep: str | Sequence[str] | None = None,
    preset: str | None = None,
    name: str | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    apply: bool = True,
    progress: bool = True,
    **settings: Any,
) -> Erasure:
    """Make a pipeline stop drawing a concept when asked for it. In place; returns the erasure, already applied.

    Args:
        pipe: a diffusers text-to-image or text-to-video pipeline: Stable Diffusion, FLUX, Qwen-Image, Z-Image, Wan and
            more (docs/architectures.md).
        concept: a name, a :class:`Concept` (which can carry synonyms, an anchor and neighbours), or several of them.
        method: "uce" (seconds), "esd" (minutes) or another; ``erasure methods`` lists all. A class of your own works
            before it is declared under a name.
        keep: prompts whose pictures must not change; one, or several. Default: the concepts' neighbours. The more
            of the nearby things you name, the less breaks.
        preset: named settings of the method; "recommended" by default; `erasure methods` lists the published ones.
        name: name of the erasure; made from concept and method by default.
        checkpoint: folder for the training state of a fine-tune; the same call again resumes it.
        apply: apply the erasure at once. With False the pipeline is left as it was.
        progress: show progress bars.
        **settings: single settings of the method that differ from the preset.

    Returns:
        The erasure. ``.remove(pipe)`` restores every bit, ``.save_pretrained(folder)`` writes it.

    Raises:
        ValueError: the request contradicts itself, or the pipeline is in a state in which the edit would be lost.
    """
    if isinstance(concept, Suite):
        raise ValueError(
            f"{concept.name!r} is a suite, which holds more than concepts; pass suite.concepts, keep=suite.kept"
        )
    concepts = concepts_of(concept)
    if not isinstance(method, str | Method) and not (isinstance(method, type) and issubclass(method, Method)):
        raise ValueError(f"a method is a name or a class; got {shown(method)}; `erasure methods` lists all")
    recipe = (method_class(method) if isinstance(method, str) else method).preset(preset, **settings)
    backbone = backbone_of(pipe)
    everything = (neighbour for c in concepts for neighbour in c.neighbours)
    request = Request(
        concepts=concepts,
        keep=tuple(dict.fromkeys(everything if keep is None else map(nfc, listed(keep)))),
        name=name if name is None else named_safely(name),
        preset=preset or next(iter(recipe.presets)),
        checkpoint=None if checkpoint is None else named(checkpoint),
        progress=progress,
    )
    stack = stack_of(backbone)
    with stack.locked():
        refuse_erased(stack)
        if done := names_in(stack.fused):
            warnings.warn(f"{already(done, 'this pipeline')}; this one will belong to it as it is", stacklevel=2)
        recipe.validate(backbone, request)
        warn_unknown(backbone.pipe, [*(concept.name for concept in concepts), *request.keep])
        if not request.keep and recipe.needs_keep:
            warnings.warn(
                f"without a keep list {recipe.key} also changes what is close to the target; name what must stay "
                "(keep=[...]; --keep on the command line); `erasure neighbours` suggests a list",
                stacklevel=2,
            )
        edit = recipe.erase(backbone, request)
        return edit.apply(pipe) if apply else edit


def warn_unknown(pipe: Any, texts: Iterable[str]) -> None:
    """Warn of names that Emoji World was never shown; of other bases nothing is known."""
    if base_name(pipe) == WORLD:
        from erasure.world.spec import spec

        for reason in filter(None, map(spec().unknown, texts)):
            warnings.warn(reason, stacklevel=3)


def named_safely(name: str) -> str:
    """The name of an erasure, before any work: one that no folder could have would be refused when it is saved."""
    if not isinstance(name, str):
        raise ValueError(
            f"the name of an erasure is text; got {shown(name)}; leave it out for one made of its concepts"
        )
    if name:
        check_name(name)
    return name


def refuse_erased(stack: Stack) -> None:
    """Raise if erasures are on the pipeline: a method would learn from the pictures they make."""
    if active := stack.layers:
        raise ValueError(
            f"the pipeline already carries {list(active)}; remove or fuse them first, or erase all concepts in one call"
        )
    if stack.attached:
        raise ValueError(
            "erasures are attached to the pipeline, and a method would learn from the pictures they make; take them "
            "off with their handle's remove() first"
        )
