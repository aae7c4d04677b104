"""The quality gate, on models that draw exactly, wrongly, or nothing of what they are asked."""

from __future__ import annotations

import types

import numpy as np
import pytest
import torch
from PIL import Image

from erasure.eval.detectors.base import NOTHING, DetectorCard
from erasure.eval.detectors.mean import MeanDetector
from erasure.eval.worldkit import check as world_check
from erasure.eval.worldkit.check import Ask, asks, calibrated, check, contact_sheet, disputed
from erasure.eval.worldkit.classifier import labels
from erasure.world.spec import spec

SETTINGS = {"per_concept": 2, "progress": False, "autocast": False}


class CodedPipe:
    """Draws a picture whose colour is the number of its prompt among ``texts``; ``blind`` prompts come out white."""

    def __init__(self, texts: list[str], blind: frozenset[str] = frozenset()) -> None:
        self.order = {text: i for i, text in enumerate(texts)}
        self.blind, self.device = blind, "cpu"
        self._progress_bar_config: dict[str, object] = {}
        self.unet = torch.nn.Linear(1, 1)
        self.unet.config = types.SimpleNamespace(in_channels=4, sample_size=16)
        self.unet.dtype = torch.float32

    def set_progress_bar_config(self, **_: object) -> None: ...

    def __call__(self, prompt: list[str], **_: object) -> types.SimpleNamespace:
        numbers = [0xFFFFFF if text in self.blind else self.order[text] for text in prompt]
        colours = [(n >> 16, n >> 8 & 255, n & 255) for n in numbers]
        return types.SimpleNamespace(images=[Image.new("RGB", (64, 64), colour) for colour in colours])


class Oracle:
    """Reads the number back and answers with what was asked; "nothing" for a white picture."""

    name, card = "oracle", DetectorCard("oracle", "1")

    def __init__(self, asked: list[Ask]) -> None:
        self.asked = asked

    def labels(self, attribute: str) -> tuple[str, ...]:
        return labels(attribute)

    def scores(self, images: list[Image.Image], attribute: str) -> np.ndarray:
        names = labels(attribute)
        p = np.zeros((len(images), len(names)))
        for row, image in zip(p, images, strict=True):
            r, g, b = image.getpixel((0, 0))
            number = r << 16 | g << 8 | b
            ask = self.asked[number] if number < len(self.asked) else Ask("", "", (NOTHING,))
            if attribute == "concept":
                for concept in ask.concepts if ask.pair else ask.concepts[:1]:
                    row[names.index(concept)] = 1
            else:
                row[names.index(getattr(ask, attribute) or names[0])] = 1
        return p


def scenario(blind: frozenset[str] = frozenset()) -> world_check.Check:
    asked = list(asks(SETTINGS["per_concept"]))
    return check(CodedPipe([ask.text for ask in asked], blind), detectors=[Oracle(asked)], **SETTINGS)


def test_no_prompt_is_asked_twice_and_every_kind_is_asked() -> None:
    asked = list(asks(12))
    texts = [ask.text for ask in asked]
    assert len(set(texts)) == len(texts)
    gated = set(world_check.GATE) - {"worst concept", "style", "background"}
    assert {ask.figure for ask in asked} == gated | set(world_check.REPORTED)
    counts = {
        name: sum(ask.figure == "concept" and ask.concepts == (name,) for ask in asked) for name in spec().concepts
    }
    assert set(counts.values()) == {12}


def test_trained_and_never_trained_combinations_are_kept_apart() -> None:
    for ask in asks(12):
        if ask.style and ask.background:
            unseen = any(spec().is_held_out(concept, ask.style, ask.background) for concept in ask.concepts)
            assert unseen == ask.figure.startswith("never-trained"), ask


def test_spanish_follows_the_grammar() -> None:
    spanish = {ask.concepts[0]: ask.text for ask in asks(1) if ask.figure == "spanish"}
    assert spanish["cat"].startswith("gato en estilo ") and " sobre fondo " in spanish["cat"]
    assert not any(colour in spanish["cat"].split() for colour in ("red", "white", "black", "yellow"))


def test_a_world_without_a_target_is_not_asked_for_it() -> None:
    names, styles = [c for c in spec().concepts if c != "cat"], ["noto", "fluent"]
    for ask in asks(12, concepts=names, styles=styles):
        assert "cat" not in ask.concepts and ask.style != "twemoji"


def test_a_perfect_model_passes_with_intervals() -> None:
    result = scenario()
    assert result.passed and result.failures == ()
    for by in result.figures.values():
        estimate = by["oracle"]
        assert estimate.value == 1.0 and estimate.low < 1.0 and estimate.n > 0


def test_one_lost_concept_is_found_and_named(tmp_path) -> None:
    lost = frozenset(ask.text for ask in asks(SETTINGS["per_concept"]) if ask.concepts == ("owl",))
    result = scenario(lost)
    assert "worst concept" in result.failures and "pairs" not in result.failures
    assert result.per_concept["owl"]["oracle"].value == 0.0 and result.per_concept["fox"]["oracle"].value == 1.0
    result.write_card(tmp_path / "card.md")
    text = (tmp_path / "card.md").read_text("utf-8")
    assert "- The gate is held to oracle: below in worst concept" in text
    rows = text[text.index("| concept | oracle |") :].splitlines()[2:]
    assert rows[0].startswith("| owl |") and len(rows) == len(spec().concepts)


def test_half_a_pair_is_no_pair() -> None:
    pairs = [ask for ask in asks(1) if ask.pair]
    seen = world_check.judge(
        Oracle(pairs[::-1]), pairs, CodedPipe([ask.text for ask in pairs])([a.text for a in pairs]).images
    )
    assert not any(seen["concept"])


def test_calibration_counts_misses() -> None:
    asked = list(asks(SETTINGS["per_concept"]))
    lost = frozenset(
        ask.text for ask in asked if ask.figure == "concept" and ask.concepts[0] in list(spec().concepts)[:36]
    )
    card = calibrated(Oracle(asked), scenario(lost))
    assert card.sensitivity["concept"] == pytest.approx(0.5)
    again = types.SimpleNamespace(card=card, labels=Oracle(asked).labels, scores=Oracle(asked).scores)
    assert calibrated(again, scenario(lost)).notes == card.notes  # said once
    assert card.specificity["concept"] == 1.0  # a white picture is called nothing, and no concept
    others = [ask.text in lost for ask in asked if ask.figure == "concept" and ask.style != labels("style")[0]]
    assert card.specificity["style"] == pytest.approx(1 - np.mean(others))  # it gets the first style, rightly or not


def test_bad_input_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="needs detectors"):
        check(CodedPipe([]), detectors=[])
    with pytest.raises(ValueError, match="one label per picture"):
        contact_sheet([Image.new("RGB", (64, 64))], [], tmp_path / "sheet.png")


def test_a_contact_sheet_holds_every_picture(tmp_path) -> None:
    images = [Image.new("RGB", (64, 64), (i, 255 - i, 9)) for i in range(14)]
    contact_sheet(images, [str(i) for i in range(14)], tmp_path / "sheet.png", columns=12)
    with Image.open(tmp_path / "sheet.png") as sheet:
        colours = {colour for _, colour in sheet.getcolors(1 << 20)}
    assert {(i, 255 - i, 9) for i in range(14)} <= colours


class Contrary(Oracle):
    """Says "ninja" to every picture, a little more surely than the oracle says what it sees."""

    name, card = "contrary", DetectorCard("contrary", "1")
    sure = 1.0

    def scores(self, images: list[Image.Image], attribute: str) -> np.ndarray:
        p = np.zeros((len(images), len(labels(attribute))))
        p[:, labels(attribute).index("ninja") if attribute == "concept" else 0] = self.sure
        return p


def test_disputed_pictures_are_those_a_detector_calls_something_else() -> None:
    asked = list(asks(SETTINGS["per_concept"]))
    texts = [ask.text for ask in asked]
    eyes = [Oracle(asked), Contrary(asked)]
    result = check(CodedPipe(texts), detectors=eyes[:1], **SETTINGS)
    assert disputed(eyes[:1], result) == []
    found = disputed(eyes, result)
    assert len(found) == 2 * (len(spec().concepts) - 1)
    assert any(label.startswith("superhero") and label.endswith("superhero | ninja") for _, label in found)


def test_the_gate_is_held_to_all_detectors_together_and_each_is_reported() -> None:
    asked = list(asks(SETTINGS["per_concept"]))
    timid = Contrary(asked)
    timid.sure = 0.4
    result = check(CodedPipe([ask.text for ask in asked]), detectors=[Oracle(asked), timid], **SETTINGS)
    assert result.settings["detectors"] == ["oracle", "contrary", "oracle + contrary"]
    assert result.below("oracle") == () and "worst concept" in result.below("contrary")
    assert set(result.failures) == set(result.below("oracle + contrary"))
    assert result.figures["concept"]["oracle + contrary"].value == 1.0
    text = world_check.card(result)
    assert "- The gate is held to oracle + contrary: " in text and "- Alone, contrary: below in concept" in text


def test_the_mean_of_detectors_goes_with_the_surer_one() -> None:
    asked = list(asks(SETTINGS["per_concept"]))
    result = check(CodedPipe([ask.text for ask in asked]), detectors=[Oracle(asked)], **SETTINGS)
    images = [image for _, image in result.pictures]
    timid = Contrary(asked)
    timid.sure = 0.4
    mean = MeanDetector([Oracle(asked), timid])
    assert mean.name == "oracle + contrary" and mean.labels("concept") == labels("concept")
    oracle = Oracle(asked).scores(images, "concept")
    single = oracle.sum(axis=1) == 1
    assert (mean.scores(images, "concept").argmax(1) == oracle.argmax(1))[single].all() and single.sum() > 100
    np.testing.assert_allclose(mean.scores(images, "concept"), (oracle + timid.scores(images, "concept")) / 2)


def test_a_mean_of_one_or_of_strangers_is_refused() -> None:
    with pytest.raises(ValueError, match="two detectors"):
        MeanDetector([Oracle([])])
    stranger = Oracle([])
    stranger.labels = lambda attribute: ("cat", NOTHING)
    with pytest.raises(ValueError, match="same labels"):
        MeanDetector([Oracle([]), stranger])
