"""Published numbers: every step runs on a tiny pipeline, and no verdict is given that the run does not allow."""

from __future__ import annotations

import dataclasses
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image
from typer.testing import CliRunner

from erasure.eval.core import metrics
from erasure.eval.core.distances import titles
from erasure.eval.core.prompt_files import PERCENTAGES, PromptFile, PromptRow, unlearn_canvas
from erasure.eval.detectors.base import Detector
from erasure.eval.detectors.nudenet import COUNTINGS, EIGHT, NINE, Counting, NudeNet
from erasure.eval.stats import mean, rate
from studies.reproduce import ORIGINAL, RANDOM, RECIPES, Inputs, Outcome, Published, Recipe, Step, reproduce
from studies.reproduce import sets as sets_of
from studies.reproduce.measures import drawn
from tests.eval_helpers import AddNoise
from tests.slow import first
from tests.tiny import identical, tiny_pipeline, weights

# --- stand-ins ------------------------------------------------------------------------------------------------------


class FakeDetector:
    """Two boxes whose scores are the brightness of the picture's upper left corner, red and blue apart."""

    def __init__(self, **given) -> None:
        self.given = given

    def detect(self, image: np.ndarray) -> list[dict]:
        blue, _, red = image[0, 0] / 255  # as OpenCV has it
        found = [("FEET_EXPOSED", red), ("ANUS_EXPOSED", red), ("FACE_FEMALE", blue)]
        return [{"class": name, "score": float(score), "box": [0, 0, 1, 1]} for name, score in found if score >= 0.2]


@pytest.fixture
def nudenet(monkeypatch) -> None:
    module = types.ModuleType("nudenet")
    module.NudeDetector = FakeDetector
    monkeypatch.setitem(sys.modules, "nudenet", module)


class FakeClip:
    """Cosines that anyone can recompute: brightness between -1 and 1."""

    name = "clip[fake]"

    def image_features(self, images) -> torch.Tensor:
        flat = torch.tensor(np.stack([np.asarray(i.resize((2, 2)), dtype=np.float32).ravel() for i in images]))
        return torch.nn.functional.normalize(flat - 100, dim=-1)

    def cosines(self, images, texts) -> np.ndarray:
        return np.array([np.asarray(image).mean() / 127.5 - 1 for image in images])


class Features(torch.nn.Module):
    """Mean colours: features of any picture of one size."""

    name, num_features = "means", 3

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.float().mean((2, 3))


def colour(red: int, blue: int = 0) -> Image.Image:
    return Image.new("RGB", (8, 8), (red, 0, blue))


def prompts(kind: str, count: int = 3, guidance: float | None = 7.0) -> PromptFile:
    return PromptFile(
        tuple(PromptRow(f"a photo of a cat {i}", 10 + i, guidance, "sexual" if i else "hate") for i in range(count)),
        "0" * 64,
        kind,
    )


def about(kind: str, *categories: str) -> PromptFile:
    """A prompt for each category, which it names."""
    rows = tuple(PromptRow(f"a photo of a {name}", 10 + i, None, name) for i, name in enumerate(categories))
    return PromptFile(rows, "0" * 64, kind)


def never(images, wanted) -> list[bool]:
    return [False] * len(images)


def inputs(**changes) -> Inputs:
    sizes = {"i2p": 3, "uda_nudity": 3, "uda_objects": 3, "uda_styles": 3, "coco_30k": 16, "coco_10k": 16}
    sizes |= {"p4d_nudity": 2, "geneval": 3, "t2i_compbench": 3}
    named = ("imagenette", "erased_objects", "emma_name", "emma_long")
    given = {
        "files": {kind: prompts(kind, count) for kind, count in sizes.items()}
        | {kind: about(kind, "cat", "cat", "ninja") for kind in named}
        | {"unlearn_canvas": unlearn_canvas(["cat", "ninja"], ["cat", "ninja"], seeds=[1], expected=None)},
        "real": [colour(i) for i in range(16)],
        "clip": lambda name: FakeClip(),
        "inappropriate": lambda images: [False] * len(images),
        "judge": never,
        "pictures": {
            name: [Image.new("RGB", (16, 16), (i, 9 * i, 99)) for i in range(2)]
            for name in ("van_gogh", "taylor_swift", "members", "nonmembers")
        },
        "num_inference_steps": 1,
        "batch_size": 8,
        "progress": False,
    }
    return Inputs(**{**given, **changes})


BASE = Recipe(
    "b",
    "base",
    "H",
    "tiny",
    {ORIGINAL: {"boxes": Published(0, 1e9)}},
    (Step("boxes", "i2p", 7.5, 1, 1, {"counting": "mace"}),),
)
METHOD = dataclasses.replace(BASE, row="m", arms={"noise": {"boxes": Published(0, 1e9)}}, after=("b",))


INCEPTION = "torchmetrics.image.fid.NoTrainInceptionV3"


@pytest.fixture
def short(monkeypatch) -> None:
    """The published file, of three rows."""
    from studies import reproduce as module

    kinds = {**module.KINDS, "i2p": dataclasses.replace(module.KINDS["i2p"], expected=3)}
    monkeypatch.setattr(module, "KINDS", kinds)


# --- every runnable step, on a tiny pipeline ------------------------------------------------------------------------


# Rows of measures that are unlike each other.
QUICK = ("3", "8", "12", "14-geneval", "17", "19")


@pytest.mark.parametrize("row", first(RECIPES, *QUICK))
def test_every_row_runs(row: str, tmp_path, nudenet, monkeypatch) -> None:
    monkeypatch.setattr(INCEPTION, lambda *_, feature_extractor_weights_path: Features())
    recipe, pipe = RECIPES[row], unconditional() if row == "20" else tiny_pipeline()
    arm = next(iter(recipe.arms))
    before = weights(pipe)
    change = None if arm == ORIGINAL or arm.startswith(RANDOM) else AddNoise()
    if change is not None and recipe.models != 1:
        change = {"cat": AddNoise("first"), "ninja": AddNoise("second")}
    outcome = reproduce(small(recipe), pipe, inputs(), tmp_path, arm=arm, change=change)
    values = {result.metric: result.estimate for result in outcome.results}
    assert set(values) == set(recipe.arms[arm])
    not_here = {"target_proportion"} if row == "11" else set()
    assert {name for name, estimate in values.items() if estimate.value is None} == not_here, outcome
    assert all(values[name].reason == recipe.lacks for name in not_here)
    assert {result.verdict for result in outcome.results} <= {"not comparable", "not measured"}  # one step, few rows
    assert identical(before, weights(pipe))
    assert Outcome.load(tmp_path / f"row-{row}-{arm}.json").results == outcome.results


def unconditional() -> DDPMPipeline:
    """An unconditional model with random weights, for pictures of 16 pixels."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=16, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    return DDPMPipeline(unet.eval(), DDPMScheduler())


def small(recipe: Recipe) -> Recipe:
    """Fewer pictures per prompt, a shorter attack or lesson."""
    cheap = {
        "attack": {"tokens": 2, "tries": 2, "iterations": 1},
        "inversion": {"pictures": 2, "steps": 1, "start": "wizard"},
    }
    cheap |= {"attack_chosen": cheap["attack"], "p4d": {**cheap["attack"], "pictures": 2}}
    steps = [
        dataclasses.replace(step, images=min(step.images, 2), settings={**step.settings, **cheap.get(step.measure, {})})
        for step in recipe.steps
    ]
    return dataclasses.replace(recipe, steps=tuple(steps))


def test_what_no_step_gives_says_what_it_lacks(tmp_path) -> None:
    """Of the published numbers, two have no step here."""
    for row, arm, metric in (("11", "esd", "target_proportion"), ("17", "random-unet-tina", "hit")):
        change = None if arm.startswith(RANDOM) else AddNoise()
        outcome = reproduce(row, tiny_pipeline(), inputs(files={}), tmp_path, arm=arm, change=change)
        (result,) = [result for result in outcome.results if result.metric == metric]
        assert result.verdict == "not measured" and result.estimate.value is None
        assert RECIPES[row].lacks in result.estimate.reason


def test_all_twenty_rows_are_there_and_the_base_rows_come_first() -> None:
    assert {row.partition("-")[0] for row in RECIPES} == {str(i) for i in range(1, 21)}
    assert all(set(recipe.after) <= {"1", "2", "8"} for recipe in RECIPES.values())
    assert all(ORIGINAL in RECIPES[row].arms and not RECIPES[row].after for row in ("1", "2", "8"))
    assert RECIPES["3"].after == ("1", "2")


# --- verdicts -------------------------------------------------------------------------------------------------------


def test_a_method_is_not_interpreted_before_the_base_is_inside_its_band(tmp_path, nudenet, short) -> None:
    pipe, given = tiny_pipeline(), inputs(num_inference_steps=None)
    assert (
        reproduce(METHOD, pipe, given, tmp_path, arm="noise", change=AddNoise()).results[0].verdict == "base row first"
    )
    off = dataclasses.replace(BASE, arms={ORIGINAL: {"boxes": Published(-5, 1)}})
    assert reproduce(off, pipe, given, tmp_path).results[0].verdict == "outside"
    late = reproduce(METHOD, pipe, given, tmp_path, arm="noise", change=AddNoise())
    assert late.results[0].verdict == "base row first" and late.results[0].estimate.value is not None
    (file,) = tmp_path.glob("row-*-original.json")
    file.write_text(file.read_text()[:-20])
    with pytest.raises(ValueError, match=f"{file.name}: not a result of a row"):
        reproduce(METHOD, pipe, given, tmp_path, arm="noise", change=AddNoise())
    assert reproduce(BASE, pipe, given, tmp_path).results[0].verdict == "inside"
    assert reproduce(METHOD, pipe, given, tmp_path, arm="noise", change=AddNoise()).results[0].verdict == "inside"
    other = tiny_pipeline(seed=3)  # the base row was of other weights
    assert (
        reproduce(METHOD, other, given, tmp_path, arm="noise", change=AddNoise()).results[0].verdict == "base row first"
    )


def test_a_metric_waits_for_the_same_metric_of_the_base_and_without_one_for_all(tmp_path, nudenet, short) -> None:
    pipe, given = tiny_pipeline(), inputs(num_inference_steps=None)
    two = {"boxes": Published(0, 1e9), "judged": Published(0, 1)}  # no step gives the second one
    both = dataclasses.replace(BASE, row="r", arms={ORIGINAL: two, "noise": two}, lacks="a judge")
    reproduce(both, pipe, given, tmp_path)
    verdicts = [r.verdict for r in reproduce(both, pipe, given, tmp_path, arm="noise", change=AddNoise()).results]
    assert verdicts == ["inside", "not measured"]
    lone = dataclasses.replace(both, row="s", after=("r",), arms={"noise": {"boxes": Published(0, 1e9)}})
    assert reproduce(lone, pipe, given, tmp_path, arm="noise", change=AddNoise()).results[0].verdict == "inside"
    file = tmp_path / "row-r-original.json"
    file.write_text(file.read_text().replace('"boxes"', '"other"'))
    late = reproduce(lone, pipe, given, tmp_path, arm="noise", change=AddNoise())
    assert late.results[0].verdict == "base row first" and "Base row r" in late.warnings[-1]


def test_a_run_that_differs_from_the_protocol_is_not_comparable(tmp_path, nudenet, short) -> None:
    pipe, whole = tiny_pipeline(), inputs(num_inference_steps=None)
    for changes in ({"limit": 2}, {"num_inference_steps": 2}, {"files": {"i2p": prompts("i2p", 2)}}):
        outcome = reproduce(BASE, pipe, dataclasses.replace(whole, **changes), tmp_path)
        assert outcome.results[0].verdict == "not comparable" and len(outcome.warnings) >= 2


def test_a_safety_checker_makes_a_number_about_a_model_void(tmp_path, nudenet, short) -> None:
    class Sees:
        pixel_values = torch.zeros(1)

        def __call__(self, images, return_tensors):
            return self

        def to(self, device):
            return self

    pipe = tiny_pipeline()
    object.__setattr__(pipe, "feature_extractor", Sees())
    black = lambda images, clip_input: (images * 0, [True] * len(images))  # noqa: E731
    object.__setattr__(pipe, "safety_checker", black)
    outcome = reproduce(BASE, pipe, inputs(num_inference_steps=None), tmp_path)
    assert outcome.results[0].estimate.value == 0  # no box in a black picture: it would pass for suppression
    assert outcome.results[0].verdict == "not comparable" and "safety checker was on" in outcome.warnings[0]


def test_arms_and_changes_have_to_fit(tmp_path) -> None:
    with pytest.raises(ValueError, match="unknown row '99'"):
        reproduce("99", None, inputs(), tmp_path)
    with pytest.raises(ValueError, match="no published model 'rece'"):
        reproduce("3", None, inputs(), tmp_path, arm="rece")
    with pytest.raises(ValueError, match="base alone"):
        reproduce("3", None, inputs(), tmp_path, arm="mace")


def test_an_erasure_that_is_not_given_back_is_an_error(tmp_path, nudenet) -> None:
    with pytest.raises(RuntimeError, match="did not give the weights back"):
        reproduce(METHOD, tiny_pipeline(), inputs(), tmp_path, arm="noise", change=AddNoise(faithful=False))


def test_what_is_missing_is_named_and_nothing_is_zero(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "nudenet", None)
    pipe = tiny_pipeline()
    reasons = {
        "no prompt file of the kind 'i2p'": (BASE, inputs(files={})),
        "pip install -e '.\\[nsfw\\]'": (BASE, inputs()),
        "no real pictures": (RECIPES["18"], inputs(real=None)),
        "no CLIP; the protocol's is ViT-L-14-336/openai": (RECIPES["18"], inputs(clip=None)),
        "different size .* \\(16 and 5": (RECIPES["18"], inputs(files={"coco_30k": prompts("coco_30k", 5)})),
        "too few pictures": (RECIPES["18"], inputs(limit=5)),
        "no Q16": (RECIPES["8"], inputs(inappropriate=None)),
    }
    for reason, (recipe, given) in reasons.items():
        (result, *_) = reproduce(recipe, pipe, given, tmp_path).results
        assert result.estimate.value is None and result.verdict == "not measured"
        assert re.search(reason, result.estimate.reason), result.estimate.reason
    assert rate([], []).value is None and mean([], []).value is None  # no picture, no number


def test_the_guidance_of_the_file_is_used_where_the_protocol_uses_it(tmp_path, nudenet) -> None:
    rows = tuple(PromptRow("a cat", i, g) for i, g in enumerate((7.0, 12.0, 7.0)))
    given = inputs(files={"i2p": PromptFile(rows, "1" * 64, "i2p")})
    asked: list[tuple[float, int]] = []
    pipe = tiny_pipeline()
    call = type(pipe).__call__

    class Spy(type(pipe)):
        def __call__(self, *args, **kwargs):
            asked.append((kwargs["guidance_scale"], len(kwargs["generator"])))
            return call(self, *args, **kwargs)

    pipe.__class__ = Spy
    fixed = reproduce(BASE, pipe, given, tmp_path)
    assert asked == [(7.5, 3)] and fixed.facts["boxes"]["guidance"] == {"7.5": 3}
    asked.clear()
    own = dataclasses.replace(BASE, steps=(dataclasses.replace(BASE.steps[0], guidance="file"),))
    read = reproduce(own, pipe, given, tmp_path)
    assert asked == [(7.0, 2), (12.0, 1)] and read.facts["boxes"]["guidance"] == {"7": 2, "12": 1}
    assert read.facts["boxes"]["guidance_from"] == "file"
    silent = inputs(files={"i2p": prompts("i2p", guidance=None)})
    with pytest.raises(ValueError, match="guidance=None in 'i2p'"):
        reproduce(own, pipe, silent, tmp_path)


def test_finished_pictures_are_kept_and_noise_depends_on_the_row_alone(tmp_path, nudenet) -> None:
    pipe, rows = tiny_pipeline(), prompts("i2p").rows
    together, alone = drawn(pipe, rows, 2), drawn(pipe, rows[2:], 2)
    assert np.abs(np.asarray(together[2], dtype=int) - np.asarray(alone[0], dtype=int)).max() <= 1
    reproduce(BASE, pipe, inputs(), tmp_path)
    files = sorted((tmp_path / "pictures").rglob("*.png"))
    assert len(files) == 3
    for file in files:
        colour(255).save(file)
    assert reproduce(BASE, pipe, inputs(), tmp_path).results[0].estimate.value == 3  # a box in each, none drawn again
    reproduce(METHOD, pipe, inputs(), tmp_path, arm="noise", change=AddNoise())
    assert len(list((tmp_path / "pictures").iterdir())) == 2  # never the pictures of other weights


def test_negative_cosines_survive(tmp_path, nudenet) -> None:
    class Dark(FakeClip):
        def cosines(self, images, texts) -> np.ndarray:
            return np.full(len(images), -0.25)

    recipe = dataclasses.replace(RECIPES["2"], arms={ORIGINAL: {"clip_cosine": Published(0.3, 0.003)}})
    (result,) = reproduce(recipe, tiny_pipeline(), inputs(clip=lambda name: Dark()), tmp_path).results
    assert result.estimate.value == pytest.approx(-0.25)


# --- the attack -----------------------------------------------------------------------------------------------------


def attacked(shows, tmp_path, tries: int = 2) -> Outcome:
    settings = {"target": "church", "tokens": 2, "tries": tries, "iterations": 1}
    recipe = dataclasses.replace(
        RECIPES["15-church"], steps=(Step("attack", "uda_objects", "file", 1, 1, settings),),
        arms={"esd": {"before": Published(0, 1), "asr": Published(0, 1)}},
    )  # fmt: skip
    long = PromptRow("a photo of a cat " * 40, 3, 7.0)  # longer than the encoder
    file = PromptFile((*prompts("uda_objects", 2).rows, long), "2" * 64, "uda_objects")
    given = inputs(files={"uda_objects": file}, judge=shows)
    return reproduce(recipe, tiny_pipeline(), given, tmp_path, arm="esd", change=AddNoise())


def numbers(outcome: Outcome) -> dict[str, float | None]:
    return {result.metric: result.estimate.value for result in outcome.results}


def test_success_before_and_after_the_attack_are_counted_over_all_prompts(tmp_path) -> None:
    calls = []

    def first_row_only(images, wanted) -> list[bool]:
        assert set(wanted) <= {"church"}
        calls.append(len(images))
        return [len(calls) == 1 and i == 0 for i in range(len(images))]

    outcome = attacked(first_row_only, tmp_path / "a")
    assert numbers(outcome) == {"before": pytest.approx(1 / 3), "asr": pytest.approx(1 / 3)}
    assert outcome.facts["attack"]["tries_used"] == [0, None, None]
    calls.clear()

    def after_the_first_look(images, wanted) -> list[bool]:
        calls.append(len(images))
        return [len(calls) > 1] * len(images)

    outcome = attacked(after_the_first_look, tmp_path / "b")
    assert numbers(outcome) == {"before": 0.0, "asr": 1.0}
    assert outcome.facts["attack"]["tries_used"] == [1, 1, 1]


def test_pictures_without_a_verdict_are_no_failures_of_the_attack(tmp_path) -> None:
    assert numbers(attacked(lambda images, wanted: [None] * len(images), tmp_path)) == {"before": None, "asr": None}


# --- NudeNet --------------------------------------------------------------------------------------------------------


def test_boxes_are_counted_by_class_and_threshold(nudenet) -> None:
    eye = NudeNet("mace")
    red, faint, blue = colour(255), colour(80), colour(0, 255)
    assert eye.count([red, faint, blue]) == [{"FEET_EXPOSED": 1}, {"FEET_EXPOSED": 1}, {}]
    assert NudeNet("unlearn_diff_atk").count([red, faint]) == [{"FEET_EXPOSED": 1, "ANUS_EXPOSED": 1}, {}]
    assert eye.count([blue], 0.5, ["FACE_FEMALE"]) == [{"FACE_FEMALE": 1}]
    assert (COUNTINGS["mace"].threshold, len(EIGHT), len(NINE)) == (0.2, 8, 9)
    with pytest.raises(ValueError, match="0.2 to 1"):
        Counting(0.1, EIGHT)
    with pytest.raises(ValueError, match="unknown counting 'esd'"):
        NudeNet("esd")


def test_it_is_a_detector_whose_threshold_lies_at_one_half(nudenet) -> None:
    eye = NudeNet("unlearn_diff_atk", label="naked people")
    assert (
        isinstance(eye, Detector) and eye.labels("concept") == ("naked people", "nothing") and eye.labels("style") == ()
    )
    scores = eye.scores([colour(255), colour(120), colour(110), colour(0)], "concept")
    assert (scores[:, 0] > 0.5).tolist() == [True, True, False, False]
    np.testing.assert_allclose(scores.sum(1), 1)
    assert "0.45" in eye.name and eye.card.sensitivity is None


def test_without_the_package_the_extra_and_its_licence_are_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "nudenet", None)
    with pytest.raises(ImportError, match=r"AGPL-3.0.*pip install -e '.\[nsfw\]'"):
        NudeNet()


# --- distances ------------------------------------------------------------------------------------------------------


def test_clean_resize_is_an_antialiased_cubic_of_fractions() -> None:
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (600, 450, 3), dtype=np.uint8))
    ours = np.asarray(metrics.clean_resize(noise)).astype(float)
    assert ours.shape == (299, 299, 3)
    tensor = torch.from_numpy(np.array(noise)).permute(2, 0, 1)[None].float()
    theirs = torch.nn.functional.interpolate(tensor, (299, 299), mode="bicubic", antialias=True).clamp(0, 255)[0]
    # another implementation of the same mathematics, but for its cubic's constant (PIL -0.5, as torch's antialiased)
    assert np.abs(ours - theirs.permute(1, 2, 0).numpy()).max() <= 1
    assert ours.std() < 0.75 * np.asarray(noise).std()  # a filter that widens with the scale, not point samples
    flat = np.asarray(metrics.clean_resize(Image.new("RGB", (64, 64), (3, 200, 77))))
    assert (flat == (3, 200, 77)).all()


def test_inception_sees_clean_pictures_and_only_it_is_called_fid(monkeypatch) -> None:
    seen, asked = [], []

    class Network(Features):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            seen.append((pixels.dtype, tuple(pixels.shape[1:])))
            return super().forward(pixels)

    def network(*_, feature_extractor_weights_path: str | None) -> Network:
        asked.append(feature_extractor_weights_path)
        return Network()

    monkeypatch.setattr(INCEPTION, network)
    rng = np.random.default_rng(0)
    sets = [
        [Image.fromarray(rng.integers(0, top, (20 + i, 30, 3), dtype=np.uint8)) for i in range(16)] for top in (90, 250)
    ]
    name, value = sets_of.frechet(*sets, weights="inception.pth")
    assert name == "FID" and value.value > 100 and asked == ["inception.pth"]
    assert set(seen) == {(torch.uint8, (3, 299, 299))}
    assert titles(metrics.InceptionFeatures().name) == ("KID", "FID")
    assert titles("inception-64") == ("kid[inception-64]", "frechet[inception-64]")
    same_size = [image.resize((8, 8)) for image in sets[0]]
    assert sets_of.frechet(same_size, same_size, Features(), "inception-64")[0] == "frechet[inception-64]"


def test_cmmd_is_a_thousand_times_the_biased_kernel_distance() -> None:
    rng = np.random.default_rng(0)
    x, y = ([Image.fromarray(rng.integers(0, top, (4, 4, 3), dtype=np.uint8)) for _ in range(16)] for top in (90, 250))
    name, value = sets_of.cmmd(x, y, FakeClip())
    a, b = (FakeClip().image_features(z).double().numpy() for z in (x, y))
    k = [np.exp(-((p[:, None] - q[None]) ** 2).sum(-1) / 200).mean() for p, q in ((a, a), (b, b), (a, b))]
    assert name == "cmmd[clip[fake]]" and value.value == pytest.approx(1000 * (k[0] + k[1] - 2 * k[2]))
    assert sets_of.cmmd(x, x, FakeClip())[1].value == pytest.approx(0, abs=1e-9)


# --- the command ----------------------------------------------------------------------------------------------------


def test_the_command_lists_rows_and_refuses_unknown_ones(tmp_path) -> None:
    from studies.reproduce.__main__ import commands as app

    runner = CliRunner()
    listed = runner.invoke(app, ["--list"], env={"COLUMNS": "200"})
    assert listed.exit_code == 0 and "15-van-gogh" in listed.output and "743" in listed.output
    unknown = runner.invoke(app, ["99"])
    assert isinstance(unknown.exception, ValueError) and "unknown row '99'" in str(unknown.exception)
    for given, told in (
        (["--arm", "nobody"], "no published model 'nobody'"),
        (["--limit", "0"], "limit"),
        (["--prompts", "i2p=nowhere.csv"], "no such file; i2p is"),
    ):
        slip = runner.invoke(app, ["1", *given])
        assert slip.exit_code and told in f"{slip.output} {slip.exception}", slip.output
    unnamed = runner.invoke(app, ["1", "--prompts", "i2p.csv"])
    assert "kind=FILE" in str(unnamed.exception)


def test_the_command_measures_a_row_with_the_safety_checker_off(tmp_path, nudenet, monkeypatch) -> None:
    import studies.reproduce.__main__ as cli

    pipe = tiny_pipeline()
    monkeypatch.setattr(cli, "open_base", lambda *_, **__: pipe)
    object.__setattr__(
        pipe, "safety_checker", lambda images, **_: (_ for _ in ()).throw(AssertionError("it was asked"))
    )
    file = tmp_path / "i2p.csv"
    header = ["prompt", "categories", *PERCENTAGES, "evaluation_seed", "evaluation_guidance"]
    file.write_text(",".join(header) + "\na cat,sexual,1,2,3,4,7\n")
    command = [
        "1",
        "--prompts",
        f"i2p={file}",
        "--unchecked",
        "--steps",
        "1",
        "--out",
        str(tmp_path / "out"),
    ]
    ran = CliRunner().invoke(cli.commands, command, env={"COLUMNS": "200"})
    assert ran.exit_code == 0, ran.exception
    assert "safety checker is off" in ran.output and "not comparable" in ran.output
    assert Outcome.load(tmp_path / "out" / "row-1-original.json").results[0].estimate.value is not None


def test_every_row_has_a_command_to_type_and_the_page_shows_it() -> None:
    page = (Path(__file__).parents[1] / "docs" / "reproduce.md").read_text("utf-8")
    for recipe in RECIPES.values():
        for arm in recipe.arms:
            command = recipe.command(arm)
            assert command.startswith(f"python -m studies.reproduce {recipe.row} ")
            assert ("--erasure" in command) == (arm != ORIGINAL and not arm.startswith(RANDOM))
        assert recipe.command(next(iter(recipe.arms))) in page
        for text in (recipe.notes, recipe.lacks):
            assert text in page
        for numbers in recipe.arms.values():
            for name, known in numbers.items():
                assert f"{name} {known.value:g} ± {known.tolerance:g}" in page
