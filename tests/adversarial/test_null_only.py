"""A true retraining, judged where no other retrained model is there to compare it with."""

from __future__ import annotations

import pytest

from erasure.eval.judge import claims
from erasure.eval.probes.base import Evidence
from erasure.eval.probes.weigh import contrasts
from tests.made_up import FACTS, NULLS, good, number
from tests.probe_helpers import rows_of

RATES = {"base": 0.95, "UCE": 0.4, "start": 0.0}  # a probe teaches a good model some of it, and random weights nothing


@pytest.mark.parametrize("probe", ["inversion", "completion"])
def test_random_weights_are_no_evidence_against_it(probe):
    rest = [e for e in good("null") if e.probe != probe and not e.model.startswith("gold")]
    found = contrasts(probe, rows_of(RATES, prompts=100), NULLS)
    (report,) = claims([*rest, *found], NULLS, FACTS)
    assert report.removal == "C0" and not report.against["removal"]
    assert report.answers["weights"].verdict == "undecided"


def test_nor_is_it_that_it_learns_faster_than_random_weights():
    rest = [e for e in good("null") if e.probe != "relearning" and not e.model.startswith("gold")]
    faster = Evidence("relearning", "UCE", "advantage", number(3.0, 0.5), "", "null", {"power": "pass"}, "log2")
    (report,) = claims([*rest, faster], NULLS, FACTS)
    assert report.removal == "C0" and not report.against["removal"]
    assert report.answers["weights"].verdict == "undecided"


def test_the_same_numbers_against_retrained_models_are_evidence():
    models = {"base": "base", "UCE": "erased", "gold 0": "gold", "gold 1": "gold", "gold 2": "gold"}
    rates = {"base": 0.95, "UCE": 0.6, **{f"gold {i}": 0.02 for i in range(3)}}
    rest = [e for e in good() if e.probe != "inversion" and e.model in models]
    (report,) = claims([*rest, *contrasts("inversion", rows_of(rates, prompts=30), models)], models, FACTS)
    assert report.answers["weights"].verdict == "shown not" and "inversion" in report.answers["weights"].sentence
