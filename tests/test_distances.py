"""CLIP scores and distances of kept pictures: their definitions, their null, their intervals, and where they stand."""

from __future__ import annotations

import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from erasure.cli import evaluate as command
from erasure.cli import results
from erasure.concept import Concept, Prompt, Suite
from erasure.eval import Evaluation, assessment_of
from erasure.eval.core import distances as module
from erasure.eval.core import tables
from erasure.eval.core.distances import OTHER_SEEDS, Distances, frechet_draws, kid_draws, titles
from erasure.eval.core.metrics import ClipFeatures, InceptionFeatures, frechet_distance
from erasure.eval.core.quality import title_of
from erasure.eval.core.records import BASE
from erasure.eval.judge.limits import limits
from erasure.eval.report.html import render
from erasure.eval.run.drawing import paired_pictures
from tests.eval_helpers import AddNoise, PixelDetector
from tests.test_evaluate import tiny_clip
from tests.test_report import Page
from tests.tiny import tiny_pipeline

MANY = tuple(f"thing{i}" for i in range(18))
SUITE = Suite(
    version=1, name="tiny", concept=Concept("cat", neighbours=("dog", "fox")), unrelated=MANY, num_inference_steps=1
)
KID, FRECHET = "kid[clip[tiny]]", "frechet[clip[tiny]]"


def features(rng, prompts: int, each: int, d: int, *, shift: float = 0.0, scale: float = 1.0) -> np.ndarray:
    return scale * rng.normal(size=(prompts, each, d)) + shift * np.eye(d)[0]


def test_the_kernel_distance_is_a_mean_over_pictures_of_different_prompts():
    rng = np.random.default_rng(0)
    x, y = features(rng, 5, 2, 3), features(rng, 5, 2, 3, shift=1.0)
    total = []
    for p, q in itertools.permutations(range(5), 2):
        for i, j in itertools.product(range(2), repeat=2):
            k = [(a @ b / 3 + 1) ** 3 for a, b in ((x[p, i], x[q, j]), (y[p, i], y[q, j]), (x[p, i], y[q, j]))]
            total.append(k[0] + k[1] - k[2] - (y[p, i] @ x[q, j] / 3 + 1) ** 3)
    found = kid_draws([(x, y)])
    assert found.value == pytest.approx(np.mean(total))
    assert kid_draws([(x, x)]).estimate().value == pytest.approx(0)
    assert (found.pictures, found.prompts) == (10, 5)


def test_the_kernel_distance_has_no_bias_and_the_frechet_distance_has():
    rng = np.random.default_rng(1)
    pairs = [(features(rng, 20, 1, 16), features(rng, 20, 1, 16)) for _ in range(300)]
    values = np.array([kid_draws([pair]).value for pair in pairs])
    assert abs(values.mean()) < 3 * values.std() / len(values) ** 0.5
    assert np.mean([frechet_distance(x[:, 0], y[:, 0]) for x, y in pairs]) > 5


@pytest.mark.parametrize(("pictures", "d"), [(40, 8), (12, 30)])
def test_the_frechet_distance_is_that_of_torchmetrics(pictures, d):
    from torchmetrics.image.fid import _compute_fid

    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(pictures, d)), rng.normal(size=(pictures, d)) @ rng.normal(size=(d, d)) / 4 + 0.5
    given = [torch.from_numpy(z) for a in (x, y) for z in (a.mean(0), np.cov(a.T))]
    assert frechet_distance(x, y) == pytest.approx(float(_compute_fid(*given)), rel=1e-3)
    doubled = np.repeat([2.0, 0.0], pictures // 2) / pictures  # a weight is a picture that is there so often
    kept = pictures // 2
    ratio = pictures / (pictures - 1) * (kept - 1) / kept
    a, b = x[:kept], y[:kept]
    spread = frechet_distance(a, b) - ((a.mean(0) - b.mean(0)) ** 2).sum()
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + spread * ratio
    assert frechet_distance(x, y, doubled) == pytest.approx(expected)


def test_intervals_hold_the_truth_and_equal_models_are_seldom_told_apart(monkeypatch):
    """A small simulation; a larger one gives 92 to 100 % and under 1 %."""
    monkeypatch.setattr(module, "KID_DRAWS", 300)
    monkeypatch.setattr(module, "FRECHET_DRAWS", 40)
    truth = np.mean([kid_draws([world(np.random.default_rng(s), 800, 1.5)[1:]]).value for s in range(4)])
    held, told, apart, far = [], [], [], []
    for seed in range(80):
        base, other, arm = world(np.random.default_rng(100 + seed), 30, 1.5)
        one, null = kid_draws([(arm, other)]), kid_draws([(base, other)])
        limits, change = one.estimate(), one.minus(null).estimate()
        held.append(limits.low <= truth <= limits.high)
        told.append(change.low > 0)
        base, other, arm = world(np.random.default_rng(500 + seed), 30, 0.0)
        for draws, found in ((kid_draws, apart), (frechet_draws, far)):
            change = draws([(arm, other)]).minus(draws([(base, other)])).estimate()
            found.append(change.low > 0 or change.high < 0)
    assert np.mean(held) >= 0.85 and np.mean(told) >= 0.9
    assert np.mean(apart) <= 0.05 and np.mean(far) <= 0.05


def world(rng, prompts: int, shift: float, d: int = 8):
    """Features of a base, of the base with other seeds and of an arm, which share what is the prompt's."""
    common = rng.normal(size=(prompts, 1, d)) * 0.5**0.5
    base, other, arm = (common + 0.5**0.5 * rng.normal(size=(prompts, 1, d)) for _ in range(3))
    return base, other, arm + shift * np.eye(d)[0]


class Colour(torch.nn.Module):
    """The mean colour of a picture."""

    name = "colour"

    def forward(self, pixels):
        return pixels.float().mean((2, 3)) / 128


def flat(rng, level: float) -> Image.Image:
    return Image.fromarray((level + rng.normal(0, 20, (4, 4, 3))).clip(0, 255).astype(np.uint8))


def test_half_of_the_seeds_is_the_null_where_there_are_two():
    rng = np.random.default_rng(0)
    prompts = [Prompt(f"a {i}", "neighbours", str(i)) for i in range(20)]
    base, bright = ([[flat(rng, level) for _ in range(2)] for _ in prompts] for level in (100, 160))
    job = Distances([Colour()], prompts, (0, 1))
    assert job.wanted == []
    null, _ = job.of(BASE, base)
    kid, far = job.of("bright", bright)
    assert (null.metric, far.metric, null.group) == ("kid[colour]", "frechet[colour]", "neighbours")
    assert null.value.low <= 0 <= null.value.high and null.change is None and null.value.n == 20
    assert kid.change.low > 0 and kid.change.value == pytest.approx(kid.value.value - null.value.value)
    assert far.change.low > 0
    (same, _) = job.of("same", base)
    assert same.change.value == same.change.low == same.change.high == 0


def test_the_base_draws_other_seeds_where_there_is_one_picture_a_prompt():
    rng = np.random.default_rng(0)
    prompts = [Prompt("the target", "target", "t"), *(Prompt(f"a {i}", "unrelated", str(i)) for i in range(20))]
    job = Distances([Colour()], prompts, (0,))
    assert job.wanted == list(range(1, 21))
    base, others = [[flat(rng, 100)] for _ in prompts], [[flat(rng, 100)] for _ in job.wanted]
    null, _ = job.of(BASE, base, others)
    assert null.value.low <= 0 <= null.value.high and null.value.value != 0


def test_too_few_pictures_have_no_distance_and_no_number():
    rng = np.random.default_rng(0)
    prompts = [Prompt(f"a {i}", "neighbours", str(i)) for i in range(5)]
    job = Distances([Colour()], prompts, (0,))
    found = job.of(BASE, [[flat(rng, 100)] for _ in prompts])
    assert job.wanted == [] and {d.value.value for d in found} == {None}
    assert {d.value.reason for d in found} == {"too few pictures (5; at least 16)"}


def test_only_inception_has_proper_names():
    assert [title_of(key) for key in titles("inception")] == [
        "KID, Inception v3 features",
        "FID, Inception v3 features",
    ]
    other = [title_of(key) for key in titles("clip[vit-b-32/openai]")]
    assert other == ["KID, clip[vit-b-32/openai] features", "Fréchet distance, clip[vit-b-32/openai] features"]
    assert title_of("clip[clip[tiny]]") == "CLIP score, clip[tiny]"


def test_inception_without_its_extra_says_how_to_get_it(monkeypatch):
    import torchmetrics.image.fid as fid

    monkeypatch.setattr(fid, "_TORCH_FIDELITY_AVAILABLE", False)
    with pytest.raises(ImportError, match=r"diffusion-erasure\[fid\]"):
        InceptionFeatures()


# --- in an evaluation -------------------------------------------------------------------------------------------------


class Brighter:
    """Makes every picture brighter, in the autoencoder."""

    name, config = "brighter", {"method": "brighter"}

    def apply(self, pipe) -> None:
        self.kept = pipe.vae.decoder.conv_out.bias.data.clone()
        pipe.vae.decoder.conv_out.bias.data += 2

    def remove(self, pipe) -> None:
        pipe.vae.decoder.conv_out.bias.data.copy_(self.kept)


@pytest.fixture(scope="module")
def found():
    edits = {"a little": AddNoise(scale=0.01), "a lot": Brighter()}
    return paired_pictures(tiny_pipeline(), edits, SUITE, detectors=[PixelDetector()], clip=tiny_clip(), progress=False)


def test_clip_features_are_measured_by_default_with_null_and_change(found):
    at = {(d.arm, d.metric, d.group): d for d in found.distances}
    assert {key[1] for key in at} == {KID, FRECHET}
    null, lot = at[BASE, KID, "unrelated"], at["a lot", KID, "unrelated"]
    assert null.change is None and lot.change.low > 0 and lot.value.value > null.value.value
    assert at["a lot", FRECHET, "unrelated"].change.low > 0
    assert abs(at["a little", KID, "unrelated"].change.value) < lot.change.value / 10
    assert "too few pictures" in at["a lot", KID, "neighbours"].value.reason
    for row in found.quality():
        if not row.distance:
            own, base = (
                {(r.prompt, r.seed): r.clip_cosine for r in found.select(a, row.group)} for a in (row.arm, BASE)
            )
            assert row.value.value == pytest.approx(np.mean(list(own.values())))
            if row.change is not None:
                assert row.change.value == pytest.approx(np.mean([own[key] - base[key] for key in own]))
    assert {r.group for r in found.quality() if not r.distance} == {"target", "neighbours", "unrelated"}


def test_one_picture_a_prompt_draws_the_null_once(monkeypatch):
    pipe, seen = tiny_pipeline(), []
    real = module.features_of
    monkeypatch.setattr(module, "features_of", lambda images, *rest: seen.append(len(images)) or real(images, *rest))
    found = paired_pictures(
        pipe, {"edit": AddNoise()}, SUITE, detectors=[PixelDetector()], clip=tiny_clip(), images_per_prompt=1,
        progress=False,
    )  # fmt: skip
    assert seen == [18, 18, 18]  # the base, its other seeds, the arm
    assert max(r.seed for r in found.records) == 0 < OTHER_SEEDS
    assert [d.value.value is None for d in found.distances if d.group == "unrelated"] == [False] * 4


def test_no_extractors_measure_nothing(found):
    none = paired_pictures(
        tiny_pipeline(),
        {},
        SUITE,
        detectors=[PixelDetector()],
        clip=tiny_clip(),
        extractors=(),
        limit=1,
        progress=False,
    )
    assert none.distances == () and any("no feature extractor" in line for line in limits(none))
    assert found.distances and not any("no feature extractor" in line for line in limits(found))


def test_they_survive_json_and_stand_in_it(found, tmp_path):
    found.save(tmp_path)
    again = Evaluation.from_json(tmp_path)
    assert again.distances == found.distances and again.quality() == found.quality()
    raw = json.loads((tmp_path / "evaluation.json").read_text())
    rows = {(r["arm"], r["measure"], r["group"]): r for r in raw["summary"]["quality"]}
    assert rows["a lot", KID, "unrelated"]["change"]["low"] > 0 and rows[BASE, KID, "unrelated"]["change"] is None
    for one in raw["distances"]:  # as earlier versions wrote them
        del one["group"], one["change"]
    assert Evaluation.from_dict(raw).distances[0].group == "kept"


def test_they_stand_in_the_first_table_of_the_report(found):
    page = Page(render(assessment_of(found)))
    table = page.text.partition("Dots are measured shares")[0].partition("Share of pictures in which")[2]
    text = " ".join(table.split())
    for title in ("CLIP score, clip[tiny]", "KID, clip[tiny] features", "Fréchet distance, clip[tiny] features"):
        assert f"measured as {title}" in text
    assert "null: other seeds" in text and "minus the null" in text and "Read KID first" in text
    assert "not available: too few pictures" in text and "FID" not in text.replace("KID", "")
    plain = dataclasses.replace(
        found, distances=(), records=tuple(dataclasses.replace(r, clip_cosine=None) for r in found.records)
    )
    assert "No CLIP was given" in Page(render(assessment_of(plain))).text


def test_the_command_line_prints_rates_and_losses_and_leaves_distances_to_the_report(found, tmp_path, monkeypatch):
    lines = Console(record=True, width=200)
    monkeypatch.setattr(results, "console", lines)
    for part in (command, results):
        monkeypatch.setattr(part, "say", lambda text, **_: lines.print(text, markup=False, soft_wrap=True))
    monkeypatch.setattr("erasure.eval.evaluate", lambda *args, **kwargs: assessment_of(found))
    command.compare(None, {}, SUITE, tmp_path, limit=None, detectors=[], clip=tiny_clip())
    text = lines.export_text()
    for row in found.rows():
        assert str(row.rate) in text, row
        assert not row.change or row.change.value is None or str(row.change).replace(" %", "") in text, row
    for arm in found.erased:
        for detector in list(found.detectors)[:1]:
            said = [line for line in text.splitlines() if line.startswith(f"- {arm.name}, by {detector}: ")][0]
            names = [row.label for row in tables.lost(tables.kept_labels(found, arm.name, detector))]
            assert said.endswith("nothing that should stay got worse") == (not names)
            assert ("lost most" in said) == bool(names) and all(f"{name} " in said for name in names[:5])
    assert (
        "KID" not in text
        and "The report has more" in text
        and "Read KID first" in (tmp_path / "report.html").read_text()
    )


def test_features_of_a_clip_have_a_mean_square_of_one():
    pixels = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert ClipFeatures(tiny_clip())(pixels).square().mean(1).numpy() == pytest.approx(1.0)


def test_a_model_with_the_weights_of_the_base_is_called_so(found, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(results, "say", said.append)
    results.say_lost(found)
    assert not any("compares the base with itself" in line for line in said)
    base = found.arms[0].weights
    same = [dataclasses.replace(arm, weights=base, kind="weights") for arm in found.arms]
    results.say_lost(dataclasses.replace(found, arms=tuple(same)))
    assert sum("compares the base with itself" in line for line in said) == len(found.erased)
