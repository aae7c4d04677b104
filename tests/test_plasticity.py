"""Something new to learn: it is found where it is, nowhere else, and a model that is slow to learn it is told."""

from __future__ import annotations

import numpy as np
import pytest

from erasure.eval.core.emblem import FOUND, WORD, Emblem, prompts
from erasure.eval.probes.base import Observation
from erasure.eval.probes.removal.plasticity import Plasticity
from erasure.world.scenes import Placement, Scene, render
from erasure.world.spec import spec
from tests.probe_helpers import tiny_context

STEPS = (0, 20, 40, 80)


@pytest.mark.slow
def test_the_emblem_is_found_in_its_own_pictures_and_in_no_picture_of_the_world():
    emblem, world = Emblem(), spec()
    own = emblem.likeness([example.image for example in emblem.examples(40, seed=7)])
    place = Placement(32.0, 32.0, 52, 0.0, False)
    backgrounds = list(world.backgrounds)
    scenes = [
        Scene((name,), style, backgrounds[i % len(backgrounds)], (place,))
        for i, name in enumerate(world.concepts)
        for style in world.styles
    ]
    others = emblem.likeness([render(scene) for scene in scenes])
    assert np.mean(np.array(own) >= FOUND) >= 0.95
    assert np.mean(np.array(others) >= FOUND) <= 0.02


def test_other_seeds_are_other_emblems_and_the_same_seed_the_same():
    one, other = Emblem(), Emblem(seed=4)
    assert not np.array_equal(one.fields, other.fields)
    assert one.examples(3, seed=0)[1].image.tobytes() == Emblem().examples(3, seed=0)[1].image.tobytes()
    assert max(other.likeness([e.image for e in one.examples(20, seed=1)])) < FOUND
    assert all(WORD in text for text in prompts(8)) and len(set(prompts(8))) == 8


def test_it_runs_and_gives_the_weights_back():
    context = tiny_context()
    before = context.hash_weights(context.pipe)
    probe = Plasticity.preset("smoke")
    assert probe is not None
    for name in ("base", "noise"):
        rows = probe.run(context.models[name], context)
        assert len(rows) == 2 * len(probe.steps) and {row.facts["step"] for row in rows} == set(probe.steps)
    assert context.hash_weights(context.pipe) == before


def rows(model: str, step: int | None) -> list[Observation]:
    """A model that draws it from one step on; None = never."""
    return [
        Observation(model, f"step {at}", prompt, run, float(step is not None and at >= step), None,
                    {"step": at, "run": run, "prompt": prompt})
        for run in range(3)
        for at in STEPS
        for prompt in prompts(8)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("step", "value", "low", "high"),
    # curves that jump: half way between two looks, at 20 half way from 1, and in the interval the whole of both gaps
    [(40, 0, -1, 1), (80, 1, 0, 2), (20, np.log2(20**0.5 / 800**0.5), -5.4, 0)],
)
def test_how_much_slower_than_the_base_a_model_learns(step, value, low, high):
    found = Plasticity(steps=STEPS).weigh({"base": rows("base", 40), "UCE": rows("UCE", step)}, ROLES)
    (slowed,) = [e for e in found if e.measure == "slowed"]
    assert slowed.estimate.value == pytest.approx(value) and slowed.conclusive
    assert low - 0.01 <= slowed.estimate.low <= slowed.estimate.high <= high + 0.01


ROLES = {"base": "base", "UCE": "erased"}


def test_a_model_that_never_learns_it_is_slower_by_a_lower_limit_and_a_base_that_never_does_says_nothing():
    weigh = Plasticity(steps=STEPS).weigh
    (never,) = [e for e in weigh({"base": rows("base", 20), "UCE": rows("UCE", None)}, ROLES) if e.measure == "slowed"]
    assert never.estimate.low > 0 and never.estimate.high is None
    (unknown,) = [
        e for e in weigh({"base": rows("base", None), "UCE": rows("UCE", 20)}, ROLES) if e.measure == "slowed"
    ]
    assert not unknown.conclusive
    with pytest.raises(ValueError, match="steps must rise from 0"):
        Plasticity(steps=(5, 10))
