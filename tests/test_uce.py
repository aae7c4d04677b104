"""UCE against a plain per-layer reference in float64, and the guarantees of the closed form."""

import pytest
import torch

from erasure import Concept, world
from erasure.artifact.stack import stack_of
from erasure.backbone import backbone_of
from erasure.methods import ridge
from erasure.methods.ridge import Problem, cholesky, solve
from erasure.methods.uce import UCE
from tests.reference import uce as reference
from tests.reference import uce_2023 as reference_2023
from tests.tiny import make, tiny_pipeline

TARGETS, GUIDES, KEPT = ["superhero", "van gogh"], ["ninja", ""], ["a wizard", "batman", "the cat"]


def edited_weights(pipe, edit):
    edit.apply(pipe)
    weights = {name: pipe.unet.get_parameter(name).detach().double().clone() for name in edit.parameter_names}
    edit.remove(pipe)
    return weights


def relative_error(ours, theirs):
    assert ours.keys() == theirs.keys()
    return max(((ours[name] - theirs[name]).norm() / theirs[name].norm()).item() for name in theirs)


def official(pipe, targets=TARGETS, guides=GUIDES, kept=KEPT, **settings):
    concepts = [Concept(target, anchor=guide) for target, guide in zip(targets, guides, strict=True)]
    return make(pipe, concepts, "uce", preset="official-2025", keep=kept, **settings)


@pytest.mark.parametrize(
    "pipeline",
    [
        {},
        {"prediction_type": "v_prediction", "width": 48},
        pytest.param(  # widths and blocks of Stable Diffusion 1.4, fewer channels
            {"width": 768, "channels": (16, 32, 32, 32)}, marks=pytest.mark.slow
        ),
    ],
    ids=["sd1", "sd2", "sd1.4-shaped"],
)
def test_weights_equal_the_per_layer_reference(pipeline):
    pipe = tiny_pipeline(**pipeline)
    pipe.unet.double(), pipe.text_encoder.double()
    ours = edited_weights(pipe, official(pipe))
    assert len(ours) == (32 if pipeline.get("width") == 768 else len(ours))
    assert relative_error(ours, reference.edit(pipe, TARGETS, GUIDES, KEPT)) <= 1e-6


@pytest.mark.parametrize("settings", [{"lamb": 0.1}, {"erase_scale": 2.0}, {"preserve_scale": 0.3}])
def test_every_weight_of_the_regression_means_what_the_paper_says(settings):
    pipe = tiny_pipeline()
    pipe.unet.double(), pipe.text_encoder.double()
    ours = edited_weights(pipe, official(pipe, **settings))
    assert relative_error(ours, reference.edit(pipe, TARGETS, GUIDES, KEPT, **settings)) <= 1e-6


def test_the_float32_edit_is_the_float64_edit_rounded():
    pipe = tiny_pipeline()
    assert relative_error(edited_weights(pipe, official(pipe)), reference.edit(pipe, TARGETS, GUIDES, KEPT)) <= 1e-6


ONE, STYLE = (["superhero"], [""]), (["van gogh style"], ["a photo"])
LARGE = {"width": 768, "channels": (16, 32, 32, 32)}  # the shape of Stable Diffusion 1.4's text side


@pytest.mark.parametrize("technique", ["replace", "tensor"])
@pytest.mark.parametrize(
    ("shape", "pairs"),
    [
        pytest.param({}, ONE, marks=pytest.mark.slow),
        ({}, (TARGETS, GUIDES)),
        ({}, STYLE),
        pytest.param(LARGE, (TARGETS, GUIDES), marks=pytest.mark.slow),
        pytest.param(LARGE, ONE, marks=pytest.mark.slow),
        pytest.param(LARGE, STYLE, marks=pytest.mark.slow),
    ],
)
def test_weights_equal_the_reference_of_the_2023_code(technique, pairs, shape):
    pipe = tiny_pipeline(**shape)
    pipe.unet.double(), pipe.text_encoder.double()
    concepts = [Concept(target, anchor=guide) for target, guide in zip(*pairs, strict=True)]
    edit = make(pipe, concepts, "uce", preset="official-2023", keep=KEPT, technique=technique)
    theirs = reference_2023.edit(pipe, *pairs, KEPT, technique=technique)
    assert relative_error(edited_weights(pipe, edit), theirs) <= 1e-6


@pytest.mark.slow
def test_weights_equal_the_reference_on_a_full_size_unet():
    from diffusers import UNet2DConditionModel

    pipe = tiny_pipeline(width=768)
    torch.manual_seed(0)
    pipe.unet = UNet2DConditionModel(cross_attention_dim=768, sample_size=64)  # Stable Diffusion 1.4's config
    ours = edited_weights(pipe, official(pipe))
    assert len(ours) == 32
    assert relative_error(ours, reference.edit(pipe, TARGETS, GUIDES, KEPT)) <= 1e-6


@pytest.mark.parametrize(("empty_anchor", "position"), [("bos", 0), ("eos", 1)])
def test_the_empty_anchor_is_the_token_that_was_asked_for(empty_anchor, position):
    pipe = tiny_pipeline()
    [(_, anchors)] = UCE(empty_anchor=empty_anchor).pair_rows(backbone_of(pipe), [("superhero", "")], "hidden")
    assert torch.equal(anchors[0], pipe.encode_prompt("", pipe.device, 1, False)[0][0, position])


def test_the_guide_is_reached_and_the_kept_stay_as_the_ridge_vanishes():
    x, y, kept = (
        torch.randn(n, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) for n in (3, 4, 9)
    )
    y = y[:3]
    t = solve(Problem(x, y, kept.T @ kept, lamb=1e-9)).matrix
    torch.testing.assert_close(t @ x.T, y.T, rtol=0, atol=1e-6)
    torch.testing.assert_close(t @ kept.T, kept.T, rtol=0, atol=1e-6)


def test_a_large_ridge_changes_nothing_and_the_edit_has_the_rank_of_its_pairs():
    x, y = (torch.randn(3, 32, generator=torch.Generator().manual_seed(n)) for n in (1, 2))
    none = torch.zeros(32, 32)
    assert (solve(Problem(x, y, none, lamb=1e9)).matrix - torch.eye(32)).abs().max() < 1e-6
    assert torch.linalg.matrix_rank(solve(Problem(x, y, none, lamb=0.5)).matrix - torch.eye(32)) == 3


def test_a_singular_system_gets_a_ridge_and_a_warning():
    x, y = torch.randn(2, 32), torch.randn(2, 32)
    with pytest.warns(UserWarning, match="singular"):
        solution = solve(Problem(x, y, torch.zeros(32, 32), lamb=0.0))
    assert torch.isfinite(solution.matrix).all()


@pytest.mark.parametrize(("d", "n", "lamb"), [(2, 1, 0.5), (32, 5, 0.5), (64, 200, 1e-3), (300, 40, 1e-6)])
def test_the_condition_number_is_that_of_the_eigenvalues(d, n, lamb):
    x = torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(d))
    system = x.T @ x + lamb * torch.eye(d, dtype=torch.float64)
    eigenvalues = torch.linalg.eigvalsh(system)
    _, condition = cholesky(system)
    assert condition == pytest.approx(float(eigenvalues[-1] / eigenvalues[0]), rel=0.05)


def test_order_of_concepts_does_not_matter():
    pipe = tiny_pipeline()
    one = edited_weights(pipe, official(pipe))
    other = edited_weights(pipe, official(pipe, TARGETS[::-1], GUIDES[::-1]))
    assert relative_error(one, other) <= 1e-6


def test_composition_is_one_edit_after_the_other():
    pipe = tiny_pipeline()
    first, second = official(pipe, ["superhero"], [""], []), official(pipe, ["van gogh"], ["ninja"], [])
    first.apply(pipe), second.apply(pipe)
    stacked = {name: pipe.unet.get_parameter(name).detach().clone() for name in first.parameter_names}
    first.remove(pipe), second.remove(pipe)
    assert (
        relative_error(edited_weights(pipe, first.compose(second)), {k: w.double() for k, w in stacked.items()}) <= 1e-6
    )


def test_the_published_edit_is_a_few_kilobytes(tmp_path):
    pipe = tiny_pipeline(width=768)
    folder = official(pipe, ["superhero"], [""], []).save_pretrained(tmp_path / "edit")
    assert (folder / "erasure.safetensors").stat().st_size < 20_000


def test_making_leaves_the_pipeline_alone():
    pipe = tiny_pipeline()
    before = {k: v.clone() for k, v in pipe.unet.state_dict().items()}
    official(pipe)
    assert all(torch.equal(before[k], v) for k, v in pipe.unet.state_dict().items())
    assert not stack_of(backbone_of(pipe)).layers


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        ({"concept": []}, "nothing to erase"),
        ({"concept": ""}, "needs a name"),
        ({"concept": "cat", "keep": ["Cat"]}, "both to be erased and to be kept"),
        ({"concept": "cat", "keep": [" "]}, "empty prompt is in the keep list"),
        ({"concept": [Concept("cat", anchor="ninja"), "ninja"]}, "itself to be erased"),
        ({"concept": "cat", "method": "ucee"}, r"unknown method.*esd.*uce"),
        ({"concept": "cat", "preset": "official"}, "official-2025"),
        ({"concept": "cat", "lambda_": 1}, "has no setting .lambda_.*lamb"),
        ({"concept": "cat", "lamb": True}, "lamb is a number; got True"),
        ({"concept": "cat", "lamb": -1.0}, "lamb: .*greater than or equal to 0; got -1"),
        ({"concept": "cat", "lamb": "abc"}, "lamb"),
        ({"concept": "cat", "empty_anchor": "middle"}, "empty_anchor"),
        ({"concept": "cat", "method": "esd", "preset": "recommended", "trajectories": 0}, "trajectories"),
        ({"concept": "cat", "erase_scale": 0.0}, "erase_scale: .* greater than 0"),
        ({"concept": "cat", "erase_scale": -1.0}, "erase_scale: .* greater than 0"),
        ({"concept": "cat", "preserve_scale": float("inf")}, "preserve_scale: .* finite"),
        ({"concept": "cat", "max_drift": float("inf")}, "max_drift: .* finite"),
        ({"concept": "cat", "method": "esd", "preset": "recommended", "eta": float("nan")}, "eta: .* finite"),
        ({"concept": "superhero " * 80}, "longer than the text encoder"),
    ],
)
def test_a_bad_request_is_refused_with_advice(arguments, fault):
    with pytest.raises(ValueError, match=fault):
        make(tiny_pipeline(), **{"preset": "official-2025", "keep": [], **arguments})


def test_settings_that_need_a_keep_list_say_so():
    with pytest.warns(UserWarning, match="keep"):
        make(tiny_pipeline(), "superhero", "uce")


def test_the_neighbours_of_a_concept_are_kept_by_default():
    edit = make(tiny_pipeline(), Concept("superhero", neighbours=("ninja", "wizard")), "uce")
    assert edit.config["keep"] == ["ninja", "wizard"]


def test_numbers_may_be_written_as_yaml_reads_them():
    assert UCE.preset("official-2025", lamb="1e-4").lamb == 1e-4


def test_weights_equal_the_reference_on_emoji_world():
    pipe = world.load()
    pipe.unet.double(), pipe.text_encoder.double()
    ours = edited_weights(pipe, official(pipe, ["superhero", "cat"], ["ninja", ""], ["a wizard", "dog"]))
    assert relative_error(ours, reference.edit(pipe, ["superhero", "cat"], ["ninja", ""], ["a wizard", "dog"])) <= 1e-6


def test_everyday_nouns_are_kept_unless_they_are_the_target():
    edit = make(tiny_pipeline(), Concept("cat", synonyms=("castle",)), "uce", keep=["ninja"])
    assert "dog" in edit.config["keep_everyday"] and not {"cat", "castle"} & set(edit.config["keep_everyday"])
    assert make(tiny_pipeline(), "cat", "uce", preset="official-2025").config["keep_everyday"] == []


def test_a_concept_that_moves_what_is_kept_too_far_weighs_less_and_the_report_says_how_much():
    keep, concepts = ["a wizard", "the cat", "ninja"], [Concept("superhero"), Concept("castle", anchor="house")]
    free, held = (make(tiny_pipeline(), concepts, "uce", keep=keep, max_drift=limit) for limit in (0.0, 0.02))
    assert "erase_scales" not in free.config["report"]
    scales = held.config["report"]["erase_scales"]
    assert len(scales) == 2 and min(scales) < 3.0 >= max(scales)
    moved = [edit.config["report"]["neighbours"]["moved"] for edit in (free, held)]
    assert moved[1] < moved[0] / 2
    assert "erase_scales" not in make(tiny_pipeline(), concepts, "uce", keep=keep, max_drift=1e6).config["report"]
    apart = make(tiny_pipeline(), concepts, "uce", keep=keep, max_drift=0.02, technique="tensor")
    assert apart.config["report"]["erase_scales"] == pytest.approx(scales)
    rounds = make(tiny_pipeline(), concepts, "rece", keep=keep, max_drift=0.02)
    assert rounds.config["report"]["erase_scales"] == pytest.approx(scales)


def test_the_limit_of_the_drift_holds_however_many_rows_there_are(monkeypatch):
    keep = ["a wizard", "the dog", "ninja"]
    concepts = [Concept("superhero"), Concept("castle", anchor="house"), Concept("cat", anchor="an animal")]
    expected = make(tiny_pipeline(), concepts, "uce", keep=keep, max_drift=0.02)
    monkeypatch.setattr(ridge.gathered, "__kwdefaults__", {"limit": 1})
    found = make(tiny_pipeline(), concepts, "uce", keep=keep, max_drift=0.02)
    assert expected.system and not found.system  # the rows of its concepts were not kept apart
    assert found.config["report"]["erase_scales"] == pytest.approx(expected.config["report"]["erase_scales"])
    for edit in (expected, found):
        assert min(edit.config["report"]["erase_scales"]) < 3.0
    first, second = (edit.tensors["hidden.u"] @ edit.tensors["hidden.v"].T for edit in (expected, found))
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-6)


def test_kept_words_that_are_one_to_the_text_encoder_limit_nothing():
    edit = make(tiny_pipeline(), "superhero", "uce", keep=["a wizard", "wizard"], keep_everyday=False)
    assert "erase_scales" not in edit.config["report"]
