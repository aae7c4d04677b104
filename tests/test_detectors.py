"""The world's detectors: what they answer, what they are worth, and that they are not one another."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest
import torch
from PIL import Image

from erasure.eval.core.verdicts import verdicts_of
from erasure.eval.detectors.base import NOTHING, Detector
from erasure.eval.worldkit import augment, classifier, train
from erasure.eval.worldkit import detectors as world
from erasure.eval.worldkit.detectors import load
from erasure.io import sha256_file
from erasure.train import step_rng
from erasure.world.spec import spec
from tests.eval_helpers import PixelDetector

SHIPPED = ("a", "b", "clip")
CLASSIFIERS = ("a", "b")


def pictures(views: augment.Views) -> list[Image.Image]:
    return [Image.fromarray(image) for image in views.images]


@functools.cache
def renders(kind: str) -> augment.Views:
    """Fresh scenes, from a seed no training run uses."""
    rng = step_rng(4242, 0)
    if kind == "nothing":
        return augment.nothing_views(rng, 60)
    return augment.scene_views(augment.draw_scenes(rng, 150, pairs=float(kind == "pairs")))


@functools.cache
def answers(name: str, kind: str, attribute: str) -> np.ndarray:
    return load(name).scores(pictures(renders(kind)), attribute)


@pytest.mark.parametrize("name", SHIPPED)
def test_answers_are_distributions_over_the_labels_of_the_world(name: str) -> None:
    detector = load(name)
    assert isinstance(detector, Detector)
    assert detector.labels("concept") == (*spec().concepts, NOTHING)
    assert detector.labels("style") == tuple(spec().styles)
    assert detector.labels("background") == tuple(spec().backgrounds)
    for attribute in ("concept", "style", "background"):
        p = answers(name, "single", attribute)
        assert p.shape == (150, len(detector.labels(attribute)))
        assert (p >= 0).all()
        np.testing.assert_allclose(p.sum(axis=1), 1, atol=1e-4)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifiers_recognise_renders_they_never_saw(name: str) -> None:
    views = renders("single")
    assert (answers(name, "single", "concept").argmax(1) == views.concepts[:, 0]).mean() >= 0.90
    assert (answers(name, "single", "style").argmax(1) == views.styles).mean() >= 0.90
    assert (answers(name, "single", "background").argmax(1) == views.backgrounds).mean() >= 0.95


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifiers_see_both_objects_of_a_pair(name: str) -> None:
    assert classifier.both_present(answers(name, "pairs", "concept"), renders("pairs").concepts).mean() >= 0.80


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_what_shows_nothing_is_called_nothing(name: str) -> None:
    p = answers(name, "nothing", "concept")
    assert (p.argmax(axis=1) == len(spec().concepts)).mean() >= 0.85
    blank = [Image.new("RGB", (64, 64), background.rgb) for background in spec().backgrounds.values()]
    assert (load(name).scores(blank, "concept").argmax(axis=1) == len(spec().concepts)).all()


def test_clip_is_far_better_than_chance_at_every_attribute() -> None:
    views = renders("single")
    assert (answers("clip", "single", "concept").argmax(1) == views.concepts[:, 0]).mean() >= 0.95
    assert (answers("clip", "single", "background").argmax(1) == views.backgrounds).mean() >= 0.95
    # drawing styles are what it knows least (its card says 0.63; chance is 0.33): it judges no style suite alone
    assert (answers("clip", "single", "style").argmax(1) == views.styles).mean() >= 0.50


def test_the_default_pair_are_two_different_networks() -> None:
    first, second = world.detectors()
    assert first.name != second.name
    assert first.card.weights_sha256 != second.card.weights_sha256
    shapes = [sorted(tuple(p.shape) for p in detector.model.parameters()) for detector in (first, second)]
    assert shapes[0] != shapes[1]
    assert np.abs(answers("a", "single", "concept") - answers("b", "single", "concept")).max() > 1e-3


def test_pictures_of_another_size_and_mode_are_read() -> None:
    detector, picture = load("a"), pictures(renders("single"))[0]
    large = picture.resize((256, 256), Image.Resampling.NEAREST).convert("RGBA")
    assert detector.scores([large], "concept").argmax() == detector.scores([picture], "concept").argmax()
    assert detector.scores([], "concept").shape == (0, len(spec().concepts) + 1)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_card_is_about_the_weights_beside_it(name: str) -> None:
    path = world.WEIGHTS / ("clip/open_clip_model.safetensors" if name == "clip" else f"{name}.safetensors")
    assert load(name).card.weights_sha256 == sha256_file(path)
    assert path.stat().st_size <= (4e6 if name == "clip" else 1.5e6)


def test_weights_that_are_not_the_cards_are_refused(tmp_path, monkeypatch) -> None:
    model = classifier.classifier_b()
    train.ship("b", model, {"concept": 0.0}, weights=tmp_path)
    with torch.no_grad():
        model.style.bias.add_(1)
    (tmp_path / "other").mkdir()
    train.ship("b", model, {"concept": 0.0}, weights=tmp_path / "other")
    (tmp_path / "other" / "b.safetensors").replace(tmp_path / "b.safetensors")
    monkeypatch.setattr(world, "WEIGHTS", tmp_path)
    with pytest.raises(ValueError, match="not the weights its card is about"):
        world.classifier.__wrapped__("b")
    with pytest.raises(FileNotFoundError, match="no weights"):
        world.classifier.__wrapped__("a")


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="no such detector.*'c'"):
        load("c")
    with pytest.raises(ValueError, match="unknown attribute.*'mood'"):
        classifier.labels("mood")


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_step_of_training_changes_the_weights_and_a_finished_run_is_kept(name: str, tmp_path) -> None:
    recipe = train.RECIPES[name]
    one = dataclasses.replace(recipe.training, iterations=1, batch_size=8)
    tiny = dataclasses.replace(recipe, scenes=8, nothing=4, training=one)
    cpu = torch.device("cpu")
    trained = train.train_classifier(tiny, tmp_path, None, device=cpu).state_dict()
    torch.manual_seed(recipe.training.seed)
    fresh = recipe.build().state_dict()
    assert any(not torch.equal(trained[key], fresh[key]) for key in fresh)
    again = train.train_classifier(tiny, tmp_path, None, device=cpu).state_dict()
    assert all(torch.equal(trained[key], again[key]) for key in fresh)


def test_masked_labels_do_not_enter_the_loss() -> None:
    views = augment.nothing_views(step_rng(1), 4)
    logits = {name: torch.zeros(4, len(classifier.labels(name))) for name in classifier.ATTRIBUTES}
    logits["background"][:, 0] = 1.0
    known = dataclasses.replace(views, styles=np.zeros(4, dtype=np.int64), backgrounds=np.zeros(4, dtype=np.int64))
    half = dataclasses.replace(known, backgrounds=np.array([0, 0, augment.UNKNOWN, augment.UNKNOWN]))
    assert train.attribute_loss(logits, known).item() == pytest.approx(train.attribute_loss(logits, half).item())


def test_a_pair_is_half_and_half() -> None:
    pair = renders("pairs")[np.arange(1)]
    logits = {name: torch.zeros(1, len(classifier.labels(name))) for name in classifier.ATTRIBUTES}
    even, one = ({key: value.clone() for key, value in logits.items()} for _ in range(2))
    even["concept"][0, pair.concepts[0]] = 8.0
    one["concept"][0, pair.concepts[0, 0]] = 8.0
    assert train.attribute_loss(even, pair) < train.attribute_loss(one, pair)


@pytest.mark.parametrize("recipe", [augment.augment_a, augment.augment_b])
def test_augmentation_keeps_range_and_shape_and_repeats_with_its_seed(recipe) -> None:
    x = classifier.tensor(renders("single").images[:8])
    y = recipe(x.clone(), step_rng(5))
    assert y.shape == x.shape and y.min() >= -1 and y.max() <= 1
    assert torch.equal(y, recipe(x.clone(), step_rng(5)))
    assert not torch.equal(x, y)


# --- detectors that are broken ----------------------------------------------------------------------------------------


class Broken(PixelDetector):
    """Gives something else than its probabilities."""

    def __init__(self, spoil, **given):
        super().__init__(**given)
        self.spoil = spoil

    def scores(self, images, attribute):
        return self.spoil(super().scores(images, attribute))


GREYS = [Image.new("RGB", (8, 8), (level,) * 3) for level in (10, 90, 150)]


def verdicts(detector):
    return verdicts_of(detector, GREYS, ["cat", "dog", "sun"], "concept")


def test_a_picture_without_a_number_has_no_verdict():
    """The largest of NaN is the first label: for every other prompt it would be "not seen"."""
    one = verdicts(Broken(lambda rows: np.where(np.arange(3)[:, None] == 1, np.nan, rows)))
    assert [v.hit for v in one] == [True, None, True] and one[1].reason == "pixels gave NaN for this picture"
    assert all(v.hit is None and v.nothing is None for v in verdicts(Broken(lambda rows: rows * np.nan)))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda rows: rows[:, :2], lambda rows: rows[:1], lambda rows: rows[0], lambda rows: rows[:, :0],
        lambda rows: np.concatenate([rows, rows], 1), lambda rows: None, lambda rows: rows.T, lambda rows: -rows,
        lambda rows: 100 * rows, lambda rows: 0 * rows, lambda rows: np.full(rows.shape, np.inf), lambda rows: "x",
    ],
)  # fmt: skip
def test_what_are_no_probabilities_is_refused_in_one_line(spoil):
    with pytest.raises(ValueError, match="pixels: scores must be") as caught:
        verdicts(Broken(spoil))
    assert "\n" not in str(caught.value)


def test_tensors_lists_and_half_precision_are_numbers():
    expected = [v.hit for v in verdicts(PixelDetector())]
    for spoil in (np.ndarray.tolist, torch.tensor, lambda rows: torch.tensor(rows).half().requires_grad_()):
        assert [v.hit for v in verdicts(Broken(spoil))] == expected


@pytest.mark.parametrize(
    "labels", [("cat", "Cat ", "dog", "nothing"), "cat!", (1, 2, 3, 4), ("cat", None, "dog", "sun")]
)
def test_labels_that_are_none_or_twice_are_refused(labels):
    detector = PixelDetector()
    detector.labels = lambda attribute: labels
    with pytest.raises(ValueError, match="two labels of concept are the same|must give a tuple of texts"):
        verdicts(detector)
