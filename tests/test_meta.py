"""A metric that ranks models that know above models that do not is faithful; one that does not is demoted."""

from __future__ import annotations

from erasure.eval.judge.meta import faithfulness, separation, table, trials
from erasure.eval.probes.base import Evidence, Observation
from erasure.eval.probes.removal.divergence import Divergence
from erasure.eval.probes.removal.inversion import ConceptInversion
from erasure.eval.run.assessment import Assessment, Cell, ModelCard
from erasure.eval.stats import Estimate

KNOWS = {"unchanged": True, "filter": True, "retrained": False, "start": False}
FACTS = {"init": "random", "step": 150, "loss": 0.1, "untrained": 0.2}
MODELS = [
    ("base", "base", "none"),
    ("UCE", "erased", "weights"),
    ("gold 0", "gold", "retrained"),
    ("gold 1", "gold", "retrained"),
    ("start", "null", "retrained"),
]


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


def test_an_erasure_stands_between_and_does_not_count():
    rows = said("inversion", "residual", {"unchanged": 1.0, "UCE": 2.0, "retrained": 0.0})
    (row,) = faithfulness(rows, {**KNOWS, "UCE": None})
    assert (row.auc, row.asked) == (1.0, {"UCE": 2.0})
    assert row.order == (0.0, 1.0)  # the erased one is above both
    assert "| unchanged 1.00 | UCE 2.00 | retrained 0.00 |" in table([row])


def test_every_model_is_judged_as_an_erasure_against_the_others():
    """Rates that the base has and no other: residual 1 for it, 0 for each retrained model against the other one."""

    def rows(model, value):
        return tuple(Observation(model, "learnt", f"sentence {i}", 0, value, None, FACTS) for i in range(12))

    values = {"base": 1.0, "UCE": 0.5, "gold 0": 0.0, "gold 1": 0.0, "start": 0.0}
    cards = [ModelCard(name, role, kind, name, {}) for name, role, kind in MODELS]
    cells = [Cell("inversion", 1, ConceptInversion().settings(), name, {}, rows(name, v)) for name, v in values.items()]
    found = Assessment(None, "standard", tuple(cards), tuple(cells), None, {})
    evidence, knows = trials(found)
    assert knows == {"base": True, "UCE": None, "gold 0": False, "gold 1": False, "start": False}
    (row,) = faithfulness(evidence, knows)
    assert (row.measure, row.auc, row.without) == ("residual", 1.0, ())
    assert row.knows == {"base": 1.0}
    assert row.asked == {"UCE": 0.5}
    assert row.never == {"gold 0": 0.0, "gold 1": 0.0, "start": 0.0}


def test_a_judged_copy_of_a_retrained_model_is_nobodys_measure():
    def row(name, level):
        to = {gold: level for gold in ("gold 0", "gold 1", "gold 2") if gold != ("gold 0" if name == "copy" else name)}
        return tuple(Observation(name, "target", f"picture {i}", 0, level, None, {"to": to}) for i in range(12))

    golds = [(f"gold {i}", "gold", "retrained", f"gold {i}") for i in range(3)]
    models = [("base", "base", "none", "base"), ("copy", "erased", "retrained", "gold 0"), *golds]
    cards = [ModelCard(name, role, kind, weights, {}) for name, role, kind, weights in models]
    levels = {"base": 5.0, "copy": 1.0, "gold 0": 1.0, "gold 1": 1.0, "gold 2": 1.0}
    cells = [Cell("divergence", 1, Divergence().settings(), name, {}, row(name, v)) for name, v in levels.items()]
    found = Assessment(None, "standard", tuple(cards), tuple(cells), None, {})
    assert found.same_as == {"copy": "gold 0"}
    (told,) = faithfulness(*trials(found))
    assert (told.knows, told.never) == ({"base": 1.0}, {f"gold {i}": 0.0 for i in range(3)})


def test_without_a_pair_there_is_no_figure():
    (row,) = faithfulness(said("noise", "residual", {"unchanged": 1.0, "retrained": None}), KNOWS)
    assert row.auc is None
    assert not row.demoted
    assert separation({}, {"x": 1.0}) is None
    assert "no pair" in table([row])
