"""Finished cells on the Hugging Face Hub: where each goes, what is pushed, and that nothing is pushed twice."""

from __future__ import annotations

import dataclasses
import re
import string
from typing import TYPE_CHECKING, Any

from pydantic import model_validator
from pydantic.dataclasses import dataclass

from erasure.concept import STRICT
from erasure.io import meant, sha256_json, shown

if TYPE_CHECKING:
    from erasure.artifact import Erasure
    from erasure.batch.recipe import Cell

FIELDS = ("concept", "method", "preset", "seed", "base", "key")
LONGEST = 96  # characters of a repository's name on the hub
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


@dataclass(frozen=True, config=STRICT)
class Push:
    """Where every finished cell goes.

    Attributes:
        repository: "organisation/name" with placeholders: ``{concept}``, ``{method}``, ``{preset}``, ``{seed}``,
            ``{base}``, or ``{key}``, the name of the cell's folder. Every cell needs a repository of its own.
        private: of repositories that are made; one that is there stays as it is.
    """

    repository: str
    private: bool = True

    @model_validator(mode="after")
    def _check(self) -> Push:
        try:
            fields = [name for _, name, _, _ in string.Formatter().parse(self.repository) if name is not None]
        except ValueError as error:
            raise ValueError(f"a repository is a pattern such as 'me/{{concept}}-{{method}}'; {error}") from None
        for name in fields:
            if name not in FIELDS:
                raise ValueError(f"unknown placeholder {shown(name)}{meant(name, FIELDS)}; known are {list(FIELDS)}")
        example = self.repository.format(**dict.fromkeys(FIELDS, "a"))
        if not REPOSITORY.fullmatch(example) or "--" in example or ".." in example:
            raise ValueError(
                f"a repository is 'organisation/name' of letters, digits, '-', '_' and '.'; got "
                f"{shown(self.repository)}"
            )
        return self

    def repository_of(self, cell: Cell) -> str:
        """The repository of a cell."""
        facts = {
            "concept": cell.target,
            "method": cell.method.name,
            "preset": cell.method.preset or "recommended",
            "seed": str(cell.seed),
            "base": cell.base.rpartition("/")[2],
            "key": cell.key,
        }
        owner, _, name = self.repository.format(**{key: _plain(value) for key, value in facts.items()}).partition("/")
        return f"{owner}/{name[:LONGEST].strip('-.')}"


def check_cells(push: Push, cells: list[Cell]) -> None:
    """Raise ValueError where two cells would go to one repository, or a redacted name would be published."""
    taken: dict[str, str] = {}
    for cell in cells:
        if cell.wanted.hidden:
            raise ValueError(
                f"push: {cell.key} has a redacted name, and its card would publish that; leave `push` out, or the "
                "register"
            )
        repository = push.repository_of(cell)
        if taken.setdefault(repository, cell.key) != cell.key:
            raise ValueError(
                f"push: {taken[repository]} and {cell.key} would both go to {repository}; put more of "
                f"{[f'{{{name}}}' for name in FIELDS]} into the repository's name"
            )


def _plain(text: str) -> str:
    """A name as a part of a repository's."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "unnamed"


def described(edit: Erasure, answers: dict[str, Any]) -> Erasure:
    """The erasure with the five verdicts of its evaluation on its card."""
    from erasure.eval.judge import QUESTIONS

    rows = [
        {"question": QUESTIONS[key].question, "answer": one["word"], "number": one["number"], "verdict": one["verdict"]}
        for key, one in answers.items()
        if key in QUESTIONS
    ]
    return dataclasses.replace(edit, config=edit.config.with_facts(evaluation=rows)) if rows else edit


def digest_of(edit: Erasure, weights: str) -> str:
    """What would be pushed, as a hash: numbers, facts and card."""
    facts = {key: value for key, value in edit.config.plain().items() if key != "system"}  # which is not saved with it
    return sha256_json([weights, edit.name, edit.kind, facts, edit.card()])


__all__ = ["FIELDS", "Push", "check_cells", "described", "digest_of"]
