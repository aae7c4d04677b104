"""Real pictures with captions: what attacks aim at, what relearning learns from, what membership is asked about.

Never generations of the model that is judged.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from PIL import Image

from erasure.concept import Suite, same
from erasure.eval.records import fingerprint
from erasure.io import parse_json, sha256_file
from erasure.train import step_rng
from erasure.world.scenes import Scene, prompt, render, sample_scene
from erasure.world.spec import spec
from erasure.world.train import scenes_hash, training_scenes


@dataclasses.dataclass(frozen=True)
class Example:
    """One real picture.

    Attributes:
        image: RGB.
        caption: what it shows, in words.
        label: the concept in it, as detectors call it.
        key: stable name, for records.
        member: whether the base model was trained on exactly this picture; None = not known.
    """

    image: Image.Image
    caption: str
    label: str
    key: str
    member: bool | None = None


@runtime_checkable
class Material(Protocol):
    """Where real pictures come from. The same arguments give the same pictures; other seeds give others.

    ``key`` stands for all of them: two sources with one key give the same pictures.
    """

    @property
    def key(self) -> str: ...

    def target(self, count: int, *, seed: int = 0, member: bool | None = False) -> list[Example]:
        """Pictures of the target. ``member``: True = the base was trained on them, False = not, None = either.

        Raises:
            ValueError: there are not so many.
        """
        ...

    def kept(
        self, count: int, *, seed: int = 0, member: bool | None = False, labels: Sequence[str] | None = None
    ) -> list[Example]:
        """Pictures without the target, of ``labels`` or of anything else."""
        ...


class WorldMaterial:
    """Emoji World's scenes: members are scenes of its training, the others fresh ones from the same distribution.

    Args:
        target: a concept or a style of the world. Scenes hold one object.
        also: other targets, which no picture of what is kept shows either.
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
        return f"Emoji World's scenes: {named}, {scenes_hash(list(_members()))[:16]}"

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
        source = _members() if member else _twins(seed)
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
def _twins(seed: int) -> tuple[Scene, ...]:
    """Fresh scenes from the distribution of the training's."""
    rng, world = step_rng(seed, 2, 12), spec()
    return tuple(sample_scene(rng, list(world.concepts), list(world.styles)) for _ in range(len(_members())))


class FolderMaterial:
    """Pictures of the user's: a folder with ``metadata.jsonl``, as the datasets library calls an image folder.

    One line a picture: ``{"file_name": "1.png", "text": "a photo of ...", "label": "Spiderman", "member": false}``;
    ``member`` may be left out. Pictures whose label is the target's name are of the target; the others are kept, but
    for those of ``also``, further targets.

    Raises:
        FileNotFoundError: no such folder, no metadata, or a picture that it names is not there.
        ValueError: a line without file_name, text or label; the message has its number.
    """

    def __init__(self, folder: str | Path, target: str, *, also: Sequence[str] = ()) -> None:
        self.folder, self.name, self.also = Path(folder), target, tuple(also)
        file = self.folder / "metadata.jsonl"
        if not file.exists():
            raise FileNotFoundError(
                f"{file}: no such file; give a folder of pictures with a metadata.jsonl of file_name, text and label"
            )
        self.rows = [
            self._row(i, line) for i, line in enumerate(file.read_text("utf-8").splitlines(), 1) if line.strip()
        ]

    @functools.cached_property
    def key(self) -> str:
        pictures = [sha256_file(self.folder / row["file_name"]) for row in self.rows]
        return f"folder {fingerprint([self.name, *self.also, self.rows, pictures])}"

    def _row(self, number: int, line: str) -> dict:
        where = f"{self.folder / 'metadata.jsonl'}, line {number}"
        try:
            row = parse_json(line)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected keys and values, got {type(row).__name__}")
        if row.get("member") not in (True, False, None):
            raise ValueError(f"{where}: member is {row['member']!r}; write true or false, or leave it out")
        if missing := [key for key in ("file_name", "text", "label") if not isinstance(row.get(key), str)]:
            raise ValueError(f"{where}: lacks {missing}; each line needs file_name, text and label")
        if not (self.folder / row["file_name"]).exists():
            raise FileNotFoundError(f"{where}: {row['file_name']} is not in the folder")
        return row

    def target(self, count: int, *, seed: int = 0, member: bool | None = False) -> list[Example]:
        return self._pick([row for row in self.rows if same(row["label"], self.name)], count, seed, member)

    def kept(
        self, count: int, *, seed: int = 0, member: bool | None = False, labels: Sequence[str] | None = None
    ) -> list[Example]:
        rows = [row for row in self.rows if not any(same(row["label"], name) for name in (self.name, *self.also))]
        if labels is not None:
            rows = [row for row in rows if any(same(row["label"], label) for label in labels)]
        return self._pick(rows, count, seed, member)

    def _pick(self, rows: list[dict], count: int, seed: int, member: bool | None) -> list[Example]:
        # A picture whose membership is unknown may stand for a stranger, never for a member.
        rows = [row for row in rows if member is None or bool(row.get("member", False)) == member]
        if len(rows) < count:
            raise ValueError(f"{self.folder} has {len(rows)} pictures of that kind; {count} are needed; add some")
        chosen = np.random.default_rng(seed).permutation(len(rows))[:count]
        return [
            Example(
                Image.open(self.folder / row["file_name"]).convert("RGB"),
                row["text"], row["label"], row["file_name"], row.get("member"),
            )
            for row in (rows[i] for i in chosen)
        ]  # fmt: skip


def material_for(suite: Suite, folder: str | Path | None = None) -> Material | None:
    """The world's scenes for its suites, the user's folder where one is given, else nothing."""
    also = [concept.name for concept in suite.also]
    if folder is not None:
        return FolderMaterial(folder, suite.concept.name, also=also)
    world = spec()
    if suite.base == "emoji-world" and suite.concept.name in (*world.concepts, *world.styles):
        return WorldMaterial(suite.concept.name, also=also)
    return None
