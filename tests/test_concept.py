import pytest

from erasure import Concept, Suite
from erasure.artifact.files import check_name
from erasure.methods.base import check_request
from erasure.methods.uce import UCE

SHIPPED = ["superhero", "cat", "twemoji", "spiderman", "van_gogh"]


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"name": ""}, "empty"),
        ({"name": "cat", "anchor": "Cat "}, "anchor equals the target"),
        ({"name": "cat", "synonyms": ("kitty",), "anchor": "kitty"}, "anchor equals the target"),
        ({"name": "cat", "neighbours": ("dog", "CAT")}, "among its own neighbours"),
        ({"name": "cat", "templates": ("a photo",)}, "where the name goes"),
        ({"name": "cat", "kind": "animal"}, "object"),
        ({"name": "cat", "colour": "red"}, "colour"),
    ],
)
def test_a_contradictory_concept_is_refused(fields, fault):
    with pytest.raises(ValueError, match=fault):
        Concept(**fields)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_suites_load_and_survive_a_round_trip(name, tmp_path):
    suite = Suite.load(name)
    suite.save(tmp_path / "copy.yaml")
    assert Suite.load(tmp_path / "copy.yaml") == suite
    groups = {prompt.group for prompt in suite.prompts()}
    assert {"target", "neighbours"} <= groups


def test_every_name_meets_every_template_once():
    suite = Suite(
        version=1,
        name="s",
        concept=Concept("cat", synonyms=("kitty",), neighbours=("owl",), templates=("{}", "{} on a mat")),
    )
    texts = [(p.text, p.group, p.label) for p in suite.prompts()]
    assert texts == [
        ("a cat", "target", "cat"),
        ("a cat on a mat", "target", "cat"),
        ("a kitty", "target", "cat"),
        ("a kitty on a mat", "target", "cat"),
        ("an owl", "neighbours", "owl"),
        ("an owl on a mat", "neighbours", "owl"),
    ]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("version: 1\nname: s\nconcept: {name: cat, neighbours: [dog]}\nspeed: 3\n", "speed"),
        ("version: 2\nname: s\nconcept: {name: cat, neighbours: [dog]}\n", "version"),
        ("version: 1\nname: s\nconcept: {name: cat, neighbours: [dog]}\nunrelated: [dog]\n", "both"),
        ("version: 1\nname: s\nconcept: {name: cat}\n", "neighbours"),
        ("version: 1\nname: [s\n", "YAML"),
        ("- just\n- a list\n", "keys and values"),
    ],
)
def test_a_broken_suite_file_is_one_line_that_names_file_and_fault(text, fault, tmp_path):
    path = tmp_path / "suite.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=fault) as caught:
        Suite.load(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_an_unknown_suite_lists_the_shipped_ones():
    with pytest.raises(FileNotFoundError, match="superhero"):
        Suite.load("superheroo")


def test_keeping_what_is_to_be_erased_is_told():
    concept = Concept("superhero", synonyms=("caped hero",))
    with pytest.raises(ValueError, match="both to be erased and to be kept"):
        check_request([concept], ["a superhero"])
    with pytest.warns(UserWarning, match="1 of the prompts to keep name what is to be erased .'a Caped Hero at night'"):
        check_request([concept], ["a Caped Hero at night", "superheroes", "a ninja"])


def test_a_default_name_may_stand_in_a_path():
    assert UCE().name_for([Concept("/e/ girl")]) == "-e- girl-uce"
    check_name(UCE().name_for([Concept("../~x\\y")]))
