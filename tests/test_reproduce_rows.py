"""What single measures of published rows count: numbers that anyone can recompute."""

from __future__ import annotations

import dataclasses
import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from erasure.eval.core.models import opened, randomised
from erasure.eval.core.prompt_files import PromptFile, PromptRow, unlearn_canvas
from erasure.eval.probes.attacking import Candidate
from erasure.eval.probes.denoising import backbone_for
from erasure.eval.probes.embedding import FreeWords
from erasure.eval.probes.removal.latent_inversion import LatentInversion
from erasure.eval.probes.sampling import DDIM
from studies.reproduce import RECIPES, Outcome, Recipe, imagenet, reproduce
from studies.reproduce.attack import Tries, best
from studies.reproduce.judged import by_category, relative_change
from studies.reproduce.p4d import between, either
from tests.eval_helpers import AddNoise
from tests.test_reproduce import about, colour, inputs, nudenet, prompts, small, unconditional
from tests.tiny import identical, tiny_pipeline, weights

__all__ = ["nudenet"]  # a fixture

# --- one model, or several -------------------------------------------------------------------------------------------


def of_two(row: str) -> Recipe:
    return dataclasses.replace(small(RECIPES[row]), models=2)


def two(*targets: str) -> dict[str, AddNoise]:
    return {target: AddNoise(target) for target in targets}


def found(outcome: Outcome) -> dict[str, float | None]:
    return {result.metric: result.estimate.value for result in outcome.results}


def test_an_erased_class_is_counted_on_the_model_that_lacks_it_and_the_others_there_too(tmp_path) -> None:
    given = inputs(
        files={"imagenette": about("imagenette", "cat", "cat", "dog")},
        judge=lambda images, wanted: [name == "dog" for name in wanted],
    )
    recipe = of_two("19")
    base = reproduce(recipe, tiny_pipeline(), given, tmp_path)
    assert found(base) == {"erased": pytest.approx(1 / 3)}  # of all classes, since the base lacks none
    outcome = reproduce(recipe, tiny_pipeline(), given, tmp_path, arm="esd-u", change=two("cat", "dog"))
    # without the cat: cats no, no; dog yes. Without the dog: dog yes; cats no, no. Two pictures of each prompt.
    assert found(outcome) == {"erased": pytest.approx(1 / 3), "others": pytest.approx(1 / 3)}
    assert outcome.results[0].estimate.n == 6
    assert set(outcome.facts["classes"]["targets"]) == {"cat", "dog"}
    assert outcome.facts["erasure"] == {"cat": "cat", "dog": "dog"}


def test_rows_of_one_model_and_of_several_are_not_mixed_up(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"row 19 is about models that lack one target each; give change=\{TARGET"):
        reproduce("19", tiny_pipeline(), inputs(), tmp_path, arm="esd-u", change=AddNoise())
    with pytest.raises(ValueError, match=r"got \['cat'\]; row 3 is about one model"):
        reproduce("3", tiny_pipeline(), inputs(), tmp_path, arm="mace", change=two("cat"))


def test_a_mean_of_fewer_models_than_the_paper_had_is_not_comparable(tmp_path) -> None:
    recipe = dataclasses.replace(small(RECIPES["16"]), models=2)
    given = inputs(num_inference_steps=None)
    steps = tuple(dataclasses.replace(step, num_inference_steps=1) for step in recipe.steps)
    whole = dataclasses.replace(recipe, steps=steps)
    for models, verdict in ((2, "outside"), (3, "not comparable"), (None, "outside")):
        recipe = dataclasses.replace(whole, models=models)
        outcome = reproduce(recipe, tiny_pipeline(), given, tmp_path, arm="uce", change=two("cat", "ninja"))
        assert found(outcome) == {"name": 1.0, "long": 1.0}  # nobody sees anything: erased, as far as that goes
        assert outcome.results[1].verdict == verdict
        assert any("How many models" in warning for warning in outcome.warnings) == (models is None)
        assert any("How many rows of emma_long" in warning for warning in outcome.warnings)


def test_a_target_that_no_prompt_asks_for_has_no_number(tmp_path) -> None:
    for row, arm in (("19", "esd-u"), ("16", "uce"), ("9-style", "esd"), ("13", "uce"), ("12", "uce")):
        outcome = reproduce(of_two(row), tiny_pipeline(), inputs(), tmp_path, arm=arm, change=two("cat", "heron"))
        for result in outcome.results:
            assert result.verdict == "not measured" and result.estimate.value is None
            assert "'heron'" in result.estimate.reason


# --- judges ---------------------------------------------------------------------------------------------------------


def test_accuracies_of_unlearn_canvas(tmp_path) -> None:
    file = unlearn_canvas(["Rust", "Cubism", "Seed_Images"], ["Cats", "Dogs"], seeds=(1,), expected=None)
    given = inputs(
        files={"unlearn_canvas": file}, judge=lambda images, wanted: [name in ("Cubism", "Cats") for name in wanted]
    )
    style = dataclasses.replace(RECIPES["9-style"], models=1)

    def measured(recipe: Recipe, target: str) -> dict[str, tuple[float | None, int]]:
        recipe = dataclasses.replace(recipe, models=None)
        arm = next(iter(recipe.arms))
        outcome = reproduce(recipe, tiny_pipeline(), given, tmp_path, arm=arm, change=two(target))
        return {result.metric: (result.estimate.value, result.estimate.n) for result in outcome.results}

    # Styles: Rust is not seen (2 pictures), Cubism is (2), photographs are left out; objects: cats 3 of 6.
    assert measured(style, "Rust") == {"ua": (1.0, 2), "ira": (1.0, 2), "cra": (0.5, 6)}
    assert measured(style, "cubism") == {"ua": (0.0, 2), "ira": (0.0, 2), "cra": (0.5, 6)}
    # Objects: cats are seen (3), dogs are not (3), styles in 2 of 6.
    assert measured(RECIPES["10"], "Cats") == {
        "ua": (0.0, 3), "ira": (0.0, 3), "cra": (pytest.approx(1 / 3), 6),
    }  # fmt: skip


def test_a_file_of_unlearn_canvas_without_objects_is_refused(tmp_path) -> None:
    given = inputs(files={"unlearn_canvas": about("unlearn_canvas", "cat")})
    with pytest.raises(ValueError, match="needs the style and the object"):
        reproduce("9-style", tiny_pipeline(), given, tmp_path, arm="esd", change=two("cat"))


def test_pictures_without_a_verdict_are_left_out_and_told(tmp_path) -> None:
    """No face, no name: two of three seen is not two of two, and both are said."""
    verdicts = {"cat": False, "ninja": None}
    given = inputs(judge=lambda images, wanted: [verdicts[name] for name in wanted])
    recipe = dataclasses.replace(small(RECIPES["19"]), models=2)
    outcome = reproduce(recipe, tiny_pipeline(), given, tmp_path)  # cat, cat, ninja; two pictures each
    (result,) = outcome.results
    assert (result.estimate.value, result.estimate.n, result.estimate.excluded) == (0.0, 4, 2)
    assert "erased: 4 of 6 pictures had a verdict (66.7%)" in " ".join(outcome.warnings)
    nobody = inputs(judge=lambda images, wanted: [None] * len(images))
    (result,) = reproduce(recipe, tiny_pipeline(), nobody, tmp_path).results
    assert result.estimate.value is None and result.estimate.excluded == 6 and result.verdict == "not measured"


def test_without_a_judge_there_is_no_number_and_a_judge_answers_for_each(tmp_path) -> None:
    change = two("cat", "ninja")
    for row, arm in (("16", "uce"), ("9-style", "esd")):
        outcome = reproduce(of_two(row), tiny_pipeline(), inputs(judge=None), tmp_path, arm=arm, change=change)
        assert all(
            r.estimate.value is None and "--judge FILE.py:FUNCTION" in r.estimate.reason for r in outcome.results
        )
    with pytest.raises(ValueError, match="one verdict per picture; got 1 for 2"):
        reproduce(of_two("16"), tiny_pipeline(), inputs(judge=lambda i, w: [True]), tmp_path, arm="uce", change=change)
    with pytest.raises(ValueError, match="lies from 0 to 1; got 31.4"):
        percent = inputs(judge=lambda images, wanted: [31.4 for _ in images])
        reproduce(small(RECIPES["14-geneval"]), tiny_pipeline(), percent, tmp_path)


def test_imagenet_says_whether_the_likeliest_class_is_the_one_asked_for(monkeypatch, tmp_path) -> None:
    class Brightness(torch.nn.Module):
        """White is class 0, tench; black is class 497, church."""

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            white = pixels.mean((1, 2, 3)) > 0
            return torch.nn.functional.one_hot(torch.where(white, 0, 497), 1000).float()

    import torchvision

    asked = []
    monkeypatch.setattr(torchvision.models, "resnet50", lambda weights: asked.append(weights.name) or Brightness())
    imagenet._opened.cache_clear()
    judge = imagenet.ImageNet()
    white, black = Image.new("RGB", (9, 9), "white"), Image.new("RGB", (9, 9), "black")
    assert judge([white, black, black], ["Tench", "church", "tench"]) == [True, True, False]
    assert asked == ["IMAGENET1K_V2"] and judge.name == "resnet50[IMAGENET1K_V2]"
    with pytest.raises(ValueError, match=r"no classes \['english springer spaniel'\].*'English springer'"):
        judge([white], ["english springer spaniel"])
    assert judge([white], ["english springer"]) == [False]
    # and the rows that name its classes ask it where there is no other judge
    file = about("imagenette", "church", "tench")
    outcome = reproduce(of_two("19"), tiny_pipeline(), inputs(files={"imagenette": file}, judge=None), tmp_path)
    drawn = [Image.open(f) for f in sorted((tmp_path / "pictures").rglob("*.png"))]
    share = np.mean([s for i, name in enumerate(["church"] * 2 + ["tench"] * 2) for s in judge([drawn[i]], [name])])
    assert found(outcome) == {"erased": share} and outcome.facts["classes"]["judge"] == judge.name
    imagenet._opened.cache_clear()


def test_scores_are_means_of_categories_and_change_is_relative_to_the_base(tmp_path) -> None:
    kinds, names = ["colour", "colour", "colour", "count"], list("abcd")
    assert by_category([1, 1, 0, 0], names, kinds).value == pytest.approx((2 / 3 + 0) / 2)
    assert by_category([1, None, 0, 0], names, kinds).value == pytest.approx((1 / 2 + 0) / 2)
    assert by_category([None] * 4, names, kinds).value is None
    change = relative_change([1, 1, 1, 0.5], [1, 1, 0, 0.5], names, kinds)
    assert change.value == pytest.approx((2 / 3 + 0.5) / (1 + 0.5) - 1)
    partly = relative_change([1, None, 1, 0.5], [1, 1, 0, 0.5], names, kinds)
    assert partly.value == pytest.approx((1 / 2 + 0.5) / (1 + 0.5) - 1) and partly.excluded == 1
    assert relative_change([0, 0], [1, 1], names[:2], kinds[:2]).value is None
    file = PromptFile(
        tuple(PromptRow(f"two cats {i}", i, None, kind) for i, kind in enumerate(kinds)), "0", "t2i_compbench"
    )
    looks = []

    def judge(images, wanted) -> list[float]:
        looks.append(wanted)
        return [(0.4 if len(looks) == 1 else 0.5) for _ in images]

    outcome = reproduce(
        small(RECIPES["14-composite"]), tiny_pipeline(), inputs(files={"t2i_compbench": file}, judge=judge), tmp_path,
        arm="esd", change=AddNoise(),
    )  # fmt: skip
    assert found(outcome) == {"relative_change": pytest.approx(0.4 / 0.5 - 1)}
    assert len(looks) == 2 and set(looks[0]) == {row.text for row in file.rows}  # the judge is told the whole prompt


# --- attacks --------------------------------------------------------------------------------------------------------


def test_free_words_may_stand_apart() -> None:
    pipe = tiny_pipeline()
    free = FreeWords(pipe, ["<v> photo of <v> cat", "a <v>, a <v>"], count=2)
    a, ninja = pipe.tokenizer("a ninja", add_special_tokens=False).input_ids
    spoken = free.text(free.table[[a, ninja]]).hidden
    plain = backbone_for(pipe).encode(["a photo of ninja cat", "a a, a ninja"]).hidden
    assert torch.allclose(spoken, plain, atol=1e-5)
    assert free.spelled([a, ninja], row=0) == "a photo of ninja cat"
    with pytest.raises(ValueError, match="one <v> where the 3 free words stand, or one for each"):
        FreeWords(pipe, ["<v> and <v>"], count=3)


def test_the_tokens_of_p4d_k_stand_in_front_of_every_few_words() -> None:
    assert between("a b c d", 3) == "<v> a b c <v> d"
    assert between("a b c", 3) == "<v> a b c"
    assert between("", 3) == "<v>"
    assert either([False, True]) is True and either([None, True]) is True
    assert either([False, None]) is None and either([False, False]) is False


def test_the_best_candidate_is_chosen_by_what_likes_it_and_drawn_again(monkeypatch) -> None:
    """Candidates are colours; the second is liked best for the first row, the first of equals for the second."""

    def painted(job, pipe, words, tries, numbers, later=0):
        return [colour(10 * number + later, i) for i, number in numbers.items()]

    monkeypatch.setattr(sys.modules["studies.reproduce.attack"], "_drawn", painted)
    one = Candidate((5,))
    tries = Tries(prompts("i2p", 2).rows, ["<v>", "<v>"], [[one] * 3, [one] * 3])
    liking = {(0, 0): 0.1, (10, 0): 0.9, (20, 0): 0.3, (0, 1): 0.5, (10, 1): 0.5, (20, 1): 0.5}

    def liked(images) -> list[float]:
        return [liking[image.getpixel((0, 0))[::2]] for image in images]

    class Bare:
        pipe, change = tiny_pipeline(), None

    chosen = best(Bare(), tries, liked, 2)
    assert [[image.getpixel((0, 0))[0] for image in own] for own in chosen] == [[10, 11], [0, 1]]


def test_p4d_counts_prompts_that_either_variant_breaks(tmp_path, nudenet, monkeypatch) -> None:
    def hits(job, variant, rows, shows, clip):
        return {"n": [True, False, None], "k": [False, False, True]}[variant]

    monkeypatch.setattr(sys.modules["studies.reproduce.p4d"], "broken_by", hits)
    given = inputs(files={"p4d_nudity": prompts("p4d_nudity", 3)})
    outcome = reproduce("7", tiny_pipeline(), given, tmp_path, arm="esd", change=AddNoise())
    assert found(outcome) == {"asr_n": 0.5, "asr_k": pytest.approx(1 / 3), "asr_union": pytest.approx(2 / 3)}


def test_where_clip_chooses_the_judge_sees_one_picture_per_prompt(tmp_path) -> None:
    seen = []

    def judge(images, wanted) -> list[bool]:
        seen.extend(wanted)
        return [name == "ninja" for name in wanted]

    file, change = about("erased_objects", "cat", "ninja"), two("cat", "ninja")
    given = inputs(files={"erased_objects": file}, judge=judge)
    outcome = reproduce(of_two("13"), tiny_pipeline(), given, tmp_path, arm="uce", change=change)
    assert seen == ["cat", "ninja"] and found(outcome) == {"asr": 0.5}
    assert len(list((tmp_path / "pictures").rglob("*.png"))) == 2  # the attack on the ninja does not aim at a cat
    without = reproduce(of_two("13"), tiny_pipeline(), inputs(clip=None), tmp_path, arm="uce", change=change)
    assert without.results[0].estimate.reason.startswith("no CLIP; the protocol's is ViT-B-32/openai")


# --- inside ---------------------------------------------------------------------------------------------------------


def inverted(tmp_path, file: PromptFile, steps: int, **more) -> tuple[Outcome, list[Image.Image]]:
    """Row 12 on a model without the wizard, with what the judge was shown; the word starts from 'ninja'."""
    shown = []

    def judge(images, wanted) -> list[bool]:
        assert set(wanted) <= {"wizard"}
        shown.extend(images)
        return [True] * len(images)

    recipe = of_two("12")
    told = {**recipe.steps[0].settings, "start": "ninja", "steps": steps, "lr": 1.0}
    recipe = dataclasses.replace(recipe, steps=(dataclasses.replace(recipe.steps[0], settings=told),), models=None)
    pipe = tiny_pipeline()
    before = weights(pipe)
    given = inputs(files={"erased_objects": file}, judge=judge, **more)
    outcome = reproduce(recipe, pipe, given, tmp_path, arm="uce", change={"wizard": AddNoise()})
    assert identical(before, weights(pipe))
    return outcome, shown


def test_a_learnt_word_stands_for_the_target(tmp_path) -> None:
    file = about("erased_objects", "wizard", "wizard", "cat")
    outcome, shown = inverted(tmp_path / "a", file, steps=0)
    assert found(outcome) == {"hit": 1.0} and outcome.results[0].estimate.n == 2
    facts = outcome.facts["inversion"]["targets"]["wizard"]
    assert (facts["learnt_on"], facts["pictures"]) == (2, "drawn by the base")
    pipe = tiny_pipeline()
    with opened(pipe, AddNoise()):  # nothing learnt yet: the word is where it starts
        plain = [
            pipe("a photo of a ninja", generator=torch.Generator().manual_seed(row.seed), num_inference_steps=1,
                 guidance_scale=7.5).images[0]
            for row in file.rows[:2]
        ]  # fmt: skip
    for ours, theirs in zip(shown, plain, strict=True):
        assert np.abs(np.asarray(ours, float) - np.asarray(theirs, float)).max() <= 1
    _, later = inverted(tmp_path / "b", file, steps=3, pictures={"wizard": [colour(9)]})
    assert any(np.abs(np.asarray(a, float) - np.asarray(b, float)).max() > 1 for a, b in zip(shown, later, strict=True))
    with pytest.raises(ValueError, match="must name its target once.*'a witch'"):
        inverted(tmp_path / "c", PromptFile((PromptRow("a witch", 1, None, "wizard"),), "0", "erased_objects"), 0)


def test_noise_of_a_random_denoiser_brings_pictures_back(tmp_path) -> None:
    pictures = {name: [colour(40 * i, 99) for i in range(3)] for name in ("van_gogh", "taylor_swift")}
    shown: dict[str, list] = {"van_gogh": [], "taylor_swift": []}

    def judge(images, wanted) -> list[bool | None]:
        for image, name in zip(images, wanted, strict=True):
            shown[name].append(np.asarray(image, float))
        return [True, False, None][: len(images)]

    pipe = tiny_pipeline()
    given = inputs(pictures=pictures, judge=judge, num_inference_steps=4)
    outcome = reproduce("17", pipe, given, tmp_path, arm="random-unet")
    assert found(outcome) == {"van_gogh": 0.5, "taylor_swift": 0.5}
    assert outcome.facts["erasure"] == "random" and outcome.facts["noise"]["van_gogh"]["pictures"] == 3
    with opened(pipe, randomised(pipe)):
        sampler = DDIM(backbone_for(pipe), 4, 1.0)
        start, energies = LatentInversion(refinements=1).invert(sampler, sampler.backbone.latents(pictures["van_gogh"]))
        back = sampler.backbone.pictures(sampler.sample(start, [""] * 3))
    for ours, theirs in zip(shown["van_gogh"], back, strict=True):
        assert np.abs(ours - np.asarray(theirs, float)).max() <= 1
    assert outcome.facts["noise"]["van_gogh"]["likely"] == int((energies <= 10).sum())
    half = dataclasses.replace(given, pictures={"van_gogh": pictures["van_gogh"]})
    first, second = reproduce("17", pipe, half, tmp_path, arm="random-unet").results
    assert first.estimate.value == 0.5 and second.estimate.value is None
    assert "--pictures taylor_swift=FOLDER" in second.estimate.reason


def test_secmi_is_the_error_of_one_step_up_and_down(tmp_path) -> None:
    rng = np.random.default_rng(0)
    sets = {
        name: [Image.fromarray(rng.integers(0, top, (16, 16, 3), dtype=np.uint8)) for _ in range(4)]
        for name, top in (("members", 256), ("nonmembers", 120))
    }
    pipe = unconditional()
    alphas = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)

    @torch.no_grad()
    def error(image: Image.Image) -> float:
        """Straightforwardly: 0, 10 ... 90, then 100 and back."""
        x = torch.tensor(np.asarray(image) / 127.5 - 1).permute(2, 0, 1)[None].float()
        reached = None
        times = [*range(0, 101, 10), 90]
        for s, t in zip(times, times[1:], strict=False):
            if (s, t) == (90, 100):
                reached = x
            eps = pipe.unet(x, s).sample
            clean = (x - (1 - alphas[s]).sqrt() * eps) / alphas[s].sqrt()
            x = alphas[t].sqrt() * clean + (1 - alphas[t]).sqrt() * eps
        return float((x - reached).square().sum())

    members, others = ([error(image) for image in sets[name]] for name in ("members", "nonmembers"))
    area = np.mean([[float(m < o) for o in others] for m in members])
    outcome = reproduce("20", pipe, inputs(pictures=sets, batch_size=3), tmp_path)
    assert found(outcome) == {"auc": pytest.approx(area)}
    assert outcome.facts["secmi"] == {"members": 4, "nonmembers": 4}
    large = {**sets, "members": [Image.new("RGB", (32, 32))]}
    with pytest.raises(ValueError, match=r"16 pixels square; got \(32, 32\)"):
        reproduce("20", pipe, inputs(pictures=large), tmp_path)
    (text,) = reproduce("20", tiny_pipeline(), inputs(pictures=sets), tmp_path).results
    assert text.estimate.value is None and "unconditional" in text.estimate.reason
    (none,) = reproduce("20", pipe, inputs(pictures={}), tmp_path).results
    assert none.estimate.value is None and "--pictures members=FOLDER" in none.estimate.reason


# --- settings and commands ------------------------------------------------------------------------------------------


def test_what_settings_were_chosen_on_tests_nothing(tmp_path) -> None:
    own = about("imagenette", "cat", "dog")
    tuned = PromptFile((PromptRow("A photo  of a CAT"), PromptRow("a heron")), "0", "tuned_on")
    given = inputs(files={"imagenette": own, "tuned_on": tuned})
    outcome = reproduce(small(RECIPES["19"]), tiny_pipeline(), given, tmp_path)
    assert outcome.results[0].verdict == "not comparable"
    assert "Settings were chosen on 1 of the prompts of imagenette; they test nothing." in outcome.warnings


def test_the_command_takes_a_judge_and_pictures(tmp_path, monkeypatch) -> None:
    import studies.reproduce.__main__ as cli
    from studies.reproduce.__main__ import commands as app

    monkeypatch.setattr(cli, "open_base", lambda *_, **__: tiny_pipeline())
    for name in ("van_gogh", "taylor_swift"):
        (tmp_path / name).mkdir()
        colour(200).save(tmp_path / name / "0.png")
    (tmp_path / "judge.py").write_text("def judge(images, wanted):\n    return [w == 'van_gogh' for w in wanted]\n")
    command = ["17", "--arm", "random-unet", "--steps", "1", "--out", str(tmp_path / "out")]
    command += [f"--pictures={name}={tmp_path / name}" for name in ("van_gogh", "taylor_swift")]
    ran = CliRunner().invoke(app, [*command, "--judge", f"{tmp_path / 'judge.py'}:judge"], env={"COLUMNS": "200"})
    assert ran.exit_code == 0, ran.exception
    saved = json.loads((tmp_path / "out" / "row-17-random-unet.json").read_text())
    assert [result["estimate"]["value"] for result in saved["results"]] == [1.0, 0.0]
    assert saved["facts"]["noise"]["judge"] == "judge"
    absent = CliRunner().invoke(app, [*command, "--judge", f"{tmp_path / 'judge.py'}:other"])
    assert "has no function 'other'" in str(absent.exception)
    nowhere = CliRunner().invoke(app, [*command, "--judge", "nowhere.py:judge"])
    assert "needs FILE.py:FUNCTION; got 'nowhere.py:judge'" in str(nowhere.exception)


def test_the_command_takes_one_erasure_per_target(tmp_path, monkeypatch) -> None:
    import studies.reproduce.__main__ as cli
    from erasure.artifact import Erasure
    from studies.reproduce.__main__ import commands as app

    monkeypatch.setattr(cli, "open_base", lambda *_, **__: tiny_pipeline())
    monkeypatch.setattr(Erasure, "from_pretrained", lambda folder: AddNoise(str(folder)))
    (tmp_path / "judge.py").write_text("def judge(images, wanted):\n    return [True for _ in wanted]\n")
    (tmp_path / "emma.csv").write_text("prompt,evaluation_seed,object\na cat,1,cat\na dog,2,dog\n")
    command = ["16", "--arm", "uce", "--unchecked", "--steps", "1", "--out", str(tmp_path / "out")]
    command += [f"--prompts={kind}={tmp_path / 'emma.csv'}" for kind in ("emma_name", "emma_long")]
    command += ["--judge", f"{tmp_path / 'judge.py'}:judge"]
    ran = CliRunner().invoke(app, [*command, "--erasure", "cat=one", "--erasure", "dog=other"])
    assert ran.exit_code == 0, ran.exception
    outcome = Outcome.load(tmp_path / "out" / "row-16-uce.json")
    assert found(outcome) == {"name": 0.0, "long": 0.0} and outcome.facts["erasure"] == {"cat": "one", "dog": "other"}
    assert set(outcome.facts) >= {"erasing:emma_name", "erasing:emma_long"}
    unnamed = CliRunner().invoke(app, [*command, "--erasure", "one"])
    assert "--erasure needs TARGET=FOLDER" in str(unnamed.exception)
    several = CliRunner().invoke(app, ["3", "--arm", "mace", "--erasure", "a", "--erasure", "b"])
    assert "row 3 is about one model; got 2 erasures" in str(several.exception)
