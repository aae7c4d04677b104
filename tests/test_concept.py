import dataclasses
import re
from pathlib import Path

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

import erasure
from erasure import Concept, Suite, erase
from erasure.artifact.files import check_name
from erasure.io import fault_of
from erasure.methods.base import Request, check_request
from erasure.methods.uce import UCE
from erasure.wording import BARE, listed, naming, same, with_article
from erasure.world.spec import spec
from tests.tiny import tiny_pipeline

SHIPPED = sorted(path.stem for path in Path(erasure.__file__).with_name("suites").glob("*.yaml"))


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


@pytest.mark.parametrize("name", ["superhero", "Yu-Gi-Oh!", "C++", "#blessed"])
def test_a_description_that_names_the_target_is_refused_whatever_signs_the_name_has(name):
    for text in (f"the {name} of the city", f"a game like {name.lower()}"):
        with pytest.raises(ValueError, match="say it without the name"):
            Suite(**{**SOUND, "concept": Concept(name, neighbours=("dog",)), "words": {"descriptions": [text]}})
    assert Suite(**{**SOUND, "concept": Concept(name, neighbours=("dog",)), "words": {"descriptions": ["a caped man"]}})


SOUND = {"version": 1, "name": "s", "concept": {"name": "cat", "neighbours": ["dog"]}}
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("images_per_prompt", 0, "greater than 0; got 0"),
        ("images_per_prompt", -2, "greater than 0; got -2"),
        ("images_per_prompt", 10**9, "less than or equal to 10000"),
        ("images_per_prompt", NAN, "finite number; got nan"),
        ("num_inference_steps", 0, "greater than 0; got 0"),
        ("num_inference_steps", INF, "finite number; got inf"),
        ("num_inference_steps", 2.5, "a whole number is needed.*got 2.5"),
        ("num_inference_steps", 1001, "less than or equal to 1000; got 1001"),
        ("guidance_scale", NAN, "finite number; got nan"),
        ("guidance_scale", INF, "finite number; got inf"),
        ("guidance_scale", -0.5, "greater than or equal to 0; got -0.5"),
        ("guidance_scale", 1e6, "less than or equal to 100; got 1000000.0"),
        ("name", " ", "at least 1 character"),
        ("base", "", "at least 1 character"),
        ("unrelated", ["sun", ""], ".1: .*at least 1 character"),
        ("keep", [""], ".0: .*at least 1 character"),
        ("concept", {"name": "cat", "neighbours": ["dog"], "synonyms": [""]}, "synonyms.0: .*at least 1 character"),
        ("concept", {"name": "cat", "neighbours": ["dog"], "templates": []}, "templates: .*at least 1 item"),
        ("words", {"paraphrases": ["pet", ""]}, "paraphrases.1: .*at least 1 character"),
        ("words", {"translations": {"es": [""]}}, "translations.es.0: .*at least 1 character"),
    ],
)
def test_a_value_out_of_its_range_is_refused_when_a_suite_is_read(field, value, allowed):
    kind = TypeAdapter(Suite)
    assert kind.validate_python(SOUND).name == "s"
    with pytest.raises(ValidationError) as caught:
        kind.validate_python({**SOUND, field: value})
    assert re.search(rf"^{field}.*{allowed}", fault_of(caught.value)), fault_of(caught.value)


def test_a_file_names_the_field_and_what_is_allowed(tmp_path):
    path = tmp_path / "suite.yaml"
    path.write_text("version: 1\nname: s\nconcept: {name: cat, neighbours: [dog]}\nimages_per_prompt: 0\n")
    with pytest.raises(ValueError, match=r"suite.yaml: images_per_prompt: .*greater than 0; got 0$"):
        Suite.load(path)


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
    assert UCE().name_for(Request((Concept("/e/ girl"),))) == "-e- girl-uce"
    check_name(UCE().name_for(Request((Concept("../~x\\y"),))))


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("noun", "written"),
    [
        ("cat", "a cat"),
        ("owl", "an owl"),
        ("umbrella", "an umbrella"),
        ("undead walker", "an undead walker"),
        ("urn", "an urn"),
        ("uncle", "an uncle"),
        ("unidentified object", "an unidentified object"),
        ("unicorn", "a unicorn"),
        ("university", "a university"),
        ("uniform", "a uniform"),
        ("ukulele", "a ukulele"),
        ("used car", "a used car"),
        ("u-boat", "a u-boat"),
        ("ufo", "a ufo"),
        ("european castle", "a european castle"),
        ("eucalyptus", "a eucalyptus"),
        ("ewe", "a ewe"),
        ("one-eyed pirate", "a one-eyed pirate"),
        ("once-proud king", "a once-proud king"),
        ("onion", "an onion"),
        ("hour", "an hour"),
        ("nudity", "nudity"),
        ("self-harm", "self-harm"),
        ("hourglass", "an hourglass"),
        ("honest man", "an honest man"),
        ("heir", "an heir"),
        ("house", "a house"),
        ("herb", "a herb"),
        ("x-ray", "an x-ray"),
        ("s-shaped road", "an s-shaped road"),
        ("t-shirt", "a t-shirt"),
        ("8-bit hero", "an 8-bit hero"),
        ("18th-century house", "an 18th-century house"),
        ("180 degree turn", "180 degree turn"),
        ("1950s diner", "a 1950s diner"),
        ("3d render", "a 3d render"),
        ("éclair", "an éclair"),
        ("e\u0301clair", "an e\u0301clair"),
        # has one already, or needs none
        ("a superhero", "a superhero"),
        ("an owl", "an owl"),
        ("The Eiffel Tower", "The Eiffel Tower"),
        ("the Eiffel Tower", "the Eiffel Tower"),
        ("my dog", "my dog"),
        ("two cats", "two cats"),
        ("3 cats", "3 cats"),
        ("someone", "someone"),
        ("", ""),
        (" ", " "),
        # names
        ("Spiderman", "Spiderman"),
        ("Van Gogh", "Van Gogh"),
        ("Batman in the rain", "Batman in the rain"),
        ("European", "European"),
        ("European castle", "a European castle"),
        ("American flag", "an American flag"),
        ("Indian Ocean", "Indian Ocean"),
        ("santa", "santa"),
        ("猫", "猫"),
        ("кошка", "кошка"),
        # plurals
        ("grapes", "grapes"),
        ("grapes in a bowl", "grapes in a bowl"),
        ("scissors", "scissors"),
        ("flowers", "flowers"),
        ("people", "people"),
        ("children playing", "children playing"),
        ("bag of grapes", "a bag of grapes"),
        ("man in jeans", "a man in jeans"),
        ("woman wearing glasses", "a woman wearing glasses"),
        ("bus", "a bus"),
        ("dress", "a dress"),
        ("cactus", "a cactus"),
        ("iris", "an iris"),
        ("lens", "a lens"),
        ("cat's cradle", "a cat's cradle"),
    ],
)
def test_articles(noun, written):
    assert with_article(noun) == written
    assert with_article(written) == written  # never a second one


def test_the_worlds_captions_are_those_it_was_trained_on():
    """By the rule of then: an before a, e, i, o; nothing before BARE; a before everything else."""
    for emoji in spec().concepts.values():
        for kind, names in {"name": (emoji.name,), "synonym": emoji.synonyms}.items():
            then = [n if n in BARE else f"{'an' if n[0] in 'aeio' else 'a'} {n}" for n in names]
            assert list(emoji.phrases()[kind]) == then


TWO, ONE = "Beyonce\u0301", "Beyonc\u00e9"


def test_two_spellings_of_a_name_are_one_name():
    assert TWO != ONE and same(TWO, ONE) and same(TWO.upper(), f" {ONE} ") and same("van  gogh", "Van Gogh")
    concept = Concept(TWO, synonyms=(f"Queen {TWO}",), anchor=f"not {TWO}", templates=(f"{TWO} and {{}}",))
    assert concept == Concept(ONE, synonyms=(f"Queen {ONE}",), anchor=f"not {ONE}", templates=(f"{ONE} and {{}}",))
    assert UCE().name_for(Request((concept,))) == f"{ONE}-uce"
    for fields in ({"anchor": TWO}, {"neighbours": (TWO,)}):
        with pytest.raises(ValueError, match="anchor equals|own neighbours"):
            Concept(ONE, **fields)
    with pytest.raises(ValueError, match="both"):
        Suite(version=1, name="s", concept=Concept("a", neighbours=(TWO,)), unrelated=(ONE,))
    with pytest.raises(ValueError, match="both"):
        Suite(version=1, name="s", concept=Concept("a", neighbours=("b",)), unrelated=(TWO,), keep=(ONE,))
    with pytest.raises(ValueError, match="both to be erased and to be kept"):
        check_request([Concept(ONE)], [TWO])
    assert naming([f"{TWO} sings"], [ONE]) == [f"{TWO} sings"] and naming([f"{ONE} sings"], [TWO])


def test_what_is_kept_is_one_spelling_too():
    edit = erase(tiny_pipeline(), "superhero", keep=[TWO, "ninja"], apply=False)
    assert edit.config["keep"] == [ONE, "ninja"]


def test_a_slip_in_a_key_is_told_with_the_key_that_was_meant(tmp_path):
    file = tmp_path / "suite.yaml"
    text = (Path(erasure.concept.__file__).parent / "suites" / "superhero.yaml").read_text("utf-8")
    for right, wrong, key in (("unrelated:", "unrelatd:", "unrelated"), ("  synonyms:", "  synonym:", "synonyms")):
        file.write_text(text.replace(right, wrong, 1), "utf-8")
        with pytest.raises(ValueError, match=rf"no such key \(did you mean '{key}'\?\)"):
            Suite.load(file)


def test_one_string_with_commas_may_be_several_prompts():
    assert listed("a ninja") == ["a ninja"] and listed(["a cat, asleep"]) == ["a cat, asleep"]
    with pytest.raises(ValueError, match=r"give several as a list, \['ninja', 'wizard'\]"):
        listed("ninja, wizard")


# --- what cannot be seen, what stands twice, what is no name ----------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["super\u200bhero", "\ufeffsuperhero", "superhero\x00", "\u2066superhero\u2069", "super\u00adhero"]
)
def test_a_pasted_name_is_the_word_that_everybody_types(text):
    concept = Concept(text, synonyms=(text + " man",), neighbours=("nin\u200bja",))
    assert concept == Concept("superhero", synonyms=("superhero man",), neighbours=("ninja",))
    with pytest.raises(ValueError, match="both to be erased and to be kept|the target is among its own neighbours"):
        Concept("superhero", neighbours=(text,))


def test_joiners_that_words_are_written_with_stay():
    for text in ("می\u200cخواهم", "👩\u200d🚒", "क्\u200dष"):
        assert Concept(text).name == text


@pytest.mark.parametrize("text", ["", " ", "\u200b", "\u200d", "\u202e", "\x00", "\ufeff \u200b"])
def test_a_name_of_nothing_is_refused_in_one_line(text):
    for call in (lambda: Concept.of(text), lambda: Concept("cat", synonyms=(text,))):
        with pytest.raises(ValueError, match="needs a name|at least 1 character"):
            call()
    with pytest.raises(ValueError) as caught:
        Concept.of(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("wrong", [5, None, b"cat", ["cat"], {"name": "cat"}])
def test_what_is_no_concept_is_refused_in_one_line(wrong):
    with pytest.raises(ValueError, match="a concept is a name or a Concept; got") as caught:
        Concept.of(wrong)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("wrong", [5, None, b"cat", {"cat": 1}, [None], [["cat"]]])
def test_what_is_no_list_of_strings_is_refused(wrong):
    with pytest.raises(ValueError, match="one string or a list of strings is needed; got"):
        listed(wrong)


def test_what_stands_twice_is_asked_once():
    """The same prompt with the same noise is one picture, however often it is counted."""
    cat = Concept("cat", synonyms=("cat", "kitty", "kitty"), neighbours=("dog", "dog"))
    twice = Suite(
        version=1, name="x", concept=cat, also=(Concept("kitty", neighbours=("dog",)),), unrelated=("sun", "sun")
    )
    asked = [prompt.text for prompt in twice.prompts()]
    assert asked == ["a cat", "a kitty", "a dog", "a sun"]
    assert twice.phrases == ("cat", "kitty") and twice.neighbours == ("dog",)


def test_braces_in_a_sentence_are_text():
    concept = Concept("cat", templates=("{} in {x}", "{0.__class__} of {}"))
    suite = Suite(version=1, name="x", concept=dataclasses.replace(concept, neighbours=("dog",)))
    assert suite.prompts()[0].text == "a cat in {x}"


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


def made(pipe, concept, **given):
    return erase(pipe, concept, apply=False, **{"keep": ["wizard"], "preset": "official-2025", **given})


def test_a_concept_that_stands_twice_weighs_once(pipe):
    one, several = made(pipe, "superhero"), made(pipe, ["superhero", "Superhero ", Concept("superhero")])
    assert several.name == one.name and several.config["concepts"] == one.config["concepts"]
    assert all(torch.equal(one.tensors[name], several.tensors[name]) for name in one.tensors)
    assert made(pipe, "superhero", keep=["wizard", "wizard"]).config["keep"] == ["wizard"]
    with pytest.raises(ValueError, match="two concepts are called 'superhero', and differ"):
        made(pipe, ["superhero", Concept("superhero", anchor="ninja")])


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ({"concept": {"name": "cat"}}, "a concept is a name, a Concept, or a list of them; got {'name': 'cat'}"),
        ({"concept": 5}, "a concept is a name, a Concept, or a list of them; got 5"),
        ({"concept": [None]}, "a concept is a name or a Concept; got None"),
        ({"keep": {"wizard": 1}}, "one string or a list of strings is needed"),
        ({"keep": [None]}, "one string or a list of strings is needed; got None in it"),
        ({"name": "../x"}, "unsafe name of an erasure; got '../x'"),
        ({"name": 5}, "the name of an erasure is text; got 5"),
        ({"concept": b"cat"}, "a concept is a name, a Concept, or a list of them; got b'cat'"),
        ({"method": None}, "a method is a name or a class; got None"),
        ({"checkpoint": ""}, "an empty path; got ''"),
        ({"checkpoint": 5}, "no path; got 5"),
    ],
)
def test_what_cannot_be_erased_or_saved_is_refused_before_any_work(pipe, given, fault, monkeypatch):
    monkeypatch.setattr(UCE, "erase", None)  # it would be called, and fail
    with pytest.raises(ValueError, match=re.escape(fault)) as caught:
        made(pipe, **{"concept": "superhero", **given})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
@pytest.mark.parametrize("method", ["uce", "esd"])
def test_a_model_that_holds_nan_is_refused(part, method):
    broken = tiny_pipeline()
    next(getattr(broken, part).parameters()).data.view(-1)[-1] = torch.nan
    with pytest.raises(ValueError, match=f"{part}..* holds NaN or infinity: the model is broken"):
        erase(broken, "superhero", method, keep=["wizard"], progress=False)


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda: Concept(""), "a concept needs a name; got an empty string"),
        (lambda: Concept(5), "Concept: name: a text is needed; got 5"),
        (lambda: Concept("cat", kind="thing"), "Concept: kind: .*'object', 'style'.*; got 'thing'"),
        (lambda: Concept("cat", colour="red"), "Concept: colour: no such key"),
        (lambda: Concept(), "Concept: name: Field required"),
        (lambda: Suite(**{**SOUND, "images_per_prompt": 0}), "Suite: images_per_prompt: .*greater than 0; got 0"),
        (lambda: Suite(**{**SOUND, "concept": {"name": ""}}), "Suite: concept: a concept needs a name"),
    ],
)
def test_what_is_wrong_in_python_is_said_in_one_line(made, said):
    with pytest.raises(ValueError, match=rf"^{said}[^\n]*$"):
        made()
