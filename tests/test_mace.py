"""MACE: each stage against a plain reading of it, and the whole on tiny models."""

import pytest
import torch
import torch.nn.functional as F

from erasure import Concept, Erasure
from erasure.backbone import backbone_of
from erasure.methods.base import Request
from erasure.methods.mace import MACE, attention, fuse, masked_mass, places_of
from erasure.train import Draw
from tests.slow import first
from tests.tiny import identical, make, tiny, weights

HERO, CAT = Concept("superhero", anchor="ninja"), Concept("cat", anchor="dog")
QUICK = {"iterations": 3, "lr": 1e-2, "trajectories": 2, "keep_steps": 2, "num_inference_steps": 3, "progress": False}


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_fusion_is_the_least_squares_of_all_rows():
    w, w1, aims = random(5, 7), random(5, 7, seed=1), [random(5, 7, seed=2), random(5, 7, seed=3)]
    rows, kept, lamb = [random(4, 7, seed=4), random(6, 7, seed=5)], random(3, 7, seed=6), 0.3
    moments = [x.T @ x for x in rows]
    ours = fuse(w, w1, aims, moments, kept.T @ kept, lamb)
    x = torch.cat([*rows, lamb**0.5 * torch.eye(7, dtype=torch.float64), kept])
    y = torch.cat([*(r @ m.T for r, m in zip(rows, aims, strict=True)), lamb**0.5 * w1.T, kept @ w.T])
    torch.testing.assert_close(ours, torch.linalg.lstsq(x, y).solution.T, rtol=1e-8, atol=1e-8)
    near = fuse(w, w1, [w1, w1], moments, 0 * kept.T @ kept, lamb)  # nothing was trained and nothing is kept
    torch.testing.assert_close(near, w1, rtol=1e-8, atol=1e-8)


def test_the_mass_counts_the_words_at_the_places_of_the_mask():
    maps = [random(2, 3, 64, 5).float().softmax(-1), random(2, 3, 16, 5, seed=1).float().softmax(-1)]
    words = torch.tensor([[0, 1, 1, 0, 0], [0, 0, 1, 0, 0.0]])
    masks = (random(2, 8, 8, seed=2) > 0).float()
    total = 0.0
    for a, side in zip(maps, (8, 4), strict=True):
        square = 0.0
        for n in range(2):
            mask = masks[n, :: 8 // side, :: 8 // side].flatten()
            for token in words[n].nonzero().flatten():
                square += (a[n, :, :, token] * mask).square().sum()
        total += square**0.5
    torch.testing.assert_close(masked_mass(maps, words, masks), total, rtol=1e-5, atol=1e-6)
    assert places_of(maps[1], words, (8, 8)).shape == (2, 3, 4, 4)


def test_masks_are_where_the_model_looks_when_it_reads_the_words():
    pipe = tiny("sd1")
    backbone, request = backbone_of(pipe), Request(concepts=(HERO,), progress=False)
    method = MACE(**{k: v for k, v in QUICK.items() if k != "progress"})
    encoded = backbone.encode(["superhero"])
    (span,) = encoded.segments[0].span("content")
    words = torch.zeros(1, 77)
    words[0, span] = 1
    bank = method.pictures(backbone, encoded.text, request, None, "bank", window=(0.2, 0.4))
    assert all(200 <= t < 400 for t in bank.t.tolist())
    masks = method.masks(backbone, bank, encoded.text, words)
    with torch.no_grad():
        maps = attention(backbone, bank, encoded.text, torch.arange(len(bank)))
    side, mean = bank.x.shape[-1], 0
    for a in maps:
        here = round(a.shape[2] ** 0.5)
        looked = a[..., span].sum(-1).mean(1).reshape(-1, 1, here, here)
        mean = mean + F.interpolate(looked, (side, side), mode="bilinear") / len(maps)
    for mask, one in zip(masks, mean[:, 0], strict=True):
        scaled = (one - one.min()) / (one.max() - one.min())
        assert torch.equal(mask, (scaled > 0.5).float()) and 0 < mask.mean() < 1
    assert method.masks(backbone, bank, encoded.text, words).equal(masks)
    assert MACE(masked=False).masks(backbone, bank, encoded.text, words).min() == 1


@pytest.mark.parametrize("architecture", first(["sd1", "sdxl"], "sd1"))
def test_two_concepts_become_one_edit_and_the_model_is_put_back(architecture, tmp_path):
    pipe = tiny(architecture)
    before = weights(pipe)
    edit = make(pipe, [HERO, CAT], "mace", keep=["wizard"], checkpoint=tmp_path / "training", **QUICK)
    assert edit.kind == "delta" and identical(before, weights(pipe))
    backbone = backbone_of(pipe)
    sites = {f"{name}.weight" for name in backbone.text_sites("hidden")}
    assert set(edit.tensors) == sites and edit.config.prompts == ["superhero", "cat"]
    edit.save_pretrained(tmp_path / "edit")
    Erasure.from_pretrained(tmp_path / "edit").apply(pipe)
    assert not identical(before, weights(pipe))


def test_training_lowers_the_attention_and_fusion_keeps_some_of_that():
    pipe = tiny("sd1")
    backbone, request = backbone_of(pipe), Request(concepts=(HERO,), progress=False)
    settings = {**QUICK, "iterations": 30, "lamb": 1e-3, "preserve_scale": 0.0, "masked": False}
    method = MACE(**{k: v for k, v in settings.items() if k != "progress"})
    loss = method.objective(backbone, method.student(backbone), request, None)

    def mass():
        with torch.no_grad():
            return sum(loss(Draw(0, i)) for i in range(4)).item()

    base = mass()
    refined = method.refinement.erase(backbone, request)
    refined.apply(pipe)
    after_one = mass()
    refined.remove(pipe)
    edit = make(pipe, HERO, "mace", **settings)
    edit.apply(pipe)
    assert mass() < min(base, after_one)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"robust": True}, "compares no predictions"),
        ({"adapter": "weights"}, "an adapter for each concept"),
        ({"retain": 1.0}, "keeps by preserve_scale"),
        ({"rank": 0}, "rank"),
        ({"lamb": -1.0}, "lamb"),
    ],
)
def test_settings_that_make_no_sense_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        make(tiny("sd1"), HERO, "mace", keep=["wizard"], **{**QUICK, **given})


def test_a_concept_without_an_anchor_is_refused_before_any_work(monkeypatch):
    pipe = tiny("sd1")
    with pytest.raises(ValueError, match="needs an anchor"):
        make(pipe, "superhero", "mace", keep=["wizard"], **QUICK)
