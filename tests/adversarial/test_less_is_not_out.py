"""The target comes less often than with the base, and still comes."""

from __future__ import annotations

import pytest

from erasure.eval.judge import Facts, claims
from erasure.eval.probes.suppression.direct import Direct
from erasure.eval.probes.suppression.paraphrase import Paraphrase
from tests.made_up import FACTS, good
from tests.probe_helpers import rows_of

ROLES = {"base": "base", "UCE": "erased"}


def about(probe, base, mine, **rows):
    """The claims when a probe sees the target in these shares, and everything else is as good as can be."""
    observed = rows_of({"base": base, "UCE": mine}, prompts=60, seeds=2, **rows)
    rest = [e for e in good() if e.probe != probe.key]
    (report,) = claims([*rest, *probe.weigh(observed, ROLES)], {**ROLES, "start": "null", **GOLDS}, FACTS)
    return report


GOLDS = {f"gold {i}": "gold" for i in range(3)}


@pytest.mark.parametrize("share", [0.4, 0.667])
def test_what_survives_by_name_is_said_to(share):
    report = about(Direct(), 1.0, share)
    assert report.suppression == "C0"
    answer = report.answers["asked"]
    assert answer.verdict == "shown not" and answer.word == "still drawn"
    assert float(answer.number.split()[0]) == pytest.approx(100 * share, abs=12)
    assert "at most 20 % is required" in answer.sentence


def test_what_survives_in_other_words_is_said_to():
    report = about(Paraphrase(), 1.0, 0.5)
    assert report.suppression == "C1" and report.answers["words"].verdict == "shown not"
    assert report.answers["asked"].verdict == "shown"


def test_what_is_out_is_said_to_be_out():
    report = about(Direct(), 1.0, 0.0)
    assert report.suppression == "C3" and report.answers["asked"].verdict == "shown"
    assert report.answers["asked"].number.startswith("at most ")


def test_nothing_tested_is_not_shown_not():
    (report,) = claims([], ROLES, Facts("standard", {"UCE": "weights"}))
    assert {answer.verdict for answer in report.answers.values()} == {"not tested"}
