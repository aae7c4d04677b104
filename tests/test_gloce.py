"""GLoCE: its matrices and gate against plain readings of them, and what the erasure does while pictures are drawn."""

import math

import numpy as np
import pytest
import torch

from erasure import Concept, Erasure
from erasure.artifact.localized import LocalizedErasure, correction, response
from erasure.backbone import backbone_of
from erasure.methods.base import Request
from erasure.methods.gloce import GLoCE, moments, outputs, peaks_of, principal
from tests.slow import first
from tests.test_operator import draw
from tests.tiny import identical, make, tiny, tiny_pipeline, weights

HERO, CAT = Concept("superhero", anchor="ninja"), Concept("cat", anchor="wizard")
QUICK = {"generations": 2, "num_inference_steps": 4, "first": 1, "last": 3, "target_rank": 3, "deviations": -20.0}


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_moments_are_those_of_all_places():
    every = [{"a": random(2, 5, 3), "b": random(1, 4, 2)}, {"a": random(1, 5, 3, seed=1), "b": random(2, 4, 2, seed=1)}]
    found = moments(every)
    for name in ("a", "b"):
        rows = torch.cat([one[name].float().flatten(0, 1) for one in every]).double().numpy()
        mean, covariance = found[name]
        np.testing.assert_allclose(mean, rows.mean(0), atol=1e-12)
        np.testing.assert_allclose(covariance, np.cov(rows.T, bias=True), atol=1e-12)


def test_principal_directions_are_those_of_the_svd():
    x = random(50, 6)
    covariance = x.T @ x / 50
    ours, theirs = principal(covariance, 2), torch.linalg.svd(covariance).Vh[:2]
    torch.testing.assert_close(ours.T @ ours, theirs.T @ theirs, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(ours @ ours.T, torch.eye(2, dtype=torch.float64))
    assert len(principal(covariance, 99)) == 6


def test_the_gate_and_what_stands_behind_it_are_the_papers():
    x, concepts = random(2, 4, 5), []
    method = GLoCE(target_rank=2, surrogate_rank=3)
    c_t, c_s = (random(9, 5, seed=s) for s in (1, 2))
    m_t, m_s, m_k = (random(5, seed=s) for s in (3, 4, 5))
    target, surrogate = (m_t, c_t.T @ c_t), (m_s, c_s.T @ c_s)
    for centre in (0.3, 0.6):
        gate = method.gate(target, m_k)
        parts = {**method.matrices(target, surrogate), "gate": gate, "reference": m_k}
        concepts.append({**parts, "logistic": torch.tensor([centre, 7.0], dtype=torch.float64)})
    v_t, v_s = torch.linalg.svd(target[1]).Vh[:2], torch.linalg.svd(surrogate[1]).Vh[:3]
    away = (m_t - m_k)[:, None]
    g_basis = torch.linalg.svd(target[1] + away @ away.T).Vh[:1]
    theirs = torch.empty_like(x)
    for n in range(2):
        for p in range(4):
            one = x[n, p]
            r = (one - m_k) / (one - m_k).norm()
            g = torch.sigmoid(7.0 * (((g_basis @ r) ** 2).sum() - 0.3))  # the lower centre opens further
            other = m_s + v_s.T @ v_s @ (torch.eye(5, dtype=torch.float64) - v_t.T @ v_t) @ (one - m_t)
            theirs[n, p] = (1 - g) * one + g * other
    for order in (concepts, concepts[::-1]):
        torch.testing.assert_close(x + correction(x, order), theirs, rtol=1e-8, atol=1e-8)


def test_the_gate_opens_around_the_largest_responses_of_what_is_kept():
    pipe, request = tiny_pipeline(), Request((HERO,), keep=("wizard", "van gogh"), progress=False)
    method, backbone = GLoCE(**{**QUICK, "width": 0.5}), backbone_of(pipe)
    edit = method.erase(backbone, request)
    steps = method.drawn(backbone, ["wizard", "van gogh"], 0)
    assert len(steps) == 2 and all(len(t) == 4 for _, t, _ in steps)  # two of four steps, two pictures of each
    assert edit.tensors["start"] == steps[0][1][0] > steps[1][1][0]
    reference = {site: mean for site, (mean, _) in moments(outputs(backbone, steps)).items()}
    target = moments(outputs(backbone, method.drawn(backbone, ["superhero"], 1)))
    gates = {site: method.gate(target[site], reference[site]) for site in target}
    peaks = peaks_of(outputs(backbone, steps), gates, reference)
    for site, found in peaks.items():
        every = [response(one[site].double(), gates[site], reference[site]) for one in outputs(backbone, steps)]
        torch.testing.assert_close(found, torch.cat([one.amax(1) for one in every]), rtol=1e-5, atol=1e-7)
        assert 0 <= found.min() and found.max() <= 1 + 1e-9
        centre, slope = edit.tensors[f"{site}.0.logistic"].tolist()
        assert centre == pytest.approx(float(found.mean() - 20.0 * found.std()), rel=1e-3)
        half = 0.5 * float(found.std())
        assert 1 / (1 + math.exp(-slope * half)) == pytest.approx(0.99, abs=1e-4)
        assert edit.config.report["gate_opens"] == 1.0


@pytest.mark.parametrize("architecture", first(["sd1", "sdxl"], "sd1"))
def test_an_erasure_acts_from_its_first_step_on_and_at_its_scale(architecture, tmp_path):
    pipe = tiny(architecture)
    before, base = weights(pipe), draw(pipe)
    edit = make(pipe, [HERO, CAT], "gloce", keep=["van gogh"], progress=False, **QUICK)
    assert isinstance(edit, LocalizedErasure) and identical(before, weights(pipe))
    backbone, site = backbone_of(pipe), edit.sites[0]
    text, seen = backbone.encode(["superhero"]).text, {}
    start = float(edit.tensors["start"])

    def output(t, scale):
        edit.apply(pipe, scale)
        layer = backbone.denoiser.get_submodule(site)
        handle = layer.register_forward_hook(lambda m, a, out: seen.update(x=out))
        x = torch.randn(1, *backbone.latent_shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            backbone.predict(x, torch.tensor([t]), text)
        handle.remove(), edit.remove(pipe)
        return seen["x"].double()

    plain = output(start, 0.0)
    concepts = [{k: v.double() for k, v in one.items()} for one in edit.concepts_of(site)]
    for scale in (0.5, 1.0):
        expected = plain + scale * correction(plain, concepts)
        torch.testing.assert_close(output(start, scale), expected, rtol=1e-3, atol=1e-4)
    early = start + 1.0
    assert torch.equal(output(early, 1.0), output(early, 0.0))
    edit.apply(pipe)
    assert (draw(pipe) - base).abs().max() > 1e-5
    edit.remove(pipe)
    assert identical(before, weights(pipe)) and torch.equal(draw(pipe), base)
    assert Erasure.from_pretrained(edit.save_pretrained(tmp_path / "edit")).kind == "localized"


def test_damaged_and_foreign_erasures_are_refused():
    pipe = tiny_pipeline()
    edit = make(pipe, HERO, "gloce", keep=["wizard"], progress=False, **QUICK)
    site = edit.sites[0]
    changes = {"0.down": random(3, 7), "0.logistic": random(3), "0.bias": random(4), "1.bias": random(16)}
    for name, tensor in changes.items():
        with pytest.raises(ValueError, match="a localized erasure holds"):
            type(edit)(edit.name, edit.config, {**edit.tensors, f"{site}.{name}": tensor}).check_tensors()
    with pytest.raises(ValueError, match="a localized erasure holds"):
        type(edit)(edit.name, edit.config, {k: v for k, v in edit.tensors.items() if k != "start"}).check_tensors()


@pytest.mark.parametrize(
    ("keep", "given", "message"),
    [
        ([], {}, "empty keep list"),
        (["wizard"], {"first": 3}, "let them rise"),
        (["wizard"], {"last": 5}, "let them rise"),
        (["wizard"], {"target_rank": 0}, "target_rank"),
        (["wizard"], {"width": 0.0}, "width"),
        (["wizard"], {"generations": 0}, "generations"),
    ],
)
def test_what_makes_no_sense_is_refused_before_any_work(keep, given, message, monkeypatch):
    pipe = tiny_pipeline()
    monkeypatch.setattr(type(pipe), "__call__", lambda *args, **kwargs: pytest.fail("work was done"))
    with pytest.raises(ValueError, match=message):
        make(pipe, HERO, "gloce", keep=keep, progress=False, **{**QUICK, **given})


def test_a_gate_that_never_opens_is_refused():
    with pytest.raises(ValueError, match="the gate opens on no picture of the target"):
        make(tiny_pipeline(), HERO, "gloce", keep=["wizard"], progress=False, **{**QUICK, "deviations": 1e6})


@pytest.mark.parametrize("architecture", ["sd3", "flux"])
def test_models_without_cross_attention_are_refused(architecture):
    with pytest.raises(ValueError, match="gloce does not work on .*choose another"):
        make(tiny(architecture), HERO, "gloce", keep=["wizard"], progress=False, **QUICK)
