"""Real pictures with captions, for attacks, relearning and membership. Never generations of the judged model."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from PIL import Image

from erasure.captioned import opened, rows_of
from erasure.eval.core.records import fingerprint
from erasure.io import sha256_file
from erasure.wording import same


@dataclasses.dataclass(frozen=True)
class Example:
    """One real picture.

    Attributes:
        image: RGB.
        label: the concept in it, as detectors call it.
        key: stable name, for records.
        member: whether the base model was trained on this picture; None = unknown.
    """

    image: Image.Image
    caption: str
    label: str
    key: str
    member: bool | None = None


@runtime_checkable
class Material(Protocol):
    """A source of real pictures. The same arguments give the same pictures; other seeds give others.

    Two sources with one ``key`` give the same pictures.
    """

    @property
    def key(self) -> str: ...

    def target(self, count: int, *, seed: int = 0, member: bool | None = False) -> list[Example]:
        """Pictures of the target. ``member``: True = the base was trained on them, False = not, None = either.

        Raises:
            ValueError: there are fewer.
        """
        ...

    def kept(
        self, count: int, *, seed: int = 0, member: bool | None = False, labels: Sequence[str] | None = None
    ) -> list[Example]:
        """Pictures without the target, of ``labels`` or of anything else."""
        ...


class FolderMaterial:
    """A folder of pictures with ``metadata.jsonl``, an image folder of the datasets library.

    One line per picture: ``{"file_name": "1.png", "text": "a photo of ...", "label": "Spiderman", "member": false}``;
    ``member`` may be left out. Pictures labelled with the target's name are of the target; the others are kept, except
    those of ``also``, further targets.

    Raises:
        FileNotFoundError: no such folder, no metadata, or a picture that it names is not there.
        ValueError: a line without file_name, text or label; the message has its number.
    """

    def __init__(self, folder: str | Path, target: str, *, also: Sequence[str] = ()) -> None:
        self.folder, self.name, self.also = Path(folder), target, tuple(also)
        self.rows = rows_of(self.folder, "label")

    @functools.cached_property
    def key(self) -> str:
        pictures = [sha256_file(self.folder / row["file_name"]) for row in self.rows]
        return f"folder {fingerprint([self.name, *self.also, self.rows, pictures])}"

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
        # A picture of unknown membership may be used as a non-member, never as a member.
        rows = [row for row in rows if member is None or bool(row.get("member", False)) == member]
        if len(rows) < count:
            raise ValueError(f"{self.folder} has {len(rows)} pictures of that kind; {count} are needed; add some")
        chosen = np.random.default_rng(seed).permutation(len(rows))[:count]
        return [
            Example(
                opened(self.folder / row["file_name"]),
                row["text"], row["label"], row["file_name"], row.get("member"),
            )
            for row in (rows[i] for i in chosen)
        ]  # fmt: skip
