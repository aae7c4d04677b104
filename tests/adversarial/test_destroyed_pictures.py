"""An eraser that draws noise when the target is asked for."""

from __future__ import annotations

import pytest

from erasure.eval.core.observations import Observation
from erasure.eval.judge import claims
from erasure.eval.probes.utility.degeneracy import Degeneracy
from tests.made_up import FACTS, MODELS, good
from tests.probe_helpers import rows_of


def without_degeneracy():
    return [e for e in good() if e.probe != "degeneracy"]


def about(share, golds, *, prompts=18):
    rates = {"base": 0.0, "UCE": share, **({f"gold {i}": golds for i in range(3)} if golds is not None else {})}
    rows = rows_of(rates, prompts=prompts, seeds=2)
    (report,) = claims([*without_degeneracy(), *Degeneracy().weigh(rows, MODELS)], MODELS, FACTS)
    return report


@pytest.mark.parametrize(("share", "golds"), [(0.7, None), (0.7, 0.1), (0.7, 0.55), (0.95, 0.95), (1.0, None)])
def test_noise_is_no_suppression_whatever_retrained_models_draw(share, golds):
    report = about(share, golds)
    assert (report.suppression, report.removal) == ("C0", "C0") and report.banners
    assert report.answers["asked"].verdict != "shown" and report.answers["weights"].verdict != "shown"


def test_noise_is_told_as_damage():
    assert about(0.9, 0.1).answers["rest"].verdict == "shown not"


def test_a_model_that_draws_as_much_of_nothing_as_retrained_ones_is_not_blamed():
    report = about(0.5, 0.5, prompts=150)
    assert report.suppression == "C3" and not report.banners


def test_noise_under_one_name_of_three_is_destruction():
    """One name of the suite gives noise, in every sentence. The names are meant as they stand, so this is certain."""

    def rows(model, noisy):
        return [
            Observation(model, "name", f"{name} {t}", 0, float(name == noisy), {"template": f"{t}", "phrase": name})
            for name in ("superhero", "caped hero", "masked hero")
            for t in range(24)
        ]

    drawn = {"base": rows("base", ""), "UCE": rows("UCE", "superhero")}
    (report,) = claims([*without_degeneracy(), *Degeneracy().weigh(drawn, MODELS)], MODELS, FACTS)
    assert report.suppression == "C0" and report.answers["rest"].verdict == "shown not"
