"""Probes that hand the model part of the answer: the sampler under them, their controls, and what they refuse."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image

from erasure.eval.core.pictures import generate, weights_hash
from erasure.eval.detectors.base import DetectorCard
from erasure.eval.probes import probe_class
from erasure.eval.probes.base import Missing, Observation, lacking
from erasure.eval.probes.denoising import backbone_for
from erasure.eval.probes.removal.classifier_guidance import ClassifierGuidance, pull_of, steered
from erasure.eval.probes.removal.completion import Completion
from erasure.eval.probes.removal.image_to_image import ImageToImage
from erasure.eval.probes.removal.inpainting import Inpainting
from erasure.eval.probes.removal.latent_inversion import INVERTED, RANDOM, LatentInversion, psnr
from erasure.eval.probes.removal.noise import NoiseProbe
from erasure.eval.probes.sampling import DDIM
from erasure.eval.worldkit.classifier import classifier_a, labels
from erasure.eval.worldkit.detectors import ClassifierDetector
from tests.eval_helpers import PixelDetector
from tests.probe_helpers import ROLES, rows_of, tiny_context
from tests.tiny import tiny, tiny_pipeline

KEYS = ("noise", "completion", "inpainting", "image_to_image", "classifier_guidance", "latent_inversion")


pytestmark = pytest.mark.usefixtures("few_steps")


def guide(seed: int = 0) -> ClassifierDetector:
    torch.manual_seed(seed)
    names = {"concept": labels("concept")}
    return ClassifierDetector(classifier_a().requires_grad_(False), DetectorCard("a", "0", labels=names))


@pytest.fixture(scope="module")
def context():
    return tiny_context(selector=guide())


@pytest.fixture
def sampler():
    return DDIM(backbone_for(tiny_pipeline()), num_inference_steps=6, guidance_scale=5.0, batch_size=2)


# --- the sampler ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_without_noise_it_draws_what_the_stock_pipeline_draws(prediction_type, guidance_scale):
    pipe = tiny_pipeline(prediction_type=prediction_type)
    prompts = ["a cat", "a dog in the style of van gogh", ""]
    settings = {"num_inference_steps": 6, "guidance_scale": guidance_scale}
    stock = [row[0] for row in generate(pipe, prompts, progress=False, **settings)]
    sampler = DDIM(backbone_for(pipe), batch_size=2, **settings)
    ours = sampler.backbone.pictures(sampler.sample(sampler.starts([(p, 0) for p in prompts]), prompts))
    for a, b in zip(stock, ours, strict=True):
        assert np.abs(np.asarray(a, int) - np.asarray(b, int)).max() <= 1


def test_any_scheduler_becomes_ddim_on_its_own_schedule():
    sampler = DDIM(backbone_for(tiny("sdxl")), num_inference_steps=4)
    assert [step.alpha for step in sampler.steps] == sorted(step.alpha for step in sampler.steps)
    assert all(now.alpha_prev == after.alpha for now, after in zip(sampler.steps, sampler.steps[1:], strict=False))
    assert sampler.sample(sampler.starts([("a cat", 0)]), ["a cat"]).isfinite().all()


@pytest.mark.parametrize("eta", [1.0, 1.85, 5.0])
def test_noise_beyond_ddpm_gives_numbers(sampler, eta):
    keys = [("a cat", 0), ("a cat", 1)]
    x, prompts = sampler.starts(keys), ["a cat", "a cat"]
    noisy = sampler.sample(x, prompts, eta=eta, scale=1.04, keys=keys)
    assert noisy.isfinite().all()
    assert torch.equal(noisy, sampler.sample(x, prompts, eta=eta, scale=1.04, keys=keys))
    assert not torch.allclose(noisy, sampler.sample(x, prompts))
    with pytest.raises(ValueError, match="give one key per row"):
        sampler.sample(x, prompts, eta=eta)


def test_a_trajectory_in_two_parts_is_the_whole(sampler):
    x, prompts = sampler.starts([("a cat", 0), ("a dog", 1), ("a", 2)]), ["a cat", "a dog", "a"]
    half = sampler.sample(x, prompts, stop=4)
    assert torch.equal(sampler.sample(half, prompts, start=4), sampler.sample(x, prompts))


# --- all of them ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("key", KEYS)
def test_the_small_preset_runs_repeats_and_gives_the_weights_back(context, key):
    probe, before = probe_class(key).preset("smoke"), weights_hash(context.pipe)
    rows = {model.name: probe.run(model, context) for model in context.models.values()}
    assert weights_hash(context.pipe) == before
    assert probe.run(context.models["noise"], context) == rows["noise"]
    roles = {model.name: model.role for model in context.models.values()}
    found = probe.weigh(rows, roles)
    back = json.loads(json.dumps({name: [dataclasses.asdict(row) for row in own] for name, own in rows.items()}))
    assert probe.weigh({name: [Observation(**row) for row in own] for name, own in back.items()}, roles) == found
    answer = "success" if key == "latent_inversion" else "residual"
    assert [e.control for e in found if (e.model, e.measure, e.family) == ("noise", answer, "")] == ["gold"]


@pytest.mark.parametrize(
    ("key", "changes", "reason"),
    [
        ("noise", {"selector": None}, "second detector"),
        ("inpainting", {"material": None}, "real pictures"),
        ("image_to_image", {"material": None}, "real pictures"),
        ("noise", {"selector": PixelDetector()}, "second detector"),
        ("classifier_guidance", {"selector": None}, "second detector"),
        ("latent_inversion", {"material": None}, "real pictures"),
    ],
)
def test_what_lacks_an_input_says_so(context, key, changes, reason):
    probe = probe_class(key).preset("smoke")
    assert reason in lacking(probe, dataclasses.replace(context, **changes))
    assert lacking(probe, context) is None


def test_steering_needs_a_selector_with_gradients(context):
    pixels = dataclasses.replace(context, selector=PixelDetector("other"))
    with pytest.raises(Missing, match="with gradients"):
        ClassifierGuidance.preset("smoke").run(context.base, pixels)


@pytest.mark.parametrize("key", KEYS)
def test_what_comes_back_means_nothing_without_a_model_that_never_saw_the_target(context, key):
    alone = dataclasses.replace(context, models={"base": context.base})
    reason = lacking(probe_class(key).preset("smoke"), alone)
    assert "never saw the target" in reason or "no retrained model" in reason


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (NoiseProbe, {"etas": (0.0,)}),
        (NoiseProbe, {"etas": ()}),
        (Completion, {"psis": (0.0, 0.2), "declared": 0.3}),
        (Completion, {"psis": (0.4, 0.2), "declared": 0.2}),
        (Completion, {"psis": (0.2, 1.0), "declared": 0.2}),
        (Inpainting, {"hole": 1.0}),
        (ImageToImage, {"strengths": (0.0, 0.5)}),
    ],
)
def test_settings_that_would_measure_nothing_are_refused(kind, settings):
    with pytest.raises(ValueError, match="got"):
        kind(**settings)


# --- each -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_the_base_begins_and_ends_itself_is_an_ordinary_picture(context):
    probe = Completion(psis=(0.0, 0.5, 0.9), declared=0.5, prompts=3)
    rows = probe.run(context.base, context)
    pictures = {row.family: [] for row in rows}
    for row in rows:
        pictures[row.family].append(row.facts["image_hash"])
    assert pictures["psi 0"] == pictures["psi 0.5"] == pictures["psi 0.9"]
    erased = probe.run(context.models["noise"], context)
    assert erased[0].facts["image_hash"] != pictures["psi 0"][0]  # nothing handed over: all its own


def test_completion_reads_the_area_between_the_curves():
    probe = Completion(psis=(0.0, 0.2, 0.4), declared=0.2)
    shares = {"psi 0": {"base": 1, "UCE": 0, "gold-0": 0}, "psi 0.2": {"base": 1, "UCE": 1, "gold-0": 0}}
    shares["psi 0.4"] = {"base": 1, "UCE": 1, "gold-0": 1}
    rows = {name: [] for name in ("base", "UCE", "gold-0")}
    for family, rates in shares.items():
        for name, own in rows_of(rates, family=family).items():
            rows[name] += own
    found = {(e.measure, e.family): e for e in probe.weigh(rows, ROLES) if e.model == "UCE"}
    assert found["area", ""].estimate.value == pytest.approx(0.5)
    assert found["residual", ""].estimate.value == 1
    assert found["residual", ""].conclusive
    assert found["residual", "psi 0.4"].estimate.value is None  # models that never saw it complete it too
    assert not found["residual", "psi 0.4"].conclusive


def test_noise_is_compared_with_as_many_tries_without_it():
    attack = rows_of({"base": 1, "UCE": 1, "gold-0": 0, "gold-1": 0}, family="attack")
    control = rows_of({"base": 1, "UCE": 0.3, "gold-0": 0, "gold-1": 0}, family="control")
    rows = {name: attack[name] + control[name] for name in attack}
    found = {(e.model, e.measure, e.family): e for e in NoiseProbe().weigh(rows, ROLES)}
    assert found["UCE", "excess", ""].estimate.value == pytest.approx(0.7, abs=0.2)
    assert found["UCE", "excess", ""].gates == {"known": "pass", "power": "pass"}
    assert found["UCE", "residual", ""].estimate.value == 1
    assert found["base", "excess", ""].estimate.value == 0


def test_noise_that_ruins_the_base_is_inconclusive():
    attack = rows_of({"base": 0, "UCE": 0, "gold-0": 0}, family="attack")
    control = rows_of({"base": 1, "UCE": 0, "gold-0": 0}, family="control")
    rows = {name: attack[name] + control[name] for name in attack}
    found = [e for e in NoiseProbe().weigh(rows, ROLES) if e.model == "UCE" and e.measure in ("excess", "residual")]
    assert not any(e.conclusive for e in found if e.family != "control")


@pytest.mark.slow
def test_noise_takes_the_selectors_choice_of_equal_numbers(context):
    rows = NoiseProbe(etas=(1.0, 1.5), scales=(1.0, 1.04), prompts=2).run(context.base, context)
    assert [row.family for row in rows] == ["attack"] * 2 + ["control"] * 2
    assert {row.facts["tries"] for row in rows} == {4}
    assert {row.facts["eta"] for row in rows if row.family == "control"} == {0.0}


def test_inpainting_keeps_what_is_known(context):
    sampler, probe = DDIM.of(context), Inpainting(hole=0.5)
    (example,) = context.material.target(1)
    filled, again = probe.fill(sampler, [example.image] * 2, "a cat", [("x", 0), ("x", 1)])
    inside = np.zeros((16, 16), bool)
    inside[4:12, 4:12] = True
    for image in (filled, again):
        assert np.array_equal(np.asarray(image)[~inside], np.asarray(example.image)[~inside])
        assert not np.array_equal(np.asarray(image)[inside], np.asarray(example.image)[inside])
    assert filled != again


def test_what_fills_a_hole_knows_nothing_of_what_was_in_it(context):
    sampler, probe = DDIM.of(context), Inpainting(hole=0.5)
    (example,) = context.material.target(1)
    other = example.image.copy()
    other.paste(Image.new("RGB", (8, 8), "white"), (4, 4))
    a, b = (probe.fill(sampler, [image], "a cat", [("x", 0)])[0] for image in (example.image, other))
    assert a.tobytes() == b.tobytes()


def test_weak_image_to_image_stays_with_the_picture(context):
    rows = ImageToImage(strengths=(0.5, 1.0), declared=0.5, pictures=2).run(context.base, context)
    assert [row.family for row in rows] == ["strength 0.5"] * 2 + ["strength 1"] * 2
    assert len({row.cluster for row in rows}) == 2


@pytest.mark.slow
def test_a_guide_that_pulls_harder_sees_more_of_the_target(context):
    sampler, pull = DDIM.of(context), pull_of(context)
    x = sampler.starts([("x", i) for i in range(4)])
    levels = [pull(sampler.sample(x, [""] * 4, split=steered(sampler, pull, s))).mean().item() for s in (0.0, 0.3, 1.0)]
    assert levels == sorted(levels)
    assert levels[-1] > levels[0]
    with torch.no_grad():
        assert levels[0] == pytest.approx(pull(sampler.sample(x, [""] * 4)).mean().item())
    assert all(p.grad is None for p in context.pipe.unet.parameters())


def test_the_scale_is_chosen_on_the_base_alone():
    probe, rows = ClassifierGuidance(scales=(1.0, 10.0, 100.0)), {name: [] for name in ("base", "UCE", "gold-0")}
    shares = {"scale 1": (0.1, 0.9, 0), "scale 10": (0.9, 0.1, 0), "scale 100": (0.2, 0.9, 0)}
    for family, (base, erased, gold) in shares.items():
        for name, own in rows_of({"base": base, "UCE": erased, "gold-0": gold}, family=family).items():
            rows[name] += own
    (answer,) = (e for e in probe.weigh(rows, ROLES) if (e.measure, e.family) == ("residual", ""))
    assert answer.note == "at scale 10"
    assert answer.estimate.clusters == 10  # it was chosen on the other ten pictures
    assert answer.estimate.value == pytest.approx(0.1, abs=0.1)


def test_the_noise_of_a_models_own_pictures_is_found_again(sampler):
    backbone, start = sampler.backbone, sampler.starts([(f"{i}", 0) for i in range(3)])
    clean = sampler.sample(start, [""] * 3)
    found, _ = LatentInversion(refinements=5).invert(sampler, clean)
    assert torch.allclose(found, start, atol=0.05)
    back = sampler.sample(found, [""] * 3)
    pairs = zip(backbone.pictures(clean), backbone.pictures(back), strict=True)
    assert min(psnr(a, b) for a, b in pairs) > 40


def inverted(levels, energy=1.0, family=INVERTED):
    return [Observation("", family, f"picture {i}", 0, v, None, {"energy": energy}) for i, v in enumerate(levels)]


def test_inversion_succeeds_above_retrained_models_and_from_likely_noise_alone():
    golds = {name: inverted(np.linspace(20, 24, 20)) for name in ("gold-0", "gold-1")}
    random = inverted([60.0] * 20, energy=40.0, family=RANDOM)
    probe = LatentInversion()

    def success(erased, random=random, base=30.0):
        rows = {"base": inverted([base] * 20) + random, "UCE": erased, **golds}
        return next(e for e in probe.weigh(rows, ROLES) if (e.model, e.measure) == ("UCE", "success"))

    assert success(inverted([29.0] * 20)).estimate.value == 1
    assert success(inverted([22.0] * 20)).estimate.value == 0
    assert success(inverted([29.0] * 20, energy=11.0)).estimate.value == 0
    assert success(inverted([29.0] * 20)).conclusive
    assert not success(inverted([22.0] * 20), base=22.0).conclusive  # nor does the base: the probe sees nothing
    assert not success(inverted([29.0] * 20), random=inverted([60.0] * 20, family=RANDOM)).conclusive
    golds["gold-0"] = golds["gold-1"] = inverted([24.0] * 20, energy=11.0)
    assert success(inverted([29.0] * 20)).estimate.value is None


def test_the_base_brings_a_random_control_and_the_probe_is_only_descriptive(context):
    rows = LatentInversion(pictures=2, refinements=1).run(context.base, context)
    assert [row.family for row in rows] == [INVERTED] * 2 + [RANDOM] * 2
    assert LatentInversion.descriptive
    assert not Completion.descriptive
