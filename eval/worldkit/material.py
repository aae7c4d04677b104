"""Emoji World's scenes as material: those of its base's training, and fresh ones of the same distribution."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np

from erasure.concept import Suite
from erasure.eval.core.material import Example
from erasure.train import step_rng
from erasure.wording import same
from erasure.world.scenes import Scene, prompt, render, sample_scene
from erasure.world.spec import spec
from erasure.world.train import scenes_hash, training_scenes


class WorldMaterial:
    """Emoji World's scenes: members are scenes of its training, the others fresh ones from the same distribution.

    Args:
        target: a concept or a style of the world. Scenes have one object.
        also: other targets, which are not kept either.
    """

    def __init__(self, target: str, *, also: Sequence[str] = ()) -> None:
        world = spec()
        if target not in world.concepts and target not in world.styles:
            raise ValueError(
                f"Emoji World has neither a concept nor a style {target!r}; choose one of "
                f"{sorted(world.targets)} or another of its concepts"
            )
        self.name, self.also = target, tuple(also)

    @functools.cached_property
    def key(self) -> str:
        named = " without ".join([self.name, *self.also])
        return f"Emoji World's scenes: {named}, {_hash_of_members()[:16]}"

    def target(self, count: int, *, seed: int = 0, member: bool | None = False) -> list[Example]:
        return self._pick(self._shows, count, seed, member)

    def kept(
        self, count: int, *, seed: int = 0, member: bool | None = False, labels: Sequence[str] | None = None
    ) -> list[Example]:
        def wanted(scene: Scene) -> bool:
            named = scene.concepts[0] if self.name in spec().concepts else scene.style
            shown = {*scene.concepts, scene.style}
            return not shown & {self.name, *self.also} and (
                labels is None or any(same(named, label) for label in labels)
            )

        return self._pick(wanted, count, seed, member)

    def _shows(self, scene: Scene) -> bool:
        return self.name in (*scene.concepts, scene.style)

    def _pick(self, wanted: Callable[[Scene], bool], count: int, seed: int, member: bool | None) -> list[Example]:
        source = _members() if member else _fresh(seed)
        found = [(i, scene) for i, scene in enumerate(source) if len(scene.concepts) == 1 and wanted(scene)]
        if len(found) < count:
            raise ValueError(
                f"the world has {len(found)} {'training' if member else 'fresh'} scenes of that kind; got count={count}"
            )
        order = step_rng(seed, count, 11).permutation(len(found))[:count]
        return [self._example(*found[i], member=bool(member), seed=seed) for i in order]

    def _example(self, index: int, scene: Scene, *, member: bool, seed: int) -> Example:
        (concept,) = scene.concepts
        caption = prompt(concept, style=scene.style, background=scene.background)
        label = concept if self.name in spec().concepts else scene.style
        key = f"{'training' if member else f'fresh {seed}'} scene {index}"
        return Example(render(scene), caption, label, key, member)


@functools.cache
def _members() -> tuple[Scene, ...]:
    return tuple(training_scenes(frozenset()))


@functools.cache
def _hash_of_members() -> str:
    return scenes_hash(_members())


@functools.cache
def _fresh(seed: int) -> tuple[Scene, ...]:
    """Fresh scenes from the distribution of the training's."""
    rng, concepts, styles = step_rng(seed, 2, 12), np.array([*spec().concepts]), np.array([*spec().styles])
    return tuple(sample_scene(rng, concepts, styles) for _ in range(len(_members())))


def material_of_world(suite: Suite) -> WorldMaterial | None:
    """The world's scenes for one of its suites; None for a target that the world does not have."""
    world = spec()
    if suite.concept.name in (*world.concepts, *world.styles):
        return WorldMaterial(suite.concept.name, also=[concept.name for concept in suite.also])
    return None
