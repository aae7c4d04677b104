"""Trained methods: what cannot work is refused before the base is sampled, and each concept goes to its own anchor."""

import pytest
import torch

from erasure import Concept
from erasure.backbone import backbone_of
from erasure.methods import bank, method_class
from erasure.methods.base import Request, check_change, replacements
from erasure.train import Diverged, Training
from tests.test_train import quiet, vector
from tests.tiny import make, tiny

SMALL = {"trajectories": 4, "keep_steps": 1, "num_inference_steps": 2, "articles": True}
CONCEPTS = [Concept("superhero", anchor="cat"), Concept("ninja", anchor="robot")]


def sampled(*_, **__):
    raise AssertionError("the base was sampled")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lr": -1e-4}, "lr is above 0"),
        ({"lr": 0.0}, "lr is above 0"),
        ({"lr": 3e38}, "lr is above 0 and at most 1e.30"),
        ({"clip": 0.0}, "clip is a norm above 0"),
        ({"warmup": -1}, "warmup is at least 0"),
        ({"seed": 2**41}, "seed is at most"),
        ({"optimizer": "adamw8bit"}, "needs bitsandbytes"),
    ],
)
@pytest.mark.parametrize("key", ["esd", "spm", "concept-ablation"])
def test_settings_that_cannot_work_are_refused_before_the_base_is_sampled(monkeypatch, key, settings, said):
    monkeypatch.setattr(bank.TrajectoryBank, "sample", sampled)
    monkeypatch.setattr(bank.DrawnBank, "draw", sampled)
    with pytest.raises(ValueError, match=said):
        make(tiny("sd1"), "superhero", key, **settings)


@pytest.mark.parametrize(
    ("key", "settings"),
    [
        ("spm", {"adapter": "weights"}),
        ("spm", {"saliency": 0.5, "optimizer": "adam"}),
        ("adv-unlearn", {"adapter": "lora"}),
    ],
)
def test_methods_that_train_one_thing_alone_refuse_to_train_another(key, settings):
    with pytest.raises(ValueError, match="leave (it|them) out"):
        make(tiny("sd1"), "superhero", key, keep=["wizard"], **settings)


def test_a_gate_of_one_observation_is_refused():
    look = {"generations": 1, "first": 0, "last": 1, "num_inference_steps": 2, "articles": False}
    with pytest.raises(ValueError, match="keep more"):
        make(tiny("sd1"), "superhero", "gloce", keep=["wizard"], **look)


def test_every_prompt_has_the_anchor_of_its_own_concept():
    concepts = [Concept("superhero", synonyms=["Batman"], anchor="cat"), Concept("ninja")]
    prompts = ["superhero", "Batman", "ninja", "a superhero", "a ninja"]
    kept = ["wizard", "king"]
    assert replacements(prompts, concepts, kept) == [["cat"], ["cat"], kept, ["cat"], kept]


def rows_of(backbone, names):
    return {name: backbone.encode([name]).text.hidden[0] for name in names}


@pytest.mark.parametrize("lacking", [False, True], ids=["two-anchors", "one-anchor"])
def test_age_moves_each_concept_onto_its_own_anchor(lacking):
    backbone, keep = backbone_of(tiny("sd1")), ["wizard", "king"]
    concepts = [CONCEPTS[0], Concept("ninja") if lacking else CONCEPTS[1]]
    method = method_class("age")(**SMALL)
    request = Request(concepts=concepts, keep=keep, progress=False)
    prompts = method.prompts(backbone, request)
    text = backbone.encode(prompts).text
    held = method.bank(backbone, text, request, None, "bank")
    anchors, targets = method.anchors(backbone, request, held, text)
    known = rows_of(backbone, ["cat", "robot", *keep])
    for row, prompt in enumerate(prompts):
        found = next(name for name, hidden in known.items() if torch.equal(hidden, anchors.hidden[row]))
        own = {"superhero": ["cat"], "ninja": keep if lacking else ["robot"]}
        assert found in next(names for phrase, names in own.items() if phrase in prompt)
    assert torch.isfinite(targets).all()


@pytest.mark.parametrize("lacking", [False, True], ids=["two-anchors", "one-anchor"])
def test_random_labels_of_a_concept_are_its_own_anchor_or_of_the_keep_list(monkeypatch, lacking):
    backbone, keep, seen = backbone_of(tiny("sd1")), ["wizard", "king"], []
    concepts = [CONCEPTS[0], Concept("ninja") if lacking else CONCEPTS[1]]
    method = method_class("random-label")(**{**SMALL, "trajectories": 8}, lr=1e-4)
    request = Request(concepts=concepts, keep=keep, progress=False)
    held = method.pictures(backbone, backbone.encode(method.prompts(backbone, request)).text, request, None, "bank")
    predicted = bank.DrawnBank.predicted

    def noted(self, own, text):
        seen.append((self.prompt, text))
        return predicted(self, own, text)

    monkeypatch.setattr(bank.DrawnBank, "predicted", noted)
    method.objective(backbone, method.student(backbone), request, None)
    label, text = seen[0]
    known, prompts = rows_of(backbone, ["cat", "robot", *keep]), method.prompts(backbone, request)
    for row, prompt in zip(label.tolist(), held.prompt.tolist(), strict=True):
        found = next(name for name, hidden in known.items() if torch.equal(hidden, text.hidden[row]))
        own = {"superhero": ["cat"], "ninja": keep if lacking else ["robot"]}
        assert found in next(names for phrase, names in own.items() if phrase in prompts[prompt])


def test_weights_that_a_last_step_broke_are_not_returned():
    _, parameters = vector()
    with pytest.raises(Diverged, match="weights stopped being finite at step 0"):
        quiet(parameters, lambda draw: parameters["w"].sum() * 1e10, Training(1, 1e30, optimizer="sgd"))


def test_a_change_that_is_not_finite_is_named_as_that():
    with pytest.raises(ValueError, match="did not stay finite"):
        check_change(float("inf"))


def test_the_published_schedule_of_spm_falls_three_times():
    training = method_class("spm").preset("paper").training()
    lowest = [step for step in range(500, 3000) if training.factor(step) < 1e-5]
    assert training.restarts == 3 and len({round(step / 833) for step in lowest}) == 3


WEIGHTS = [
    ("age", "hold"), ("age", "retain"), ("adv-unlearn", "eta"), ("concept-ablation", "prior"), ("esd", "eta"),
    ("esd", "retain"), ("esd", "alpha"), ("receler", "eta"), ("salun", "retain"), ("spm", "anchoring"), ("spm", "eta"),
    ("leco", "alpha"), ("z-erase", "retain"), ("z-erase", "eta"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "setting"), WEIGHTS)
def test_a_weight_below_zero_would_do_the_opposite_and_is_refused(key, setting):
    with pytest.raises(ValueError, match=f"{key}: {setting}"):
        method_class(key).preset(**{setting: -1.0})


@pytest.mark.parametrize("key", ["esd", "eap", "stereo", "leco", "erasediff", "spm", "cure", "sld", "adavd"])
def test_an_anchor_that_is_not_used_is_named(key):
    said = f"{key} draws nothing in a concept's place, so the anchor 'cat' is not used"
    pipe = tiny("sd1")
    request = Request((Concept("superhero", anchor="cat"),), keep=("wizard",))
    with pytest.warns(UserWarning, match=said):
        method_class(key).preset().validate(backbone_of(pipe), request)


@pytest.mark.parametrize("key", ["uce", "concept-ablation", "age", "random-label", "gloce", "mace-cfr"])
def test_an_anchor_that_is_used_is_not(key, recwarn):
    request = Request((Concept("superhero", anchor="cat"),), keep=("wizard",))
    method_class(key).preset().validate(backbone_of(tiny("sd1")), request)
    assert not [one for one in recwarn if "is not used" in str(one.message)]


def test_an_anchor_that_is_the_target_with_an_article_is_refused():
    with pytest.raises(ValueError, match="the anchor equals the target"):
        Concept("superhero", anchor="a superhero")
    with pytest.raises(ValueError, match="is itself to be erased"):
        make(tiny("sd1"), [Concept("superhero", anchor="a cat"), Concept("cat")], "uce")


@pytest.mark.parametrize(
    ("concept", "key", "settings", "said"),
    [
        ("superhero", "leco", {"neutral": "a superhero"}, "neutral .* is itself to be erased"),
        (Concept("pop art", kind="style"), "uce", {"style_anchor": "art " * 80}, "longer than the text encoder"),
        ("beard", "esd", {"erase_from": "santa", "retain": 1.0}, "'santa' is kept as it is"),
        ("superhero", "leco", {"neutral": "person " * 80}, "longer than the text encoder"),
        ("beard", "esd", {"erase_from": "santa " * 80}, "longer than the text encoder"),
    ],
)
def test_a_setting_that_is_a_prompt_is_checked_as_anchors_are(concept, key, settings, said):
    with pytest.raises(ValueError, match=said):
        make(tiny("sd1"), concept, key, keep=["santa", "wizard"], progress=False, **settings)
    fine = {"leco": {"neutral": "a person"}, "uce": {"style_anchor": "art"}, "esd": {"erase_from": "santa"}}[key]
    request = Request((concept if isinstance(concept, Concept) else Concept(concept),), keep=("wizard",))
    method_class(key).preset(**fine).validate(backbone_of(tiny("sd1")), request)
