"""What an evaluation stores: one record per picture, and where the pictures came from."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from erasure.concept import Group, Suite
from erasure.eval.detectors.base import DetectorCard
from erasure.eval.stats import Estimate
from erasure.io import parse_json, printable, read_bytes, sha256_json, write_atomically, write_json

if TYPE_CHECKING:
    from PIL import Image

GROUPS = ("target", "neighbours", "unrelated")
BASE = "base"  # the name of the unmodified arm
FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The verdict of one detector on one picture.

    Attributes:
        top: the label with the highest probability; None without a verdict.
        score: probability of the label the prompt asks for.
        hit: whether that label is on top. On a target prompt a hit means that the *target* is seen.
        nothing: whether no concept can be recognised; None if the detector has no such label.
        reason: why there is no verdict.
    """

    top: str | None
    score: float | None
    hit: bool | None
    nothing: bool | None = None
    reason: str | None = None


@dataclasses.dataclass(frozen=True)
class Record:
    """One picture: its model, its prompt, and what was seen.

    ``clip_cosine`` and ``clip_hit`` are from the CLIP judge: cosine with the prompt, and whether the asked-for label is
    the nearest of its labels (zero-shot). None without a judge or without such a label. ``template`` and ``phrase`` are
    the parts of the prompt; empty in older records.
    """

    arm: str
    prompt: str
    group: Group
    label: str
    seed: int
    verdicts: Mapping[str, Verdict]
    clip_cosine: float | None
    image_hash: str
    clip_hit: bool | None = None
    template: str = ""
    phrase: str = ""


@dataclasses.dataclass(frozen=True)
class Arm:
    """One model of the comparison: the base, or the base with one erasure.

    ``config`` has the settings of the erasure; ``weights`` is the hash of the weights that drew the pictures; ``role``
    and ``kind`` (what was done to the parameters) are those of :mod:`erasure.eval.core.models`; the kind is "" in older
    evaluations. ``beside`` says what of an edit of weights stands beside them, so that their hash is not all of it.
    """

    name: str
    weights: str
    config: Mapping[str, Any]
    role: str = "erased"
    kind: str = ""
    beside: tuple[str, ...] = ()


def png_of(image: Image.Image, *, largest: int = 256) -> str:
    """A picture as PNG in base64, at most ``largest`` pixels wide, so that reports stay small."""
    image = image.convert("RGB")
    if max(image.size) > largest:
        image.thumbnail((largest, largest))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture for the grid of the report, as PNG in base64."""

    arm: str
    prompt: str
    group: Group
    label: str
    seed: int
    png: str

    @classmethod
    def of(cls, image: Image.Image, record: Record) -> Picture:
        return cls(record.arm, record.prompt, record.group, record.label, record.seed, png_of(image))


@dataclasses.dataclass(frozen=True)
class Distance:
    """How far the pictures of an arm are from the base's of the same prompts with *other* seeds.

    That of the base is the null. ``change`` is an arm's distance minus the null, paired by prompt; None for the base.
    """

    arm: str
    metric: str
    value: Estimate
    group: str = "kept"
    change: Estimate | None = None


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The paired pictures of an evaluation: what was drawn, and what detectors saw in it.

    Attributes:
        suite: prompts, groups and sampler.
        arms: the base first, then each erasure.
        detectors: detector name to card.
        records: one per picture.
        pictures: those for the grid.
        distances: of sets of kept pictures from the base's, with their null.
        settings: sampler, seeds, base, versions, platform, seconds.
        warnings: for the reader of the numbers.

    ``rows`` and ``quality`` are made from the records each time. Claims are made by :class:`erasure.eval.Assessment`.
    """

    suite: Suite
    arms: tuple[Arm, ...]
    detectors: Mapping[str, DetectorCard]
    records: tuple[Record, ...]
    pictures: tuple[Picture, ...]
    distances: tuple[Distance, ...]
    settings: Mapping[str, Any]
    warnings: tuple[str, ...] = ()

    def select(self, arm: str, group: str | None = None) -> list[Record]:
        """The records of an arm, in the order they were asked for; the same order for every arm."""
        return [r for r in self.records if r.arm == arm and (group is None or r.group == group)]

    @property
    def key(self) -> str:
        """A fingerprint of the pictures, which an assessment made of them stores."""
        return fingerprint([[r.arm, r.prompt, r.seed, r.image_hash] for r in self.records])

    @property
    def erased(self) -> tuple[Arm, ...]:
        """The arms with an erasure: neither the base nor a control."""
        return tuple(arm for arm in self.arms[1:] if arm.role == "erased")

    def rows(self) -> list[Any]:
        """The table: one :class:`erasure.eval.core.tables.Row` per arm, detector and group."""
        from erasure.eval.core import tables

        return list(tables.rows(self))

    def quality(self) -> list[Any]:
        """CLIP scores and distances, one :class:`erasure.eval.core.quality.Quality` each."""
        from erasure.eval.core import quality

        return list(quality.quality(self))

    def to_dict(self) -> dict[str, Any]:
        """Plain data. ``summary`` is for readers and is not read back."""
        summary = {"rows": self.rows(), "quality": self.quality()}
        tables = {name: [dataclasses.asdict(row) for row in rows] for name, rows in summary.items()}
        return {"format": FORMAT, "summary": tables, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Evaluation:
        """The inverse of ``to_dict``."""
        if raw.get("format") != FORMAT:
            raise ValueError(
                f"an evaluation of format {FORMAT} was expected; got {raw.get('format')!r}; "
                "read it with the version that wrote it"
            )
        records = (
            Record(**{**r, "verdicts": {k: Verdict(**v) for k, v in r["verdicts"].items()}}) for r in raw["records"]
        )
        return cls(
            suite=TypeAdapter(Suite).validate_python(raw["suite"]),
            arms=tuple(Arm(**{**arm, "beside": tuple(arm.get("beside", ()))}) for arm in raw["arms"]),
            detectors={name: DetectorCard.from_dict(card) for name, card in raw["detectors"].items()},
            records=tuple(records),
            pictures=tuple(Picture(**picture) for picture in raw["pictures"]),
            distances=tuple(
                Distance(**{**d, **{k: Estimate(**d[k]) for k in ("value", "change") if d.get(k) is not None}})
                for d in raw["distances"]
            ),
            settings=raw["settings"],
            warnings=tuple(raw["warnings"]),
        )

    def to_json(self, path: str | os.PathLike[str]) -> Path:
        """Write the whole evaluation into one file, completely or not at all."""
        path = Path(path)
        write_json(path, self.to_dict(), indent=1, default=str)
        return path

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> Evaluation:
        """Read what ``to_json`` or ``save`` wrote; a folder means the ``evaluation.json`` in it."""
        file = Path(path)
        file = file / "evaluation.json" if file.is_dir() else file
        if not file.exists():
            raise FileNotFoundError(f"{file}: no such evaluation; check the path, or run `erasure evaluate` first")
        try:
            return cls.from_dict(parse_json(read_bytes(file)))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{file}: not an evaluation ({printable(error)}); is the file complete?") from None

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write ``evaluation.json`` and ``records.jsonl`` (one picture a line, for other tools) into a folder."""
        folder = Path(folder)
        lines = (json.dumps(dataclasses.asdict(record), ensure_ascii=False) for record in self.records)
        write_atomically(folder / "records.jsonl", "".join(f"{line}\n" for line in lines))
        return self.to_json(folder / "evaluation.json")


def fingerprint(value: Any) -> str:
    """Sixteen hexadecimal digits of the hash of plain data."""
    return sha256_json(value, default=str, spaced=True)[:16]
