"""Suggested neighbours: names that the model's text encoder takes for close, and none that mean the concept."""

import pytest

import erasure
from erasure import Concept, Suite
from erasure.methods.neighbours import candidate_names
from erasure.world.spec import spec
from tests.tiny import tiny_pipeline


@pytest.fixture(scope="module")
def world():
    return erasure.world.load()


def test_a_suites_target_gets_its_neighbours_and_its_neighbours_get_it(world):
    plan = Suite.load("superhero")
    assert erasure.suggest_neighbours(world, "caped hero", n=20)[0] != "superhero"  # a synonym finds the suite too
    assert erasure.suggest_neighbours(world, " Superhero ", n=9) == list(plan.neighbours)
    found = erasure.suggest_neighbours(world, "wizard", n=9)
    assert found[0] == "superhero" and "ninja" in found and "wizard" not in found


def test_what_no_suite_knows_is_ranked_by_the_text_encoder(world):
    """Better than chance, for concepts of the world whose families are known; the ranking reads no family."""
    names = list(spec().concepts)
    targets = [one for plan in Suite.shipped() for one in Suite.load(plan).concepts]
    known = {name for one in targets for name in (one.name, *one.neighbours)}
    hits = chance = 0.0
    for name in sorted({*names} - known):
        family = {one for one in names if spec().concepts[one].family == spec().concepts[name].family} - {name}
        near = erasure.suggest_neighbours(world, name, n=5, among=names)
        assert name not in near
        hits += len(family & {*near}) / 5
        chance += len(family) / (len(names) - 1)
    assert hits > 2 * chance  # 23 % and 9 % of 13 concepts


def test_names_of_the_concept_are_left_out_and_own_ones_come_first(world):
    concept = Concept("motor bike", synonyms=("moped bike",), neighbours=("bus",))  # in no shipped suite
    among = ["a red moped bike", "bike", "Motor  Bike", "taxi", "rose"]
    assert erasure.suggest_neighbours(world, concept, among=among)[0] == "bus"
    assert sorted(erasure.suggest_neighbours(world, concept, among=among)[1:]) == ["rose", "taxi"]


def test_styles_are_suggested_for_styles_alone(world):
    plans = [*map(Suite.load, Suite.shipped())]
    plain = candidate_names(plans, world=True, style=False)
    assert "noto style" not in plain and "noto" not in plain and "wizard" in plain
    assert "noto style" in candidate_names(plans, world=True) and "noto style" not in candidate_names(
        plans, world=False
    )
    assert {"Batman", "Claude Monet", "bicycle"} <= {*candidate_names(plans, world=False)}
    assert "noto" in erasure.suggest_neighbours(world, Concept("twemoji", kind="style"), n=2)


def test_any_base_has_an_answer_and_nothing_explicit_is_suggested():
    pipe = tiny_pipeline()
    found = erasure.suggest_neighbours(pipe, "Batman")
    assert found[0] == "Spiderman" and "Batman" not in found and len(found) == 8
    assert not {"nudity", "a naked adult"} & {*erasure.suggest_neighbours(pipe, "a person", n=400)}
    assert erasure.suggest_neighbours(pipe, "nudity", n=2) == ["an adult in a swimsuit", "an adult in sportswear"]


@pytest.mark.parametrize(
    ("concept", "n", "fault"), [("", 8, "needs a name"), ("cat", 0, "give 1 or more"), ("cat " * 99, 8, "token")]
)
def test_what_cannot_be_answered_is_refused(world, concept, n, fault):
    with pytest.raises(ValueError, match=fault):
        erasure.suggest_neighbours(world, concept, n=n)
