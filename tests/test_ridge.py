"""The mathematics of the closed forms on random numbers: no model, no prompts."""

import dataclasses
import itertools
import warnings

import pytest
import torch

from erasure.methods.drift import Drift
from erasure.methods.kept import Accumulator, Kept
from erasure.methods.ridge import Problem, Solution, compressed, condensed, gathered, gram_root, solve
from tests.reference import ridge as reference

EPS = torch.finfo(torch.float64).eps


def random(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def relative(a, b):
    return float((a - b).norm() / b.norm())


def problems():
    """Targets, anchors, kept rows: spread, duplicated, nearly so, zero, of very different size, and none kept."""
    x, y, k = random(12, 96, seed=1), random(12, 96, seed=2), random(40, 96, seed=3)
    yield "spread", x, y, k
    yield "duplicated", torch.cat([x, x[:5]]), torch.cat([y, y[:5]]), torch.cat([k, k[:7], x[:2]])
    yield "nearly duplicated", torch.cat([x, x + 1e-6 * y]), torch.cat([y, y]), k
    yield "zero", torch.cat([x, 0 * x[:3]]), torch.cat([y, y[:3]]), torch.cat([k, 0 * k[:4]])
    yield "sizes", x * torch.logspace(-3, 1, 12, dtype=torch.float64)[:, None], y, k
    yield "nothing kept", x, y, k[:0]


# --- two systems, one solution ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("x", "y", "k"), [pytest.param(*rows, id=name) for name, *rows in problems()])
@pytest.mark.parametrize("lamb", [10.0, 0.5, 1e-3, 1e-6])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_primal_dual_and_the_explicit_inverse_agree(x, y, k, lamb, scale):
    rows = Kept.rows_of(k, 0.7)
    primal = solve(Problem(x, y, rows.matrix(), lamb, scale))
    dual = solve(Problem(x, y, rows, lamb, scale))
    bound = max(1e-9, EPS * primal.condition)  # what a solver in float64 can promise of an ill-conditioned system
    assert relative(dual.matrix, primal.matrix) < bound
    expected = reference.matrix(x, y, [(row, 0.7) for row in k], lamb=lamb, erase_scale=scale)
    assert relative(dual.matrix, expected) < bound and relative(primal.matrix, expected) < bound
    assert dual.condition == pytest.approx(primal.condition, rel=0.05)


@pytest.mark.parametrize("shape", [(3, 8), (20, 33), (60, 20)])
def test_random_problems_of_every_shape_agree(shape):
    n, m = shape
    for seed, d in itertools.product(range(5), (24, 64, 128)):
        x, y, k = random(n, d, seed=seed), random(n, d, seed=seed + 100), random(m, d, seed=seed + 200)
        rows = Kept.rows_of(k)
        primal, dual = (solve(Problem(x, y, kept, 1e-3)) for kept in (rows.matrix(), rows))
        assert relative(dual.matrix, primal.matrix) < 1e-9  # where rows outnumber dimensions both are the primal


def test_a_system_without_a_ridge_gets_the_same_one_in_both_forms():
    x, y, k = random(6, 48, seed=1), random(6, 48, seed=2), random(9, 48, seed=3)
    rows = Kept.rows_of(k)
    with pytest.warns(UserWarning, match="a ridge of"):
        primal = solve(Problem(x, y, rows.matrix(), 0.0))
    with pytest.warns(UserWarning, match="a ridge of"):
        dual = solve(Problem(x, y, rows, 0.0))
    assert relative(dual.matrix, primal.matrix) < 1e-6  # conditioned as 1e8
    assert relative(x @ dual.matrix.T, y) < 1e-6 and relative(k @ dual.matrix.T, k) < 1e-6


# --- a weight that spares what is kept -------------------------------------------------------------------------------


def drift(problem, probes):
    moved = probes @ (solve(problem).matrix - torch.eye(probes.shape[1], dtype=probes.dtype)).T
    return float(moved.norm() / (probes - probes.mean(dim=0)).norm())


def lighter(problem, scale):
    root = (scale / problem.erase_scale) ** 0.5
    return dataclasses.replace(problem, targets=root * problem.targets, anchors=root * problem.anchors)


@pytest.mark.parametrize(("kept", "lamb"), [(15, 0.5), (200, 0.5), (200, 0.0)], ids=["rows", "matrix", "no ridge"])
def test_each_concept_has_the_weight_at_which_it_drifts_no_further_than_the_limit(kept, lamb):
    x, y, probes = random(9, 48, seed=1), random(9, 48, seed=2), random(kept, 48, seed=3, scale=0.2)
    alone = [Problem(x[i], y[i], Kept.rows_of(probes), lamb, 3.0) for i in (slice(4), slice(4, 9))]
    limit = sum(drift(one, probes) for one in alone) / 2  # one of the two exceeds it
    found = Drift(Kept.rows_of(probes), lamb, probes)
    scales = [found.scale_within(one.targets, one.anchors, limit, 3.0) for one in alone]
    assert found.defined and sorted(scale < 3.0 for scale in scales) == [False, True]
    for one, scale in zip(alone, scales, strict=True):
        assert drift(one, probes) <= limit or drift(lighter(one, scale), probes) == pytest.approx(limit, rel=1e-6)
        assert found.scale_within(one.targets, one.anchors, 1e6, 3.0) == 3.0


def test_a_tiny_ridge_is_that_of_the_solution():
    x, y, probes = random(3, 8, seed=1), random(3, 8, seed=2), random(2, 8, seed=3)
    problem = Problem(x, y, Kept.rows_of(probes), 1e-16, 3.0)
    scale = Drift(problem.kept, 1e-16, probes).scale_within(x, y, 0.1, 3.0)
    with pytest.warns(UserWarning, match="a ridge of"):
        assert scale == 3.0 and drift(problem, probes) <= 0.1
    with pytest.raises(ValueError, match="any drift is possible"):
        Drift(Kept.zero(8), 0.0, probes)


def test_probes_that_are_the_same_are_not_apart():
    one = random(1, 8, seed=1)
    assert not Drift(Kept.rows_of(one), 0.5, one.repeat(3, 1)).defined
    assert not Drift(Kept.rows_of(one), 0.5, one).defined


def test_the_dual_forms_no_matrix_of_the_width_squared():
    d, largest = 6000, 0
    x, y, k = random(20, d, seed=1), random(20, d, seed=2), random(30, d, seed=3)

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            largest = max([largest, *(t.numel() for t in torch.utils._pytree.tree_leaves(out) if hasattr(t, "numel"))])
            return out

    with Sizes():
        solution = solve(Problem(x, y, Kept.rows_of(k), 0.5)).smallest()
    assert largest <= 60 * d and solution.u.shape == (d, 20)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"anchors": random(3, 16)}, "every target needs one anchor"),
        ({"kept": torch.zeros(9, 9)}, "every target needs one anchor.*kept 9 wide"),
        ({"kept": torch.zeros(9, 16)}, "Kept.rows_of"),
        ({"lamb": -0.1}, "lambda is a finite number and never negative"),
        ({"lamb": float("nan")}, "lambda is a finite number and never negative"),
        ({"targets": torch.full((4, 16), float("nan"))}, "targets hold NaN"),
        ({"kept": Kept.rows_of(torch.full((2, 16), float("inf")))}, "kept hold NaN or infinity"),
        ({"targets": torch.zeros(4, 16), "lamb": 0.0}, "every embedding is zero"),
        ({"targets": torch.zeros(4, 16), "lamb": 0.0, "kept": Kept.zero(16)}, "every embedding is zero"),
    ],
)
def test_what_has_no_solution_is_refused(change, fault):
    given = {"targets": random(4, 16), "anchors": random(4, 16, seed=1), "kept": torch.zeros(16, 16), "lamb": 0.5}
    with pytest.raises(ValueError, match=fault):
        solve(Problem(**(given | change)))


# --- what is kept ----------------------------------------------------------------------------------------------------


def test_rows_and_matrices_of_what_is_kept_add_and_weigh_alike():
    a, b = random(5, 32, seed=1), random(9, 32, seed=2)
    expected = 2.0 * a.T @ a + 0.5 * b.T @ b
    rows = Kept.rows_of(a, 2.0) + 0.5 * Kept.rows_of(b)
    matrices = Kept.of(a.T @ a) * 2.0 + Kept.of(b.T @ b) * 0.5
    assert rows.low_rank and not matrices.low_rank and not (rows + matrices).low_rank
    for kept in (rows, matrices, Kept.zero(32) + rows, Kept.rows_of(a, 2.0) + Kept.of(0.5 * b.T @ b)):
        torch.testing.assert_close(kept.matrix(), expected)
        root = kept.rows()
        torch.testing.assert_close(root.T @ root, expected)
        values, vectors = kept.spectrum()
        assert len(values) == 14 and bool((values.diff() <= 0).all())
        torch.testing.assert_close(vectors * values @ vectors.T, expected)
    with pytest.raises(ValueError, match="not negative"):
        rows * -1.0
    with pytest.raises(ValueError, match="widths differ"):
        rows + Kept.zero(31)
    assert len(Kept.zero(32).spectrum()[0]) == len(Kept(torch.zeros(32, 32).double()).spectrum()[0]) == 0


def test_a_sketch_is_exact_while_its_rows_suffice_and_says_what_it_lost_after():
    x = random(400, 64, seed=1) @ torch.diag(torch.logspace(0, -4, 64, dtype=torch.float64))
    gram = x.T @ x
    for size, exact in ((64, True), (16, False)):
        total = Accumulator(64, wide=0, size=size)
        for batch in x.split(23):
            total.add(batch)
        kept = total.kept()
        assert kept.low_rank and len(kept.data) <= size
        missed = gram - kept.matrix()
        if exact:
            assert float(missed.norm()) < 1e-12 * float(gram.norm()) and kept.lost < 1e-12 * float(gram.trace())
            continue
        assert float(torch.linalg.eigvalsh(missed)[0]) > -1e-12 * float(gram.norm())  # nothing is kept twice
        assert kept.lost == pytest.approx(float(missed.trace()), rel=1e-9)
        best = float(torch.linalg.eigvalsh(gram)[:-size].sum())
        assert best <= kept.lost * (1 + 1e-9) and kept.lost < 2 * best
    few = Accumulator(64, wide=0, size=16)
    few.add(x[:10])
    assert torch.equal(few.kept().data, x[:10]) and few.kept().lost == 0.0


def test_sketches_add_up_and_what_they_lost_does():
    x = random(300, 48, seed=1) @ torch.diag(torch.logspace(0, -3, 48, dtype=torch.float64))
    parts = []
    for rows in x.split(150):
        part = Accumulator(48, wide=0, size=20)
        part.add(rows)
        parts.append(part.kept())
    both = (parts[0] + parts[1]).shrunk(20)
    gram = x.T @ x
    assert len(both.data) == 20
    assert both.lost == pytest.approx(float((gram - both.matrix()).trace()), rel=1e-9)
    assert (2.0 * both).lost == pytest.approx(2 * both.lost)


def test_narrow_embeddings_are_summed_as_their_matrix():
    x = random(50, 16, seed=1)
    total = Accumulator(16)
    for batch in x.split(7):
        total.add(batch)
    assert not total.kept().low_rank
    torch.testing.assert_close(total.kept().matrix(), x.T @ x)


# --- rows and factors ------------------------------------------------------------------------------------------------


def test_condensed_rows_ask_the_same():
    x, y, k = random(90, 24, seed=1), random(90, 24, seed=2), random(10, 24, seed=3)
    r, q = condensed(x, y)
    assert r.shape == q.shape == (24, 24)
    a, b = (solve(Problem(*rows, k.T @ k, 0.3, 2.0)) for rows in ((x, y), (r, q)))
    assert relative(b.matrix, a.matrix) < 1e-11
    assert condensed(x[:24], y[:24])[0] is not None and torch.equal(condensed(x[:24], y[:24])[0], x[:24])


def test_concepts_stay_apart_up_to_the_limit_and_are_condensed_as_they_come_beyond():
    pairs = [(random(10, 24, seed=i), random(10, 24, seed=i + 100)) for i in range(40)]
    held = []

    def come():
        for x, y in pairs:
            held.append(x)
            yield x, y

    x, y, counts = gathered(iter(pairs))
    assert len(x) == 400 and counts == (10,) * 40 and torch.equal(y, torch.cat([b for _, b in pairs]))
    few_x, few_y, counts = gathered(come(), limit=0)
    assert len(few_x) == 24 and sum(counts) == 400
    a, b = (solve(Problem(*rows, torch.zeros(24, 24), 0.3)) for rows in ((x, y), (few_x, few_y)))
    assert relative(b.matrix, a.matrix) < 1e-11


def test_factors_are_compressed_composed_and_measured_without_the_matrix():
    u, v = random(40, 6, seed=1), random(40, 6, seed=2)
    u2, v2 = torch.cat([u, u], dim=1), torch.cat([v, 2 * v], dim=1)
    small = compressed(u2, v2)
    assert small[0].shape == (40, 6)
    torch.testing.assert_close(small[0] @ small[1].T, u2 @ v2.T)
    a, b = Solution(u, v, 3.0), Solution(random(40, 2, seed=3), random(40, 2, seed=4), 5.0)
    torch.testing.assert_close(a.then(b).matrix, a.matrix @ b.matrix)
    assert a.then(b).condition == 5.0
    w = random(7, 6, seed=5)
    assert float((w @ gram_root(v)).norm()) == pytest.approx(float((w @ v.T).norm()), rel=1e-9)
    assert a.norm == pytest.approx(float((u @ v.T).norm()), rel=1e-9)


def test_nothing_warns_where_nothing_is_wrong():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solve(Problem(random(4, 32), random(4, 32, seed=1), Kept.rows_of(random(5, 32, seed=2)), 0.5)).smallest()
