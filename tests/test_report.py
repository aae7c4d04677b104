"""The report of a plain evaluation stands alone, says everything it has to, and cannot be broken by what is in it."""

from __future__ import annotations

import base64
import dataclasses
import re
from html.parser import HTMLParser

import pytest

from erasure.eval import assessment_of, write_report
from erasure.eval.core.quality import clip_rows
from erasure.eval.core.records import BASE, Evaluation
from erasure.eval.detectors.base import DetectorCard
from erasure.eval.report.html import percent, render
from tests.eval_helpers import demo_evaluation


class Page(HTMLParser):
    """Tags with their attributes, headings in order, and the visible text."""

    VOID = {"meta", "img", "br", "line", "link", "input", "hr"}

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.headings: list[str] = []
        self.text = ""
        self.html = html
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag in ("h1", "h2"):
            self.headings.append("")

    def handle_endtag(self, tag):
        if tag in self.VOID:
            return
        assert self.open and self.open[-1] == tag, f"</{tag}> closes <{self.open[-1:]}>"
        self.open.pop()

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script", "title"):
            self.text += data
        if self.open and self.open[-1] in ("h1", "h2"):
            self.headings[-1] += data


@pytest.fixture(scope="module")
def evaluation() -> Evaluation:
    return demo_evaluation()


def written(evaluation: Evaluation, path) -> str:
    """The report of an evaluation, as it lies in its file."""
    return write_report(assessment_of(evaluation), path).read_text("utf-8")


@pytest.fixture(scope="module")
def html(evaluation, tmp_path_factory) -> str:
    return written(evaluation, tmp_path_factory.mktemp("report") / "report.html")


@pytest.fixture(scope="module")
def page(html) -> Page:
    return Page(html)


def test_it_needs_nothing_but_itself(html, page):
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object")
        for name in ("src", "href", "srcset", "data", "action", "poster"):
            value = attributes.get(name)
            assert not value or value.startswith(("data:image/webp;base64,", "#")), (tag, attributes)
        assert not any(name.startswith("on") for name in attributes)
    assert "@import" not in html and "url(" not in html
    assert not page.open


def test_everything_is_there_and_answers_come_first(page):
    expected = ["Superhero, before and after", "What was found", "What may be said", "Before and after"]
    expected += ["What came instead", "Which neighbours suffered most", "The paired pictures in numbers"]
    expected += ["Agreement of the detectors", "Settings", "What was not assessed", "Glossary"]
    assert [heading for heading in page.headings if heading in expected] == expected
    assert page.headings[-1] == "Suppression is not removal"


def said_once(page):
    """How many pictures the grid does not repeat, because an arm above drew the same."""
    rows = [attributes for tag, attributes in page.tags if tag == "td" and "colspan" in attributes]
    return sum(int(row["colspan"]) for row in rows if row.get("class") == "small")


def test_every_arm_has_its_pictures_in_every_block(page, evaluation):
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    beside_the_answers = 3 * len(evaluation.arms)
    assert len(images) + said_once(page) == len(evaluation.pictures) + beside_the_answers
    for image in images:
        assert base64.b64decode(image["src"].partition(",")[2])[8:12] == b"WEBP"
        assert image["alt"] and "crisp" in image["class"]
    for arm in evaluation.arms:
        for group in ("target", "neighbours", "unrelated"):
            assert any(p.arm == arm.name and p.group == group for p in evaluation.pictures)


def test_many_models_share_the_room_of_the_grid(evaluation, tmp_path, monkeypatch):
    monkeypatch.setattr("erasure.eval.report.html.TILES", len(evaluation.pictures) // 2)
    page = Page(written(evaluation, tmp_path / "report.html"))
    images = sum(tag == "img" for tag, _ in page.tags) + said_once(page) - 3 * len(evaluation.arms)
    assert 2 * 3 * len(evaluation.arms) <= images < len(evaluation.pictures)
    assert images % len(evaluation.arms) == 0  # every arm has the same prompts


def test_numbers_are_those_of_the_evaluation(page, evaluation):
    for row in evaluation.rows():
        shown = f"{100 * row.rate.value:.1f}".removesuffix(".0")
        assert f"{shown}\u202f%" in page.text
    drawn = [attributes for tag, attributes in page.tags if tag == "svg" and "whisker" in attributes.get("class", "")]
    assert len(drawn) >= len(evaluation.rows())
    uses = [attributes["href"] for tag, attributes in page.tags if tag == "use"]
    (axes,) = re.findall(r"<defs>(.*?)</defs>", page.html, re.DOTALL)
    groups = re.findall(r'<g id="([^"]+)">(.*?)</g>', axes, re.DOTALL)
    marked = {f"#{name}": marks for name, marks in groups}
    assert len(uses) == len(drawn) - 1  # one holds what the others use
    assert len(marked) < len(uses)
    of_base = sum(marked[use].count('class="mark base"') for use in uses)  # KeyError: a figure without its axis
    assert of_base >= sum(row.arm != "base" for row in evaluation.rows())
    assert "permutation" in page.text and "Holm" in page.text and "95\u202f%" in page.text


def test_limits_are_said(page, evaluation):
    text = " ".join(page.text.split())
    found = assessment_of(evaluation)
    for line in found.limits:
        assert " ".join(line.split()) in text
    for key in found.claims()[0].not_assessed:
        assert f"({key})" in text
    assert "2412.06966" in text and "2408.00376" in text
    (banner,) = (banner for report in found.claims() for banner in report.banners)  # esd, in the demonstration
    assert f"{banner[:1].upper()}{banner[1:]}." in text.replace("\u00a0", " ")
    first = next(iter(evaluation.detectors.values()))
    assert f"only from its list of {len(first.labels['concept'])} labels" in text
    assert "upper end" in text and "assumed to correlate by 0.3" in text and "first answer" in text
    assert "mean score of superhero" in text
    assert all(warning in text for warning in evaluation.warnings)
    for card in evaluation.detectors.values():
        assert card.name in text and card.notes in text
    assert evaluation.settings["base_weights"] in text and "official-2025" in text


def test_the_judge_has_zero_shot_accuracy(evaluation):
    rare = tuple(dataclasses.replace(r, clip_hit=i % 13 == 0) for i, r in enumerate(evaluation.records))
    rated = dataclasses.replace(evaluation, records=rare)  # figures that stand nowhere else on the page
    table = Page(render(assessment_of(rated))).text.partition("Zero-shot accuracy")[2]
    for row in clip_rows(rated):
        assert percent(row.accuracy.value) in table
    mute = tuple(dataclasses.replace(r, clip_hit=None) for r in evaluation.records)
    assert "no zero-shot accuracy" in render(assessment_of(dataclasses.replace(evaluation, records=mute)))


def test_trial_runs_show_no_verdicts(evaluation):
    trial = assessment_of(dataclasses.replace(evaluation, settings={**evaluation.settings, "limit": 2}))
    html = render(trial)
    text = " ".join(Page(html).text.split())
    assert text.index("no number in it is evidence") < text.index("What was found")
    assert re.findall('class="answer ([a-z-]+)"', html).count("shown") == 0
    assert all(" ".join(sentence.split()) in text for report in trial.claims() for sentence in report.stated["utility"])


def test_it_reads_on_a_phone_and_in_the_dark(html):
    assert 'name="viewport"' in html and "prefers-color-scheme: dark" in html and "max-width: 700px" in html


def contrast(a: str, b: str) -> float:
    """WCAG contrast of two hex colours."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_text_has_enough_contrast(html):
    for scheme in (block for block in re.findall(r":root \{(.*?)\}", html, re.S)):
        colours = dict(re.findall(r"--([\w-]+): (#\w{6})", scheme))
        for text, ground in (
            ("ink", "paper"),
            ("soft", "paper"),
            ("soft", "faint"),
            ("warn", "warn-paper"),
            ("ink", "faint"),
        ):
            assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
        for mark in ("accent", "base"):
            assert contrast(colours[mark], colours["paper"]) >= 3, mark


def test_hostile_names_are_text(evaluation, tmp_path):
    evil = '<script>alert("x")</script><img src=x onerror=y>'
    concept = dataclasses.replace(evaluation.suite.concept, name=evil)
    hostile = dataclasses.replace(
        evaluation,
        suite=dataclasses.replace(evaluation.suite, concept=concept),
        records=tuple(dataclasses.replace(r, prompt=evil + r.prompt) for r in evaluation.records),
        pictures=tuple(dataclasses.replace(p, prompt=evil + p.prompt, label=evil) for p in evaluation.pictures),
        arms=(evaluation.arms[0], *(dataclasses.replace(a, config={evil: evil}) for a in evaluation.erased)),
        detectors={k: DetectorCard(k, evil, notes=evil) for k in evaluation.detectors},
        settings={evil: evil},
        warnings=(evil,),
    )
    page = Page(write_report(assessment_of(hostile), tmp_path / "r.html", title=evil).read_text("utf-8"))
    assert all(
        tag != "script" and not any(name.startswith("on") for name in attributes) for tag, attributes in page.tags
    )
    shown = len([t for t, _ in page.tags if t == "img"]) + said_once(page)
    assert evil in page.text and shown > len(hostile.pictures)


def test_what_cannot_be_seen_is_written_out(evaluation, tmp_path):
    """Escaping leaves overrides of the writing direction and control characters as they are."""
    evil = "cat\u202etac\x1b[2J"
    hostile = dataclasses.replace(
        evaluation,
        pictures=tuple(dataclasses.replace(p, prompt=evil, label=evil) for p in evaluation.pictures),
        detectors={k: DetectorCard(k, evil, notes=evil) for k in evaluation.detectors},
        warnings=(evil,),
    )
    html = write_report(assessment_of(hostile), tmp_path / "r.html", title=evil).read_text("utf-8")
    assert "\u202e" not in html and "\x1b" not in html and "cat\\u202etac\\x1b[2J" in Page(html).text


def test_a_report_of_nothing_still_reads(evaluation, tmp_path):
    base = dataclasses.replace(
        evaluation,
        arms=evaluation.arms[:1],
        records=tuple(r for r in evaluation.records if r.arm == BASE),
        pictures=(),
        distances=(),
        settings={},
        warnings=(),
    )
    page = Page(written(base, tmp_path))
    assert (tmp_path / "report.html").exists() and "there is no erasure to report on" in page.text


def test_missing_values_are_never_shown_as_zero(evaluation, tmp_path):
    name = next(iter(evaluation.detectors))
    records = tuple(
        dataclasses.replace(
            r,
            verdicts={
                name: dataclasses.replace(r.verdicts[name], hit=None, score=None, reason=f"no label {r.label!r}")
            },
        )
        if r.group == "unrelated"
        else dataclasses.replace(r, verdicts={name: r.verdicts[name]})
        for r in evaluation.records
    )
    blind = dataclasses.replace(evaluation, records=records, detectors={name: evaluation.detectors[name]})
    page = Page(written(blind, tmp_path / "r.html"))
    assert page.text.count("not available: no label") >= len(blind.arms)
    (esd,) = (report for report in assessment_of(blind).claims() if report.model == "esd")  # uce's are the base's own
    assert esd.utility["unrelated"] == "not assessed" and "unrelated" in " ".join(esd.needed["suppression"])
    assert "left out of its rates" in page.text


def test_the_report_of_a_reloaded_evaluation_is_the_same(evaluation, html, tmp_path):
    again = Evaluation.from_json(evaluation.to_json(tmp_path / "evaluation.json"))
    assert written(again, tmp_path / "r.html") == html
