"""SPEED against a plain per-layer reference in float64, and the guarantees of the null space."""

import pytest
import torch

from erasure import Concept, Erasure, world
from erasure.backbone import backbone_of
from erasure.methods import closed_form, speed
from erasure.methods.closed_form import rows
from erasure.methods.speed import SPEED, invariants, without
from tests.reference import speed as reference
from tests.test_uce import edited_weights, relative_error
from tests.tiny import identical, make, tiny, tiny_pipeline, weights

ONE = ["superhero"], ["ninja"]
MANY = ["superhero", "van gogh", "animal"], ["ninja", "", "a cat"]
KEPT = ["a wizard", "batman", "the cat", "a photo", "style", "a ninja and a wizard"]
WIDE = {"width": 768, "channels": (16, 32, 32, 32)}  # widths and blocks of Stable Diffusion 1.4, fewer channels
FORMS = {
    "plain": {"prior_filter": False, "augment": 0},
    "filter": {"prior_filter": True, "augment": 0},
    "augment": {"prior_filter": False, "augment": 3},
    "full": {"prior_filter": True, "augment": 3},
}


def official(pipe, targets=MANY[0], guides=MANY[1], keep=KEPT, preset="few", **settings):
    concepts = [Concept(target, anchor=guide) for target, guide in zip(targets, guides, strict=True)]
    return make(pipe, concepts, "speed", preset=preset, keep=keep, **settings)


def double(**config):
    pipe = tiny_pipeline(**config)
    pipe.unet.double(), pipe.text_encoder.double()
    return pipe


def expected(pipe, targets, guides, keep=KEPT, *, augment=0, seed=0, **settings):
    """The reference, given what chance or a clustering decides."""
    k2 = invariants(reference.empty_tokens(pipe)).T
    count = len(keep) or pipe.tokenizer.model_max_length - 1
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, augment, generator=generator, dtype=torch.float64) if augment else None
    return reference.edit(pipe, targets, guides, keep, k2, noise=noise, **settings)


def changes(pipe, edit):
    """What the edit adds to each layer it touches."""
    after = edited_weights(pipe, edit)
    return {name: after[name] - pipe.unet.get_parameter(name).detach().double() for name in after}


def change_error(pipe, ours, theirs):
    """Relative error of the change alone, the weights' share taken out: stricter than that of the weights."""
    before = {name: pipe.unet.get_parameter(name).detach().double() for name in ours}
    return relative_error(*({name: w[name] - before[name] for name in before} for w in (ours, theirs)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("targets", "guides"), [ONE, MANY], ids=["one", "many"])
@pytest.mark.parametrize("pipeline", [{}, pytest.param(WIDE, marks=pytest.mark.slow)], ids=["sd1", "sd1.4-shaped"])
def test_weights_equal_the_per_layer_reference(pipeline, targets, guides, form):
    pipe = double(**pipeline)
    ours = edited_weights(pipe, official(pipe, targets, guides, **FORMS[form]))
    theirs = expected(pipe, targets, guides, **FORMS[form])
    assert relative_error(ours, theirs) <= 1e-6
    assert change_error(pipe, ours, theirs) <= 1e-5  # factors are stored in float32


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"threshold": 0.3}, {"threshold": 0.3}),
        ({"retain_scale": 0.05}, {"rho": 0.05}),
        ({"lamb": 0.7}, {"lamb": 0.7}),
        ({"seed": 5}, {"seed": 5}),
        ({"layers": "kv"}, {"layers": ("to_k", "to_v")}),
        ({"layers": "k"}, {"layers": ("to_k",)}),
        ({"preset": "many"}, {"threshold": 1e-4, "rho": 0.05, "prior_filter": False, "augment": 10}),
    ],
    ids=lambda settings: "-".join(settings),
)
def test_every_setting_means_what_the_paper_says(ours, theirs):
    pipe = double()
    ours = {**({} if "preset" in ours else FORMS["full"]), **ours}
    theirs = {**FORMS["full"], **theirs}
    edited, reference_weights = edited_weights(pipe, official(pipe, **ours)), expected(pipe, *MANY, **theirs)
    assert change_error(pipe, edited, reference_weights) <= 1e-5


def test_nothing_to_keep_keeps_the_empty_prompts_tokens():
    pipe = double()
    ours = edited_weights(pipe, official(pipe, keep=[], **FORMS["full"]))
    assert change_error(pipe, ours, expected(pipe, *MANY, keep=[], **FORMS["full"])) <= 1e-5


def test_the_preset_for_nudity_moves_every_token_after_the_start():
    pipe = double()
    ours = edited_weights(pipe, official(pipe, ["nudity"], [""], keep=[], preset="nudity"))
    settings = {"prior_filter": True, "augment": 10, "rho": 0.7, "lamb": 0.5, "all_tokens": True}
    assert change_error(pipe, ours, expected(pipe, ["nudity"], [""], keep=[], **settings)) <= 1e-5


def test_weights_equal_the_reference_on_emoji_world():
    pipe = world.load()
    pipe.unet.double(), pipe.text_encoder.double()
    targets, guides, keep = ["superhero", "cat"], ["astronaut", ""], ["a wizard", "dog", "fox", "a fairy"]
    ours = edited_weights(pipe, official(pipe, targets, guides, keep, augment=4))
    assert relative_error(ours, expected(pipe, targets, guides, keep, augment=4, prior_filter=True)) <= 1e-6


@pytest.mark.parametrize("form", FORMS)
def test_the_invariants_do_not_move(form):
    pipe = double()
    k2 = invariants(reference.empty_tokens(pipe)).T
    edit = official(pipe, **FORMS[form])
    for name, change in changes(pipe, edit).items():
        w = pipe.unet.get_parameter(name).detach().double()
        assert (change @ k2).norm() <= 1e-5 * (w @ k2).norm()
        assert change.norm() >= 1e-3 * w.norm()


def test_the_invariants_do_not_move_when_the_retain_set_holds_some_of_them():
    pipe = double()
    k2 = invariants(reference.empty_tokens(pipe)).T
    edit = official(pipe, keep=[], threshold=1e-3, **FORMS["plain"])  # the empty prompt's tokens, and their centroids
    for name, change in changes(pipe, edit).items():
        assert (change @ k2).norm() <= 1e-5 * (pipe.unet.get_parameter(name).detach().double() @ k2).norm()


@pytest.mark.parametrize("architecture", ["sdxl", "sd3", "flux"])
def test_every_encoders_empty_prompt_is_kept_in_both_spaces(architecture):
    pipe = tiny(architecture)
    backbone = backbone_of(pipe)
    edit = official(pipe, pooled=True, threshold=1e3, **FORMS["plain"])  # nothing else is
    empty = backbone.encode([""])
    starts = [segment.hidden[0, :1] for segment in empty.segments]
    for space, kept in (("hidden", torch.cat(starts)), ("pooled", empty.pooled)):
        u, v = (edit.tensors[f"{space}.{name}"] for name in "uv")
        target = torch.cat(rows(backbone, ["superhero"], "last_subject", space))
        assert (kept @ v @ u.T).norm() <= 1e-4 * (target @ v @ u.T).norm()
        assert (target @ v @ u.T).norm() >= 1e-3 * target.norm()
    known = any(name.endswith(("to_k.weight", "to_v.weight")) for name in edit.parameter_names)
    assert known == (architecture == "sdxl")


def test_what_the_null_space_leaves_out_does_not_move():
    pipe = double()
    kept = torch.cat(rows(backbone_of(pipe), KEPT, "last_subject")).double()
    edit = official(pipe, threshold=1e-7, **FORMS["plain"])  # below the least mean square of what is kept
    target = torch.cat(rows(backbone_of(pipe), MANY[0], "last_subject")).double()
    for name, change in changes(pipe, edit).items():
        w = pipe.unet.get_parameter(name).detach().double()
        assert (kept @ change.T).norm() <= 1e-5 * (kept @ w.T).norm()
        assert (target @ change.T).norm() >= 0.05 * (target @ w.T).norm()


def test_the_anchor_is_reached_as_the_ridge_vanishes():
    pipe = double()
    edit = official(pipe, *ONE, keep=["batman"], retain_scale=1e-7, threshold=1e-3, **FORMS["plain"])
    x, y = (torch.cat(rows(backbone_of(pipe), names, "last_subject")).double() for names in ONE)
    for name, change in changes(pipe, edit).items():
        w = pipe.unet.get_parameter(name).detach().double()
        torch.testing.assert_close(x @ (w + change).T, y @ w.T, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("layers", "ends"), [("v", {"to_v"}), ("k", {"to_k"}), ("kv", {"to_k", "to_v"})])
def test_only_the_chosen_layers_are_touched(layers, ends):
    pipe = tiny_pipeline()
    before, edit = weights(pipe), official(pipe, layers=layers)
    edit.apply(pipe)
    touched = {name for name, tensor in weights(pipe).items() if not torch.equal(tensor, before[name])}
    assert touched == {f"unet.{name}" for name in edit.parameter_names}
    assert {name.split(".")[-2] for name in touched} == ends
    edit.remove(pipe)
    assert identical(before, weights(pipe))


def test_runs_and_batch_sizes_make_no_difference(monkeypatch):
    pipe = double()
    settings = {"token_span": "subject_to_end", "keep_span": "all", "keep_everyday": True}
    one, two = official(pipe, **settings), official(pipe, **settings)
    assert identical(one.tensors, two.tensors)
    monkeypatch.setattr(closed_form, "CHUNK", 3)
    assert relative_error(edited_weights(pipe, official(pipe, **settings)), edited_weights(pipe, one)) <= 1e-6
    other = official(pipe, seed=1, **settings)
    assert relative_error(edited_weights(pipe, other), edited_weights(pipe, one)) > 1e-6


def test_the_order_of_concepts_does_not_matter():
    pipe = double()
    turned = official(pipe, MANY[0][::-1], MANY[1][::-1])
    assert relative_error(edited_weights(pipe, turned), edited_weights(pipe, official(pipe))) <= 1e-6


def test_one_matrix_serves_all_layers_without_filter_and_copies():
    pipe = tiny_pipeline(width=768)
    plain, full = official(pipe, **FORMS["plain"]), official(pipe, **FORMS["full"])
    assert set(plain.tensors) == {"hidden.u", "hidden.v"}
    assert set(full.tensors) == {"hidden.u", *(f"{name.removesuffix('.weight')}.v" for name in full.parameter_names)}
    assert plain.tensors["hidden.u"].shape == full.tensors["hidden.u"].shape == (768, 3)


def test_saving_and_loading_give_the_same_weights(tmp_path):
    pipe = tiny_pipeline()
    edit = official(pipe)
    edit.save_pretrained(tmp_path / "edit")
    again = Erasure.from_pretrained(tmp_path / "edit")
    assert identical(edited_weights(pipe, again), edited_weights(pipe, edit))


def test_relative_settings_do_not_depend_on_the_size_of_the_embeddings():
    pipe = double()
    settings = {"relative": True, "threshold": 1e-3, "retain_scale": 1e-2, **FORMS["full"]}
    one = changes(pipe, official(pipe, **settings))
    norm = pipe.text_encoder.final_layer_norm
    with torch.no_grad():
        norm.weight *= 7
        norm.bias *= 7
    two = changes(pipe, official(pipe, **settings))
    assert relative_error(two, one) <= 1e-5  # a change times an embedding grows as the embedding does
    absolute = changes(pipe, official(pipe, **{**settings, "relative": False}))
    assert relative_error(absolute, one) > 1e-2


def test_a_text_that_names_a_target_as_a_word_is_dropped():
    concepts = [Concept("cat", synonyms=("van gogh",))]
    texts = ["A CAT, asleep", "catfish", "wildcat", "a cat-like thing", "art by van  gogh", "art by Van Gogh.", "gogh"]
    assert without(texts, concepts) == ["catfish", "wildcat", "art by van  gogh", "gogh"]


@pytest.mark.parametrize("suffix", [".csv", ".txt"])
def test_a_retain_file_is_the_keep_list_less_what_names_a_target(tmp_path, suffix):
    pipe = double()
    file = tmp_path / f"names{suffix}"
    lines = [*KEPT, "a superhero, flying"]
    file.write_text("\n".join(['"concept",note', *(f'"{line}",x' for line in lines)] if suffix == ".csv" else lines))
    one, two = official(pipe), official(pipe, keep=[], retain=str(file))
    assert relative_error(edited_weights(pipe, two), edited_weights(pipe, one)) <= 1e-6
    assert (two.config["retained"], two.config["named_a_target"]) == (len(KEPT), 1)
    assert two.config["settings"]["retain"] == file.name


def test_a_corpus_counts_as_what_it_is_made_of(tmp_path):
    pipe = double()
    closed_form.Gram.of(backbone_of(pipe), KEPT[2:], span="last_subject").save(tmp_path / "corpus")
    corpus = {"corpus": str(tmp_path / "corpus"), "corpus_scale": 0.0, **FORMS["plain"]}
    one, two = official(pipe, **FORMS["plain"]), official(pipe, keep=KEPT[:2], **corpus)
    assert relative_error(edited_weights(pipe, two), edited_weights(pipe, one)) <= 1e-6


def test_the_centroids_are_those_of_a_clustering_and_the_same_every_time():
    generator = torch.Generator().manual_seed(0)
    centres = 10 * torch.randn(3, 8, generator=generator, dtype=torch.float64)
    points = [centre + 0.1 * torch.randn(9, 8, generator=generator, dtype=torch.float64) for centre in centres]
    empty = torch.cat([torch.ones(1, 8, dtype=torch.float64), *points])
    found = invariants(empty)
    assert torch.equal(found[0], empty[0]) and torch.equal(found, invariants(empty))
    means = torch.stack([group.mean(dim=0) for group in points])
    assert torch.cdist(means, found[1:]).min(dim=1).values.max() < 1e-9


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        ({"preserve_scale": 2.0}, "no weight.*threshold"),
        ({"threshold": 1e-12, "keep_everyday": True}, "no direction free"),
        ({"threshold": 0.0}, "threshold"),
        ({"retain_scale": 0.0}, "retain_scale"),
        ({"lamb": -1.0}, "lamb"),
        ({"augment": -1}, "augment"),
        ({"layers": "q"}, "layers"),
        ({"preset": "official"}, "few"),
    ],
)
def test_a_bad_request_is_refused_with_advice(arguments, fault):
    with pytest.raises(ValueError, match=fault):
        official(tiny_pipeline(), **arguments)


def test_a_bad_retain_file_is_refused_with_advice(tmp_path):
    pipe = tiny_pipeline()
    with pytest.raises(FileNotFoundError, match="one a line"):
        official(pipe, retain=str(tmp_path / "none.txt"))
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match="nothing to keep"):
        official(pipe, retain=str(tmp_path / "empty.txt"))
    (tmp_path / "table.csv").write_text("name\ncat\n")
    with pytest.raises(ValueError, match="no column 'concept'"):
        official(pipe, retain=str(tmp_path / "table.csv"))


def test_settings_that_reach_every_prompt_ask_for_a_keep_list():
    assert SPEED(token_span="subject_to_end").needs_keep
    assert not SPEED().needs_keep and not SPEED(token_span="subject_to_end", retain="names.txt").needs_keep
    assert speed.CENTROIDS == 3
