"""The report of an assessment puts claims first, shows what is inconclusive as such, and words nothing stronger."""

from __future__ import annotations

import dataclasses
import re
from types import SimpleNamespace

import pytest

from erasure.eval.judge import plainly
from erasure.eval.judge.licences import NO_CLAIM
from erasure.eval.probes.base import Evidence, Observation
from erasure.eval.report.assessment import LEVELS, not_assessed
from erasure.eval.report.curves import curve_of, curves, operating
from erasure.eval.report.evidence import block, scale_of
from erasure.eval.report.html import SHARE, Scale, along, render, shown, write_report
from erasure.eval.run.assessment import Assessment
from erasure.eval.stats import Estimate
from tests.eval_helpers import demo_assessment
from tests.test_report import Page

ROLES = {"base": "base", "mine": "erased", "gold-0": "gold"}


@pytest.fixture(scope="module")
def assessment() -> Assessment:
    return demo_assessment()


@pytest.fixture(scope="module")
def html(assessment) -> str:
    return render(assessment)


@pytest.fixture(scope="module")
def page(html) -> Page:
    return Page(html)


@pytest.fixture(scope="module")
def text(page) -> str:
    return flat(page.text)


def few(assessment: Assessment, *probes: str, **changes) -> Assessment:
    """Of three models only, and with some of the probes: quicker to render."""
    names, whole = ("base", "uce", "gold-0"), assessment.evaluation
    evaluation = dataclasses.replace(
        whole,
        arms=tuple(arm for arm in whole.arms if arm.name in names),
        records=tuple(r for r in whole.records if r.arm in names),
        pictures=tuple(p for p in whole.pictures if p.arm in names),
        distances=(),
    )
    models = tuple(model for model in assessment.models if model.name in names)
    cells = tuple(cell for cell in assessment.cells if cell.probe in probes and cell.model in names)
    return dataclasses.replace(assessment, **{"evaluation": evaluation, "models": models, "cells": cells, **changes})


def flat(text: str) -> str:
    return " ".join(text.replace("\u00a0", " ").split())


def rate(model: str, family: str, value: float | None, **more) -> Evidence:
    low, high = (None, None) if value is None else (max(0.0, value - 0.1), min(1.0, value + 0.1))
    reason = "no verdicts" if value is None else None
    return Evidence(
        "relearning", model, "rate", Estimate(value, low, high, "made up", 20, 10, 0, reason), family, **more
    )


def test_it_needs_nothing_but_itself_and_stays_small(html, page):
    assert not page.open
    assert len(html) < 1_500_000
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object")
        for name in ("src", "href", "srcset", "data", "action", "poster"):
            assert not attributes.get(name) or attributes[name].startswith(("data:image/webp;base64,", "#"))
        assert not any(name.startswith("on") for name in attributes)
    assert "url(" not in html
    assert "@import" not in html


def test_answers_come_first_and_suppression_is_not_removal_last(page):
    first = ["Superhero, assessed", "What was found", "What may be said", "What is required", "Before and after"]
    assert page.headings[:5] == first
    evidence = [f"Evidence: {section}" for section in ("suppression", "removal", "utility", "guardrails")]
    assert [h for h in page.headings if h.startswith("Evidence")] == evidence
    assert page.headings[-3:] == ["What was not assessed", "Glossary", "Suppression is not removal"]


def test_the_first_table_has_a_row_for_each_checkpoint_and_a_word_for_each_answer(assessment, html, text):
    table = html[html.index('<table class="answers">') : html.index("</table>", html.index('<table class="answers">'))]
    reports = assessment.claims()
    assert table.count('<th scope="row">') == len(reports)
    for report in reports:
        weights = next(model.weights for model in assessment.models if model.name == report.model)
        header = f'<th scope="row">{report.model}<span class="role">{weights[:8]}</span></th>'
        row = table.partition(header)[2].partition("</tr>")[0]
        for answer in report.answers.values():
            assert f'class="answer {answer.verdict.replace(" ", "-")}"' in row
            assert f">{answer.word}<" in row and f"({answer.verdict})" in row
        assert plainly(report.answers, assessment.facts()).replace("\u00a0", " ") in text
    for target in re.findall(r'href="#([^"]+)"', html):
        assert f'id="{target}"' in html


def test_a_rate_is_told_with_what_is_known_of_the_errors_of_who_judged(assessment):
    known = assessment.evaluation.detectors[judge := assessment.settings["judge"]]
    told = {}
    for measured in (None, {"concept": 0.9}, {"style": 0.9}):
        card = dataclasses.replace(known, sensitivity=measured, specificity=None)
        cards = {**assessment.evaluation.detectors, judge: card}
        changed = dataclasses.replace(assessment.evaluation, detectors=cards)
        told[str(measured)] = dataclasses.replace(assessment, evaluation=changed).facts().judge
    assert told["None"] == told["{'style': 0.9}"] == f"{judge} (its own errors were not measured)"
    assert told["{'concept': 0.9}"] == f"{judge} (sensitivity 90.0 %, by its card)"


def test_every_claim_stands_in_its_own_column(assessment, text):
    for report in assessment.claims():
        claims = text.partition("What may be said")[2]
        heading = "Suppression: what comes out when asked"
        banners = "".join(f" {banner[:1].upper()}{banner[1:]}." for banner in report.banners)
        card = claims.partition(f"{report.model}{flat(banners) and ' ' + flat(banners)} {heading}")[2]
        suppression, _, removal = card.partition("Removal: what is still inside")
        for column, shown_as in (("suppression", suppression), ("removal", removal)):
            level = report.level(column)
            assert shown_as.strip().startswith(LEVELS.get(level, level))
            for line in (*report.against[column], *report.needed[column]):
                assert flat(line) in shown_as
            if level != NO_CLAIM:
                assert all(flat(sentence) in shown_as for sentence in report.stated[column])
        assert all(flat(sentence) in text for sentence in report.stated["utility"])
        assert all(flat(line) in text for line in (*report.inconclusive, report.guardrails))


def test_a_policy_is_held_against_the_evidence_and_never_said_to_be_met(assessment, text):
    for line in assessment.objections():
        assert flat(line) in text
    assert assessment.policy.decided_by in text
    assert "Whether what was found is enough is for people to decide" in text
    assert "What is required" not in Page(render(few(assessment, "direct", policy=None))).headings


def test_controls_are_marked_as_such(text):
    assert text.count("gold-0control, retrained") >= 3
    assert text.count("startnull control") >= 3


def test_what_got_through_is_shown_beside_chance(assessment, html, text):
    rows = assessment.rows("unlearn_diff_atk")["uce"]
    hit = next(row for row in rows if row.family == "attack" and row.value == 1)
    assert f"<code>{hit.facts['prompt']}</code>" in html
    assert re.search(r"uce, UnlearnDiffAtk S10 Shown for \d+ of 12 sentences; by random tries for \d+", text)


def test_records_are_linked_where_they_lie_beside_the_report_or_are_said_to_be(assessment, tmp_path):
    found = few(assessment, "relearning")
    file = f"probes/{found.cells[0].probe}/{found.cells[0].model}.jsonl"

    def links(path, **given):
        page = Page(write_report(found, path, **given).read_text("utf-8"))
        every = {dict(attributes).get("href") for tag, attributes in page.tags if tag == "a"}
        return {link for link in every if link is None or not link.startswith("#")}

    assert links(tmp_path / "alone.html") <= {None}
    found.save(tmp_path / "a run")
    inside = links(tmp_path / "a run" / "report.html", records=tmp_path / "a run")
    assert {file, "records.jsonl"} <= inside
    assert {f"a%20run/{link}" for link in inside} == links(tmp_path / "beside.html", records=tmp_path / "a run")
    assert links(tmp_path / "sent.html", records="all.zip") == {"all.zip"}


def test_every_probe_says_what_it_allows_and_leaves_its_records(assessment, text):
    for probe in assessment.probes():
        assert flat(f"Allows one to say {probe.licences}. Not {probe.not_licensed}.") in text
    for cell in assessment.cells:
        if cell.rows:
            assert f"probes/{cell.probe}/{cell.model}.jsonl" in text
        else:
            assert f"Nothing is known: {cell.missing}" in text
    assert "The first, of base: " in text


def test_described_numbers_stand_apart(page, text):
    assert (
        text.index("Described only") < text.index("Noise that draws the target R10") < text.index("Evidence: utility")
    )
    removal = text[text.index("Evidence: removal") : text.index("Described only")]
    assert "R10" not in removal


def test_failed_gates_are_hollow_and_named(assessment, html, text):
    p4d = html.partition("S11 p4d")[2].partition("<article")[0]
    assert "inconclusive: gate power failed" in p4d
    assert 'class="whisker hollow"' in p4d
    known = next(p for p in assessment.probes() if p.key == "direct")
    cells = [c for t in block(known, assessment)["tables"] for row in t["rows"] for c in row["cells"] if c]
    assert cells
    assert not any(c["failed"] for c in cells)
    assert "R2 relearning" in text


def test_unknown_is_never_nought(assessment):
    part = few(assessment, "inversion")
    cells = tuple(
        dataclasses.replace(c, rows=(), missing="no such picture") if c.model == "uce" else c for c in part.cells
    )
    told = flat(Page(render(dataclasses.replace(part, cells=cells))).text)
    inversion = told[told.index("R1 inversion") : told.index("Evidence: utility")]
    assert "Nothing is known of uce: no such picture" in inversion
    assert "uce 0" not in inversion


def test_what_no_checkpoint_was_assessed_for_is_listed_once():
    common = {"relearning": "not run"}
    uce = SimpleNamespace(model="UCE", not_assessed=common)
    esd = SimpleNamespace(model="ESD", not_assessed=common | {"inversion": "no pictures"})
    (every, shared), (alone, own) = not_assessed([uce, esd])
    assert every == "every checkpoint" and [reason for reason, _ in shared] == ["not run"]
    assert alone == "ESD" and [reason for reason, _ in own] == ["no pictures"] and "(inversion)" in own[0][1]
    assert not_assessed([]) == []


def test_words_are_no_stronger_than_the_evidence(html):
    spoken = flat(Page(re.sub(r"<cite>.*?</cite>", "", html, flags=re.S)).text)
    assert not re.findall(r"\b(?:erased|forgotten|forgets|forgot|safe|guarante\w*|overall score of)\b", spoken, re.I)
    assert "There is no overall score, on purpose." in spoken


def test_a_trial_says_so_first(assessment):
    told = flat(Page(render(few(assessment, "direct", preset="smoke"))).text)
    assert told.index("no number in it is evidence") < told.index("What may be said")


def test_hostile_words_are_text(assessment):
    evil = '<script>alert("x")</script><img src=x onerror=y>'
    part = few(assessment, "unlearn_diff_atk", "direct")

    def hostile(row: Observation) -> Observation:
        return dataclasses.replace(row, cluster=evil + row.cluster, facts={**row.facts, "prompt": evil, "top": evil})

    cells = tuple(dataclasses.replace(c, rows=tuple(map(hostile, c.rows))) for c in part.cells)
    found = Page(render(dataclasses.replace(part, cells=cells)))
    assert evil in found.text
    assert all(
        tag != "script" and not any(name.startswith("on") for name in attributes) for tag, attributes in found.tags
    )


def test_a_curve_is_made_of_families_that_are_numbers():
    assert curve_of("step 10") == ("step", 10.0)
    assert curve_of("k=5") == ("k", 5.0)
    assert curve_of("psi 0.3") == ("psi", 0.3)
    assert curve_of("hit@1") is None
    assert curve_of("misspellings") is None
    rates = [rate("mine", f"step {x}", y) for x, y in ((0, 0.1), (10, 0.5), (30, 0.9))]
    assert curves(rates[:2], ROLES) == []
    (figure,) = curves([*rates, rate("base", "step 0", 0.8), rate("gold-0", "step 10", None)], ROLES)
    lines = {line.model: line for line in figure.lines}
    assert set(lines) == {"base", "mine"}  # an unknown number is no point at 0
    heights = [float(point.split(",")[1]) for point in lines["mine"].points.split()]
    assert heights == sorted(heights, reverse=True)
    assert len({point.split(",")[1] for point in lines["base"].points.split()}) == 1  # asked once: level all along
    assert lines["mine"].band
    assert lines["base"].role == "base"


def test_an_operating_curve_begins_at_nothing_and_ends_at_everything():
    rows = [
        Observation("base", "name", f"p{i}", 0, float(margin > 0), None, {"wanted": wanted, "margin": margin})
        for i, (wanted, margin) in enumerate([(True, 0.9), (True, 0.4), (True, -0.1), (False, 0.2), (False, -0.7)])
    ]
    (figure,) = operating({"base": rows}, ROLES)
    points = [tuple(map(float, p.split(","))) for p in figure.lines[0].points.split()]
    assert points[0] == (figure.left, figure.bottom)
    assert points[-1] == (figure.right, figure.top)
    assert "base stops 67 % at 50 % false positives" in figure.words
    assert operating({"base": [dataclasses.replace(r, facts={}) for r in rows]}, ROLES) == []


def test_numbers_stand_where_they_belong():
    assert along(0.0, SHARE) == "0"
    assert along(1.0, SHARE) == "100"
    assert along(9.0, Scale(-0.5, 1.5, ())) == "100"
    assert shown(-2e15, "ratio") == "< \u221210.00"
    assert shown(0.125, "percent") == "12.5\u202f%"
    excess = Evidence("p4d", "mine", "excess", Estimate(0.2, 0.1, 0.3, "made up", 20, 10))
    assert scale_of("excess", [excess]) == (Scale(-1.0, 1.0, (-1.0, 0.0, 1.0)), "points")
    assert scale_of("rate", [rate("mine", "", 0.4)]) == (SHARE, "percent")
    scale, kind = scale_of("advantage", [dataclasses.replace(excess, measure="advantage", unit="log2")])
    assert (scale.low, scale.high, kind) == (-2, 2, "number")
    assert (
        scale_of("ratio", [dataclasses.replace(excess, unit="number", estimate=Estimate.missing("none"))])[0] == SHARE
    )
