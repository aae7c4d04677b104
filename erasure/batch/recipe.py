"""What to run: a checked YAML recipe and the cells it spans."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from erasure import __version__
from erasure.concept import STRICT, WORLD, Concept, Count, Suite
from erasure.io import folder_name, load_yaml, sha256, sha256_file, sha256_json, shown

INDEX = "model_index.json"  # of a diffusers folder
PIECES, PIECE = 16, 65_536  # of a large file that are hashed, and their bytes


@dataclass(frozen=True, config=STRICT)
class MethodChoice:
    """A method with its preset and the settings that differ from it."""

    name: str
    preset: str | None = None
    settings: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check(self) -> MethodChoice:
        self.method.preset(self.preset, **self.settings)
        if "seed" in self.settings:
            raise ValueError(f"{self.name}: a seed in its settings; list it under `seeds` of the recipe instead")
        return self

    @functools.cached_property
    def method(self) -> Any:
        """The class of the method. Found once: installed packages are searched for it, and a recipe has many cells."""
        from erasure.methods import method_class

        return method_class(self.name)

    @property
    def files(self) -> dict[str, Path]:
        """The settings that name a file."""
        named = self.method.files
        return {name: Path(path) for name, path in self.settings.items() if name in named and path}

    @property
    def seeded(self) -> bool:
        """Whether the method draws random numbers."""
        return "seed" in {field.name for field in dataclasses.fields(self.method)}

    def beside(self, folder: Path) -> MethodChoice:
        """The same with its files taken relative to a folder.

        Raises:
            FileNotFoundError: one of them is not there.
        """
        files = {name: folder / path for name, path in self.files.items()}
        if absent := next((file for file in files.values() if not file.is_file()), None):
            raise FileNotFoundError(f"{self.name}: no file at {absent}; paths are taken relative to the recipe")
        return dataclasses.replace(self, settings={**self.settings, **{n: str(f) for n, f in files.items()}})


@dataclasses.dataclass(frozen=True)
class Cell:
    """One erasure of the grid.

    Attributes:
        content: a hash of the base; its name for one on the hub.
    """

    base: str
    concepts: tuple[Concept, ...]
    suite: Suite | None
    method: MethodChoice
    seed: int
    dtype: str = "float32"
    evaluate: bool = True
    limit: int | None = None
    content: str = ""

    @property
    def target(self) -> str:
        """What the cell erases, in a few words."""
        return self.suite.target if self.suite else self.concepts[0].name

    @functools.cached_property
    def key(self) -> str:
        """Name of the cell's folder: readable, and another for every other setting, file, base and version of this."""
        method = dataclasses.asdict(self.method)  # type: ignore[call-overload]
        method["settings"] |= {n: sha256_file(f) for n, f in self.method.files.items()}
        facts = sha256_json(
            {
                "library": __version__,
                "base": self.content or base_print(self.base),
                "dtype": self.dtype,
                "evaluate": [self.evaluate, self.limit],
                "concepts": [dataclasses.asdict(concept) for concept in self.concepts],  # type: ignore[call-overload]
                "method": method,
                "suite": dataclasses.asdict(self.suite) if self.suite else None,  # type: ignore[call-overload]
            },
            spaced=True,
        )
        name = re.sub(r"[^a-z0-9]+", "-", f"{self.target[:32]} {self.method.name}".lower()).strip("-")
        return folder_name(f"{name}-s{self.seed}", longest=91) + f"-{facts[:8]}"


def base_print(base: str) -> str:
    """A hash of what is in a local base model, wherever it lies and whenever it was written; its name for others.

    Small files count whole. Of a large one sixteen pieces do, spread over it: two trainings of one architecture differ
    in every one, and hashing gigabytes for each recipe would take minutes.

    Raises:
        ValueError: a folder that is no model; it might be a whole disk.
    """
    path = Path(base).expanduser()
    if path.is_file():
        return sha256(_sample(path))
    if not path.is_dir():
        return base
    if not (path / INDEX).is_file():
        raise ValueError(f"bases: the folder {shown(base)} has no {INDEX}; give a diffusers folder, or a hub id")
    files = sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))
    return sha256_json([[str(file.relative_to(path)), sha256(_sample(file))] for file in files])


def _sample(path: Path) -> Iterator[bytes]:
    size = path.stat().st_size
    yield f"{size};".encode()
    with path.open("rb") as file:
        if size <= PIECES * PIECE:
            yield file.read()
            return
        for i in range(PIECES):
            file.seek((size - PIECE) * i // (PIECES - 1))
            yield file.read(PIECE)


@dataclass(frozen=True, config=STRICT)
class Recipe:
    """A grid of erasures. Every base is combined with every concept, method and seed.

    Attributes:
        version: of the format; this library reads 1.
        out: folder of the results, relative to the recipe's.
        concepts: names of shipped suites, YAML files of suites, or concepts written out.
        methods: names, or mappings with ``name``, ``preset`` and ``settings``.
        bases: "emoji-world", diffusers folders or hub ids.
        seeds: of the method. A method without a seed, as closed forms are, has one cell however many are listed.
        evaluate: also evaluate each cell whose concept came from a suite.
        limit: at most so many prompts per group in these evaluations; leave it out for figures to publish.
        dtype: float32, float16 or bfloat16.
    """

    version: Literal[1]
    out: Path
    concepts: tuple[str | Concept, ...]
    methods: tuple[MethodChoice, ...]
    bases: tuple[str, ...] = (WORLD,)
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = (0,)
    evaluate: bool = True
    limit: Count | None = None
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"

    @model_validator(mode="before")
    @classmethod
    def _names(cls, data: Any) -> Any:
        """Let a method be written as its bare name."""
        raw = data.kwargs if hasattr(data, "kwargs") else data
        if isinstance(raw, dict) and isinstance(raw.get("methods"), list):
            raw["methods"] = [{"name": m} if isinstance(m, str) else m for m in raw["methods"]]
        return data

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        for field in ("concepts", "methods", "bases", "seeds"):
            if not getattr(self, field):
                raise ValueError(f"{field} is empty, so there is nothing to run; list at least one")
        return self

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a recipe; paths in it are taken relative to its folder."""
        path = Path(path)
        recipe = load_yaml(cls, path)
        concepts = tuple(
            str(path.parent / c) if isinstance(c, str) and c.endswith((".yaml", ".yml")) else c for c in recipe.concepts
        )
        bases = tuple(str(path.parent / b) if (path.parent / b).is_dir() else b for b in recipe.bases)
        methods = tuple(method.beside(path.parent) for method in recipe.methods)
        return dataclasses.replace(
            recipe, out=path.parent / recipe.out, concepts=concepts, bases=bases, methods=methods
        )

    def cells(self) -> list[Cell]:
        """Every cell, in the order they are run: all of one base together."""
        suites = {c: Suite.load(c) for c in self.concepts if isinstance(c, str)}
        prints = {base: base_print(base) for base in self.bases}
        cells = []
        for base, c, method in itertools.product(self.bases, self.concepts, self.methods):
            suite = suites[c] if isinstance(c, str) else None
            concepts = suite.concepts if suite else (Concept.of(c),)
            for seed in self.seeds if method.seeded else self.seeds[:1]:
                cells.append(
                    Cell(base, concepts, suite, method, seed, self.dtype, self.evaluate, self.limit, prints[base])
                )
        return cells
