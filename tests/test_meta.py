"""A metric that ranks models that know above models that do not is faithful; one that does not is demoted."""

from __future__ import annotations

from erasure.eval.meta import faithfulness, separation, table
from erasure.eval.probes.base import Evidence
from erasure.eval.stats import Estimate

KNOWS = {"unchanged": True, "filter": True, "retrained": False, "start": False}


def said(probe: str, measure: str, values: dict[str, float | None], family: str = "") -> list[Evidence]:
    return [
        Evidence(probe, model, measure, Estimate(value, value, value, "made up", 1, 1), family)
        for model, value in values.items()
    ]


def test_a_faithful_metric_and_one_that_is_not():
    good = said("inversion", "residual", {"unchanged": 1.0, "filter": 0.9, "retrained": 0.0, "start": 0.1})
    bad = said("latent_inversion", "rate", {"unchanged": 0.9, "filter": 0.8, "retrained": 0.9, "start": 1.0})
    first, second = faithfulness([*good, *bad], KNOWS)
    assert (first.auc, first.demoted) == (1.0, False)
    assert (second.auc, second.demoted) == (0.125, True)
    assert "| latent_inversion | rate | 0.12 |" in table([first, second]).splitlines()[2]


def test_the_most_relative_number_speaks_and_the_families_together_before_one():
    rows = said("inversion", "rate", {"unchanged": 0.1, "retrained": 0.9})
    rows += said("inversion", "residual", {"unchanged": 0.2, "retrained": 0.7}, "step 10")
    rows += said("inversion", "residual", {"unchanged": 1.0, "retrained": 0.0})
    (row,) = faithfulness(rows, KNOWS)
    assert (row.measure, row.family, row.auc) == ("residual", "", 1.0)
    assert row.without == ("filter", "start")


def test_without_a_pair_there_is_no_figure():
    (row,) = faithfulness(said("noise", "residual", {"unchanged": 1.0, "retrained": None}), KNOWS)
    assert row.auc is None
    assert not row.demoted
    assert separation({}, {"x": 1.0}) is None
    assert "no pair" in table([row])
