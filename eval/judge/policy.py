"""What somebody decided to require of an erasure.

The library checks whether what is required was assessed, and whether evidence contradicts it. It never says that the
evidence is enough: that is a decision about law, harm and reasonableness, for people to make case by case.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from erasure.concept import STRICT
from erasure.eval.judge.licences import NO_CLAIM, NULL, Column
from erasure.eval.judge.view import Margins
from erasure.io import in_one_line, load_yaml

if TYPE_CHECKING:
    from erasure.eval.judge import ClaimReport

STRICT_EXIT = 3  # of the command line with --strict, when `check` has something to say


@in_one_line
@dataclass(frozen=True, config=STRICT)
class Policy:
    """What is required of an erasure, and who decided.

    Attributes:
        removal_required: whether the target's influence must leave the weights. None: not decided.
        suppression_required: whether the target must be kept out of outputs. None: not decided.
        suppression_level, removal_level: the lowest sufficient level of the ladder, "C1" to "C3" and "C4" to "C6". By
            default C1 (asked by name, no attack) and C4. Raise it to what the use needs.
        ceiling: the largest share of pictures in which the target may still be recognised for it to count as kept out,
            by the upper limit of the interval; at most a half. Lower it where a single picture does harm; that needs
            more pictures.
        rationale: why, in a sentence.
        decided_by: the person or body that decided.

    Raises:
        ValueError: a requirement, or a ceiling above the default, without its reason or without who decided.
    """

    removal_required: bool | None = None
    suppression_required: bool | None = None
    suppression_level: Literal["C1", "C2", "C3"] = "C1"
    removal_level: Literal["C4", "C5", "C6"] = "C4"
    ceiling: float = Field(default=Margins.ceiling, gt=0, le=0.5)
    rationale: str = ""
    decided_by: str = ""

    @model_validator(mode="after")
    def _check(self) -> Policy:
        decided = self.removal_required is not None or self.suppression_required is not None
        for column, least in (("suppression", "C1"), ("removal", "C4")):
            level = getattr(self, f"{column}_level")
            if level != least and not getattr(self, f"{column}_required"):
                raise ValueError(
                    f"{column}_level asks for {level} of what is not required; add {column}_required: true, or leave "
                    "the level out"
                )
        absent = [name for name in ("rationale", "decided_by") if not getattr(self, name)]
        if (decided or self.ceiling > Margins.ceiling) and absent:
            what = "a requirement" if decided else f"a ceiling above {100 * Margins.ceiling:g} %"
            raise ValueError(f"{what} needs its reason and who decided; {' and '.join(absent)} not given; fill in both")
        return self

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Policy:
        """Read a policy from a YAML file; unknown keys are errors."""
        policy: Policy = load_yaml(cls, Path(path))
        return policy


def check(policy: Policy, reports: Sequence[ClaimReport]) -> list[str]:
    """What a policy requires and was not assessed, or is contradicted by evidence. Empty does not mean "enough"."""
    required: dict[Column, bool | None] = {
        "suppression": policy.suppression_required,
        "removal": policy.removal_required,
    }
    wanted = [column for column, asked in required.items() if asked]
    if wanted and not reports:
        return [f"{' and '.join(wanted)} required, and no model was assessed"]
    least = {"suppression": policy.suppression_level, "removal": policy.removal_level}
    return [line for report in reports for column in wanted for line in _open(report, column, least[column])]


def _open(report: ClaimReport, column: Column, least: str) -> list[str]:
    start = f"{report.model}: {column} is required"
    against = [f"{start}, and evidence speaks against it: {line}" for line in report.against[column]]
    level = report.level(column)
    if level == NULL:
        return [*against, f"{start}, and was assessed against a null control only, not against retrained models"]
    if level.startswith("C") and level >= least:  # "C0" is below them all
        return against
    reached = "no claim can be made" if level == NO_CLAIM else f"was assessed up to {level} of {least}"
    status = reached if level.startswith("C") else f"the column says: {level}"
    needed = "; ".join(report.needed[column])
    return [*against, f"{start}, and {status}" + (f" (needed: {needed})" if needed else "")]
