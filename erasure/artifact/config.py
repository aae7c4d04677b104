"""What an erasure records about itself: the same types in memory as on disk, and nothing changes them afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, FiniteFloat

FORMAT = 1


class _Strict(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, frozen=True)


class Print(_Strict):
    """The fingerprint of one component; see :mod:`erasure.backbone.fingerprint`."""

    layout: str
    samples: list[FiniteFloat]


class Base(_Strict):
    """The model an erasure was made for."""

    name: str
    architecture: str
    prediction_type: str
    components: dict[str, Print]
    licence: dict[str, str] = {}


class Config(_Strict):
    """Everything needed to repeat and to judge an erasure. Methods may add facts of their own; nothing acts on those.

    Frozen. Facts are attributes (``config.method``, ``config.base.name``) and read as plain data like those of a
    mapping (``config["base"]["name"]``, ``{**config}``).

    Attributes:
        method, preset, settings: what made it; lists where erasures were composed.
        concepts, keep, keep_everyday, prompts: what it was asked.
        encoding: how prompts were encoded where that is not the pipeline's default (``clip_skip``).
        base: the model it belongs to.
        spaces: of operator erasures: space to sites and columns.
        sites: of other weight changes: the names of the changed parameters or layers.
        system: of closed forms: the shape of the regression that is saved beside it.
        report: figures measured when it was made.
        evaluation: rows of an evaluation's table.
    """

    format: int
    library_version: str
    method: str
    settings: dict[str, Any] | list[dict[str, Any]]
    concepts: list[Any]
    keep: list[str]
    base: Base
    preset: str | list[str] = ""
    keep_everyday: list[str] = []
    prompts: list[str] = []
    encoding: dict[str, Any] = {}
    spaces: dict[str, Any] | None = None
    sites: list[str] | None = None
    system: dict[str, Any] | None = None
    report: dict[str, Any] = {}
    evaluation: list[dict[str, str | int | float | bool | None]] = []

    @classmethod
    def of(cls, facts: Any) -> Config:
        """From plain data, or itself."""
        return facts if isinstance(facts, Config) else cls.model_validate({k: _json(v) for k, v in facts.items()})

    def plain(self) -> dict[str, Any]:
        """Plain data, without the fields that were never set."""
        return self.model_dump(exclude_unset=True)

    def with_facts(self, **facts: Any) -> Config:
        """A copy with other facts; None takes one out."""
        return Config.of({key: value for key, value in {**self.plain(), **facts}.items() if value is not None})

    def items(self) -> list[tuple[str, Any]]:
        return list(self.plain().items())

    def keys(self) -> list[str]:
        return list(self.plain())

    def __getitem__(self, key: str) -> Any:
        return self.plain()[key]

    def __contains__(self, key: object) -> bool:
        return key in self.plain()

    def __iter__(self) -> Iterator[str]:  # type: ignore[override]  # of a mapping, not of a model
        return iter(self.plain())

    def get(self, key: str, default: Any = None) -> Any:
        """A fact as plain data, or ``default``."""
        return self.plain().get(key, default)


def _json(value: Any) -> Any:
    """A value as it comes back from JSON."""
    if isinstance(value, Mapping):
        return {str(key): _json(part) for key, part in value.items()}
    return [_json(part) for part in value] if isinstance(value, list | tuple) else value


__all__ = ["FORMAT", "Base", "Config", "Print"]
