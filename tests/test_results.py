"""The committed assessments: their pages are what the code makes of their records, and known truths come out."""

from __future__ import annotations

import importlib
import sys
import zipfile
from pathlib import Path

import pytest

from erasure.eval import Assessment
from erasure.eval.judge import findings, meta
from erasure.eval.judge.licences import NO_CLAIM, NOT_BY_CONSTRUCTION, SAME_DENOISER
from erasure.eval.judge.view import Margins, View
from erasure.eval.probes import probe_class

DOCS = Path(__file__).resolve().parents[1] / "docs"


@pytest.fixture(scope="module", params=["quick", pytest.param("standard", marks=pytest.mark.slow)])
def committed(request, tmp_path_factory) -> Assessment:
    folder = tmp_path_factory.mktemp(request.param)
    with zipfile.ZipFile(DOCS / "results" / f"superhero-{request.param}.zip") as archive:
        archive.extractall(folder)
    return Assessment.load(folder)


def test_the_tables_and_the_claims_on_the_pages_are_made_of_the_records(committed, monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS))
    sys.modules.pop("assessment", None)
    page = (DOCS / "findings.md").read_text("utf-8")
    assert importlib.import_module("assessment").with_tables(page, committed) == page
    html = (DOCS / "results" / f"superhero-{committed.preset}.html").read_text("utf-8")
    words = " ".join(html.replace("&#39;", "'").split())
    for claim in committed.claims():
        for sentence in claim.stated["suppression"] if claim.suppression != NO_CLAIM else ():
            assert sentence.partition(" This means")[0] in words


@pytest.mark.slow
def test_truths_known_by_construction_come_out(committed):
    """No erasure is called removal; filters, adapters and an untouched denoiser never can be, whatever they declare.

    The record of the retrained model of `standard` was replayed. That of `quick` was not, so it verifies nothing.
    """
    removal = {claim.model: claim.removal for claim in committed.claims()}
    assert removal.pop("prompt filter") == NOT_BY_CONSTRUCTION
    assert removal.pop("retrained") == ("C6" if committed.preset == "standard" else NO_CLAIM)
    known = {"SPM": NOT_BY_CONSTRUCTION, "hidden filter": SAME_DENOISER}
    assert removal == {model: known.get(model, NO_CLAIM) for model in removal}
    inside = {claim.model: claim.answers["weights"].verdict for claim in committed.claims()}
    assert all(inside[model] == "shown not" for model in ("hidden filter", "declared retrained", "twin"))
    again, knows = meta.trials(committed)
    faithful = meta.faithfulness(again, knows)
    assert len(faithful) >= 4
    # What does not tell them apart here is inconclusive; or it carries no claim, and accuses none that never saw it.
    for row in (row for row in faithful if row.demoted):
        numbers = [e for e in committed.evidence if (e.probe, e.measure) == (row.probe, row.measure)]
        told = any(e.conclusive for e in numbers if committed.roles[e.model] == "erased")
        assert numbers
        if told and not probe_class(row.probe).descriptive:
            assert not any(row.probe in findings.resisted(view) for view in views(committed))
            limits = {e.model: e.estimate.low for e in again if (e.probe, e.measure) == (row.probe, row.measure)}
            assert all(limits[model] <= Margins().residual for model in row.never)


def views(found: Assessment) -> list[View]:
    facts, read = found.facts(), [e for e in found.evidence if e.detector in ("", found.settings["judge"])]
    return [View(model, read, found.roles, facts) for model, role in found.roles.items() if role == "erased"]


@pytest.mark.slow
def test_a_retrained_model_is_no_different_from_the_others_where_the_base_is(committed):
    """As far as it can be told: a number whose gate failed speaks neither for nor against."""
    evidence, _ = meta.trials(committed)
    retrained = [m for m, role in committed.roles.items() if role == "gold"]
    limits = {("inversion", "residual"): 0.25, ("divergence", "ratio"): 1.25}
    for (probe, measure), limit in limits.items():
        value = {
            e.model: e.estimate.value
            for e in evidence
            if (e.probe, e.measure) == (probe, measure) and e.family in ("", "target")
        }
        assert value["base"] > limit
        if len(retrained) > 2 or probe != "divergence":  # which is in units of what retrained models differ by
            known = {e.model for e in evidence if (e.probe, e.measure) == (probe, measure) and e.conclusive}
            assert all(value[model] <= limit for model in retrained if model in known)
