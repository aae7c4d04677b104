"""MACE's closed-form refinement against a plain per-layer reference in float64, and its guarantees."""

import pytest
import torch

from erasure import Concept, world
from erasure.backbone import backbone_of
from erasure.methods.gram import Gram
from erasure.methods.mace_cfr import MACECFR, STYLES, THINGS, common
from erasure.methods.resolve import resolve
from erasure.methods.ridge import Problem, condensed, solve
from tests.reference import mace_cfr as reference
from tests.slow import first
from tests.test_speed import WIDE, change_error, changes, double
from tests.test_uce import edited_weights, relative_error
from tests.tiny import identical, make, tiny, tiny_pipeline, weights

ONE = [Concept("superhero", anchor="a ninja")]
MANY = [*ONE, Concept("the cat", anchor="animal"), Concept("van gogh", anchor="a wizard")]
KEPT = ["a wizard", "batman", "style"]
PLAIN = {"preset": "object", "lamb": 0.5, "preserve_scale": 1.0, "keep_span": "all"}


def refined(pipe, concepts=ONE, keep=KEPT, **settings):
    return make(pipe, concepts, "mace-cfr", keep=keep, **{**PLAIN, **settings})


def sentences(concepts):
    return [(t.format(c.name), t.format(c.anchor)) for c in concepts for t in THINGS]


@pytest.mark.parametrize("all_words", first([False, True], True), ids=["around", "all-words"])
@pytest.mark.parametrize("concepts", [pytest.param(ONE, marks=pytest.mark.slow), MANY], ids=["one", "many"])
@pytest.mark.parametrize("pipeline", [{}, pytest.param(WIDE, marks=pytest.mark.slow)], ids=["sd1", "sd1.4-shaped"])
def test_weights_equal_the_per_layer_reference(pipeline, concepts, all_words):
    pipe = double(**pipeline)
    ours = edited_weights(pipe, refined(pipe, concepts, all_words=all_words))
    theirs = reference.edit(pipe, sentences(concepts), KEPT, all_words=all_words)
    assert relative_error(ours, theirs) <= 1e-6


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"lamb": 100.0}, {"lamb": 100.0}),
        pytest.param({"preserve_scale": 0.1}, {"s": 0.1}, marks=pytest.mark.slow),  # with corpora below
        pytest.param(
            {"preserve_scale": 0.1, "domain_scale": 30.0}, {"s": 0.1, "w_domain": 30.0}, marks=pytest.mark.slow
        ),
        ({"preserve_scale": 0.1, "preserve_scale_squared": True}, {"s": 0.01}),
    ],
    ids=["lamb", "s", "w", "s-squared"],
)
def test_every_setting_means_what_the_paper_says(ours, theirs):
    pipe = double()
    edited, expected = edited_weights(pipe, refined(pipe, **ours)), reference.edit(pipe, sentences(ONE), KEPT, **theirs)
    assert change_error(pipe, edited, expected) <= 1e-5
    assert relative_error(edited_weights(pipe, refined(pipe)), expected) > 1e-4  # and it is not the default


def test_a_general_and_a_domain_corpus_are_weighed_as_published(tmp_path):
    pipe = double()
    general, domain = ["a photo of a wizard", "an animal"], ["spiderman, batman", "a photo"]
    for name, captions in (("general", general), ("domain", domain)):
        Gram.of(backbone_of(pipe), captions).save(tmp_path / name)
    files = {"corpus": str(tmp_path / "general"), "corpus_scale": 0.0, "domain": str(tmp_path / "domain")}
    edit = refined(pipe, preserve_scale=0.3, domain_scale=7.0, **files)
    expected = reference.edit(pipe, sentences(ONE), [*KEPT, *domain], general=general, s=0.3, w_domain=7.0)
    assert change_error(pipe, edited_weights(pipe, edit), expected) <= 1e-5
    assert edit.config["settings"]["domain"] == "domain" and edit.config["settings"]["corpus"] == "general"


@pytest.mark.slow
def test_weights_equal_the_reference_on_emoji_world():
    pipe = world.load()
    pipe.unet.double(), pipe.text_encoder.double()
    concepts, keep = [Concept("superhero", anchor="astronaut"), Concept("cat", anchor="dog")], ["a wizard", "a fox"]
    ours = edited_weights(pipe, refined(pipe, concepts, keep))
    assert relative_error(ours, reference.edit(pipe, sentences(concepts), keep)) <= 1e-6


def test_the_words_around_the_concept_become_those_around_the_anchor():
    backbone = backbone_of(double(width=128))
    ours, theirs = "a photo of superhero asleep", "a photo of a ninja asleep"
    x, y = MACECFR().sentence_rows(backbone, [(ours, theirs)], "hidden")
    t = solve(Problem(x, y, torch.zeros(128, 128), lamb=1e-9)).matrix
    before, after = (backbone.encode([p]).hidden[0].double() for p in (ours, theirs))
    length = backbone.pipe.tokenizer.model_max_length
    n, m = (len(backbone.pipe.tokenizer(p).input_ids) for p in (ours, theirs))
    words = len(backbone.pipe.tokenizer("asleep").input_ids) - 1  # they and the end token
    count = length - max(n, m) + words
    forgotten = before[n - words :][:count] @ t.T
    torch.testing.assert_close(forgotten, after[m - words :][:count], rtol=0, atol=1e-4)
    torch.testing.assert_close(before[:3] @ t.T, before[:3], rtol=0, atol=1e-4)  # nothing was to be forgotten here
    assert (before[n - words :][:count] - forgotten).norm() > 0.1 * forgotten.norm()


@pytest.mark.parametrize("include_concept", [False, True])
def test_the_concepts_own_tokens_are_edited_only_if_asked_for(include_concept):
    """With all of them matched, the concept reaches its anchor; without, it is nobody's target."""
    pipe = double(width=128)
    backbone = backbone_of(pipe)
    pairs = [("superhero", "ninja")]
    x, y = MACECFR(include_concept=include_concept).sentence_rows(backbone, pairs, "hidden")
    own, anchor = (backbone.encode([p]).take("last_subject")[0][0].double() for p in pairs[0])
    length = pipe.tokenizer.model_max_length
    assert len(x) == len(y) == length - (not include_concept)
    found = [i for i in range(len(x)) if torch.allclose(x[i], own)]
    assert len(found) == include_concept
    assert all(torch.allclose(y[i], anchor) for i in found)


def test_shared_words_are_common_and_never_counted_twice():
    assert common([0, 5, 1], [0, 6, 1]) == (1, 1)
    assert common([0, 5, 7, 1], [0, 6, 1]) == (1, 1)
    assert common([0, 5, 1], [0, 5, 5, 1]) == (2, 1)
    assert common([0, 5, 5, 1], [0, 5, 1]) == (2, 1)
    assert common([0, 3, 4, 1], [0, 3, 4, 1]) == (4, 0)


@pytest.mark.parametrize(
    ("target", "anchor"), [("batman", "batman cat"), ("batman cat", "batman"), ("cat", "an animal")]
)
def test_concept_and_anchor_of_different_length_are_matched_at_their_ends(target, anchor):
    pipe = double()
    x, y = MACECFR(include_concept=True).sentence_rows(
        backbone_of(pipe), [(f"{target} asleep", f"{anchor} asleep")], "hidden"
    )
    assert x.shape == y.shape and torch.isfinite(x).all() and torch.isfinite(y).all()
    edit = make(pipe, Concept(target, anchor=anchor), "mace-cfr", keep=["a wizard"])
    assert edit.config["report"]["relative_change"] > 1e-4


def test_fewer_rows_ask_the_same():
    x, y = (torch.randn(90, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) for n in (1, 2))
    r, z = condensed(x, y)
    assert len(r) == len(z) == 16
    torch.testing.assert_close(r.T @ r, x.T @ x)
    torch.testing.assert_close(z.T @ r, y.T @ x)
    assert all(torch.equal(a, b) for a, b in zip(condensed(x[:16], y[:16]), (x[:16], y[:16]), strict=True))


def test_batches_make_no_difference(monkeypatch):
    from erasure.methods import closed_form

    pipe = double()
    one = edited_weights(pipe, refined(pipe, MANY))
    monkeypatch.setattr(closed_form, "CHUNK", 7)
    assert relative_error(edited_weights(pipe, refined(pipe, MANY)), one) <= 1e-6


def test_concepts_erased_apart_and_solved_together_are_erased_together():
    pipe = double()
    apart = [refined(pipe, [concept]) for concept in MANY]
    together = edited_weights(pipe, refined(pipe, MANY))
    assert relative_error(edited_weights(pipe, resolve(apart)), together) <= 1e-5
    assert relative_error(edited_weights(pipe, resolve([refined(pipe, MANY)], without=[MANY[0].name])), together) > 1e-4


def test_the_pooled_embedding_is_moved_to_the_anchors():
    backbone = backbone_of(tiny("sdxl"))
    edit = refined(backbone.pipe, lamb=1e-6, keep=[], pooled=True)
    u, v = (edit.tensors[f"pooled.{name}"] for name in "uv")
    x, y = (backbone.encode([f"a photo of {name}"]).pooled[0] for name in (ONE[0].name, ONE[0].anchor))
    assert (x + u @ (v.T @ x) - y).norm() < 0.3 * (x - y).norm()  # thirty prompts in twenty dimensions


def test_the_file_is_no_larger_than_the_space(tmp_path):
    pipe = tiny_pipeline()
    edit = refined(pipe, MANY)
    assert edit.tensors["hidden.u"].shape[0] == 32 and edit.tensors["hidden.u"].shape[1] <= 32


def test_applying_and_removing_restores_every_bit_and_making_changes_nothing():
    pipe = tiny_pipeline()
    before = weights(pipe)
    edit = refined(pipe)
    assert identical(before, weights(pipe))
    edit.apply(pipe)
    assert not identical(before, weights(pipe))
    edit.remove(pipe)
    assert identical(before, weights(pipe))


def test_a_heavy_keep_list_is_not_moved():
    pipe = double(width=256)
    kept = torch.cat(backbone_of(pipe).encode(KEPT).take("all")).double()
    light, heavy = (changes(pipe, refined(pipe, preserve_scale=s)) for s in (1e-3, 1e6))
    for name in light:
        assert (kept @ heavy[name].T).norm() <= 1e-2 * (kept @ light[name].T).norm()


@pytest.mark.parametrize("templates", [THINGS, STYLES])
def test_there_are_thirty_different_sentences_with_room_for_the_concept(templates):
    assert len(templates) == len(set(templates)) == 30 and all(template.count("{}") == 1 for template in templates)


def test_kinds_and_synonyms_choose_the_sentences():
    style = Concept("van gogh", kind="style", synonyms=("vincent",), anchor="noto")
    pairs = MACECFR.preset("recommended").prompt_pairs(style)
    assert len(pairs) == 60 and ("a cat in vincent style", "a cat in noto style") in pairs
    things = MACECFR.preset("recommended").prompt_pairs(Concept("owl", anchor="dog"))
    assert ("an owl at night", "a dog at night") in things


@pytest.mark.parametrize(
    ("concepts", "arguments", "fault"),
    [
        ([*ONE, Concept("cat")], {}, "needs an anchor.*'cat'"),
        (ONE, {"token_span": "all"}, "all_words"),
        (ONE, {"preserve_scale": -1.0}, "preserve_scale"),
        (ONE, {"domain_scale": -1.0}, "domain_scale"),
        (ONE, {"lamb": -1.0}, "lamb: .*greater than or equal to 0; got -1"),
        (ONE, {"preset": "paper"}, "celebrity"),
    ],
)
def test_a_bad_request_is_refused_with_advice(concepts, arguments, fault):
    with pytest.raises(ValueError, match=fault):
        make(tiny_pipeline(), concepts, "mace-cfr", **{"keep": KEPT, "preset": "object", **arguments})


def test_a_keep_list_without_weight_is_said():
    with pytest.warns(UserWarning, match="no weight"):
        make(tiny_pipeline(), ONE, "mace-cfr", preset="object", keep=KEPT)


@pytest.mark.slow
def test_presets_without_a_ridge_say_when_the_system_is_singular():
    with pytest.warns(UserWarning, match="singular"):
        make(tiny_pipeline(width=768), ONE, "mace-cfr", preset="celebrity", keep=KEPT)
