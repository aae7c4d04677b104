"""What to run: a checked YAML recipe and the cells it spans."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Discriminator, Field, PositiveInt, Tag, model_validator
from pydantic.dataclasses import dataclass

from erasure import __version__
from erasure.batch.concepts import Csv, FromRegister, Wanted, wanted_of
from erasure.batch.judging import Judging
from erasure.batch.outputs import Output, refusal
from erasure.batch.publishing import Push, check_cells
from erasure.concept import STRICT, WORLD, Concept, Suite
from erasure.io import folder_name, load_yaml, sha256, sha256_file, sha256_json, shown

if TYPE_CHECKING:
    from erasure.methods.base import Method

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
        self.chosen()
        if "seed" in self.settings:
            raise ValueError(f"{self.name}: a seed in its settings; list it under `seeds` of the recipe instead")
        return self

    @functools.cached_property
    def method(self) -> Any:
        """The class of the method. Found once: installed packages are searched for it, and a recipe has many cells."""
        from erasure.methods import method_class

        return method_class(self.name)

    def chosen(self) -> Method:
        """The method with all its settings."""
        return self.method.preset(self.preset, **self.settings)

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
        wanted: what it erases, and what it keeps.
        content: a hash of the base, with its folder of configs; its name for one on the hub.
        config: the folder of configs for a base of one file, where the recipe names it.
    """

    base: str
    wanted: Wanted
    method: MethodChoice
    seed: int
    dtype: str = "float32"
    content: str = ""
    config: str | None = None

    @property
    def concepts(self) -> tuple[Concept, ...]:
        return self.wanted.concepts

    @property
    def suite(self) -> Suite | None:
        """What the cell is evaluated on."""
        return self.wanted.suite

    @property
    def target(self) -> str:
        """What the cell erases, in a few words."""
        return self.wanted.target

    @functools.cached_property
    def key(self) -> str:
        """Name of the cell's folder: readable, and another for every other setting, file, base and version of this.

        What is made of the erasure (outputs, an evaluation, a push) does not count: asked for later, it is added.
        """
        method = dataclasses.asdict(self.method)  # type: ignore[call-overload]
        method["settings"] |= {n: sha256_file(f) for n, f in self.method.files.items()}
        facts = sha256_json(
            {
                "library": __version__,
                "base": self.content or base_print(self.base),
                "dtype": self.dtype,
                "concepts": [dataclasses.asdict(concept) for concept in self.concepts],  # type: ignore[call-overload]
                "keep": self.wanted.keep,
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


def _kind(value: Any) -> str:
    """Which of :data:`Listed` a line under `concepts` is."""
    if isinstance(value, str):
        return "name"
    has = value.__contains__ if isinstance(value, dict) else functools.partial(hasattr, value)
    return next((source for source in ("csv", "register") if has(source)), "concept")


def _named(value: Any) -> Any:
    """A bare name as a mapping."""
    return {"name": value} if isinstance(value, str) else value


def _judging(value: Any) -> Any:
    """`true` is a plain evaluation, `false` none, a name is a preset."""
    if isinstance(value, bool):
        return {} if value else None
    if not isinstance(value, str | dict | Judging | None):
        raise ValueError(f"true, false, a preset or a mapping with `preset`; got {shown(value)}")
    return {"preset": value} if isinstance(value, str) else value


def _push(value: Any) -> Any:
    """A repository's name as a mapping."""
    return {"repository": value} if isinstance(value, str) else value


Listed = Annotated[
    Annotated[str, Tag("name")]
    | Annotated[Concept, Tag("concept")]
    | Annotated[Csv, Tag("csv")]
    | Annotated[FromRegister, Tag("register")],
    Discriminator(_kind),
]


@dataclass(frozen=True, config=STRICT)
class Recipe:
    """A grid of erasures. Every base is combined with every concept, method and seed.

    Attributes:
        version: of the format; this library reads 1.
        out: folder of the results, relative to the recipe's.
        concepts: names of shipped suites, YAML files of suites, CSV files, ``csv`` and ``register`` with their settings
            (:class:`~erasure.batch.concepts.Csv`, :class:`~erasure.batch.concepts.FromRegister`), or concepts written
            out.
        methods: names, or mappings with ``name``, ``preset`` and ``settings``.
        bases: "emoji-world", diffusers folders, .safetensors files or hub ids.
        config: for bases that are .safetensors files, the diffusers folder whose configs go with them; by default the
            one around or beside each file, or the hub's.
        seeds: of the method. A method without a seed, as closed forms are, has one cell however many are listed.
        outputs: what each cell leaves beside the erasure: names, or mappings with ``name`` and ``rank``.
        evaluate: also evaluate each cell whose concept came from a suite: true (plainly), false, a preset's name, or a
            mapping with ``preset`` and ``probes``.
        limit: at most so many prompts per group in plain evaluations; leave it out for figures to publish.
        push: repository of each finished cell on the Hugging Face Hub, or a mapping with ``repository``, ``private``.
        dtype: float32, float16 or bfloat16.
    """

    version: Literal[1]
    out: Path
    concepts: tuple[Listed, ...]
    methods: tuple[Annotated[MethodChoice, BeforeValidator(_named, json_schema_input_type=str | MethodChoice)], ...]
    bases: tuple[str, ...] = (WORLD,)
    config: Path | None = None
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**63)], ...] = (0,)
    outputs: tuple[Annotated[Output, BeforeValidator(_named, json_schema_input_type=str | Output)], ...] = ()
    evaluate: Annotated[
        Judging | None, BeforeValidator(_judging, json_schema_input_type=bool | str | Judging | None)
    ] = Judging()
    limit: PositiveInt | None = None
    push: Annotated[Push | None, BeforeValidator(_push, json_schema_input_type=str | Push | None)] = None
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        for field in ("concepts", "methods", "bases", "seeds"):
            if not getattr(self, field):
                raise ValueError(f"{field} is empty, so there is nothing to run; list at least one")
        if self.limit is not None and self.evaluate is not None and self.evaluate.preset is not None:
            raise ValueError("a preset has its own sizes; leave `limit` out, or take the preset smoke for a trial")
        for field in ("concepts", "methods", "bases", "seeds"):
            seen: set[str] = set()
            for given in getattr(self, field):
                if repr(given) in seen:
                    raise ValueError(f"{field}: {shown(getattr(given, 'name', given))} stands twice; keep one")
                seen.add(repr(given))
        names = [output.name for output in self.outputs]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"outputs: {twice!r} stands twice; keep one")
        return self

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a recipe; paths in it are taken relative to its folder.

        Raises:
            FileNotFoundError: a file that it names is not there.
            ValueError: it cannot be run as it stands; the message says what, and where.
        """
        path = Path(path)
        recipe = load_yaml(cls, path)
        recipe = dataclasses.replace(
            recipe,
            out=path.parent / recipe.out,
            concepts=tuple(_beside(given, path.parent) for given in recipe.concepts),
            bases=tuple(str(path.parent / b) if (path.parent / b).exists() else b for b in recipe.bases),
            config=None if recipe.config is None else path.parent / recipe.config,
            methods=tuple(method.beside(path.parent) for method in recipe.methods),
        )
        try:
            recipe.check()
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        return recipe

    def check(self) -> None:
        """Raise where an output cannot be what is asked for, `config` goes with no base, or a push would go wrong."""
        self._configs()
        for output, method, base in itertools.product(self.outputs, self.methods, self.bases):
            if reason := refusal(output, method, base):
                raise ValueError(f"outputs: {reason}")
        if self.push is not None:
            check_cells(self.push, self.cells())

    def cells(self) -> list[Cell]:
        """Every cell, in the order they are run: all of one base together."""
        cells = []
        for base, config in zip(self.bases, self._configs(), strict=True):
            content = base_print(base)
            if config is not None:
                content = sha256_json([content, base_print(config)])
            wanted = itertools.chain(*(wanted_of(given, base) for given in self.concepts))
            for one, method in itertools.product(wanted, self.methods):
                seeds = self.seeds if method.seeded else self.seeds[:1]
                cells += [Cell(base, one, method, seed, self.dtype, content, config) for seed in seeds]
        return cells

    def _configs(self) -> list[str | None]:
        """The folder of configs of each base; None where there is none or the base brings its own."""
        from erasure.opening import configs_of

        if self.config is not None and not (self.config / INDEX).is_file():
            raise ValueError(f"config: the folder {shown(self.config)} has no {INDEX}; give a diffusers folder")
        try:
            return [None if config is None else str(config) for config in configs_of(self.bases, self.config)]
        except ValueError as error:
            raise ValueError(f"config: {error}") from None


def _beside(given: Any, folder: Path) -> Any:
    """A line under `concepts` with its file taken relative to a folder."""
    if isinstance(given, str) and given.lower().endswith(".csv"):
        given = Csv(csv=Path(given))
    if isinstance(given, Csv | FromRegister):
        return given.beside(folder)
    return str(folder / given) if isinstance(given, str) and given.endswith((".yaml", ".yml")) else given
