"""Whatever stands in a recipe: it is a recipe, or one line says which key is wrong."""

from __future__ import annotations

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from erasure.batch import Recipe
from erasure.io import printable

VALID = {
    "version": 1,
    "out": "results",
    "bases": ["emoji-world"],
    "concepts": [{"name": "rose", "neighbours": ["tulip"], "anchor": "tulip"}, "superhero"],
    "methods": ["uce", {"name": "esd", "preset": "recommended", "settings": {"iterations": 3}}],
    "seeds": [0, 1],
    "evaluate": True,
    "limit": 4,
    "dtype": "float32",
}
WORDS = st.sampled_from(
    ["uce", "esd", "speed", "corpus", "name", "preset", "settings", "superhero", "recommended", "lamb", "iterations",
     "anchor", "neighbours", "..", "/", "~", "a.yaml", "", "seed", "null", "float16", "keep"]
)  # fmt: skip
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=12), WORDS, st.dates(),
    st.binary(max_size=4),
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS | st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)


def loaded(folder, raw: bytes) -> str | None:
    """Load a recipe and its cells: None, or the line that refuses it."""
    path = folder / "recipe.yaml"
    path.write_bytes(raw)
    try:
        for cell in Recipe.load(path).cells():
            assert cell.key
    except (ValueError, FileNotFoundError) as error:
        line = str(error)
        assert line and line == printable(line, limit=None), repr(line)
        return line
    return None


def fuzzed(count):
    return settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


def put(recipe, place, value):
    """A copy of a recipe with another value at a place in it."""
    if not place:
        return value
    first, *rest = place
    copy = list(recipe) if isinstance(recipe, list) else dict(recipe)
    copy[first] = put(recipe[first], rest, value)
    return copy


PLACES = [
    *([key] for key in VALID), ["bases", 0], ["concepts", 0], ["concepts", 1], ["concepts", 0, "name"],
    ["concepts", 0, "neighbours"], ["concepts", 0, "anchor"], ["methods", 0], ["methods", 1], ["methods", 1, "name"],
    ["methods", 1, "preset"], ["methods", 1, "settings"], ["methods", 1, "settings", "iterations"], ["seeds", 0],
]  # fmt: skip


def any_value_anywhere(folder, place, value):
    line = loaded(folder, yaml.safe_dump(put(VALID, place, value)).encode())
    assert line is None or str(place[0]) in line or "YAML" in line, f"{place} is not named: {line}"


@fuzzed(20)
@given(place=st.sampled_from(PLACES), value=VALUES)
def test_any_value_at_any_place_is_taken_or_refused_by_its_key(tmp_path, place, value):
    any_value_anywhere(tmp_path, place, value)


@pytest.mark.parametrize("key", ["name", "cls", "self"])
def test_a_setting_that_python_has_a_use_for_is_refused_like_any_other(tmp_path, key):
    line = loaded(tmp_path, yaml.safe_dump(put(VALID, ["methods", 1, "settings"], {key: None})).encode())
    assert f"esd has no setting {key!r}" in line


@pytest.mark.slow
@fuzzed(1000)
@given(place=st.sampled_from(PLACES), value=VALUES)
def test_any_of_many_values_at_any_place_is_taken_or_refused_by_its_key(tmp_path, place, value):
    any_value_anywhere(tmp_path, place, value)


MUTATED = st.tuples(
    st.integers(0, 2**16), st.integers(0, 40), st.binary(max_size=8) | st.text(max_size=8).map(str.encode)
).map(lambda cut: lambda text: text[: cut[0] % len(text)] + cut[2] + text[cut[0] % len(text) + cut[1] :])
RAW = yaml.safe_dump(VALID).encode()


@fuzzed(40)
@given(raw=st.one_of(VALUES.map(lambda value: yaml.safe_dump(value).encode()), MUTATED.map(lambda cut: cut(RAW))))
def test_any_file_is_a_recipe_or_refused_in_one_line(tmp_path, raw):
    loaded(tmp_path, raw)


@pytest.mark.slow
@fuzzed(1000)
@given(
    raw=st.one_of(
        st.binary(max_size=200),
        st.text(max_size=200).map(str.encode),
        VALUES.map(lambda value: yaml.safe_dump(value).encode()),
        MUTATED.map(lambda cut: cut(RAW)),
    )
)
def test_any_of_many_files_is_a_recipe_or_refused_in_one_line(tmp_path, raw):
    loaded(tmp_path, raw)
