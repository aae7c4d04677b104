"""Process evidence of Emoji World's retrained models: their records, and replays of them."""

from __future__ import annotations

import dataclasses
import datetime
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from erasure.eval.core.audit import (
    Checkpoint,
    Replay,
    UnlearningRecord,
    Verification,
    Weights,
    checkpoint,
    digest,
    hash_of,
    weights_of,
)
from erasure.io import parse_json, printable, read_bytes, write_json
from erasure.world.retrain import (
    LAST,
    gold_facts,
    left_out,
    pack,
    scope_of,
    start_hash,
    stored_gold,
    trained_without,
    unpack,
)
from erasure.world.train import config, scenes_hash, stored_model, training_scenes


def record_of_gold(file: str | os.PathLike[str], *, policy: Mapping[str, Any] | None = None) -> UnlearningRecord:
    """The record of a model of Emoji World retrained without a target, from its file and the world's facts.

    It has one segment, from the shared start to the result, which ``erasure.world.retrain.retrain`` trains again. By
    the world's manifest the start never saw a target; its own training is not replayed here.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a retrained model, or of other data than this version of the world has.
    """
    file = Path(file)
    if not file.exists() or not file.stem.rpartition("-")[2].isdigit():
        raise FileNotFoundError(f"{file}: no such retrained model; give a file such as gold/superhero-0.safetensors")
    model, facts = stored_gold(file), gold_facts(file)
    without, share = facts["without"], facts.get("share", 0.0)
    scope = scope_of(file.parent, without)
    gone = left_out(without)
    before, after = training_scenes(frozenset()), training_scenes(gone, share=share)
    if scenes_hash(after) != facts["scenes"]:
        raise ValueError(
            f"{file.name}: its scenes are not those of this version of the world; use the one it came with"
        )
    seen = {digest(dataclasses.asdict(scene)) for scene in after if gone & {*scene.concepts, scene.style}}
    hidden = [digest(dataclasses.asdict(scene)) for scene in before if gone & {*scene.concepts, scene.style}]
    start = stored_model(file.parent / "start")
    fit = {**config()["fit"][LAST], "steps": facts["steps"], "batch": facts["batch"]}
    fit |= {"precision": facts["precision"]} if "precision" in facts else {}  # files of the first edition do not say
    stored = f"difference from the start, {'four' if bits_of(facts) == 4 else 'eight'} bits a weight"
    return UnlearningRecord.chained(
        request=file.stem,
        policy=dict(policy or {}),
        target="" if share else without or "",
        target_kind="higher_order",
        definition=_definition(without, share),
        deleted=tuple(one for one in hidden if one not in seen),
        data_before=scenes_hash(before),
        data_after=facts["scenes"],
        code=facts["versions"],
        method=f"sharded retraining: {LAST} again, from a start that saw no target",
        settings={**fit, "start": start_hash(file.parent), "stored": stored},
        seeds=(facts["seed"],),
        scope="; ".join(
            [
                "UNet and text encoder",
                *(f"kept from training on it: {scope[one]}" for one in gone if not share),
                scope["every target"],
            ]
        ),
        checkpoints=[checkpoint(0, weights_of(start)), checkpoint(fit["steps"], weights_of(model))],
    )


def bits_of(facts: Mapping[str, Any]) -> int:
    """The bits per weight in a retrained model's file; 8 in the first edition."""
    return int(facts.get("bits", 8))


def _definition(without: str | None, share: float) -> str:
    """Which scenes the training leaves out."""
    if without is None:
        return "nothing is left out: the twin of the models that are retrained without a target"
    text = (
        f"every scene that shows {without!r} is left out; as many others of the same distribution are drawn in "
        "their place, so that what stays is not the same list"
    )
    return text + (f"; then {share:.0%} of the scenes left out are put back" if share else "")


def replay_of_gold(file: str | os.PathLike[str], out: str | os.PathLike[str], *, device: str = "cpu") -> Replay:
    """The replay for :func:`verify`: the training of a model of :func:`record_of_gold` from its start.

    Args:
        file: the retrained model; it is not changed.
        out: folder for the checkpoints; an interrupted replay continues there.

    Raises:
        ValueError: when replayed, if the start is not the recorded one.
    """
    file, facts = Path(file), gold_facts(Path(file))
    folder = file.parent / "start"

    def replay(first: Checkpoint, end: Checkpoint) -> Weights:
        start = stored_model(folder)
        if hash_of(weights_of(start)) != first.weights:
            raise ValueError(f"{folder} is not the start that the record of {file.name} has; get both from one place")
        _, model = trained_without(
            Path(out), facts["without"], seed=facts["seed"], device=torch.device(device), folder=file.parent,
            share=facts.get("share", 0.0), steps=end.step, batch=facts["batch"], precision=facts.get("precision"),
        )  # fmt: skip
        return weights_of(unpack(pack(model, start, bits=bits_of(facts)), start))  # as the file stores it

    return replay


def record_file(gold: Path) -> Path:
    """The file of a retrained model's record, beside it."""
    return gold.with_suffix(".record.json")


def replay_file(gold: Path) -> Path:
    """The file of the result of replaying that record."""
    return gold.with_suffix(".replay.json")


def write_replay(gold: Path, record: UnlearningRecord, result: Verification) -> Path:
    """Write the result and date of a replay that passed.

    Raises:
        ValueError: the replay did not pass.
    """
    if not result.passed:
        raise ValueError(f"{gold.name}: {result}; a replay that did not pass verifies nothing, so it is not written")
    facts = {"record": record.digest, "date": datetime.date.today().isoformat(), **dataclasses.asdict(result)}
    write_json(replay_file(gold), facts, indent=1)
    return replay_file(gold)


def audited(gold: Path, model: Mapping[str, nn.Module]) -> dict[str, Any] | None:
    """The facts of the record beside a retrained model of Emoji World; None without a record.

    Args:
        model: its ``unet`` and ``text_encoder`` from the file, in float32.

    Returns:
        ``digest`` of the record, its ``target``, the ``weights`` at its end (:func:`hash_of`), their ``parts``, and
        ``replayed``: the date of a replay that passed, "" without one. An assessment compares the weights with those
        that it judges (:func:`judged`).

    Raises:
        ValueError: the record is of other weights.
    """
    file = record_file(gold)
    if not file.exists():
        return None
    record = UnlearningRecord.from_json(file)
    if hash_of(weights_of(model)) != record.checkpoints[-1].weights:
        raise ValueError(f"{file.name} is the record of other weights than {gold.name}; get both from one place")
    return {
        "digest": record.digest,
        "target": record.target,
        "weights": record.checkpoints[-1].weights,
        "parts": sorted(model),
        "replayed": _replayed(gold, record.digest),
    }


def _replayed(gold: Path, digest: str) -> str:
    """The date of the replay beside a model, if it is one of this record."""
    file = replay_file(gold)
    if not file.exists():
        return ""
    try:
        facts = parse_json(read_bytes(file))
        return str(facts["date"]) if facts["record"] == digest else ""
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{file}: not the result of a replay ({printable(error)}); delete it, or run `erasure world audit` again"
        ) from None
