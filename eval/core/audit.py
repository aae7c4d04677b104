"""Process evidence: a record of how a model was made without some data, and a check that the record makes the model.

A record that verifies shows that *this transcript can produce these checkpoints*. It does not show that the transcript
is what happened, nor that no other data was used: different data can give the same gradients and hence the same model
("forging", Thudi et al. 2022, "On the necessity of auditable algorithmic definitions for machine unlearning"). Nor
does it say anything about what the model draws.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor, nn

from erasure.io import parse_json, printable, read_bytes, seed_of, sha256, sha256_json, tensor_bytes, write_json

FORMAT = 1
SKETCH = 64  # numbers in the sketch of a checkpoint
TOLERANCE = 0.01  # of the length of a segment
KINDS = ("observed", "latent", "higher_order")
Weights = Mapping[str, Tensor]
Replay = Callable[["Checkpoint", "Checkpoint"], Weights]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The weights at one step of a training, as hashes.

    Attributes:
        weights: :func:`hash_of` them: equal only bit for bit.
        sketch: :func:`sketch_of` them, for replays on other machines, which agree only up to rounding.
        link: hash of this checkpoint, the one before and the head of the record: the chain.
    """

    step: int
    weights: str
    sketch: tuple[float, ...]
    link: str = ""


@dataclasses.dataclass(frozen=True)
class UnlearningRecord:
    """How a model was made without some data: enough to repeat it.

    Attributes:
        request: id of the request that led to it.
        policy: what was required and who decided: ``removal_required``, ``suppression_required``, ``rationale``,
            ``decided_by``.
        target: what was removed, in a few words. target_kind: "observed" (listed items), "latent" (never in the data:
            there is nothing to remove) or "higher_order" (every item in which something occurs).
        definition: the rule by which items were left out, and how the rest was chosen.
        deleted: hashes of the items left out, never the items.
        data_before, data_after: hash of the manifest with and without them.
        code: library to version. method, settings: what trained, and with what. seeds: all of them.
        scope: which components the record covers, and which others kept what.
        checkpoints: at a fixed interval of steps, the first one the start, linked into a chain.
        evaluation: hash of the evaluation of the result; None = none.

    Raises:
        ValueError: an unknown kind, too few checkpoints, or a broken chain: the record was changed.
    """

    request: str
    policy: Mapping[str, Any]
    target: str
    target_kind: Literal["observed", "latent", "higher_order"]
    definition: str
    deleted: tuple[str, ...]
    data_before: str
    data_after: str
    code: Mapping[str, str]
    method: str
    settings: Mapping[str, Any]
    seeds: tuple[int, ...]
    scope: str
    checkpoints: tuple[Checkpoint, ...]
    evaluation: str | None = None

    def __post_init__(self) -> None:
        if self.target_kind not in KINDS:
            raise ValueError(f"unknown kind of target; got {self.target_kind!r}; choose one of {list(KINDS)}")
        steps = [point.step for point in self.checkpoints]
        if len(steps) < 2 or steps != sorted(set(steps)):
            raise ValueError(f"a record needs two checkpoints or more, in the order of their steps; got steps {steps}")
        for point, link in zip(self.checkpoints, links(self.head, self.checkpoints), strict=True):
            if point.link != link:
                raise ValueError(
                    f"the chain breaks at step {point.step}; its link is {point.link[:12]!r}, not {link[:12]!r}; the "
                    "record was changed after it was made: get it again"
                )

    @classmethod
    def chained(cls, *, checkpoints: Sequence[Checkpoint], **facts: Any) -> UnlearningRecord:
        """A new record, whose checkpoints are linked here."""
        bare = {name: value for name, value in facts.items() if name != "evaluation"}
        made = [
            dataclasses.replace(point, link=link)
            for point, link in zip(checkpoints, links(head_of(bare), checkpoints), strict=True)
        ]
        return cls(checkpoints=tuple(made), **facts)

    @property
    def head(self) -> str:
        """Hash of everything but the checkpoints and the evaluation, which comes later."""
        names = [f.name for f in dataclasses.fields(self) if f.name not in ("checkpoints", "evaluation")]
        return head_of({name: getattr(self, name) for name in names})

    @property
    def digest(self) -> str:
        """Hash of the record: what a model's config names as its ``audit``."""
        return digest(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        return {"format": FORMAT, **dataclasses.asdict(self)}

    def to_json(self, path: str | os.PathLike[str]) -> Path:
        """Write the record, completely or not at all."""
        write_json(path, self.to_dict(), indent=1)
        return Path(path)

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> UnlearningRecord:
        """Read a record; every field has to be there and no other, and the chain unbroken."""
        file = Path(path)
        if not file.exists():
            raise FileNotFoundError(f"{file}: no such record; check the path")
        try:
            raw = parse_json(read_bytes(file))
            if raw.pop("format") != FORMAT:
                raise ValueError(f"format {FORMAT} was expected")
            if wrong := sorted({f.name for f in dataclasses.fields(cls)} ^ set(raw)):
                raise ValueError(f"fields that are unknown or lacking: {wrong}")
            points = tuple(Checkpoint(**{**p, "sketch": tuple(p["sketch"])}) for p in raw.pop("checkpoints"))
            return cls(checkpoints=points, deleted=tuple(raw.pop("deleted")), seeds=tuple(raw.pop("seeds")), **raw)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{file}: not an audit record ({printable(error)}); get it again from who made it"
            ) from None


@dataclasses.dataclass(frozen=True)
class Verification:
    """The result of replaying one segment.

    Attributes:
        segment: its first and last step. exact: the same bits.
        distance: between replayed and recorded weights, as a share of the segment's length; 1 = as far as without any
            training. tolerance: the largest that passes.
    """

    segment: tuple[int, int]
    exact: bool
    distance: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.exact or self.distance <= self.tolerance

    def __str__(self) -> str:
        how = "bit for bit" if self.exact else f"up to {self.distance:.2%} of its length (at most {self.tolerance:.2%})"
        steps = f"steps {self.segment[0]} to {self.segment[1]}"
        return f"{steps} repeat {how}" if self.passed else f"{steps} do not repeat: apart by {self.distance:.2%}"


def verify(
    record: UnlearningRecord, replay: Replay, *, seed: int | None = 0, tolerance: float = TOLERANCE
) -> Verification:
    """Train one segment again and compare where it ends; see the module for what a pass does not mean.

    Args:
        replay: trains from the first checkpoint to the second, by the record's data, settings and seeds, and returns
            the weights. The caller has the data and checks that the start has the recorded hash (:func:`hash_of`).
        seed: chooses the segment. The audited party must not know it in advance; None draws a new one.
        tolerance: 0 asks for equal bits, which only the same machine and versions give; raise it for replays elsewhere.
    """
    last = int(np.random.default_rng(seed).integers(1, len(record.checkpoints)))
    first, end = record.checkpoints[last - 1], record.checkpoints[last]
    weights = replay(first, end)
    there, aim, start = (np.array(s) for s in (sketch_of(weights), end.sketch, first.sketch))
    way = float(np.linalg.norm(aim - start))
    off = float(np.linalg.norm(there - aim))
    distance = off / way if way > 0 else float(off > 0)
    return Verification((first.step, end.step), hash_of(weights) == end.weights, distance, tolerance)


def checkpoint(step: int, weights: Weights) -> Checkpoint:
    """A checkpoint, not yet linked."""
    return Checkpoint(step, hash_of(weights), sketch_of(weights))


def hash_of(weights: Weights) -> str:
    """SHA-256 of names, dtypes, shapes and bytes."""
    return sha256(piece for name, tensor in sorted(weights.items()) for piece in tensor_bytes(name, tensor))


def sketch_of(weights: Weights) -> tuple[float, ...]:
    """64 sums of weights with random signs; |sketch(a) - sketch(b)| estimates |a - b| to about 10 %.

    A count sketch (Charikar et al. 2002) with signs by each tensor's name. Twelve digits are kept.
    """
    total = np.zeros(SKETCH)
    for name, tensor in sorted(weights.items()):
        flat = tensor.detach().cpu().double().reshape(-1).numpy()
        rng = np.random.default_rng(seed_of(name))
        signed = flat * (2.0 * rng.integers(0, 2, len(flat), dtype=np.int8) - 1)
        padded = np.pad(signed, (0, -len(signed) % SKETCH)).reshape(-1, SKETCH)
        total += np.roll(padded.sum(0), int(rng.integers(SKETCH)))  # else small tensors would share the first sums
    return tuple(float(f"{value:.12g}") for value in total)


def digest(value: Any) -> str:
    """SHA-256 of plain data as canonical JSON."""
    return sha256_json(value)


def head_of(facts: Mapping[str, Any]) -> str:
    return digest({"format": FORMAT, **facts})


def links(head: str, points: Sequence[Checkpoint]) -> list[str]:
    """The chain: each link covers the head, all checkpoints before and its own."""
    found, link = [], head
    for point in points:
        link = digest([link, point.step, point.weights, list(point.sketch)])
        found.append(link)
    return found


def judged(audit: Any, parts: Mapping[str, nn.Module], denoisers: Iterable[str]) -> dict[str, str] | None:
    """A model's ``audit`` as it is stored with an assessment, with the hash of the weights that are judged.

    Args:
        audit: of the model's config: what :func:`erasure.eval.worldkit.audit.audited` returns, or anything else, of
            which only the ``digest`` is stored. None without an audit.
        parts: of the opened pipeline by name. denoisers: names of those that a record must cover.
    """
    if not audit:
        return None
    whole = isinstance(audit, Mapping) and {"digest", "target", "weights", "parts"} <= audit.keys()
    whole = whole and isinstance(audit["parts"], list | tuple) and all(isinstance(p, str) for p in audit["parts"])
    if not whole or not {*denoisers} <= {*audit["parts"]}:
        return {"digest": str(audit)}
    own = {part: parts[part] for part in audit["parts"] if part in parts}
    return {
        "digest": str(audit["digest"]),
        "target": str(audit["target"]),
        "recorded": str(audit["weights"]),
        "judged": hash_of(weights_of(own)),
        "replayed": str(audit.get("replayed", "")),
    }


def weights_of(model: Mapping[str, nn.Module]) -> Weights:
    """Every tensor of a model's parts by name."""
    return {f"{part}.{name}": t for part, module in model.items() for name, t in module.state_dict().items()}
