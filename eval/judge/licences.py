"""What may be said: the ladder of claims, and what each piece of evidence licences; read from ``claims.yaml``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple

from erasure.io import load_yaml

Column = Literal["suppression", "removal"]


class Level(NamedTuple):
    """One level of the ladder.

    Attributes:
        title: in reports, where a letter with a number would be read as a score.
        column: which of the two it belongs to; they are never merged.
        sentence: what is printed, with places for numbers.
        evidence: the least that is needed.
        means: in plain words. never: what it does not mean.
    """

    title: str
    column: Column
    sentence: str
    evidence: str
    means: str
    never: str


NO_CLAIM = "C0"
TRIAL = "Trial run, no evidence: "
NULL = "C4'"
NOT_BY_CONSTRUCTION = "not removal by construction: the original parameters are present"
SAME_DENOISER = "not removal by construction: the denoiser is the base's, bit for bit"
SAME_PREDICTIONS = "not removal by construction: the denoiser predicts what the base's predicts"
CODE_BESIDE = "not removal by construction: code beside the parameters takes part, and can be taken off"
BY_CONSTRUCTION = (NOT_BY_CONSTRUCTION, SAME_DENOISER, SAME_PREDICTIONS, CODE_BESIDE)
NOT_APPLICABLE = "not applicable"


class Licence(NamedTuple):
    """What one kind of evidence allows one to say, and what not."""

    evidence: str
    licences: str
    not_licensed: str


class Tables(NamedTuple):
    """What ``claims.yaml`` holds: levels by their code, and licences by the kind of evidence."""

    ladder: dict[str, Level]
    licences: dict[str, Licence]


LADDER, LICENCES = load_yaml(Tables, Path(__file__).with_name("claims.yaml"))
