"""An assessment: paired pictures, every probe's observations of every model, and what they weigh.

Only observations are stored. Evidence, claims and the report are made from them each time, by pure functions.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from erasure.eval.core import tables
from erasure.eval.core.models import IN_WEIGHTS, Kind, Role
from erasure.eval.core.records import Evaluation, fingerprint
from erasure.eval.judge import PICTURES, Audit, ClaimReport, Facts, Margins, claims
from erasure.eval.judge.limits import limits
from erasure.eval.judge.policy import Policy, check
from erasure.eval.probes import names, probe_class
from erasure.eval.probes.base import Evidence, Observation, Probe
from erasure.io import (
    one_line,
    parse_json,
    printable,
    read_bytes,
    sha256,
    sha256_file,
    shown,
    write_atomically,
    write_json,
)

FORMAT = 3
FILE = "assessment.json"
LONGEST = 120  # bytes of a model's file name, which has endings
CELLS = "probes"
DETECTOR = "detector"  # fact of an observation: who made it, where several detectors judge the same pictures
DRAWN = ("evaluation.json", "records.jsonl")  # of the paired pictures
TOLD = ("preset", "models", "policy", "settings", "cells", "files")  # what ``stated`` is the hash of
MADE_OF = (
    "what its assessment was made of: another run wrote into the folder, one was interrupted, or it was edited; run "
    "the same evaluation into the folder again, and give every run a folder of its own"
)
CHANGED = "was changed after the assessment was written; get it again, or run the same evaluation into the folder again"


@dataclasses.dataclass(frozen=True)
class ModelCard:
    """One model: its role, what was done to its parameters, the hash of its weights, and where it comes from.

    ``audit`` is :func:`erasure.eval.core.audit.judged` of the record that came with it; None without one.
    """

    name: str
    role: Role
    kind: Kind
    weights: str
    config: Mapping[str, Any]
    audit: Mapping[str, str] | None = None


@dataclasses.dataclass(frozen=True)
class Cell:
    """One probe on one model.

    Attributes:
        settings, version: of the probe.
        inputs: everything else that the observations depend on: a stored cell with other inputs is not valid.
        missing: why there are no observations.
    """

    probe: str
    version: int
    settings: Mapping[str, Any]
    model: str
    inputs: Mapping[str, Any]
    rows: tuple[Observation, ...] = ()
    missing: str | None = None
    seconds: float = 0.0

    @property
    def key(self) -> dict[str, Any]:
        """What identifies a cell."""
        facts = {name: getattr(self, name) for name in ("probe", "version", "settings", "model", "inputs")}
        return json.loads(json.dumps(facts, default=str))

    @property
    def content(self) -> str:
        """The hash of what was observed. It finds a changed file; whoever may write the folder can write it too."""
        rows = [dataclasses.asdict(row) for row in self.rows]
        return fingerprint([json.loads(json.dumps(rows, default=float)), self.missing])

    @staticmethod
    def file(folder: Path, probe: str, model: str) -> Path:
        return folder / CELLS / probe / f"{slug(model)}.jsonl"

    def save(self, folder: Path) -> None:
        """Write one line of facts, then one line per observation; completely or not at all."""
        head = {**self.key, "missing": self.missing, "seconds": round(self.seconds, 2)}
        lines = [head, *(dataclasses.asdict(row) for row in self.rows)]
        text = "".join(f"{json.dumps(line, ensure_ascii=False, default=float)}\n" for line in lines)
        write_atomically(self.file(folder, self.probe, self.model), text)

    @classmethod
    def load(cls, file: Path) -> Cell:
        """Read a cell; one that is not complete is refused."""
        try:
            head, *rows = map(parse_json, read_bytes(file).splitlines())
            return cls(**head, rows=tuple(Observation(**row) for row in rows))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{file}: not the observations of a probe ({printable(error)}); delete it to run it again"
            ) from None


def slug(name: str) -> str:
    """A name as a file name: letters, digits, dots and dashes; others become their code, and long ones their hash."""
    text = "".join(c if c.isalnum() or c in ".-" else f"_{ord(c):x}" for c in name)
    if len(text.encode()) <= LONGEST:
        return text
    return f"{text.encode()[: LONGEST - 17].decode(errors='ignore')}-{sha256(name)[:16]}"


@dataclasses.dataclass(frozen=True)
class Assessment:
    """Everything that was observed of some erasures, with evidence and claims.

    Attributes:
        evaluation: the paired pictures of the suite.
        preset: smoke | no-draw | quick | standard | full, or "pictures": a plain evaluation, judged by every detector.
        models: the base first, then erasures and controls.
        cells: every probe on every model that it concerns.
        policy: what is required, or None.
        settings: sampler, detectors, versions, seconds.
    """

    evaluation: Evaluation
    preset: str
    models: tuple[ModelCard, ...]
    cells: tuple[Cell, ...]
    policy: Policy | None
    settings: Mapping[str, Any]

    @property
    def roles(self) -> dict[str, Role]:
        return {model.name: model.role for model in self.models}

    @property
    def missing(self) -> dict[str, dict[str, str]]:
        """Probe to model to why there is no observation."""
        out: dict[str, dict[str, str]] = {}
        for cell in self.cells:
            if cell.missing is not None:
                out.setdefault(cell.probe, {})[cell.model] = cell.missing
        return out

    def probes(self) -> Iterator[Probe]:
        """The probes that ran, with their settings, in the order of the taxonomy."""
        settings = {cell.probe: cell.settings for cell in self.cells}
        for name in names():
            if name in settings:
                kind = probe_class(name)
                yield kind(**{key: _tupled(value) for key, value in settings[name].items()})

    def rows(self, probe: str) -> dict[str, list[Observation]]:
        """The observations of a probe by model, the base first; models without any are left out."""
        by = {cell.model: list(cell.rows) for cell in self.cells if cell.probe == probe and cell.rows}
        return {model.name: by[model.name] for model in self.models if model.name in by}

    @functools.cached_property
    def evidence(self) -> tuple[Evidence, ...]:
        """The evidence from the observations, probe by probe."""
        found: list[Evidence] = []
        for probe in self.probes():
            for detector, rows in self._by_detector(probe.key).items():
                found += [dataclasses.replace(e, detector=detector) for e in self._weighed(probe, rows)]
        return tuple(found)

    def _by_detector(self, probe: str) -> dict[str, dict[str, list[Observation]]]:
        """The observations of a probe by detector and by model; "" where one detector judges everything."""
        found: dict[str, dict[str, list[Observation]]] = {}
        for model, own in self.rows(probe).items():
            for row in own:
                found.setdefault(str(row.facts.get(DETECTOR, "")), {}).setdefault(model, []).append(row)
        return found

    def _weighed(self, probe: Probe, rows: Mapping[str, list[Observation]]) -> list[Evidence]:
        """The evidence from some rows of a probe. A model that is judged and a control is not compared with itself."""
        found = probe.weigh({name: own for name, own in rows.items() if name not in self.same_as}, self.roles)
        for arm, control in self.same_as.items():
            others = {name: own for name, own in rows.items() if name != control}
            found += [e for e in probe.weigh(others, self.roles) if e.model == arm]
        return found

    @functools.cached_property
    def same_as(self) -> dict[str, str]:
        """Judged models that are retrained controls as well, whatever they are called, to the name of the control."""
        golds = {model.weights: model.name for model in self.models if model.role == "gold"}
        judged = [model for model in self.models if model.role == "erased" and model.kind in IN_WEIGHTS]
        return {model.name: golds[model.weights] for model in judged if model.weights in golds}

    def claims(self) -> list[ClaimReport]:
        """One report per erasure: suppression and removal in two columns, utility, what was not assessed."""
        return claims(self.evidence, self.roles, self.facts())

    def facts(self) -> Facts:
        """What the claims depend on beside the evidence."""
        return Facts(
            target=self.evaluation.suite.target,
            probed=self.evaluation.suite.concept.name if self.evaluation.suite.also else "",
            information=self.evaluation.suite.information,
            groups=tuple(dict.fromkeys(prompt.group for prompt in self.evaluation.suite.prompts())),
            style=self.evaluation.suite.attribute == "style",
            budgets={probe.key: budget for probe in self.probes() if (budget := probe.budget())},
            preset=self.preset,
            kinds={model.name: self._kind(model) for model in self.models},
            scopes={model.name: str(model.config.get("scope", "")) for model in self.models},
            audits={model.name: record for model in self.models if (record := _audit(model)) is not None},
            same_as=self.same_as,
            detectors=tuple(self.evaluation.detectors),
            judge="" if self.preset == PICTURES else self._in_words(self.settings["judge"]),
            judges={name: self._in_words(name) for name in self.evaluation.detectors},
            kept={model.name: named for model in self.models if (named := self._named_to(model))},
            sampler=self.settings["sampler"],
            ran=tuple(dict.fromkeys(cell.probe for cell in self.cells)),
            missing=self.missing,
            margins=Margins.of(self.preset, **({} if self.policy is None else {"ceiling": self.policy.ceiling})),
            limited=self.evaluation.settings.get("limit") is not None,
        )

    @property
    def limits(self) -> list[str]:
        """What these pictures, this suite and these detectors say nothing about, whatever the probes."""
        return limits(self.evaluation)

    def _kind(self, model: ModelCard) -> Kind:
        """What was done to its parameters. A filter leaves the base's: what calls itself one and does not is none."""
        changed = any(base.weights != model.weights for base in self.models if base.role == "base")
        return "weights" if model.kind == "filter" and changed else model.kind

    def _named_to(self, model: ModelCard) -> dict[str, str]:
        """Kept group to how many of its names the method was given."""
        if model.role != "erased" or "keep" not in model.config:
            return {}
        keep = [*model.config["keep"], *model.config.get("keep_everyday", ())]
        groups = {group: self.evaluation.select(model.name, group) for group in ("neighbours", "unrelated")}
        names = {group: list(dict.fromkeys(record.label for record in own)) for group, own in groups.items() if own}
        return {group: f"{tables.named_in(keep, own)} of {len(own)}" for group, own in names.items()}

    def _in_words(self, name: str) -> str:
        """The name of a detector, with the errors on its card."""
        attribute = self.evaluation.suite.attribute
        card = self.evaluation.detectors.get(name)
        measured = {} if card is None else {"sensitivity": card.sensitivity, "specificity": card.specificity}
        errors = [f"{kind} {100 * by[attribute]:.1f} %" for kind, by in measured.items() if by and attribute in by]
        return f"{name} ({', '.join([*errors, 'by its card']) if errors else 'its own errors were not measured'})"

    def objections(self) -> list[str]:
        """What the policy requires and the evidence does not show; empty without a policy."""
        return [] if self.policy is None else check(self.policy, self.claims())

    def to_dict(self) -> dict[str, Any]:
        """Plain data. ``evidence``, ``claims`` and ``objections`` are for readers and are not read back."""
        return {
            "format": FORMAT,
            "preset": self.preset,
            "models": [dataclasses.asdict(model) for model in self.models],
            "policy": None if self.policy is None else dataclasses.asdict(self.policy),
            "settings": dict(self.settings),
            "cells": [[c.probe, c.model, fingerprint(c.key), c.content] for c in self.cells],
            "missing": self.missing,
            "evidence": [dataclasses.asdict(e) for e in self.evidence],
            "claims": [dataclasses.asdict(report) for report in self.claims()],
            "objections": self.objections(),
        }

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write ``evaluation.json``, ``records.jsonl``, the cells under ``probes/`` and ``assessment.json``.

        The last holds the hashes of all the others, and one of itself (``stated``).
        """
        folder = Path(folder)
        self.evaluation.save(folder)
        for cell in self.cells:
            cell.save(folder)
        content = {**self.to_dict(), "files": {name: sha256_file(folder / name) for name in DRAWN}}
        path = folder / FILE
        write_json(path, {**content, "stated": stated(content)}, indent=1, default=str)
        return path

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Assessment:
        """Read what ``save`` wrote.

        Raises:
            FileNotFoundError: no assessment there.
            ValueError: it is not complete, or of another version of the format or of a probe.
        """
        folder = Path(folder)
        file = folder / FILE
        if not file.exists():
            raise FileNotFoundError(f"{file}: no such assessment; run `erasure evaluate --preset quick` first")
        raw = _read(file)
        if raw.stated != stated(raw.told):
            raise ValueError(f"{file} {CHANGED}")
        for name in DRAWN:
            if not (folder / name).exists() or sha256_file(folder / name) != raw.files.get(name):
                raise ValueError(f"{folder / name} is not {MADE_OF}")
        evaluation = Evaluation.from_json(folder)
        models = tuple(raw.models)
        _check_models(file, models, evaluation)
        cells = []
        for probe, model, key, content in raw.cells:
            stored = Cell.file(folder, probe, model)
            if not stored.exists() or fingerprint((cell := Cell.load(stored)).key) != key:
                raise ValueError(f"{folder}: the observations of {probe} on {model} are not {MADE_OF}")
            if cell.content != content:
                raise ValueError(f"{folder}: what was observed by {probe} on {model} {CHANGED}")
            if cell.version not in (now := (kind := probe_class(probe)).version, *kind.reads):
                raise ValueError(
                    f"{folder}: the observations of {probe} are those of its version {cell.version}, and this "
                    f"library has version {now}; run the same evaluation into the folder again, or read it with the "
                    "library that made it"
                )
            cells.append(cell)
        return cls(evaluation, raw.preset, models, tuple(cells), raw.policy, raw.settings)


def stated(content: Mapping[str, Any]) -> str:
    """The hash of what ``assessment.json`` states. It finds an edited file; whoever writes one can write it too."""
    return fingerprint([json.loads(json.dumps(content.get(name), default=str)) for name in TOLD])


@dataclasses.dataclass(frozen=True)
class _Stored:
    """``assessment.json``, as far as it is read back; ``told`` is the file as it is."""

    preset: str
    models: list[ModelCard]
    policy: Policy | None
    settings: dict[str, Any]
    cells: list[tuple[str, str, str, str]]
    files: dict[str, str]
    stated: str
    told: dict[str, Any]


def _read(file: Path) -> _Stored:
    """The file, if it is whole and of this version."""
    try:
        raw = parse_json(read_bytes(file))
        form = raw["format"]
        stored = TypeAdapter(_Stored).validate_python({**raw, "told": raw}) if form == FORMAT else None
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: not an assessment ({one_line(error)}); is the file complete?") from None
    if stored is None:
        raise ValueError(
            f"{file}: format {FORMAT} was expected; got {shown(form)}; run the same evaluation into the folder again, "
            "which takes up what is there, or read it with the library that made it"
        )
    return stored


def _check_models(file: Path, models: Sequence[ModelCard], evaluation: Evaluation) -> None:
    """Refuse models that are not those whose pictures are there: another role or kind would give other claims."""
    told = {model.name: (model.role, model.kind, model.weights) for model in models}
    drawn = {arm.name: (arm.role, arm.kind, arm.weights) for arm in evaluation.arms}
    for name in {**told, **drawn}:
        mine, theirs = told.get(name), drawn.get(name)
        if mine != theirs:
            said, seen = (
                "no such model" if one is None else f"{one[0]}, {one[1]}, weights {one[2][:12]}"
                for one in (mine, theirs)
            )
            raise ValueError(
                f"{file}: it calls {printable(name)} {said}, and its pictures are of {seen}; it was changed; get it "
                "again"
            )


def _audit(model: ModelCard) -> Audit | None:
    """The record of how a model was made; older assessments have its name alone."""
    if model.audit is not None:
        return Audit(**model.audit)
    supplied = model.config.get("audit")
    return Audit(str(supplied)) if supplied else None


def _tupled(value: Any) -> Any:
    """Lists of a JSON file as tuples, which settings have."""
    return tuple(map(_tupled, value)) if isinstance(value, list) else value
