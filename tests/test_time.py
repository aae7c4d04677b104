"""TIME against a plain per-layer reference in float64, and the pairing of tokens."""

import pytest
import torch

from erasure import Concept
from erasure.backbone import backbone_of
from erasure.methods.time import SENTENCES, TIME, matched
from tests.reference import time as reference
from tests.test_uce import edited_weights, relative_error
from tests.tiny import make, tiny, tiny_pipeline

# In the paper's case the source is the destination with words left out.
PAIRS = [("cat", "the cat"), ("superhero", "superhero ninja")]
KEPT = ("a wizard", "batman")


def double_pipeline(**shape):
    pipe = tiny_pipeline(**shape)
    pipe.unet.double(), pipe.text_encoder.double()
    return pipe


def edit(pipe, pairs=PAIRS, kept=(), **settings):
    concepts = [Concept(source, anchor=destination) for source, destination in pairs]
    return make(pipe, concepts, "time", keep=kept, **{"preset": "official-2023", **settings})


@pytest.mark.parametrize("pairs", [PAIRS[:1], PAIRS], ids=["one", "two"])
@pytest.mark.parametrize(
    ("preset", "templates", "keys"), [("official-2023", ("{}",), False), ("paper", SENTENCES, True)]
)
@pytest.mark.parametrize("shape", [{}, {"prediction_type": "v_prediction", "width": 48}], ids=["sd1", "sd2"])
def test_weights_equal_the_per_layer_reference(shape, preset, templates, keys, pairs):
    pipe = double_pipeline(**shape)
    theirs = reference.edit(pipe, pairs, templates=templates, keys=keys)
    assert relative_error(edited_weights(pipe, edit(pipe, pairs, preset=preset)), theirs) <= 1e-6


@pytest.mark.slow
def test_weights_equal_the_reference_in_the_shape_of_stable_diffusion():
    pipe = double_pipeline(width=768, channels=(16, 32, 32, 32))
    ours = edited_weights(pipe, edit(pipe))
    assert len(ours) == 16  # values alone
    assert relative_error(ours, reference.edit(pipe, PAIRS, templates=("{}",), keys=False)) <= 1e-6


@pytest.mark.parametrize("settings", [{"lamb": 1.0}, {"keys": True}])
def test_settings_and_what_is_kept_mean_what_the_equation_says(settings):
    pipe = double_pipeline()
    ours = edited_weights(pipe, edit(pipe, kept=KEPT, **settings))
    theirs = reference.edit(pipe, PAIRS, templates=("{}",), kept=KEPT, **{"keys": False, **settings})
    assert relative_error(ours, theirs) <= 1e-6


# Numbers are words; 0 starts, 9 ends a prompt, and twelve positions are padded.
@pytest.mark.parametrize(
    ("source", "destination", "places"),
    [
        ([0, 1, 9], [0, 5, 1, 9], [0, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 11]),  # a word put in
        ([0, 1, 2, 9], [0, 1, 3, 9], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]),  # a word for a word
        ([0, 1, 2, 9], [0, 1, 3, 4, 9], [0, 1, 3, 4, 5, 6, 7, 8, 9, 10, 11, 11]),  # its last piece for the word
        ([0, 1, 2, 3, 9], [0, 1, 4, 9], [0, 1, 2, 2, 3, 4, 5, 6, 7, 8, 9, 10]),  # the word for both pieces
        ([0, 1, 2, 9], [0, 1, 9], [0, 1, 2, 2, 3, 4, 5, 6, 7, 8, 9, 10]),  # no word for it: what follows
        ([0, 2, 1, 9], [0, 3, 1, 9], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]),  # in front
        ([2, 9], [3, 4, 9], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 11]),  # no start token
        ([2, 9], [9], [0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]),  # to the empty prompt, no start token
    ],
)
def test_tokens_are_paired_with_what_stands_in_their_place(source, destination, places):
    assert matched(source, destination, length=12) == places


def test_the_pairing_is_the_papers_wherever_that_is_defined():
    random = torch.Generator().manual_seed(0)
    for _ in range(200):
        words = torch.randint(1, 9, (int(torch.randint(1, 9, (1,), generator=random)),), generator=random).tolist()
        left = [word for word in words if torch.rand(1, generator=random) > 0.4]
        source, destination = [0, *left, 9], [0, *words, 9]
        assert matched(source, destination, length=12) == reference.match(source, destination, 12)


def test_a_and_an_are_one_word():
    pipe = tiny_pipeline()
    backbone = backbone_of(pipe)
    [(x, y)] = TIME().pair_rows(backbone, [("a cat", "an animal cat")], "hidden")
    other = backbone.encode(["an animal cat"]).hidden[0]
    assert len(x) == 77
    torch.testing.assert_close(y[:3], other[[0, 1, 3]])  # start, "an" for "a", and "cat" past the new word


def test_words_that_two_prompts_share_do_not_move():
    [(x, y)] = TIME().pair_rows(backbone_of(tiny_pipeline()), [("a photo of a cat", "a photo of a ninja")], "hidden")
    assert torch.equal(x[:5], y[:5]) and not torch.isclose(x[5:], y[5:]).all(dim=1).any()


def test_only_the_span_that_was_asked_for_is_moved():
    [(x, _)] = TIME(token_span="last_subject").pair_rows(backbone_of(tiny_pipeline()), [("a cat", "a ninja")], "hidden")
    assert len(x) == 1


def test_values_alone_unless_keys_are_asked_for():
    pipe = tiny_pipeline()
    values, both = (set(edit(pipe, keys=keys).parameter_names) for keys in (False, True))
    assert values == {name for name in both if "to_v" in name} and len(both) == 2 * len(values)


@pytest.mark.parametrize("architecture", ["sdxl", "sd3", "flux"])
def test_every_architecture_pairs_its_own_tokens(architecture):
    pipe = tiny(architecture)
    made = edit(pipe, [("superhero", "ninja")], preset="paper")
    report = made.config["report"]
    assert report["target"]["moved"] > 0.05
    before = {name: p.clone() for name, p in backbone_of(pipe).denoiser.named_parameters()}
    made.apply(pipe)
    assert any(not torch.equal(p, before[name]) for name, p in backbone_of(pipe).denoiser.named_parameters())
    made.remove(pipe)
    assert all(torch.equal(p, before[name]) for name, p in backbone_of(pipe).denoiser.named_parameters())


@pytest.mark.parametrize(
    ("concept", "settings", "fault"),
    [
        (Concept("spider-man", anchor="spider - man"), {}, "did not move"),
        ([Concept("cat", anchor="ninja"), "ninja"], {}, "itself to be erased"),
        ("cat", {"templates": ["a photo"]}, "write at least"),
        ("cat", {"templates": []}, "write at least"),
        ("cat", {"keys": "perhaps"}, "keys"),
        ("cat", {"lamb": -1.0}, "lamb: .*greater than or equal to 0; got -1"),
        ("cat", {"preset": "official"}, "official-2023"),
    ],
)
def test_a_bad_request_is_refused_with_advice(concept, settings, fault):
    with pytest.raises(ValueError, match=fault):
        make(tiny_pipeline(), concept, "time", keep=[], **{"preset": "official-2023", **settings})
