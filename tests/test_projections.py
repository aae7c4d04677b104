"""Double Projections and CURE: the mathematics on random numbers, and both methods on a tiny pipeline."""

import warnings

import pytest
import torch

from erasure import Concept
from erasure.backbone import backbone_of
from erasure.methods.kept import Kept
from erasure.methods.projections import cure, double_projection, expansion, proxy, residual, subspace
from tests.reference import ridge as reference
from tests.tiny import make, tiny, tiny_pipeline


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def relative(a, b):
    return float((a - b).norm() / b.norm())


EYE = torch.eye(48, dtype=torch.float64)
KEPT, TARGETS, ANCHORS = random(20, 48, seed=1), random(5, 48, seed=2), random(5, 48, seed=3)
FORMS = pytest.mark.parametrize("kept", [Kept.rows_of(KEPT), Kept.of(KEPT.T @ KEPT)], ids=["rows", "matrix"])


# --- Double Projections ----------------------------------------------------------------------------------------------


@FORMS
def test_targets_reach_their_anchors_and_the_whole_preserved_span_stays(kept):
    basis = subspace(kept, energy=1.0)
    solution = double_projection(TARGETS, ANCHORS, basis)
    t = solution.matrix
    assert relative(t, reference.double_projection(TARGETS, ANCHORS, reference.projector(KEPT))) < 1e-10
    assert relative(TARGETS @ t.T, ANCHORS) < 1e-10
    inside = random(7, 20, seed=4) @ KEPT
    assert relative(inside @ t.T, inside) < 1e-10
    assert solution.notes["preserved_rank"] == basis.shape[1] == 20 and solution.notes["moved"] == pytest.approx(1)
    r, ratios = residual(TARGETS, basis)
    assert solution.notes["residual"] == pytest.approx(float(r.norm() / TARGETS.norm()))
    assert solution.notes["least_residual"] == pytest.approx(float(ratios.min()))


def test_one_target_is_the_papers_rank_one_edit():
    c, anchor = TARGETS[:1], ANCHORS[:1]
    basis = subspace(Kept.rows_of(KEPT), energy=1.0)
    r = (c - c @ reference.projector(KEPT))[0]
    expected = EYE + torch.outer((anchor - c)[0], r) / r.square().sum()
    assert relative(double_projection(c, anchor, basis).matrix, expected) < 1e-10


@FORMS
def test_the_rank_is_the_least_that_holds_the_energy(kept):
    values = torch.linalg.svdvals(KEPT).square()
    for energy in (0.3, 0.9, 0.99):
        basis = subspace(kept, energy=energy)
        k = basis.shape[1]
        assert float(values[:k].sum() / values.sum()) >= energy > float(values[: k - 1].sum() / values.sum())
        torch.testing.assert_close(basis.T @ basis, torch.eye(k, dtype=torch.float64))
    assert subspace(kept, energy=0.5, rank=7).shape[1] == 7
    assert subspace(kept, energy=1.0).shape[1] == 20


def test_energy_that_a_sketch_dropped_counts():
    whole = Kept.rows_of(KEPT)
    sketch = whole.shrunk(10)
    held = 1 - sketch.lost / float(KEPT.square().sum())
    assert subspace(sketch, energy=0.5).shape[1] == subspace(whole, energy=0.5).shape[1]
    assert subspace(sketch, energy=0.99).shape[1] == 10 and held < 0.99


def test_a_target_inside_the_preserved_span_is_refused_or_moved_part_of_the_way():
    close = torch.cat([TARGETS, 3.0 * KEPT[:1] + 0.01 * random(1, 48, seed=5)])
    anchors = torch.cat([ANCHORS, ANCHORS[:1]])
    basis = subspace(Kept.rows_of(KEPT), energy=1.0)
    with pytest.raises(ValueError, match="holds a target but for .*the floor is 2.0e-02.*set ridge"):
        double_projection(close, anchors, basis)
    whole = double_projection(close, anchors, basis, floor=0.0)
    part = double_projection(close, anchors, basis, ridge=0.1)
    assert whole.norm > 20 * part.norm and part.notes["least_residual"] < 0.01
    moved = close @ part.matrix.T - close
    assert float(moved[-1].norm()) < 0.05 * float((anchors - close)[-1].norm())
    assert relative(KEPT @ part.matrix.T, KEPT) < 1e-10  # what is kept is exact whatever the ridge
    inside = double_projection(KEPT[:2], ANCHORS[:2], basis, ridge=0.1)
    assert inside.norm < 1e-10 and inside.notes["residual"] < 1e-10


def test_the_ridge_is_the_length_at_which_a_target_moves_half_way():
    basis = EYE[:, :10]
    c = torch.zeros(1, 48, dtype=torch.float64)
    c[0, 0], c[0, 20] = 1.0, 0.1
    share = float(c.norm())
    solution = double_projection(c, random(1, 48, seed=6), basis, ridge=0.1 / share)
    assert solution.notes["moved"] == pytest.approx(0.5)
    anchor = random(1, 48, seed=6)
    torch.testing.assert_close(c @ solution.matrix.T, (c + anchor) / 2)


def test_duplicated_targets_are_one_target():
    twice, anchors = torch.cat([TARGETS, TARGETS]), torch.cat([ANCHORS, ANCHORS])
    basis = subspace(Kept.rows_of(KEPT), energy=1.0)
    once = double_projection(TARGETS, ANCHORS, basis).matrix
    assert relative(double_projection(twice, anchors, basis).matrix, once) < 1e-9


def test_the_proxy_is_what_the_safe_span_has_of_the_target():
    basis = subspace(Kept.rows_of(KEPT), energy=1.0)
    expected = torch.linalg.lstsq(KEPT.T, TARGETS.T).solution.T @ KEPT  # S S^+ c
    torch.testing.assert_close(proxy(TARGETS, basis), expected)
    t = double_projection(TARGETS, proxy(TARGETS, basis), basis).matrix
    assert relative(t @ t, t) < 1e-10  # onto the span: a projection along what is left of the targets


@pytest.mark.parametrize("settings", [{"energy": 0.0}, {"energy": 1.1}, {"energy": 0.5, "rank": -1}])
def test_a_subspace_of_nothing_or_no_share_is_refused(settings):
    with pytest.raises(ValueError, match="a share of its energy"):
        subspace(Kept.rows_of(KEPT), **settings)
    with pytest.raises(ValueError, match="something kept"):
        subspace(Kept.zero(48), energy=0.9)


# --- CURE ------------------------------------------------------------------------------------------------------------


@FORMS
@pytest.mark.parametrize(("forget", "retain"), [(1.0, 1.0), (2.0, 5.0), (1e3, 1e6)])
def test_cure_is_the_product_of_its_projectors(kept, forget, retain):
    solution = cure(TARGETS, kept, forget_alpha=forget, retain_alpha=retain)
    expected = reference.cure(TARGETS, KEPT, forget_alpha=forget, retain_alpha=retain)
    assert relative(solution.matrix, expected) < 1e-9
    assert solution.u.shape == (48, 5) and solution.notes == {"forget_rank": 5, "retain_rank": 20}


def test_an_endless_expansion_takes_the_concept_out_and_leaves_what_is_kept():
    solution = cure(TARGETS, Kept.rows_of(KEPT), forget_alpha=1e12, retain_alpha=1e12)
    assert relative(KEPT @ solution.matrix.T, KEPT) < 1e-9
    apart = cure(TARGETS, Kept.zero(48), forget_alpha=1e12, retain_alpha=1.0)
    assert float((TARGETS @ apart.matrix.T).norm()) < 1e-9 * float(TARGETS.norm()) and apart.notes["retain_rank"] == 0


def test_erasing_twice_erases_more():
    once = cure(TARGETS, Kept.zero(48), forget_alpha=2.0, retain_alpha=1.0)
    left = [float((TARGETS @ s.matrix.T).norm() / TARGETS.norm()) for s in (once, once.then(once))]
    assert 0 < left[1] < left[0] < 1


def test_the_expansion_grows_from_the_share_to_one():
    energies = torch.tensor([6.0, 3.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(expansion(energies, 1.0), energies / 10)
    torch.testing.assert_close(expansion(energies, 5.0)[0], torch.tensor(3.0 / 3.4, dtype=torch.float64))
    assert float(expansion(energies, 1e9).min()) > 0.999
    with pytest.raises(ValueError, match="goes up from 1"):
        expansion(energies, 0.5)
    with pytest.raises(ValueError, match="every embedding to forget is zero"):
        cure(torch.zeros(2, 48, dtype=torch.float64), Kept.zero(48), forget_alpha=2.0, retain_alpha=2.0)


def test_wide_embeddings_form_no_square_matrix():
    d = 20_000
    x, y, k = random(4, d, seed=1), random(4, d, seed=2), Kept.rows_of(random(8, d, seed=3))
    largest = 0

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            largest = max([largest, *(t.numel() for t in torch.utils._pytree.tree_leaves(out) if hasattr(t, "numel"))])
            return out

    with Sizes():
        assert double_projection(x, y, subspace(k, energy=1.0)).smallest().u.shape == (d, 4)
        assert cure(x, k, forget_alpha=5.0, retain_alpha=5.0).smallest().u.shape[0] == d
    assert largest <= 16 * d


# --- as methods ------------------------------------------------------------------------------------------------------

# random text encoders do not tell a concept from its neighbours, and the quick report says so
pytestmark = pytest.mark.filterwarnings("ignore:.*move .* times as much")
HERO = Concept("superhero", anchor="ninja", synonyms=("spiderman",))
KEEP = ["wizard", "batman", "the cat"]


def rows(pipe, prompts, span):
    return torch.cat([r for c in [backbone_of(pipe).encode(prompts)] for r in c.take(span)]).double()


def test_double_projections_keep_every_token_of_the_keep_list_and_move_the_concept():
    pipe = tiny_pipeline(width=128)
    edit = make(pipe, HERO, "double-projections", preset="paper", keep=KEEP, proxy=False)
    u, v = (edit.tensors[f"hidden.{name}"].double() for name in "uv")
    kept, x, y = (rows(pipe, prompts, "last_subject") for prompts in (KEEP, ["superhero"], ["ninja"]))
    assert float((kept @ v @ u.T).norm()) < 1e-5 * float(kept.norm())
    assert relative(x + x @ v @ u.T, y) < 1e-4
    report = edit.config["report"]
    assert report["preserved_rank"] == 3 and 0 < report["least_residual"] <= report["residual"] < 1


def test_double_projections_say_that_nothing_is_left_to_move():
    pipe = tiny_pipeline()  # 32 wide: the tokens of the keep list fill the space
    settings = {"token_span": "subject_to_end", "keep_span": "all"}
    with pytest.raises(ValueError, match="set ridge"):
        make(pipe, HERO, "double-projections", preset="paper", keep=KEEP, energy=1.0, **settings)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        edit = make(pipe, HERO, "double-projections", preset="paper", keep=KEEP, energy=0.999, ridge=0.5, **settings)
    assert any("of the concept's length" in str(w.message) for w in caught) == (edit.config["report"]["moved"] < 0.5)


def test_a_higher_rank_moves_less():
    pipe = tiny_pipeline(width=128)
    moved = [
        make(pipe, HERO, "double-projections", keep=KEEP, energy=1.0, rank=rank, keep_everyday=False).config["report"]
        for rank in (2, 20, 60)
    ]
    assert moved[0]["residual"] > moved[1]["residual"] > moved[2]["residual"]
    assert [r["preserved_rank"] for r in moved] == [2, 20, 60]


def test_cure_shrinks_the_concept_and_needs_no_anchor():
    pipe = tiny_pipeline(width=128)
    edit = make(pipe, "superhero", "cure", keep=KEEP)
    x = rows(pipe, ["superhero"], "last_subject")
    strong = make(pipe, "superhero", "cure", keep=KEEP, forget_alpha=1e6, retain_alpha=1.0)
    left = [
        float((x + x @ e.tensors["hidden.v"].double() @ e.tensors["hidden.u"].double().T).norm() / x.norm())
        for e in (edit, strong)
    ]
    assert left[1] < left[0] < 1
    with_anchor = make(pipe, Concept("superhero", anchor="ninja"), "cure", keep=KEEP)
    torch.testing.assert_close(with_anchor.tensors["hidden.v"].abs(), edit.tensors["hidden.v"].abs())


@pytest.mark.parametrize("method", ["double-projections", "cure"])
def test_weights_that_have_no_meaning_here_are_refused_and_nothing_can_be_solved_again(method):
    pipe = tiny("sd1")
    with pytest.raises(ValueError, match="weighs nothing; got lamb=0.1"):
        make(pipe, HERO, method, keep=KEEP, lamb=0.1)
    room = {"rank": 8} if method == "double-projections" else {}  # the everyday words fill a text of 32 dimensions
    edit = make(pipe, HERO, method, keep=KEEP, **room)
    assert not edit.system and "system" not in edit.config
