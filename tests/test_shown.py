"""What an erasure looks like where somebody works with it: one line, a card in a notebook, pictures side by side."""

import numpy as np
import pytest
from PIL import Image

import erasure
from erasure.pipelines import active_erasures, attach_erasures, load_erasure
from tests.tiny import identical, make, tiny_pipeline, weights


def made(pipe, concept="superhero", **more):
    return make(pipe, concept, "uce", preset="official-2025", keep=["wizard"], **more)


def test_an_erasure_is_one_line_whatever_it_holds():
    pipe = tiny_pipeline()
    assert repr(made(pipe)) == (
        "OperatorErasure('superhero-uce': 'superhero' erased from 'StableDiffusionPipeline' by 'uce')"
    )
    many = made(pipe, [f"concept {i}" for i in range(60)], name="x" * 900)
    hostile = made(pipe, "cat\x1b[2J\u202e", name="n")
    for edit in (many, hostile):
        assert len(repr(edit)) < 400 and "\n" not in repr(edit) and repr(edit).isprintable()
    assert "concept 2 and 57 more" in repr(many)
    with attach_erasures(pipe, made(pipe)) as attached:
        assert repr(attached) == "Attached(['superhero-uce'])"


def test_its_card_in_a_notebook_has_the_quick_report_in_words_and_foreign_text_does_nothing():
    pipe = tiny_pipeline()
    card = made(pipe, "<script>alert(1)</script>", name="<b>x")._repr_html_()
    assert "<script>" not in card and "&lt;script&gt;" in card and "<b>x" not in card
    assert "how far the words moved: target" in card and "wizard" in card


def test_a_preview_is_a_labelled_sheet_and_leaves_the_pipeline_as_it_was():
    pipe = tiny_pipeline()
    edit, other = made(pipe), made(pipe, "ninja")
    load_erasure(pipe, other, scale=0.5)
    before = weights(pipe)
    given = {"num_inference_steps": 2, "guidance_scale": 3.0}
    one = edit.preview(pipe, ["a superhero", "a cat"], seed=3, **given)
    assert isinstance(one, Image.Image) and one.height > 2 * 190 and one.width > 2 * 190
    assert identical(before, weights(pipe)) and active_erasures(pipe) == {"ninja-uce": 0.5}
    rows = np.asarray(one)[54:].astype(int)
    above, below = rows[:188, 64:], rows[192:380, 64:]
    assert np.abs(above - below).max() > 0
    nothing = np.asarray(edit.preview(pipe, "a superhero", seed=3, scale=0.0, **given))[54:].astype(int)
    assert np.array_equal(nothing[:188, 64:], nothing[192:380, 64:])
    edit.apply(pipe)
    again = edit.preview(pipe, ["a superhero", "a cat"], seed=3, **given)
    assert active_erasures(pipe) == {"ninja-uce": 0.5, "superhero-uce": 1.0}
    assert np.array_equal(np.asarray(again), np.asarray(one))


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ({"prompts": []}, "draws prompts"),
        ({"prompts": "a cat", "seed": -1}, "a seed is a whole number"),
        ({"prompts": "a cat", "seed": 2**64}, "a seed is a whole number"),
        ({"prompts": "a cat", "seed": 0.5}, "a seed is a whole number"),
        ({"prompts": "a cat", "scale": float("nan")}, "a scale is a number"),
    ],
)
def test_a_preview_of_nothing_is_refused(given, fault):
    pipe = tiny_pipeline()
    with pytest.raises(ValueError, match=fault):
        made(pipe).preview(pipe, **given)


def test_the_package_shows_its_public_names_alone():
    assert dir(erasure) == sorted(
        ["Concept", "Erasure", "Suite", "erase", "resolve", "save_denoiser", "suggest_neighbours"]
        + ["world", "methods", "pipelines", "eval", "__version__"]
    )
    assert all(hasattr(erasure, name) for name in dir(erasure))
