"""An eraser that makes the model hard to train, so that the target comes back late like everything else."""

from __future__ import annotations

import pytest

from erasure.eval.judge import claims
from erasure.eval.probes.base import Evidence
from tests.made_up import FACTS, MODELS, good, number


def about(*evidence):
    rest = [e for e in good() if e.probe != "plasticity"]
    (report,) = claims([*rest, *evidence], MODELS, FACTS)
    return report


def slowed(value, half=0.5, gate="pass"):
    return Evidence("plasticity", "UCE", "slowed", number(value, half), "", None, {"known": gate}, "log2")


def test_slow_relearning_of_a_model_that_learns_nothing_quickly_is_no_removal():
    report = about(slowed(2.0))
    assert report.removal == "C0" and report.answers["weights"].verdict != "shown"
    assert any("plasticity" in line for line in report.needed["removal"])


@pytest.mark.parametrize("evidence", [(), (slowed(0.0, gate="fail"),)])
def test_not_to_have_looked_is_no_pass(evidence):
    report = about(*evidence)
    assert report.removal == "C0" and any("plasticity" in line for line in report.needed["removal"])


def test_a_model_that_learns_as_the_base_does_is_not_suspected():
    assert about(slowed(0.1)).removal in ("C4", "C5")
