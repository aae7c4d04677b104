"""RECE against a plain per-layer reference in float64, and what its rounds promise."""

import pytest
import torch

from erasure import Concept
from erasure.artifact import Erasure
from erasure.backbone import backbone_of
from erasure.methods.rece import RECE, gram_of, revive
from erasure.methods.ridge import Problem, compressed, solve
from tests.reference import rece as reference
from tests.slow import first
from tests.test_uce import edited_weights, relative_error
from tests.tiny import make, tiny, tiny_pipeline

TARGETS, GUIDES, KEPT = ["superhero", "van gogh"], ["ninja", ""], ["a wizard", "batman", "the cat"]
CLOSURES = ["regzero", "standardreg", "surrogatereg"]


def double_pipeline(**shape):
    pipe = tiny_pipeline(**shape)
    pipe.unet.double(), pipe.text_encoder.double()
    return pipe


def official(pipe, targets=TARGETS, guides=GUIDES, kept=KEPT, **settings):
    concepts = [Concept(target, anchor=guide) for target, guide in zip(targets, guides, strict=True)]
    return make(pipe, concepts, "rece", keep=kept, **{"preset": "object", **settings})


@pytest.mark.parametrize(
    "concepts", [pytest.param((["superhero"], [""]), marks=pytest.mark.slow), (TARGETS, GUIDES)], ids=["one", "two"]
)
@pytest.mark.parametrize("closure", CLOSURES)
@pytest.mark.parametrize(
    "shape",
    [{}, pytest.param({"prediction_type": "v_prediction", "width": 48}, marks=pytest.mark.slow)],
    ids=["sd1", "sd2"],
)
def test_weights_equal_the_per_layer_reference(shape, closure, concepts):
    pipe = double_pipeline(**shape)
    theirs = reference.edit(pipe, *concepts, KEPT, epochs=1, reg=1e-3, closure=closure)
    assert relative_error(edited_weights(pipe, official(pipe, *concepts, closure=closure)), theirs) <= 1e-6


# The third closure is left out: after one round its normal equations, which the reference inverts, are singular.
@pytest.mark.parametrize("closure", ["regzero", "standardreg"])
def test_three_epochs_of_matrices_are_three_epochs_of_layers(closure):
    pipe = double_pipeline()
    theirs = reference.edit(pipe, TARGETS, GUIDES, KEPT, epochs=3, reg=0.1, closure=closure)
    ours = official(pipe, preset="nudity", closure=closure, empty_per_concept=False)
    assert relative_error(edited_weights(pipe, ours), theirs) <= 1e-6


@pytest.mark.parametrize(("preset", "epochs"), first([("nudity", 3), ("unsafe", 2)], ("nudity", 3)))
@pytest.mark.parametrize("kept", [[], KEPT], ids=["nothing", "a list"])
@pytest.mark.parametrize(
    "targets",
    [pytest.param(TARGETS[:1], marks=pytest.mark.slow), [*TARGETS, "the cat in the style"]],
    ids=["one", "three"],
)
def test_the_script_for_nudity_keeps_the_empty_prompt_once_for_every_concept(preset, epochs, kept, targets):
    pipe, n = double_pipeline(), len(targets)
    ours = edited_weights(pipe, official(pipe, targets, [""] * n, kept, preset=preset))
    theirs = reference.edit(pipe, targets, [""] * n, kept, epochs=epochs, reg=0.1, empties=n)
    assert relative_error(ours, theirs) <= 1e-6
    once = reference.edit(pipe, targets, [""] * n, kept, epochs=epochs, reg=0.1)
    assert (relative_error(ours, once) > 1e-4) == (n > 1)


@pytest.mark.slow
def test_weights_equal_the_reference_in_the_shape_of_stable_diffusion():
    pipe = double_pipeline(width=768, channels=(16, 32, 32, 32))
    ours = edited_weights(pipe, official(pipe))
    assert len(ours) == 32
    assert relative_error(ours, reference.edit(pipe, TARGETS, GUIDES, KEPT, epochs=1, reg=1e-3)) <= 1e-6


def test_no_epochs_are_uce():
    pipe = double_pipeline()
    concepts = [Concept(target, anchor=guide) for target, guide in zip(TARGETS, GUIDES, strict=True)]
    uce = make(pipe, concepts, "uce", preset="official-2023", keep=KEPT)
    assert relative_error(edited_weights(pipe, official(pipe, epochs=0)), edited_weights(pipe, uce)) <= 1e-6


@pytest.mark.parametrize("closure", CLOSURES)
def test_the_attack_is_the_minimum_of_what_it_minimises(closure):
    """Any small step away from it makes the sum of squares larger."""
    d, n, reg = 12, 3, 0.3
    random = torch.Generator().manual_seed(0)
    weights = [torch.randn(8, d, generator=random, dtype=torch.float64) for _ in range(3)]
    t, c, y = (torch.randn(k, d, generator=random, dtype=torch.float64) for k in (d, n, n))
    g = sum(w.T @ w for w in weights)

    def cost(x):
        draw = {"regzero": x.square().sum(), "standardreg": (x - y).square().sum()}
        draw["surrogatereg"] = sum(((x - c) @ (w @ t).T).square().sum() for w in weights)
        return sum((x @ (w @ t).T - c @ w.T).square().sum() for w in weights) + reg * draw[closure]

    best = revive(t, g, c, y, reg=reg, closure=closure)
    for _ in range(20):
        step = 1e-2 * torch.randn(n, d, generator=random, dtype=torch.float64)
        assert cost(best + step) > cost(best)


def test_the_attack_revives_and_the_epoch_ends_that():
    """Measured on the layers themselves: |W' c_adv - W c| against |W' c - W c|, before and after the epoch."""
    pipe = double_pipeline()
    original = reference.originals(pipe)
    c, y = reference.tokens(pipe, "superhero"), reference.tokens(pipe, "ninja")
    edited, again = (edited_weights(pipe, official(pipe, ["superhero"], ["ninja"], epochs=epochs)) for epochs in (0, 1))
    t = torch.linalg.lstsq(torch.cat(list(original.values())), torch.cat([edited[n] for n in original])).solution
    g = gram_of(backbone_of(pipe).text_sites().values())
    c_adv = revive(t, g, c, y, reg=1e-3, closure="regzero")

    def left(weights, x):
        return sum((x @ weights[n].T - c @ original[n].T).square().sum().item() for n in original) ** 0.5

    erased = left(edited, c)
    assert erased > 0.5 * left(original, y)
    assert left(edited, c_adv) < 0.3 * erased
    assert left(again, c_adv) > 0.8 * erased


def test_the_report_says_what_each_epoch_did():
    epochs = official(tiny_pipeline(), epochs=2).config["report"]["epochs"]
    assert len(epochs) == 2
    for epoch in epochs:
        assert epoch["revived"] < 0.8 * epoch["erased"] and epoch["erased_again"] > epoch["revived"]


def test_hold_leaves_the_first_erasure_in_place():
    pipe = double_pipeline()
    settings = {"preset": "recommended", "epochs": 3, "synonyms": False, "articles": False}
    without, held = (official(pipe, ["superhero"], ["ninja"], **settings, hold=hold) for hold in (False, True))
    [start] = official(pipe, ["superhero"], ["ninja"], **{**settings, "epochs": 1}).config["report"]["epochs"]
    moved = [edit.config["report"]["epochs"][-1]["erased"] for edit in (without, held)]
    assert abs(moved[1] - start["erased"]) < abs(moved[0] - start["erased"])


def test_a_relative_reg_does_not_depend_on_the_size_of_the_weights():
    pipe = tiny_pipeline()

    def made(relative):
        edit = official(pipe, ["superhero"], ["ninja"], relative=relative, reg=0.1)
        return edit.tensors["hidden.u"].double() @ edit.tensors["hidden.v"].double().T

    before = {relative: made(relative) for relative in (True, False)}
    with torch.no_grad():
        for site in backbone_of(pipe).text_sites().values():
            site.linear.weight.mul_(10)
    torch.testing.assert_close(made(True), before[True], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(made(False), before[False], rtol=1e-2, atol=1e-2)


def test_the_order_of_concepts_does_not_matter():
    pipe = double_pipeline()
    one, other = official(pipe), official(pipe, TARGETS[::-1], GUIDES[::-1])
    assert relative_error(edited_weights(pipe, one), edited_weights(pipe, other)) <= 1e-6


def test_compressed_factors_are_the_same_matrix_in_fewer_columns():
    random = torch.Generator().manual_seed(0)
    u, v = (torch.randn(40, 60, generator=random, dtype=torch.float64) for _ in range(2))
    u[:, 5:] = u[:, :5] @ torch.randn(5, 55, generator=random, dtype=torch.float64)
    small_u, small_v = compressed(u, v)
    assert small_u.shape == small_v.shape == (40, 5)
    torch.testing.assert_close(small_u @ small_v.T, u @ v.T)


def test_a_solution_that_needs_its_columns_keeps_them():
    random = torch.Generator().manual_seed(0)
    x, y = (torch.randn(3, 32, generator=random) for _ in range(2))
    solution = solve(Problem(x, y, torch.zeros(32, 32), 0.5))
    assert solution.smallest() is solution
    twice = solve(Problem(torch.cat([x, x]), torch.cat([y, y]), torch.zeros(32, 32), 0.5))
    assert twice.smallest().u.shape == (32, 3)
    torch.testing.assert_close(twice.smallest().matrix, twice.matrix)


def test_the_file_is_no_larger_than_the_space_of_embeddings(tmp_path):
    pipe = tiny_pipeline()
    edit = official(pipe, preset="unsafe")
    assert edit.tensors["hidden.u"].shape[1] <= 32 < 2 * 77
    again = Erasure.from_pretrained(edit.save_pretrained(tmp_path / "edit"))
    assert relative_error(edited_weights(pipe, again), edited_weights(pipe, edit)) == 0


@pytest.mark.parametrize(
    ("concept", "settings", "fault"),
    [
        (Concept("spider-man", anchor="spider - man"), {}, "same to the text encoder"),
        ([Concept("cat", anchor="ninja"), "ninja"], {}, "itself to be erased"),
        ("cat", {"technique": "tensor"}, "use 'replace'"),
        ("cat", {"epochs": -1}, "epochs"),
        ("cat", {"reg": -0.1}, "reg"),
        ("cat", {"closure": "regone"}, "closure"),
        ("cat", {"preset": "official"}, "object-easy"),
    ],
)
def test_a_bad_request_is_refused_with_advice(concept, settings, fault):
    with pytest.raises(ValueError, match=fault):
        make(tiny_pipeline(), concept, "rece", keep=[], **{"preset": "object", **settings})


def test_a_guide_that_is_the_target_is_refused():
    with pytest.raises(ValueError, match="anchor equals the target"):
        Concept("superhero", anchor="Superhero ")


def test_the_presets_are_the_published_settings():
    table = {name: (RECE.preset(name).reg, RECE.preset(name).epochs) for name in RECE.presets if name != "recommended"}
    assert table == {
        "nudity": (0.1, 3),
        "unsafe": (0.1, 2),
        "style": (1e-3, 1),
        "object": (1e-3, 1),
        "object-easy": (0.1, 1),
    }


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [("sdxl", {"pooled": True}), ("sd3", {}), ("flux", {"pooled": True})],
)
def test_every_architecture_plays_the_rounds(architecture, settings):
    pipe = tiny(architecture)
    edit = official(pipe, ["superhero"], ["ninja"], **settings)
    report = edit.config["report"]
    for part in (report, report["pooled"]) if settings.get("pooled") else (report,):
        [epoch] = part["epochs"]
        assert epoch["revived"] < epoch["erased"] and epoch["erased_again"] > epoch["revived"]
    before = {name: p.clone() for name, p in backbone_of(pipe).denoiser.named_parameters()}
    edit.apply(pipe)
    changed = [name for name, p in backbone_of(pipe).denoiser.named_parameters() if not torch.equal(p, before[name])]
    assert set(changed) == set(edit.parameter_names)
    edit.remove(pipe)
    assert all(torch.equal(p, before[name]) for name, p in backbone_of(pipe).denoiser.named_parameters())
